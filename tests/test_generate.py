"""The command line, on a checkpoint of the tests."""

import json

import numpy as np
import PIL.Image
import pytest
from conftest import noise_picture

import generate


@pytest.fixture
def command(pipe, tmp_path):
    pipe.unet.register_to_config(sample_size=[6, 4])
    pipe.save_pretrained(tmp_path / "checkpoint")
    noise_picture(0).save(tmp_path / "toy.png")

    def call(*arguments):
        fixed = ["-o", tmp_path / "out", "--checkpoint", tmp_path / "checkpoint", "--steps", "1", "--device", "cpu"]
        return generate.main([str(part) for part in (*arguments, *fixed)])

    return call


def test_writes_tile_views_and_cameras(command, tmp_path, capsys):
    assert command(tmp_path / "toy.png") == 0
    folder = tmp_path / "out" / "toy"
    assert sorted(path.name for path in folder.iterdir()) == [
        "cameras.json",
        "tile.png",
        *(f"view_{i}.png" for i in range(6)),
    ]
    tile = np.asarray(PIL.Image.open(folder / "tile.png"))
    assert np.array_equal(np.asarray(PIL.Image.open(folder / "view_3.png")), tile[16:32, 16:32])
    cameras = json.loads((folder / "cameras.json").read_text())
    assert np.array(cameras["frames"][5]["camera_to_world"]).shape == (4, 4)
    assert cameras["intrinsics"][0][2] == 8
    assert "tile.png" in capsys.readouterr().out


def test_never_overwrites_unasked(command, tmp_path, capsys):
    (tmp_path / "out" / "toy").mkdir(parents=True)
    (tmp_path / "out" / "toy" / "mine.txt").write_text("precious")
    assert command(tmp_path / "toy.png") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "toy" / "mine.txt").read_text() == "precious"
    assert command(tmp_path / "toy.png", "--overwrite") == 0
    assert (tmp_path / "out" / "toy" / "tile.png").exists()


@pytest.mark.parametrize("content", [b"no picture", b"", None], ids=["text", "empty", "missing"])
def test_bad_input_is_one_line_and_code_2(command, tmp_path, capsys, content):
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    assert command(tmp_path / "toy.png", path) == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1 and "bad.png" in captured.err
    assert not (tmp_path / "out").exists()


def test_two_pictures_of_one_name(command, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    noise_picture(1).save(tmp_path / "other" / "toy.jpg")
    assert command(tmp_path / "toy.png", tmp_path / "other" / "toy.jpg") == 2
    assert "rename one" in capsys.readouterr().err
