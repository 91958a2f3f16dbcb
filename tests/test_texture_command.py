"""A texture for a mesh from the command line, in Blender: its own UVs or new ones, or one line."""

import json
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from zero123plus.options import ROOT

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
        ("record", lambda folder: (folder / "cameras.json").write_text("{}"), "cameras.json cannot be read"),
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
