"""Damaged pictures: 2,000 seeded mutations of good files end as a picture or as a one-line error."""

import io
import os
import random
import types

import PIL.features
from conftest import noise_picture

from pipeline import load_pictures
from zero123plus.checks import FORMATS
from zero123plus.pictures import prepare, read_picture

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
COUNT = 2000


def good_files() -> list[bytes]:
    """A picture in every format that is read, with and without transparency where the format has it."""
    files = []
    for form in FORMATS:
        if form == "AVIF" and not PIL.features.check("avif"):
            continue
        for mode in ("RGB", "L", "RGBA"):
            buffer = io.BytesIO()
            try:
                noise_picture(1, (24, 17)).convert(mode).save(buffer, form)
            except (OSError, ValueError):  # JPEG has no transparency
                continue
            files.append(buffer.getvalue())
    return files


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Changes a few bytes, and cuts, repeats or fills a part in half of the cases."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):  # most of them among the headers
        reach = min(len(data), rng.choice((64, 256, 10_000)))
        data[rng.randrange(reach)] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
    start = rng.randrange(len(data))
    part = data[start : start + rng.randint(1, 64)]
    kind = rng.choice(("cut", "repeat", "fill", *("none",) * 3))
    if kind == "cut":
        del data[start:]
    elif kind == "repeat":
        data[start:start] = part * rng.randint(1, 20)
    elif kind == "fill":
        data[start : start + len(part)] = bytes([rng.choice((0, 255))]) * len(part)
    return bytes(data)


def test_damaged_files_are_pictures_or_one_line(tmp_path):
    try:
        from zero123plus import page as app
    except ImportError:  # the page's packages are not installed
        app = None
    rng, files, ends = random.Random(0), good_files(), {"picture": 0, "error": 0}
    assert len(files) >= 10
    for i in range(COUNT):
        data = mutate(rng.choice(files), rng)
        try:  # as generate.py reads it
            picture = read_picture(io.BytesIO(data), "fuzz.png")
            load_pictures(prepare(picture, "keep"), "fuzz.png")
            ends["picture"] += 1
        except ValueError as error:
            assert "\n" not in str(error) and "fuzz.png" in str(error), (i, error)
            ends["error"] += 1
        if app:
            path = tmp_path / "upload.png"
            path.write_bytes(data)
            try:
                app.read_upload(types.SimpleNamespace(path=str(path)))
                read_picture(path, "The picture")
            except (app.gr.Error, ValueError) as error:
                assert "\n" not in str(error), (i, error)
    assert min(ends.values()) > COUNT / 10
