"""Pictures: reading them, cutting the object out, centring it, and tiles to control it with."""

import functools
import logging
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFilter
import PIL.ImageOps
from scipy import ndimage

from pipeline import COLUMNS, ENCODED_EDGE, GREY, PLAIN_SHARE, ROWS, border_of, is_grey, to_8_bits, to_srgb

from .checks import load_picture

logger = logging.getLogger(__name__)

REMBG_HOST = "https://github.com"  # which it downloads its models from
REMBG_MODEL = "u2net"  # Apache-2.0; the default of newer versions of rembg is not for commercial use
CUT_OUT_SHARE = 0.02  # of transparent pixels from which a picture counts as cut out
SPECK_SHARE = 0.002  # of the largest part's pixels, below which a part is no part of the object
FRAME_SHARE = 0.97  # of its bounding box that a cut-out fills, from which it is a frame rather than an object
BACKGROUNDS = ("auto", "remove", "keep")  # what [`prepare`] does with that of a picture
STAYS = "The background stays"  # what the warning of one that cannot be removed begins with
FOREGROUND_RATIO = 0.85  # of the object's larger side to the square, where a picture is cut out here
CONNECT_SECONDS = 5  # until a host that does not answer counts as out of reach


# ---- Reading ----


def read_picture(file, name: str) -> PIL.Image.Image:
    """Reads a picture, upright, in sRGB as its colour profile says, and of 8 bits. For arguments and errors see
    [`checks.load_picture`].
    """
    return to_8_bits(to_srgb(load_picture(file, name)), name)


# ---- Cutting out and centring ----


@functools.cache
def rembg_session():
    """Loads rembg's model, once.

    Raises:
        ValueError: if the package is missing or its model cannot be had.
    """
    try:
        import rembg
    except (ImportError, SystemExit) as error:  # without onnxruntime rembg exits
        raise ValueError("Removing backgrounds needs the package rembg: pip install 'rembg[cpu]'.") from error
    try:
        home = Path(os.getenv("U2NET_HOME", Path(os.getenv("XDG_DATA_HOME", "~"), ".u2net"))).expanduser()
        if not (home / f"{REMBG_MODEL}.onnx").exists():  # the download's own attempts take minutes
            urllib.request.urlopen(urllib.request.Request(REMBG_HOST, method="HEAD"), timeout=CONNECT_SECONDS).close()
        return rembg.new_session(REMBG_MODEL)
    except Exception as error:  # whatever its download raises
        raise ValueError(
            f"rembg's model cannot be had ({error}): put it where rembg looks for it (U2NET_HOME), or give pictures"
            " with transparency."
        ) from error


def is_cut_out(rgba: PIL.Image.Image) -> bool:
    """Whether a share of at least `CUT_OUT_SHARE` of an RGBA picture, or of its border, or all its corners, are
    transparent: an object that is cropped tightly may leave the corners alone.
    """
    clear = np.asarray(rgba)[..., 3] < 128
    border = np.concatenate([clear[0], clear[-1], clear[:, 0], clear[:, -1]])
    return bool(max(clear.mean(), border.mean()) >= CUT_OUT_SHARE or clear[[0, 0, -1, -1], [0, -1, 0, -1]].all())


