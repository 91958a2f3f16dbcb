"""Renders, in a real Blender."""

import io
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

bpy = pytest.importorskip("bpy", reason="bpy is built for Python 3.11 only")
pytestmark = pytest.mark.slow  # Blender starts and renders

import helpers  # noqa: E402

from pipeline import CAMERAS  # noqa: E402
from training import blender, render  # noqa: E402
from training.shards import load_objects  # noqa: E402
from zero123plus.exports import EXPORTS  # noqa: E402


def test_normalise_moves_parents_and_counts_modifiers():
    """A cube, doubled by an array modifier, is the child of an empty, and both move away after frame 1."""
    blender.reset_scene(1)
    bpy.ops.mesh.primitive_cube_add(location=(5, 0, 0))
    cube, empty = bpy.context.object, bpy.data.objects.new("empty", None)
    bpy.context.collection.objects.link(empty)
    cube.parent = empty
    cube.modifiers.new("array", "ARRAY").count = 2  # 4 x 2 x 2 in all
    empty.location = (0, 7, 0)
    empty.keyframe_insert("location", frame=1)
    bpy.context.scene.frame_set(1)
    blender.normalise()
    bpy.context.scene.frame_set(1)
    points = blender.shown_points()
    edges = np.array([4, 2, 2]) / np.sqrt(24)  # of the diagonal, which is the sphere's diameter
    assert points.max(0) == pytest.approx(edges / 2, abs=1e-5) and points.min(0) == pytest.approx(-edges / 2, abs=1e-5)


@pytest.mark.parametrize("preset", CAMERAS)
def test_exported_views_carve_out_the_mesh(preset, tmp_path):
    """True renders of an egg that differs along every half-axis, so that a flip or turn would be seen."""
    blender.reset_scene(1)
    bpy.ops.mesh.primitive_uv_sphere_add(segments=48, ring_count=24)
    egg = bpy.context.object
    for vertex in egg.data.vertices:
        for axis, (below, above) in enumerate(((1, 1.6), (0.7, 1.2), (1.3, 0.6))):
            vertex.co[axis] *= above if vertex.co[axis] > 0 else below
    material = bpy.data.materials.new("red")
    material.use_nodes = True
    material.node_tree.nodes["Principled BSDF"].inputs["Base Color"].default_value = (0.8, 0, 0, 1)
    egg.data.materials.append(material)
    blender.normalise()
    blender.light(blender.hdri_paths()[0], 0, 1)
    cameras = blender.tile_cameras(CAMERAS[preset])
    views = [blender.render_view(camera, helpers.SIZE, str(tmp_path))["rgba"] for camera in cameras]
    views = [Image.fromarray(view) for view in views]
    poses = CAMERAS[preset].poses()
    intrinsics = CAMERAS[preset].intrinsics(helpers.SIZE, helpers.SIZE)

    matrix = np.array(bpy.data.objects["fit"].matrix_world @ egg.matrix_world)
    centres = np.array([face.center[:] for face in egg.data.polygons]) @ matrix[:3, :3].T + matrix[:3, 3]
    normals = np.array([face.normal[:] for face in egg.data.polygons])
    for form, read in helpers.READERS.items():
        EXPORTS[form](tmp_path / form, views, poses, intrinsics)
        frames, focal, centre = read(tmp_path / form)
        iou = helpers.hull_iou(
            frames, focal, centre, lambda points: (points @ normals.T < (centres * normals).sum(1)).all(1)
        )
        assert iou > 0.8, form


def arguments(folder, *more):
    return [str(part) for part in ("--output", folder, "--size", 32, "--samples", 1, "--workers", 1, *more)]


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    """A folder with a cube of edge 1 as .obj, a sphere as .glb and a file that is no mesh."""
    folder = tmp_path_factory.mktemp("meshes")
    blender.reset_scene(1)
    bpy.ops.mesh.primitive_cube_add(size=1)
    bpy.ops.wm.obj_export(filepath=str(folder / "cube.obj"))
    blender.reset_scene(1)
    bpy.ops.mesh.primitive_uv_sphere_add()
    bpy.ops.export_scene.gltf(filepath=str(folder / "ball.glb"), export_format="GLB")
    (folder / "broken.glb").write_bytes(b"glTF, but not really")
    return folder


