"""Exports are read back and the object is where the cameras say."""

import json

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
from helpers import POSES, READERS, SIZE, hull_iou, intrinsics, lines_of, silhouettes

from zero123plus import checks, results
from zero123plus.exports import EXPORTS
from zero123plus.mesh import project
from zero123plus.pictures import cut_out


@pytest.fixture
def ball(tmp_path):
    """Both exports of six true views of a red ball of radius 0.2 at (0.2, 0, 0.1)."""
    masks = silhouettes((0.2, 0, 0.1), SIZE)
    views = [PIL.Image.fromarray(np.where(mask[..., None], (200, 30, 30), 127).astype(np.uint8)) for mask in masks]
    for form, write in EXPORTS.items():
        write(tmp_path / form, [cut_out(view) for view in views], POSES, intrinsics(SIZE))
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
    points = np.array([point[1:7] for point in points], float)
    assert np.allclose(np.linalg.norm(points[:, :3] - (0.2, 0, 0.1), axis=1), 0.2, atol=0.08)
    assert np.abs(points[:, 3:] - (200, 30, 30)).max() < 60  # the ball's colour, at its outline mixed with grey


@pytest.mark.parametrize("fill", (127, 30))
def test_views_without_a_silhouette_give_a_sphere_of_points_and_no_mesh(tmp_path, pipe, caplog, fill):
    """Views that are empty, or all object; everything else of the result is written."""
    views = [PIL.Image.new("RGB", (SIZE, SIZE), (fill,) * 3) for _ in range(6)]
    if fill != 127:
        for view in views:
            view.putdata([(i * 7919 % 251, i * 104729 % 241, 200) for i in range(SIZE**2)])
    tile = PIL.Image.new("RGB", (2 * SIZE, 3 * SIZE))
    results.write_result(tmp_path, pipe, tile, views, EXPORTS, name="grey")
    assert {path.name for path in tmp_path.iterdir()} == {*checks.NAMES} - {"glb"}
    assert "There is no glb of grey: 0 of 6 views have a silhouette, but a mesh needs at least 2." in caplog.text
    points = [line.split()[1:4] for line in lines_of(tmp_path / "colmap", "points3D")]
    assert np.allclose(np.linalg.norm(np.array(points, float), axis=1), 0.25, atol=1e-5)


def test_mesh_and_cameras_of_a_result_line_up(tmp_path, pipe):
    """The mesh, by the matrix of `cameras.json`, covers in each view what the view shows."""
    trimesh = pytest.importorskip("trimesh")
    masks = silhouettes((0.2, 0, 0.1), SIZE)
    views = [PIL.Image.fromarray(np.where(mask[..., None], (200, 30, 30), 127).astype(np.uint8)) for mask in masks]
    results.write_result(tmp_path, pipe, PIL.Image.new("RGB", (2 * SIZE, 3 * SIZE)), views, ["glb"])
    (mesh,) = trimesh.load_scene(tmp_path / "glb" / "mesh.glb").geometry.values()
    cameras = json.loads((tmp_path / "cameras.json").read_text())
    mesh.apply_transform(cameras["gltf_to_world"])
    for mask, frame in zip(masks, cameras["frames"]):
        (row, column), _ = project(mesh.vertices, np.array(frame["camera_to_world"]), np.array(cameras["intrinsics"]))
        seen = PIL.Image.new("1", (SIZE, SIZE))
        for face in mesh.faces:
            PIL.ImageDraw.Draw(seen).polygon(list(zip(column[face], row[face])), fill=1)
        seen = np.asarray(seen)
        assert (seen & mask).sum() / (seen | mask).sum() > 0.9


def test_nerfstudio_names_the_points_that_splatfacto_starts_from(ball):
    name = json.loads((ball / "nerfstudio" / "transforms.json").read_text())["ply_file_path"]
    header, body = (ball / "nerfstudio" / name).read_text().split("end_header\n")
    rows = np.array([line.split() for line in body.splitlines()], float)
    assert f"element vertex {len(rows)}" in header and rows.shape == (len(rows), 6)
    colmap = np.array([line.split()[1:7] for line in lines_of(ball / "colmap", "points3D")], float)
    assert np.array_equal(rows, colmap)


@pytest.mark.parametrize("form", ("colmap", "nerfstudio"))
def test_what_transparency_hides_is_black(ball, form):
    """Readers that take the colours alone learn no grey."""
    for path in sorted((ball / form / "images").iterdir()):
        pixels = np.asarray(PIL.Image.open(path)).astype(int)
        assert (pixels[..., :3] <= pixels[..., 3:]).all() and not pixels[0, 0].any()
