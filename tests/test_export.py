"""Exports are read back and the object is where the cameras say."""

import json

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


def test_colmap_for_readers_that_stop_at_an_empty_line(ball):
    """As the reader of gsplat's examples does: every image has a 2D point, which belongs to no 3D point."""
    lines = lines_of(ball / "colmap", "images")
    assert len(lines) == 12 and all(lines)
    assert all(line.split()[2::3] == ["-1"] for line in lines[1::2])


def test_colmap_points(ball):
    points = [line.split() for line in lines_of(ball / "colmap", "points3D")]
    assert {len(point) for point in points} == {8}  # no track, because no image has a 2D point of theirs
    points = np.array([point[1:4] for point in points], float)
    assert np.allclose(np.linalg.norm(points, axis=1), 0.25, atol=1e-5) and np.abs(points.mean(0)).max() < 1e-3


def test_nerfstudio_names_the_points_that_splatfacto_starts_from(ball):
    name = json.loads((ball / "nerfstudio" / "transforms.json").read_text())["ply_file_path"]
    header, body = (ball / "nerfstudio" / name).read_text().split("end_header\n")
    rows = np.array([line.split() for line in body.splitlines()], float)
    assert f"element vertex {len(rows)}" in header and rows.shape == (len(rows), 6)
    colmap = np.array([line.split()[1:7] for line in lines_of(ball / "colmap", "points3D")], float)
    assert np.array_equal(rows, colmap)
