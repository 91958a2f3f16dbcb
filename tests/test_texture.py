"""The baker of textures: triangles on pixels, depth maps, and colours of what views see."""

import numpy as np
import pytest

from pipeline import CAMERAS
from zero123plus.mesh import Mesh, bake, depth_maps, gains, overlap, paint, rasterise, unwrap

CAMERA = CAMERAS["v1.1"]  # which see a cube from above and from below
POSES = CAMERA.poses()
SIZE = 128
COLOURS = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40), (200, 40, 200), (40, 200, 200)])


def boxes(*sizes_and_places):
    """Boxes with a vertex of its own for each corner of each face, two triangles a face."""
    vertices, normals = [], []
    for size, place in sizes_and_places:
        for axis in range(3):
            for sign in (1, -1):
                u, v = np.roll(np.eye(3), axis, 1)[1:] * sign ** np.arange(1, 3)[:, None]
                normal = np.cross(u, v)
                corners = [normal + a * u + b * v for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
                vertices += [np.array(corners)[[0, 1, 2]], np.array(corners)[[0, 2, 3]]]
                vertices[-2:] = [np.array(size) / 2 * part + place for part in vertices[-2:]]
                normals += [normal] * 6
    vertices = np.concatenate(vertices)
    return Mesh(vertices, np.arange(len(vertices)).reshape(-1, 3), np.array(normals, float), None)


def views_of(mesh, face_colours, size=SIZE):
    """True views of a mesh whose faces have one colour each: colours, alphas, poses and intrinsics."""
    intrinsics = CAMERA.intrinsics(size, size)
    depths = depth_maps(mesh.vertices, mesh.faces, POSES, intrinsics, size)
    colours = np.full((6, size, size, 3), 127 / 255)
    for i, pose in enumerate(POSES):
        for part, colour in enumerate(face_colours):
            alone = depth_maps(mesh.vertices, mesh.faces[2 * part : 2 * part + 2], [pose], intrinsics, size)[0]
            colours[i][np.isfinite(alone) & (alone <= depths[i] + 1e-9)] = colour / 255
    return colours, np.isfinite(depths).astype(float), POSES, intrinsics


def colours_of_faces(painted, seen):
    """For each side of two triangles the texels that lie within it, shape (N, 3), and whether they are seen."""
    shape = painted.texture.shape[:2]
    found = [[] for _ in range(len(painted.faces) // 2)]
    for face, row, column, weights in rasterise(painted.corners * shape[::-1] - 0.5, shape):
        inside = weights.min(1) > 0.05
        for part in np.unique(face[inside] // 2):
            chosen = inside & (face // 2 == part)
            found[part].append(
                np.c_[painted.texture[row[chosen], column[chosen]], seen[row[chosen], column[chosen]] > 0]
            )
    return [np.concatenate(parts) for parts in found]


def test_triangles_cover_each_pixel_once():
    """A square of two triangles, whose weights give back the pixels."""
    corners = np.array([[[0.5, 0.5], [8.5, 0.5], [8.5, 6.5]], [[0.5, 0.5], [8.5, 6.5], [0.5, 6.5]]])
    hits = np.zeros((10, 10), int)
    for triangle, row, column, weights in rasterise(corners, (10, 10)):
        np.add.at(hits, (row, column), 1)
        assert np.allclose((weights[..., None] * corners[triangle]).sum(1), np.stack([column, row], -1))
    assert (hits[1:7, 1:9] >= 1).all() and hits.sum() - 48 <= 8 and not hits[0].any() and not hits[7:].any()


def test_depth_maps_are_those_of_a_plane():
    """Depth is that of a ray's point on the plane, at every pixel."""
    plane = boxes(((1e-6, 0.8, 0.8), (0, 0, 0)))
    camera = CAMERA.intrinsics(SIZE, SIZE)
    depths = depth_maps(plane.vertices, plane.faces, POSES[:1], camera, SIZE)[0]
    row, column = (int(part) for part in np.argwhere(np.isfinite(depths))[len(np.argwhere(np.isfinite(depths))) // 3])
    ray = POSES[0][:3, :3] @ np.diag([1, -1, -1]) @ np.linalg.inv(camera) @ [column + 0.5, row + 0.5, 1]
    assert depths[row, column] == pytest.approx(-POSES[0][0, 3] / ray[0], abs=1e-4)


def test_a_cube_gets_its_six_colours_back():
    """Each side that is seen within 3 of 255, and no colour of a neighbour beyond its outermost texels."""
    cube = boxes(((0.25, 0.25, 0.25), (0, 0, 0)))  # so small that its lower side is seen
    painted, seen = paint(cube, *views_of(cube, COLOURS, 256))
    for colour, texels in zip(COLOURS, colours_of_faces(painted, seen)):
        assert np.abs(255 * texels[:, :3] - colour).max() <= 3
    assert seen.sum() > 0.9


def test_a_plate_before_a_wall_does_not_print_onto_it():
    """The wall behind it has the wall's colour, where it is seen and where it is hidden."""
    scene = boxes(((0.04, 0.75, 0.75), (-0.2, 0, 0)), ((0.01, 0.2, 0.2), (0.1, 0, 0)))
    colours = np.array([(220, 220, 220)] * 6 + [(30, 30, 160)] * 6)
    painted, seen = paint(scene, *views_of(scene, colours, 256))
    for texels in colours_of_faces(painted, seen)[:6]:
        assert np.abs(255 * texels[:, :3] - 220).max() <= 4


def test_gains_bring_views_together():
    """Two views of one surface, one of them darker: each moves towards the other, and equal ones stay."""
    colours = np.random.default_rng(0).uniform(0.2, 0.8, (500, 3))
    weights = np.ones((2, 500))
    assert gains(np.stack([colours, colours]), weights) == pytest.approx(np.ones((2, 3)))
    dark, bright = gains(np.stack([0.8 * colours, colours]), weights)
    assert (dark > 1).all() and (bright < 1).all()


def test_own_places_in_a_texture_stay():
    cube = boxes(((0.5, 0.5, 0.5), (0, 0, 0)))
    corners, _ = unwrap(cube.vertices, cube.faces, 256)
    cube.corners = corners.copy()
    painted, _ = paint(cube, *views_of(cube, COLOURS, 64))
    assert np.array_equal(painted.corners, corners) and painted.texture.shape == (1024, 1024, 3)
    assert overlap(corners) < 0.01 < 0.9 < overlap(np.concatenate([corners, corners]))


def test_what_is_not_seen_has_the_colour_of_what_faces_alike():
    """Of a cube that only the first view sees."""
    cube = boxes(((0.5, 0.5, 0.5), (0, 0, 0)))
    colours, alphas, poses, intrinsics = views_of(cube, COLOURS)
    painted, seen = paint(cube, colours[:1], alphas[:1], poses[:1], intrinsics)
    assert 0.2 < seen.sum() < 0.6
    texture, _ = bake(painted, painted.texture.shape[:2], colours[:1], alphas[:1], poses[:1], intrinsics)
    assert np.isfinite(texture).all()