@pytest.fixture(scope="module")
def rendered(meshes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    render.main(arguments(folder, "--objects", meshes))
    return folder


def test_files_are_rendered_and_failures_named(rendered):
    manifest = [json.loads(line) for line in (rendered / "manifest.jsonl").read_text().splitlines()]
    assert [record["source"] for record in manifest] == ["ball.glb", "cube.obj"]
    assert {len(record["cameras"]["targets"]) for record in manifest} == {12}
    (failure,) = [json.loads(line) for line in (rendered / "failures.jsonl").read_text().splitlines()]
    assert failure["id"] == "broken" and "Error" in failure["error"]
    assert sorted(path.name for path in rendered.iterdir()) == ["failures.jsonl", "manifest.jsonl", "shard-00000.tar"]


def test_depth_and_normals_are_those_of_a_ball(rendered):
    """In the middle of a view of a ball of radius 0.5 the depth is the distance minus 0.5 and the normal (0, 0, 1)."""
    sample = next(iter(webdataset.WebDataset(str(rendered / "shard-00000.tar"), shardshuffle=False)))
    camera = json.loads(sample["json"])["cameras"]["targets"][0]
    depth, normal = (
        np.asarray(Image.open(io.BytesIO(sample[f"targets.{name}.png"])))[:32, :32].astype(float)
        for name in ("depth", "normal")
    )
    normal = normal / 127.5 - 1
    assert depth[16, 16] / blender.DEPTH_UNITS == pytest.approx(camera["distance"] - 0.5, abs=0.02)
    assert depth[0, 0] == 65535
    assert normal[16, 16] == pytest.approx([0, 0, 1], abs=0.15)
    assert normal[16, 28][0] > 0.5 and normal[4, 16][1] > 0.5  # to the right, up


def test_renders_depend_on_the_object_alone(rendered, meshes, tmp_path):
    """An object that is rendered alone in another process looks the same as among others."""
    (tmp_path / "one").mkdir()
    shutil.copy(meshes / "cube.obj", tmp_path / "one")
    render.main(arguments(tmp_path / "data", "--objects", tmp_path / "one"))
    (alone,) = load_objects(tmp_path / "data")
    among = load_objects(rendered)[1]
    assert np.array_equal(alone["targets"], among["targets"]) and np.array_equal(alone["inputs"], among["inputs"])


@pytest.mark.timeout(900)
def test_ray_renders_what_one_machine_renders(ray_cluster, meshes, rendered, tmp_path):
    """When a worker is killed, every view is still the same to the bit."""
    address, kill = ray_cluster
    command = [sys.executable, "-m", "training.render", "--ray", address, "--shard-size", "1"]
    command += arguments(tmp_path / "data", "--objects", meshes)
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    kill("ray::render_sha", job)
    _, errors = job.communicate()
    assert job.returncode == 0, errors
    ours, expected = (load_objects(folder) for folder in (tmp_path / "data", rendered))
    assert [item["name"] for item in ours] == [item["name"] for item in expected]
    for name in ("inputs", "targets"):
        assert all(np.array_equal(a[name], b[name]) for a, b in zip(ours, expected))
    assert "broken" in (tmp_path / "data" / "failures.jsonl").read_text()


def test_a_time_limit_and_a_dry_run(meshes, tmp_path, capsys):
    render.main(arguments(tmp_path / "data", "--objects", meshes, "--dry-run"))
    assert "3 of 3 objects in 1 shards" in capsys.readouterr().out and not (tmp_path / "data").exists()
    render.main(arguments(tmp_path / "data", "--objects", meshes / "cube.obj", "--minutes", 0.001))
    (failure,) = [json.loads(line) for line in (tmp_path / "data" / "failures.jsonl").read_text().splitlines()]
    assert "over 0.001 minutes" in failure["error"]


def test_objaverse_by_uid(monkeypatch, meshes, tmp_path, capsys):
    """The download of the package `objaverse` is replaced by a local file."""
    fake = types.SimpleNamespace(
        load_annotations=lambda uids: {uid: {"license": "by"} for uid in uids if uid != "unknown"},
        load_objects=lambda uids: {uid: str(meshes / "ball.glb") for uid in uids},
        load_lvis_annotations=lambda: {"ball": ["0123"]},
    )
    monkeypatch.setitem(sys.modules, "objaverse", fake)
    (tmp_path / "uids.txt").write_text("0123\nunknown\n")
    expected = [{"id": "0123", "source": "objaverse/0123", "licence": "by", "path": str(meshes / "ball.glb")}]
    assert render.objaverse_items(str(tmp_path / "uids.txt")) == render.objaverse_items("ball") == expected
    assert "1 uids are not in Objaverse and are left out: unknown" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`--objaverse` cat is neither"):
        render.objaverse_items("cat")


def test_meshes_that_import_but_show_nothing_are_failures(tmp_path):
    """Points without faces, a texture that is gone; a file by itself, and .stl."""
    ply = ["ply", "format ascii 1.0", "element vertex 3", *(f"property float {axis}" for axis in "xyz"), "end_header"]
    (tmp_path / "points.ply").write_text("\n".join([*ply, "0 0 0", "1 0 0", "0 1 1"]) + "\n")
    corners = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\n"
    (tmp_path / "t.mtl").write_text("newmtl a\nmap_Kd gone.png\n")
    (tmp_path / "t.obj").write_text(
        f"mtllib t.mtl\n{corners}vt 0 0\nvt 1 0\nvt 0 1\nusemtl a\n"
        "f 1/1 3/2 2/3\nf 1/1 2/2 4/3\nf 2/1 3/2 4/3\nf 1/1 4/2 3/3\n"
    )
    render.main(arguments(tmp_path / "data", "--objects", tmp_path))
    failures = [json.loads(line) for line in (tmp_path / "data" / "failures.jsonl").read_text().splitlines()]
    reasons = {entry["id"]: entry["error"] for entry in failures}
    assert set(reasons) == {"points", "t"}
    assert "no faces" in reasons["points"] and "gone.png" in reasons["t"]
    (tmp_path / "one.stl").write_text(
        "solid a\nfacet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 0 1 0\nendloop\nendfacet\n"
        "endsolid a\n"
    )
    render.main(arguments(tmp_path / "one", "--objects", tmp_path / "one.stl"))
    assert [item["name"] for item in load_objects(tmp_path / "one")] == ["one"]


def test_files_whose_names_differ_in_a_space_or_suffix_have_two_ids(tmp_path):
    for name in ("a b.glb", "a_b.glb", "c.glb", "d.glb", "d.obj"):
        (tmp_path / name).touch()
    ids = [item["id"] for item in render.file_items(tmp_path)]
    assert len(set(ids)) == 5 and ids[2] == "c"


def test_another_size_in_the_same_folder_is_refused(rendered, meshes):
    with pytest.raises(SystemExit, match="was rendered with `--size` 32, but 16 is asked for now"):
        render.main([*arguments(rendered, "--objects", meshes), "--size", "16"])


@pytest.mark.parametrize("option", (("--seed", "3"), ("--samples", "2"), ("--up", "z")))
def test_other_settings_in_the_same_folder_are_refused(rendered, meshes, option):
    with pytest.raises(SystemExit, match=f"was rendered with `{option[0]}` .*, but {option[1]} is asked for now"):
        render.main([*arguments(rendered, "--objects", meshes), *option])


def test_ids_are_distinct_over_all_that_is_given(tmp_path, capsys):
    """ShapeNet's files all have one name, in folders that have theirs; what is given twice is one object."""
    for name in ("1a2b", "3c4d", "5e6f"):
        (tmp_path / name / "models").mkdir(parents=True)
        (tmp_path / name / "models" / "model_normalized.obj").touch()
    (tmp_path / "link").symlink_to(tmp_path / "1a2b")
    folders = [str(path) for path in sorted(tmp_path.iterdir())]
    for given in ([str(tmp_path)], folders, [*folders, folders[0]]):
        render.main(arguments(tmp_path / "out", "--objects", *given, "--dry-run"))
        assert capsys.readouterr().out.startswith("3 of 3 objects in 1 shards")
    items = [item for folder in folders for item in render.file_items(Path(folder))]
    assert len({item["id"] for item in render.distinct(items)}) == 3


def test_long_names_are_cut_with_a_hash(tmp_path):
    for last in "ab":
        (tmp_path / ("chairs" * 20)).mkdir(exist_ok=True)
        (tmp_path / ("chairs" * 20) / ("legs" * 30 + f"{last}.glb")).touch()
    ids = [item["id"] for item in render.file_items(tmp_path)]
    assert len(set(ids)) == 2 and max(map(len, ids)) <= 100


def test_what_is_left_out_is_named_by_id_file_or_path(tmp_path, capsys):
    for name in ("a.glb", "b.glb", "deep/c.glb", "d.glb"):
        (tmp_path / "meshes" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "meshes" / name).touch()
    (tmp_path / "without.txt").write_text("a\nb.glb\ndeep/c.glb\nnothing\n")
    given = ("--objects", tmp_path / "meshes", "--without", tmp_path / "without.txt", "--dry-run")
    render.main(arguments(tmp_path / "out", *given))
    said = capsys.readouterr()
    assert said.out.startswith("1 of 1 objects")
    assert "1 entries of `--without` " in said.err and "match no object: nothing" in said.err


def test_failed_objects_can_be_tried_again(meshes, tmp_path):
    folder = tmp_path / "meshes"
    shutil.copytree(meshes, folder)
    render.main(arguments(tmp_path / "data", "--objects", folder))
    shutil.copy(folder / "ball.glb", folder / "broken.glb")
    render.main(arguments(tmp_path / "data", "--objects", folder, "--retry-failed"))
    assert {item["name"] for item in load_objects(tmp_path / "data")} == {"ball", "broken", "cube"}
    assert not (tmp_path / "data" / "failures.jsonl").exists()


def test_bad_sources(tmp_path):
    with pytest.raises(SystemExit, match="has no file that Blender imports"):
        render.main(arguments(tmp_path / "data", "--objects", tmp_path))
    with pytest.raises(SystemExit, match="`--hdris` .* has no .exr or .hdr"):
        render.main(arguments(tmp_path / "data", "--objects", tmp_path, "--hdris", tmp_path))


def test_shards_are_whole_and_a_run_continues(meshes, tmp_path):
    cube, ball, data = meshes / "cube.obj", meshes / "ball.glb", tmp_path / "data"
    render.main(arguments(data, "--objects", cube))
    assert {path.name for path in data.iterdir()} == {"shard-00000.tar", "manifest.jsonl"}
    path = data / "shard-00000.tar"
    written = path.stat().st_mtime_ns
    (item,) = load_objects(data)
    assert item["name"] == "cube" and item["inputs"].shape == (6, 32, 32, 4)
    assert item["targets"].shape == (2, 6, 32, 32, 4)
    alpha = item["targets"][..., 3]
    assert (alpha.max((2, 3)) > 200).all() and (alpha[..., 0, 0] == 0).all()
    render.main(arguments(data, "--objects", cube))
    assert path.stat().st_mtime_ns == written
    render.main(arguments(data, "--objects", ball, cube))  # a longer list goes on, whatever its order
    assert path.stat().st_mtime_ns == written
    assert [item["name"] for item in load_objects(data)] == ["cube", "ball"]
