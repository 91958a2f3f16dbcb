"""Exports are read back and the object is where the cameras say."""

import json

import numpy as np
import PIL.Image
import pytest
from test_evaluation import silhouettes

import export
from evaluation import heldout

SIZE = 64


@pytest.fixture
def ball(tmp_path):
    """Both exports of six true views of a red ball of radius 0.2 at (0.2, 0, 0.1)."""
    masks = silhouettes((0.2, 0, 0.1), SIZE)
    views = [PIL.Image.fromarray(np.where(mask[..., None], (200, 30, 30), 127).astype(np.uint8)) for mask in masks]
    for form in export.FORMATS:
        export.write(form, tmp_path / form, views, heldout.POSES, heldout.intrinsics(SIZE))
    return tmp_path


def hull_iou(frames, focal, centre, is_inside):
    """IoU of the visual hull of (world-to-camera in OpenCV's convention, alpha) with a solid.

    `is_inside` takes points of shape (N, 3).
    """
    axis = np.linspace(-0.5, 0.5, 48)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    hull = np.ones(len(points), bool)
    for matrix, alpha in frames:
        x, y, z = matrix[:3, :3] @ points.T + matrix[:3, 3:]
        column, row = (focal * x / z + centre).astype(int), (focal * y / z + centre).astype(int)
        hull &= alpha[row.clip(0, SIZE - 1), column.clip(0, SIZE - 1)] > 127
    truth = is_inside(points)
    return (hull & truth).sum() / (hull | truth).sum()


def alpha_of(path):
    return np.asarray(PIL.Image.open(path))[..., 3]


def read_nerfstudio(folder):
    """Frames, focal length and centre, as [`hull_iou`] takes them."""
    transforms = json.loads((folder / "transforms.json").read_text())
    frames = []
    for frame in transforms["frames"]:
        matrix = np.linalg.inv(np.array(frame["transform_matrix"]) @ np.diag([1, -1, -1, 1]))
        frames.append((matrix, alpha_of(folder / frame["file_path"])))
    return frames, transforms["fl_x"], transforms["cx"]


def lines_of(folder, name):
    return [line for line in (folder / "sparse" / "0" / f"{name}.txt").read_text().splitlines() if line[:1] != "#"]


def read_colmap(folder):
    """The same."""
    (camera,) = lines_of(folder, "cameras")
    assert camera.split()[:4] == ["1", "PINHOLE", str(SIZE), str(SIZE)]
    frames = []
    for line in lines_of(folder, "images")[::2]:
        _, w, x, y, z, *translation, _, name = line.split()
        w, x, y, z = (float(value) for value in (w, x, y, z))
        matrix = np.eye(4)
        matrix[:3, :3] = [  # COLMAP's documentation of its format
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
        matrix[:3, 3] = [float(value) for value in translation]
        frames.append((matrix, alpha_of(folder / "images" / name)))
    return frames, float(camera.split()[4]), float(camera.split()[6])


READERS = {"nerfstudio": read_nerfstudio, "colmap": read_colmap}


@pytest.mark.parametrize("form", READERS)
def test_exports_carve_out_the_ball(ball, form):
    frames, focal, centre = READERS[form](ball / form)
    assert len(frames) == 6
    assert hull_iou(frames, focal, centre, lambda p: np.linalg.norm(p - (0.2, 0, 0.1), axis=1) < 0.2) > 0.8


def test_colmap_points(ball):
    assert all(line == "" for line in lines_of(ball / "colmap", "images")[1::2])
    points = [line.split() for line in lines_of(ball / "colmap", "points3D")]
    assert {len(point) for point in points} == {8}  # a track would name 2D points, and there are none
    points = np.array([point[1:4] for point in points], float)
    assert np.allclose(np.linalg.norm(points, axis=1), 0.25, atol=1e-5) and np.abs(points.mean(0)).max() < 1e-3
