"""The mesh of six silhouettes: its shape, colours, orientation, and the file that is written."""

import numpy as np
import PIL.Image
import pytest
from helpers import POSES, SIZE, intrinsics, silhouettes

from zero123plus.mesh import build_mesh, surface_points, write_glb

CENTRE = np.array((0.2, 0, 0.1))


def views_of_ball(size=SIZE):
    """Six true views of a ball of radius 0.2 at `CENTRE`: red on the front (+X), green elsewhere."""
    views = []
    for mask, pose in zip(silhouettes(CENTRE, size), POSES):
        rows, columns = np.mgrid[:size, :size] + 0.5
        rays = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ np.linalg.inv(intrinsics(size)).T
        rays = rays * (1, -1, -1) @ pose[:3, :3].T
        rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
        along = ((CENTRE - pose[:3, 3]) * rays).sum(-1)
        gap = np.square(pose[:3, 3] + along[..., None] * rays - CENTRE).sum(-1)
        hit = pose[:3, 3] + (along - np.sqrt(np.clip(0.04 - gap, 0, None)))[..., None] * rays
        colours = np.where((hit[..., :1] > CENTRE[0]), (200, 30, 30), (30, 160, 30))
        views.append(PIL.Image.fromarray(np.where(mask[..., None], colours, 127).astype(np.uint8)))
    return views


@pytest.fixture(scope="module")
def mesh():
    pytest.importorskip("xatlas")
    return build_mesh(views_of_ball(), POSES, intrinsics(SIZE))


def test_it_is_the_ball(mesh):
    distance = np.linalg.norm(mesh.vertices - CENTRE, axis=1)
    assert abs(distance.mean() - 0.2) < 0.015 and distance.max() < 0.27
    outwards = (mesh.vertices - CENTRE) / distance[:, None]
    assert (mesh.normals * outwards).sum(1).mean() > 0.95


def test_it_is_closed_without_tunnels(mesh):
    """Each edge belongs to two faces, which run along it in opposite directions, and the genus is 0."""
    edges = np.concatenate([mesh.faces[:, pair] for pair in ((0, 1), (1, 2), (2, 0))])
    forth, back = ({tuple(edge) for edge in part} for part in (edges, edges[:, ::-1]))
    assert len(forth) == len(edges) and forth == back
    assert len(mesh.vertices) - len(edges) // 2 + len(mesh.faces) == 2


def test_number_of_faces():
    pytest.importorskip("xatlas")
    assert 900 < len(build_mesh(views_of_ball(), POSES, intrinsics(SIZE), 1000).faces) <= 1000


def test_its_colours_are_where_the_views_have_them(mesh):
    height, width, _ = mesh.texture.shape
    places = (mesh.corners.mean(1) * (width, height)).astype(int)
    colours = mesh.texture[places[:, 1], places[:, 0]]
    x, _, z = (mesh.vertices[mesh.faces].mean(1) - CENTRE).T
    front, behind = colours[(x > 0.05) & (np.abs(z) < 0.1)], colours[(x < -0.05) & (np.abs(z) < 0.1)]
    assert (front[:, 0] > front[:, 1]).mean() > 0.95 and (behind[:, 1] > behind[:, 0]).mean() > 0.95


def test_the_file_is_gltf_with_the_front_towards_plus_z(mesh, tmp_path):
    trimesh = pytest.importorskip("trimesh")
    write_glb(tmp_path / "mesh.glb", mesh)
    (again,) = trimesh.load_scene(tmp_path / "mesh.glb").geometry.values()
    assert np.abs(again.bounds.mean(0) - (0, 0.1, 0.2)).max() < 0.02  # (y, z, x): +Y up, the input view on +Z
    assert again.visual.material.metallicFactor == 0
    colours, z = again.visual.to_color().vertex_colors, again.vertices[:, 2] - CENTRE[0]
    assert (colours[z > 0.1, 0] > colours[z > 0.1, 1]).mean() > 0.95
    assert (colours[z < -0.1, 0] < colours[z < -0.1, 1]).mean() > 0.95
    again.merge_vertices(merge_tex=True, merge_norm=True)
    assert again.is_watertight and again.volume > 0


def test_points_lie_on_the_surface():
    points, colours = surface_points(views_of_ball(), POSES, intrinsics(SIZE))
    assert len(points) > 1000 and np.abs(np.linalg.norm(points - CENTRE, axis=1) - 0.2).max() < 0.08
    assert colours.dtype == np.uint8 and colours[points[:, 0] > 0.3][:, 0].mean() > 120


def test_silhouettes_of_two_objects_are_refused():
    first, second = views_of_ball(), [view.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) for view in views_of_ball()]
    mixed = [*first[:1], *second[1:2], *first[2:3], *second[3:4], *first[4:5], *second[5:]]
    views = [PIL.Image.fromarray(np.roll(np.asarray(view), 24 * (i % 3) - 24, axis=0)) for i, view in enumerate(mixed)]
    with pytest.raises(ValueError, match="no point in common"):
        build_mesh(views, POSES, intrinsics(SIZE))
