"""The example scripts, at small size."""

import importlib

import numpy as np
import PIL.Image
import pytest
from conftest import noise_picture
from diffusers import DDIMScheduler, StableDiffusionPipeline

from zero123plus import mattes


def load(name):
    """The script `examples/NAME.py` as a module."""
    return importlib.import_module(f"examples.{name}")


@pytest.fixture
def checkpoint(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def files(folder):
    return {path.name for path in folder.iterdir()}


def test_text_to_views(pipe, checkpoint, tmp_path):
    """A text-to-image checkpoint with random weights makes a picture, of which ours makes views."""
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    text_model = StableDiffusionPipeline(**parts, scheduler=DDIMScheduler(), **none)
    text_model.unet.register_to_config(sample_size=8)
    text_model.save_pretrained(tmp_path / "text")
    arguments = ["a toy", "-o", tmp_path / "out", "--text-model", tmp_path / "text", "--checkpoint", checkpoint]
    arguments += ["--keep-background", "--text-steps", 1, "--steps", 1, "--device", "cpu"]
    load("text_to_views").main([str(part) for part in arguments])
    assert files(tmp_path / "out") == {
        "picture.png",
        "input.png",
        "tile.png",
        "cameras.json",
        *(f"view_{i}.png" for i in range(6)),
    }
    assert PIL.Image.open(tmp_path / "out" / "picture.png").size == (64, 64)
    assert PIL.Image.open(tmp_path / "out" / "tile.png").size == (32, 48)


class TestMatte:
    @pytest.fixture
    def normals(self):
        """A disc of radius 10 of normals towards the camera in the middle of 32 x 32 pixels, with a soft border of one
        pixel.
        """
        rows, columns = np.mgrid[:32, :32] - 15.5
        length = np.clip(10.5 - np.hypot(rows, columns), 0, 1)[..., None]
        return np.round(127.5 * (1 + length * (0, 0, 1))).astype(np.uint8)

    def test_trimap(self, normals):
        pytest.importorskip("scipy")
        known = mattes.trimap(normals)
        assert known[16, 16] == 1 and known[0, 0] == known[0, 16] == 0 and known[16, 25] == 0.5
        assert set(np.unique(known)) == {0, 0.5, 1}

    def test_cut_out(self, normals):
        pytest.importorskip("pymatting")
        view = np.where(normals[..., 2:] > 190, (200, 40, 40), 127).astype(np.uint8)
        rgba = mattes.view_without_background(view, normals)
        truth = normals[..., 2] > 190
        ours = rgba[..., 3] > 127
        assert (ours & truth).sum() / (ours | truth).sum() > 0.95
        assert np.abs(rgba[16, 16].astype(int) - (200, 40, 40, 255)).max() <= 2

    def test_whole_script(self, pipe, checkpoint, tmp_path, capsys):
        pytest.importorskip("pymatting")
        pipe.add_controlnet().save_pretrained(tmp_path / "normals")
        tile = PIL.Image.new("RGBA", (32, 48), (0, 0, 0, 0))
        tile.paste((200, 40, 40, 255), (4, 4, 12, 12))
        tile.save(tmp_path / "truth.png")
        noise_picture().save(tmp_path / "toy.png")
        arguments = [tmp_path / "toy.png", "-o", tmp_path / "out", "--tile", tmp_path / "truth.png", "--steps", 1]
        arguments += ["--checkpoint", checkpoint, "--controlnet", tmp_path / "normals", "--device", "cpu"]
        load("normals_and_matte").main([str(part) for part in arguments])
        assert files(tmp_path / "out") == {
            "tile.png",
            "normals.png",
            "matte.png",
            *(f"view_{i}.png" for i in range(6)),
        }
        assert PIL.Image.open(tmp_path / "out" / "view_0.png").mode == "RGBA"
        assert "mask IoU 0." in capsys.readouterr().out
