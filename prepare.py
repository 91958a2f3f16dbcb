"""Preparing pictures: background removal and recentring, for generate.py and the page."""

import functools

import numpy as np
import PIL.Image

REMBG_MODEL = "u2net"  # Apache-2.0; the default of newer versions of rembg is not for commercial use


@functools.cache
def rembg_session():
    """rembg's model, loaded once.

    Raises:
        ValueError: if the package is missing or its model cannot be had.
    """
    try:
        import rembg
    except (ImportError, SystemExit) as error:  # without onnxruntime rembg exits
        raise ValueError("Removing backgrounds needs the package rembg: pip install 'rembg[cpu]'.") from error
    try:
        return rembg.new_session(REMBG_MODEL)
    except Exception as error:  # whatever its download raises
        raise ValueError(
            f"rembg's model cannot be had ({error}): put it where rembg looks for it (U2NET_HOME), or give pictures"
            " with transparency."
        ) from error


def remove_background(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The picture as RGBA without its background; one that has transparency stays what it is."""
    rgba = picture.convert("RGBA")
    if rgba.getextrema()[3][0] < 255:
        return rgba
    session = rembg_session()
    import rembg

    return rembg.remove(rgba, session=session)


def prepare(picture: PIL.Image.Image, cut: bool, ratio: float | None) -> PIL.Image.Image:
    """The picture after [`remove_background`] if `cut`, and [`recentre`] if there is a `ratio`."""
    if cut:
        picture = remove_background(picture)
    return picture if ratio is None else recentre(picture, ratio)


def recentre(picture: PIL.Image.Image, ratio: float) -> PIL.Image.Image:
    """Crops to what is not transparent and centres it on a transparent square.

    Args:
        picture: with transparency.
        ratio: the object's larger side as a share of the square's, in (0, 1].

    Raises:
        ValueError: if the ratio is out of range, nothing is opaque, or everything is.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"`foreground_ratio` is {ratio}, but must be above 0 and at most 1.")
    rgba = picture.convert("RGBA")
    alpha = np.asarray(rgba)[..., 3]
    if alpha.min() == 255:
        raise ValueError("Recentring needs a picture with transparency: remove its background first.")
    box = PIL.Image.fromarray(np.where(alpha > 127, 255, 0).astype(np.uint8)).getbbox()
    if box is None:
        raise ValueError("The picture is transparent everywhere: there is no object in it.")
    thing = rgba.crop(box)
    edge = round(max(thing.size) / ratio)
    square = PIL.Image.new("RGBA", (edge, edge))
    square.paste(thing, ((edge - thing.width) // 2, (edge - thing.height) // 2))
    return square
