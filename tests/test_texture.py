"""A texture for a mesh: baked from views, with the file's own UVs or new ones, or refused in one line."""

import json
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from pipeline import CAMERAS
from zero123plus.mesh import Mesh, bake, depth_maps, gains, overlap, paint, rasterise, unwrap
from zero123plus.options import ROOT

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


# The command, in Blender

blender = pytest.importorskip("bpy", reason="bpy is built for Python 3.11 only")
trimesh = pytest.importorskip("trimesh")
pytestmark = pytest.mark.slow


def command(*arguments):
    job = [sys.executable, "-m", "examples.texture", *map(str, arguments), "--device", "cpu"]
    return subprocess.run(job, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def two_boxes(tmp_path):
    """Two meshes in one file, twice as large as the cameras' world, with a place of its own."""
    scene = trimesh.Scene()
    for i, x in enumerate((0, 3)):
        box = trimesh.creation.box((1, 2, 1))
        box.apply_translation((x, 5, i))
        scene.add_geometry(box, node_name=f"box{i}")
    scene.export(str(tmp_path / "boxes.glb"))
    return tmp_path / "boxes.glb"


def test_a_mesh_gets_a_texture_from_a_picture(two_boxes, tmp_path):
    """The file drops in: its axes, place and scale are those of the mesh."""
    done = command(two_boxes, ROOT / "examples/images/car.png", "-o", tmp_path / "out", "--steps", 2)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"textured.glb", "texture.png", "seen.png", "tile.png", "cameras.json", "view_5.png"} <= names
    assert (
        "% of the surface; silhouettes' IoU" in done.stdout and str(tmp_path / "out" / "textured.glb") in done.stdout
    )
    before, after = (trimesh.load(str(path)).bounds for path in (two_boxes, tmp_path / "out" / "textured.glb"))
    assert after == pytest.approx(before, abs=1e-4)
    (mesh,) = trimesh.load(str(tmp_path / "out" / "textured.glb")).geometry.values()
    assert mesh.visual.material.metallicFactor == 0 and mesh.visual.material.baseColorTexture.size[0] >= 512


def test_views_that_were_made_elsewhere(two_boxes, tmp_path):
    """A result of generate.py, or six pictures; other cameras, five views and other sizes are refused."""
    assert command(two_boxes, ROOT / "examples/images/car.png", "-o", tmp_path / "first", "--steps", 1).returncode == 0
    again = command(two_boxes, "-o", tmp_path / "again", "--views", tmp_path / "first")
    assert again.returncode == 0, again.stderr
    first, second = (np.asarray(PIL.Image.open(tmp_path / name / "texture.png")) for name in ("first", "again"))
    assert np.array_equal(first, second)
    for name, change, words in (
        ("five", lambda folder: (folder / "view_5.png").unlink(), "has no view_5.png"),
        ("sizes", lambda folder: PIL.Image.new("RGB", (9, 9)).save(folder / "view_2.png"), "of one size are needed"),
        ("cameras", other_cameras, "has other cameras than the checkpoint"),
    ):
        shutil.copytree(tmp_path / "first", tmp_path / name)
        change(tmp_path / name)
        done = command(two_boxes, "-o", tmp_path / f"out_{name}", "--views", tmp_path / name)
        assert done.returncode == 2 and words in done.stderr.splitlines()[-1]
        assert not (tmp_path / f"out_{name}").exists()


def other_cameras(folder):
    record = json.loads((folder / "cameras.json").read_text())
    record["frames"][0]["camera_to_world"] = np.eye(4).tolist()
    (folder / "cameras.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "text, words",
    [
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\n", "no faces"),
        ("v 0 0 0\nv 0 0 0\nv 0 0 0\nf 1 2 3\n", "in one point"),
    ],
)
def test_meshes_that_cannot_be_painted_are_one_line(tmp_path, text, words):
    (tmp_path / "mesh.obj").write_text(text)
    done = command(tmp_path / "mesh.obj", ROOT / "examples/images/car.png", "-o", tmp_path / "out")
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1] and not (tmp_path / "out").exists()


def test_vertices_that_are_not_finite_and_too_many_faces(monkeypatch):
    from training import blender as scene

    scene.reset_scene(1)
    blender.ops.mesh.primitive_cube_add()
    monkeypatch.setattr(scene, "MAX_FACES", 11)
    with pytest.raises(ValueError, match="the cube has 12 triangles, but at most 11 are taken: simplify it"):
        scene.shown_mesh("the cube")
    blender.context.object.data.vertices[3].co[0] = float("nan")
    with pytest.raises(ValueError, match="vertices that are not finite"):
        scene.shown_mesh("the cube")


def test_own_uvs_of_a_file(tmp_path):
    """Those in [0, 1] are kept to the last digit, others are made anew, which is said."""
    corners = "vt 0.1 0.1\nvt 0.9 0.1\nvt 0.1 0.8\n"
    shape = "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1/1 2/2 3/3\n"
    for name, places in (("inside", corners), ("outside", corners.replace("0.9", "1.9"))):
        (tmp_path / f"{name}.obj").write_text(places + shape)
        options = (ROOT / "examples/images/car.png", "-o", tmp_path / name, "--steps", 1)
        done = command(tmp_path / f"{name}.obj", *options)
        assert done.returncode == 0, done.stderr
        assert ("gets new ones" in done.stderr) == (name == "outside")
    (mesh,) = trimesh.load(str(tmp_path / "inside" / "textured.glb")).geometry.values()
    assert sorted(map(tuple, mesh.visual.uv.round(6).tolist())) == [(0.1, 0.1), (0.1, 0.8), (0.9, 0.1)]


def test_a_picture_of_nothing_is_refused(two_boxes, tmp_path):
    PIL.Image.new("RGBA", (32, 32)).save(tmp_path / "nothing.png")
    done = command(two_boxes, tmp_path / "nothing.png", "-o", tmp_path / "out")
    assert done.returncode == 2 and "transparent everywhere" in done.stderr and not (tmp_path / "out").exists()
