"""Cutting objects out of pictures, and reading them for it."""

import sys

import numpy as np
import PIL.Image
import pytest

from zero123plus import pictures

ROWS, COLUMNS = np.mgrid[:200, :200] - 99.5
RADIUS = np.hypot(ROWS, COLUMNS)


@pytest.fixture(autouse=True)
def no_rembg(monkeypatch):
    monkeypatch.setitem(sys.modules, "rembg", None)
    pictures.rembg_session.cache_clear()


def on(background, mask, colour):
    """A picture of a thing of a colour, or of shades, on a background."""
    pixels = np.empty((200, 200, 3))
    pixels[:] = background
    pixels[mask] = np.asarray(colour)[mask][:, None] if np.ndim(colour) == 2 else colour
    return PIL.Image.fromarray(pixels.round().astype(np.uint8))


def kept(picture, said=None):
    """The mask of what is kept of a picture; what is said goes to the list."""
    said = [] if said is None else said
    return np.asarray(pictures.remove_background(picture, said.append))[..., 3] > 127


def iou(first, second):
    return (first & second).sum() / (first | second).sum()


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (0, 177, 64)])
@pytest.mark.parametrize("suffix", ("png", "jpg"))
def test_the_hole_of_a_ring_is_background(tmp_path, background, suffix):
    ring = (RADIUS > 40) & (RADIUS < 80)
    on(background, ring, (200, 60, 30)).save(tmp_path / f"ring.{suffix}", quality=85)
    said = []
    mask = kept(pictures.read_picture(tmp_path / f"ring.{suffix}", "ring"), said)
    assert not mask[RADIUS < 35].any() and iou(mask, ring) > 0.9 and not said


def test_the_hole_of_a_view_is_background():
    noise = np.random.default_rng(0).normal(0, 1.5, (200, 200, 3))
    view = np.where(((RADIUS > 40) & (RADIUS < 80))[..., None], (200, 60, 30), 127 + noise) / 255
    assert not pictures.foreground(view)[RADIUS < 35].any()


def test_a_photograph_with_a_margin():
    """The object in it is cut out where it stands before one colour; else one line says what is doubtful."""
    photo = on(180, RADIUS < 60, (200, 30, 30)).resize((140, 140))
    white = PIL.Image.new("RGB", (200, 200), "white")
    white.paste(photo, (30, 30))
    said = []
    assert iou(kept(white, said), RADIUS < 42) > 0.9
    assert len(said) == 1 and "a photograph with a margin" in said[0]
    noise = np.random.default_rng(0).integers(0, 256, (140, 140, 3), dtype=np.uint8)
    white.paste(PIL.Image.fromarray(noise), (30, 30))
    said.clear()
    kept(white, said)
    assert len(said) == 1 and "a photograph with a margin" in said[0]
    with pytest.raises(ValueError, match="needs the package rembg"):
        pictures.prepare(white, "remove")


@pytest.mark.parametrize("corner", (3, 12, 24))
def test_a_tight_cut_out_keeps_its_rim(corner):
    """Rounded corners are transparent: 0.01 to 1.2% of the pixels."""
    inner = 100 - corner
    alpha = np.hypot(np.maximum(abs(COLUMNS) - inner, 0), np.maximum(abs(ROWS) - inner, 0)) <= corner
    picture = on((90, 140, 60), RADIUS < 50, (200, 60, 30))
    picture.putalpha(PIL.Image.fromarray(np.uint8(255 * alpha)))
    assert np.array_equal(kept(picture), alpha)
    assert np.array_equal(np.asarray(pictures.prepare(picture))[..., 3] > 127, alpha)


def test_white_on_white():
    """A ball whose lit part has the colour of the background."""
    light = (-0.6 * COLUMNS - 0.6 * ROWS + 0.53 * np.sqrt(np.maximum(70**2 - RADIUS**2, 0))) / 70
    said = []
    mask = kept(on(255, RADIUS < 70, 255 * np.clip(0.55 + 0.45 * light, 0, 1)), said)
    assert iou(mask, RADIUS < 70) > 0.9
    assert len(said) == 1 and "almost the colour of the background" in said[0]


@pytest.mark.parametrize("width", (1, 2, 3, 4))
def test_thin_parts_stay(width):
    pole = (abs(ROWS) < 80) & (COLUMNS > 0) & (COLUMNS < width) | (ROWS > 50) & (ROWS < 80) & (abs(COLUMNS) < 30)
    assert kept(on(255, pole, (30, 30, 120)))[30:140][pole[30:140]].all()


@pytest.mark.parametrize("disc, background", [(1.0, 0.0), (0.3, 1.0)])
@pytest.mark.parametrize("kind", ("16 bits", "floats"))
def test_grey_of_any_depth(tmp_path, kind, disc, background):
    values = np.where(RADIUS < 60, disc, background)
    if kind == "16 bits":
        PIL.Image.fromarray((65535 * values).astype(np.uint16)).save(tmp_path / "disc.png")
    else:
        PIL.Image.fromarray(values.astype(np.float32)).save(tmp_path / "disc.tif")
    (path,) = tmp_path.iterdir()
    assert iou(kept(pictures.read_picture(path, "disc")), RADIUS < 60) > 0.9


@pytest.mark.parametrize("background", pictures.BACKGROUNDS)
def test_a_picture_of_nothing_is_refused(background):
    empty = PIL.Image.new("RGBA", (40, 40), (200, 0, 0, 100))
    with pytest.raises(ValueError, match="transparent everywhere"):
        pictures.prepare(empty, background)


def test_a_call_refuses_nothing(pipe, run):
    for empty in (PIL.Image.new("RGBA", (40, 40)), PIL.Image.new("RGB", (40, 40), (127,) * 3)):
        with pytest.raises(ValueError, match="it has no object"):
            run(pipe, empty)