def erode(alpha: np.ndarray) -> np.ndarray:
    """Takes the outermost pixel of what is thicker than 4, which is mixed with the background and would be a bright or
    dark line around the object. What is thinner would vanish, and keeps its alpha, of shape (H, W). Specks, such as
    JPEG leaves beside edges, vanish.
    """
    labels, count = ndimage.label(alpha, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    alpha = np.where(sizes[labels] < SPECK_SHARE * sizes[1:].max(initial=0), 0, alpha)
    thick = ndimage.binary_dilation(ndimage.binary_opening(alpha > 127, np.ones((5, 5))), np.ones((3, 3)))
    return np.where(thick, ndimage.minimum_filter(alpha, 3), alpha)


def cut_by_colour(rgba: PIL.Image.Image) -> tuple[PIL.Image.Image | None, str]:
    """An RGBA picture without a background of one colour, None where it has none, and what is doubtful about that."""
    pixels = np.asarray(rgba)[..., :3]
    if border_of(pixels)[1] < PLAIN_SHARE:
        return None, ""
    alpha, doubt = opacity(pixels.astype(np.float32)), ""
    if border_of(pixels, SOFT / 8)[1] >= 0.99:  # without noise, what hardly differs is the object, or its shadow
        near = opacity(pixels.astype(np.float32), SOFT / 4)
        pale = ndimage.binary_opening((near > 0.5) & (alpha <= 0.5), np.ones((7, 7)))  # without what JPEG leaves
        if pale.sum() > 0.1 * (alpha > 0.5).sum():
            alpha = np.where(ndimage.binary_dilation(pale, np.ones((3, 3))), near, alpha)
            doubt = "The object, or its shadow, has almost the colour of the background"
    rows, columns = (np.flatnonzero((alpha > 0.5).any(axis)) for axis in (1, 0))
    if not len(rows):
        return None, ""
    box = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    if (alpha > 0.5)[box[1] : box[3], box[0] : box[2]].mean() > FRAME_SHARE:
        doubt = "What was cut out is a rectangle, such as a photograph with a margin"
        inner = box[0] + 2, box[1] + 2, box[2] - 2, box[3] - 2  # within the mixed pixels
        if min(inner[2] - inner[0], inner[3] - inner[1]) > 2 and (found := cut_by_colour(rgba.crop(inner))[0]):
            whole = PIL.Image.new("RGBA", rgba.size)
            whole.paste(found, inner[:2])
            return whole, f"{doubt}, and so was cut out once more"
    cut = PIL.Image.fromarray(np.dstack([pixels, erode(np.round(255 * alpha).astype(np.uint8))]))
    return (cut, doubt) if is_cut_out(cut) else (None, "")


def remove_background(picture: PIL.Image.Image, warn: Callable | None = None) -> PIL.Image.Image:
    """Returns the picture as RGBA without its background: by the border's colour where that is plain and the result
    is what an object looks like, else by rembg. One that is cut out already stays what it is.

    Args:
        picture: of any mode.
        warn: is called with what is doubtful where rembg cannot be had. Without it, that is an error.

    Raises:
        ValueError: if rembg is needed and cannot be had.
    """
    rgba = picture.convert("RGBA")
    if is_cut_out(rgba):
        return rgba
    cut, doubt = cut_by_colour(rgba)
    if cut and not doubt:
        return cut
    try:
        session = rembg_session()
    except ValueError as error:
        if cut and warn:
            warn(f"{doubt}: look at the picture that is used, and cut the object out if it is wrong. {error}")
            return cut
        raise
    import rembg

    return rembg.remove(rgba, session=session)


def recentre(picture: PIL.Image.Image, ratio: float) -> PIL.Image.Image:
    """Crops to what is not transparent and centres it on a transparent square of at most `ENCODED_EDGE` pixels, so
    that its larger side is `ratio` of the square's, in (0, 1].

    Raises:
        ValueError: if the ratio is out of range, nothing is opaque, or everything is.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"`foreground_ratio` is {ratio}, but must be above 0 and at most 1.")
    rgba = picture.convert("RGBA")
    if not is_cut_out(rgba):
        raise ValueError("Recentring needs a picture with transparency: remove its background first.")
    box = rgba.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox()
    if box is None:
        raise ValueError("The picture is transparent everywhere: there is no object in it.")
    thing = rgba.crop(box)
    edge = max(thing.size) / ratio
    if edge > ENCODED_EDGE:
        thing.thumbnail((max(1, round(ENCODED_EDGE * ratio)),) * 2, PIL.Image.Resampling.LANCZOS)
        edge = ENCODED_EDGE
    square = PIL.Image.new("RGBA", (round(edge),) * 2)
    square.paste(thing, ((square.width - thing.width) // 2, (square.height - thing.height) // 2))
    return square


@functools.cache
def log_once(message: str):
    """Logs a warning the first time that it is given."""
    logger.warning(message)


def prepare(
    picture: PIL.Image.Image, background: str = "auto", ratio: float | None = None, warn: Callable = log_once
) -> PIL.Image.Image:
    """Brings a picture to what Zero123++ was trained with: the object alone, in the middle.

    Args:
        picture: of any mode.
        background: "auto" cuts the object out of a picture that has a background ([`remove_background`]), and leaves
            a background that cannot be removed, with a warning; "remove" raises an error instead; "keep" leaves it.
        ratio: see [`recentre`]. Without one, a picture that is transparent, or stands on the grey of the training
            data, keeps its place, and one that is cut out here gets `FOREGROUND_RATIO`.
        warn: is called with the warning.

    Raises:
        ValueError: if `background` is another word, or is to be removed and cannot be, or as [`recentre`].
    """
    if background not in BACKGROUNDS:
        raise ValueError(f"`background` is {background!r}, but must be of {', '.join(BACKGROUNDS)}.")
    rgba = picture.convert("RGBA")
    if rgba.getchannel("A").getextrema()[1] < 128:
        raise ValueError("The picture is transparent everywhere: there is no object in it.")
    colour, alike = border_of(np.asarray(rgba)[..., :3])
    ready = is_cut_out(rgba) or (alike >= 0.5 and is_grey(colour))
    if background == "keep" or (ready and ratio is None and background == "auto"):
        return picture if ratio is None else recentre(picture, ratio)
    try:
        cut = remove_background(picture, None if background == "remove" else warn)
    except ValueError as error:
        if background == "remove":
            raise
        warn(f"{STAYS}, from which the views usually go wrong: {error}")
        return picture if ratio is None else recentre(picture, ratio)
    return cut if ratio is None and is_cut_out(rgba) else recentre(cut, ratio or FOREGROUND_RATIO)


# ---- Views without their background ----

SOFT = 24  # of 255; the distance to the background's colour at which a pixel is opaque
FLAT_SHARE = 0.6  # of an enclosed region's pixels that are the background's colour, from which it is a hole
MIN_HOLE = 4  # pixels of it


def background_of(view: np.ndarray) -> np.ndarray:
    """The colour of a view's background, shape (3,): the median of its border. Where less than half of the border is
    alike, the object reaches over it, and the background is taken to be `GREY`.

    Args:
        view: float of shape (H, W, 3), in [0, 255].
    """
    colour, alike = border_of(view, SOFT)
    return colour if alike >= 0.5 else np.full(3, float(GREY))


def opacity(view: np.ndarray, soft: float = SOFT) -> np.ndarray:
    """Opacity of a view's pixels, shape (H, W), in [0, 1]: 0 where it is like the background and connected to the
    border or, as in the hole of a ring, flat; rising with the difference at the object's edge to 1 at a distance of
    `soft`, and 1 inside of the object, whatever its colour. The view is float of shape (H, W, 3), in [0, 255].
    """
    distance = np.abs(view - background_of(view)).max(-1)
    # Background is what can be reached from the border without crossing the object
    labels, count = ndimage.label(distance < soft / 2)
    outside = np.unique(np.r_[labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    # Parts of the object that have the background's colour are shaded, and holes are not
    flat = ndimage.mean(distance < soft / 6, labels, np.arange(1, count + 1))
    holes = 1 + np.flatnonzero(
        (flat > FLAT_SHARE) & (np.bincount(labels.ravel(), minlength=count + 1)[1:] >= MIN_HOLE)
    )
    outside = np.isin(labels, np.setdiff1d(np.r_[outside, holes], 0))
    near = ndimage.binary_dilation(outside)  # the soft edge of the object is one pixel wide
    return np.where(outside, 0.0, np.where(near, np.clip(2 * distance / soft - 1, 0, 1), 1.0))


def foreground(views: np.ndarray) -> np.ndarray:
    """Masks of the objects, booleans of shape (..., H, W), in views in [0, 1], float of shape (..., H, W, 3)."""
    flat = views.reshape(-1, *views.shape[-3:]) * 255.0
    return np.stack([opacity(view) > 0.5 for view in flat]).reshape(views.shape[:-1])


def cut_out(view: PIL.Image.Image, name: str = "The view") -> PIL.Image.Image:
    """Makes a view's background transparent. A warning says where nothing is seen, or nothing of the background."""
    pixels = np.asarray(view.convert("RGB"))
    alpha = opacity(pixels.astype(np.float32))
    if not 0 < (alpha > 0.5).mean() < 0.98:
        what = "is empty" if (alpha <= 0.5).all() else "shows no background"
        logger.warning("%s %s: its transparency says nothing about the object.", name, what)
    return PIL.Image.fromarray(np.dstack([pixels, np.round(255 * alpha).astype(np.uint8)]))


# ---- Tiles ----


def to_tile(views: np.ndarray) -> np.ndarray:
    """Joins six views of shape (6, S, S, C) to a tile of shape (3 S, 2 S, C), row-major."""
    _, size, _, channels = views.shape
    return (
        views.reshape(ROWS, COLUMNS, size, size, channels)
        .swapaxes(1, 2)
        .reshape(ROWS * size, COLUMNS * size, channels)
    )


def depth_picture(depth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A depth map to the camera's plane, in any unit, as the ControlNet sees it: linear, the nearest point 0, the
    farthest 255, what the mask leaves out transparent; uint8 RGBA of shape (H, W, 4).
    """
    low, high = (depth[mask].min(), depth[mask].max()) if mask.any() else (0, 1)
    grey = np.where(mask, (depth.astype(np.float64) - low) / max(high - low, 1e-9), 0)
    return np.round(255 * np.stack([grey, grey, grey, mask], axis=-1)).astype(np.uint8)


def depth_tile(depths: np.ndarray, masks: np.ndarray, near: str = "small") -> PIL.Image.Image:
    """Makes the tile that a depth ControlNet expects from depth maps as other programs write them.

    Args:
        depths: six maps in the order of `camera_poses()`, shape (6, S, S), in any unit: metres, millimetres, or the
            levels of a picture.
        masks: where the object is, booleans of shape (6, S, S).
        near: "small" where near points have small values (depth), "large" where they have large ones (disparity, or
            pictures in which near is white).

    Returns:
        RGBA of 2 S x 3 S pixels (width x height), the background transparent.

    Raises:
        ValueError: if a shape is wrong, a value on the object is not finite, or `near` is another word.
    """
    depths, masks = np.asarray(depths, np.float64), np.asarray(masks, bool)
    count = ROWS * COLUMNS
    if depths.ndim != 3 or len(depths) != count or depths.shape[1] != depths.shape[2] or masks.shape != depths.shape:
        raise ValueError(
            f"`depths` and `masks` have shapes {depths.shape} and {masks.shape}, but both must be ({count}, S, S)."
        )
    if near not in ("small", "large"):
        raise ValueError(f"`near` is {near!r}, but must be 'small' or 'large'.")
    if not np.isfinite(depths[masks]).all():
        raise ValueError(
            "`depths` has values that are not finite where `masks` says that the object is: mask them out."
        )
    sign = 1 if near == "small" else -1
    return PIL.Image.fromarray(to_tile(np.stack([depth_picture(sign * d, m) for d, m in zip(depths, masks)])))
