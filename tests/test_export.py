"""Exports are read back and the object is where the cameras say."""

import numpy as np
import PIL.Image
import pytest
from helpers import POSES, READERS, SIZE, hull_iou, intrinsics, lines_of, silhouettes

from zero123plus.exports import EXPORTS


@pytest.fixture
def ball(tmp_path):
    """Both exports of six true views of a red ball of radius 0.2 at (0.2, 0, 0.1)."""
    masks = silhouettes((0.2, 0, 0.1), SIZE)
    views = [PIL.Image.fromarray(np.where(mask[..., None], (200, 30, 30), 127).astype(np.uint8)) for mask in masks]
    for form, write in EXPORTS.items():
        write(tmp_path / form, views, POSES, intrinsics(SIZE))
    return tmp_path


@pytest.mark.parametrize("form", READERS)
def test_exports_carve_out_the_ball(ball, form):
    frames, focal, centre = READERS[form](ball / form)
    assert len(frames) == 6
    assert hull_iou(frames, focal, centre, lambda p: np.linalg.norm(p - (0.2, 0, 0.1), axis=1) < 0.2) > 0.8


def test_colmap_points(ball):
    assert all(line == "" for line in lines_of(ball / "colmap", "images")[1::2])
    points = [line.split() for line in lines_of(ball / "colmap", "points3D")]
    assert {len(point) for point in points} == {8}  # no track, because a track names 2D points and there are none
    points = np.array([point[1:4] for point in points], float)
    assert np.allclose(np.linalg.norm(points, axis=1), 0.25, atol=1e-5) and np.abs(points.mean(0)).max() < 1e-3
