"""What is rendered of files is what a render of the file itself would show. Every file is made here."""

import json
import struct

import numpy as np
import pytest
from PIL import Image

bpy = pytest.importorskip("bpy", reason="bpy is built for Python 3.11 only")
pytestmark = pytest.mark.slow  # Blender starts and renders

from training import blender, render  # noqa: E402

CAMERA = {"azimuth": 30.0, "elevation": 20.0, "fov": 30.0, "distance": 1.866}
CUBE = 0.556  # of the view, which a cube covers


def look(path, tmp_path, **more):
    """Cover and mean colour (in [0, 255]) of what is seen of a file."""
    blender.reset_scene(4)
    blender.load_object({"source": "file", "path": str(path), **more})
    blender.normalise()
    blender.light(blender.hdri_paths()[0], 0.0, 1.0)
    rgba = blender.render_view(CAMERA, 48, str(tmp_path))["rgba"]
    seen = rgba[..., 3] > 127
    return seen.mean(), rgba[seen][:, :3].mean(0) if seen.any() else np.zeros(3)


def new_scene():
    """An empty scene with a cube of edge 1."""
    blender.reset_scene(1)
    bpy.data.objects.remove(bpy.context.scene.camera)
    bpy.ops.mesh.primitive_cube_add(size=1)
    return bpy.context.object


def painted(name, colour, **settings):
    """A material of a colour."""
    material = bpy.data.materials.new(name)
    material.use_nodes = True
    for key, value in {"Base Color": (*colour, 1), **settings}.items():
        material.node_tree.nodes["Principled BSDF"].inputs[key].default_value = value
    return material


def save_blend(tmp_path):
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "file.blend"))
    return tmp_path / "file.blend"


def far_points(cube, tmp_path):
    mesh = bpy.data.meshes.new("points")
    mesh.from_pydata([(30, 0, 0), (31, 0, 0), (0, 40, 0)], [(0, 1)], [])
    bpy.context.scene.collection.objects.link(bpy.data.objects.new("points", mesh))


def invisible_box(cube, tmp_path):
    bpy.ops.mesh.primitive_cube_add(size=40)
    bpy.context.object.data.materials.append(painted("glass", (1, 1, 1), Alpha=0.0))


def hidden_helper(cube, tmp_path):
    bpy.ops.mesh.primitive_cube_add(size=40)
    bpy.context.object.hide_render = True


def hidden_collection(cube, tmp_path):
    collection = bpy.data.collections.new("hidden")
    bpy.context.scene.collection.children.link(collection)
    bpy.ops.mesh.primitive_cube_add(size=40)
    big = bpy.context.object
    for owner in big.users_collection:
        owner.objects.unlink(big)
    collection.objects.link(big)
    bpy.context.view_layer.layer_collection.children["hidden"].exclude = True


def another_scene(cube, tmp_path):
    other, mesh = bpy.data.scenes.new("other"), bpy.data.meshes.new("big")
    mesh.from_pydata([(0, 0, 0), (40, 0, 0), (0, 40, 0)], [], [(0, 1, 2)])
    other.collection.objects.link(bpy.data.objects.new("big", mesh))


@pytest.mark.parametrize("beside", (far_points, invisible_box, hidden_helper, hidden_collection, another_scene))
def test_what_a_render_does_not_show_changes_nothing(tmp_path, beside):
    """It stands far beside a cube, or around it."""
    beside(new_scene(), tmp_path)
    cover, _ = look(save_blend(tmp_path), tmp_path)
    assert cover == pytest.approx(CUBE, abs=0.02)


def test_what_is_hidden_in_the_viewport_alone_is_measured(tmp_path):
    """It is in a render: a cube 4 times as large."""
    new_scene()
    bpy.ops.mesh.primitive_cube_add(size=4)
    bpy.context.object.hide_viewport = True
    cover, _ = look(save_blend(tmp_path), tmp_path)
    assert cover == pytest.approx(CUBE, abs=0.02)


def test_modifiers_of_renders_are_measured(tmp_path):
    """An array of three cubes in a row, which the viewport does not show, fits the sphere."""
    modifier = new_scene().modifiers.new("row", "ARRAY")
    modifier.count, modifier.show_viewport = 3, False
    path = save_blend(tmp_path)
    blender.reset_scene(1)
    blender.load_object({"source": "file", "path": str(path)})
    blender.normalise()
    assert np.linalg.norm(blender.shown_points(), axis=1).max() == pytest.approx(0.5, abs=1e-4)
    assert np.ptp(blender.shown_points(), axis=0) == pytest.approx(np.array([3, 1, 1]) / 11**0.5, abs=1e-4)


def test_a_child_of_a_light_keeps_its_place(tmp_path):
    """A small cube beside a large one, three of its edges away."""
    new_scene()
    light = bpy.data.objects.new("light", bpy.data.lights.new("light", "POINT"))
    bpy.context.scene.collection.objects.link(light)
    light.location = (3, 0, 0)
    bpy.ops.mesh.primitive_cube_add(size=0.5)
    bpy.context.object.parent = light
    path = save_blend(tmp_path)
    blender.reset_scene(1)
    blender.load_object({"source": "file", "path": str(path)})
    points = blender.shown_points()
    assert points[:, 0].max() == pytest.approx(3.25) and points[:, 0].min() == pytest.approx(-0.5)


def write_glb(path, nodes, materials=(), images=(), animations=(), flip=()):
    """A .glb of one triangle soup, a cube of edge 1, for each node; `flip` are those that face inwards."""
    corners = np.array([(x, y, z) for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)], np.float32)
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = np.array([(a, b, c) for quad in quads for a, b, c in (quad[:3], (quad[0], *quad[2:]))], np.uint16)
    times = np.array([0, 1], np.float32)
    away = np.array([(30, 0, 0), (0, 0, 0)], np.float32)
    parts = [corners.tobytes(), faces.tobytes(), faces[:, ::-1].tobytes(), times.tobytes(), away.tobytes()]
    parts += list(images)
    views, offset = [], 0
    for part in parts:
        views.append({"buffer": 0, "byteOffset": offset, "byteLength": len(part)})
        offset += len(part) + -len(part) % 4
    binary = b"".join(part + bytes(-len(part) % 4) for part in parts)
    accessors = [
        {"bufferView": 0, "componentType": 5126, "count": 8, "type": "VEC3", "min": [-0.5] * 3, "max": [0.5] * 3},
        {"bufferView": 1, "componentType": 5123, "count": 36, "type": "SCALAR"},
        {"bufferView": 2, "componentType": 5123, "count": 36, "type": "SCALAR"},
        {"bufferView": 3, "componentType": 5126, "count": 2, "type": "SCALAR", "min": [0], "max": [1]},
        {"bufferView": 4, "componentType": 5126, "count": 2, "type": "VEC3"},
    ]
    meshes = [
        {"primitives": [{"attributes": {"POSITION": 0}, "indices": 2 if i in flip else 1, "material": i}]}
        for i in range(len(nodes))
    ]
    materials = list(materials) or [{} for _ in nodes]
    tree = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": list(range(len(nodes)))}],
        "nodes": [{"mesh": i, **node} for i, node in enumerate(nodes)],
        "meshes": meshes,
        "materials": materials,
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": len(binary)}],
    }
    if images:
        tree |= {"images": [{"bufferView": 5, "mimeType": "image/png"}], "textures": [{"source": 0}]}
    if animations:
        tree["animations"] = list(animations)
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary
    path.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks)
    return path


def colour(*rgb, **more):
    return {"pbrMetallicRoughness": {"baseColorFactor": [*rgb, 1], "metallicFactor": 0}, **more}


def test_animated_files_are_shown_in_their_rest_pose(tmp_path):
    """The second cube flies in from 30 edges away."""
    fly = {
        "channels": [{"sampler": 0, "target": {"node": 1, "path": "translation"}}],
        "samplers": [{"input": 3, "output": 4}],
    }
    nodes = [{}, {"translation": [0, 0, 0.0]}]
    cover, _ = look(write_glb(tmp_path / "fly.glb", nodes, animations=[fly]), tmp_path)
    assert cover == pytest.approx(CUBE, abs=0.02)


def test_other_animated_files_are_named(tmp_path, capsys):
    cube = new_scene()
    cube.keyframe_insert("location", frame=1)
    render.main(
        ["--objects", str(save_blend(tmp_path)), "--output", str(tmp_path / "data"), "--size", "24", "--samples", "1"]
    )
    assert "1 objects are animated, of which one frame is shown: file" in capsys.readouterr().err


def test_a_shell_that_faces_inwards_does_not_darken(tmp_path):
    """A toon outline: black, single-sided, a tenth larger than the red cube that it encloses."""
    nodes, materials = [{}, {"scale": [1.1] * 3}], [colour(1, 0, 0), colour(0, 0, 0)]
    _, plain = look(write_glb(tmp_path / "cube.glb", nodes[:1], materials[:1]), tmp_path)
    _, outlined = look(write_glb(tmp_path / "toon.glb", nodes, materials, flip=(1,)), tmp_path)
    assert outlined[0] == pytest.approx(plain[0], abs=15) and outlined[0] > 80


def test_single_sided_faces_show_nothing_from_behind(tmp_path):
    """An open sheet, seen from in front and from behind."""
    covers = []
    for side in (1, -1):
        new_scene().scale = (0.001, 1, 1)
        sheet = bpy.context.object
        sheet.data.clear_geometry()
        sheet.data.from_pydata([(0, -1, -1), (0, side, -side), (0, 1, 1), (0, -side, side)], [], [(0, 1, 2, 3)])
        material = painted("sheet", (0, 1, 0))
        material.use_backface_culling = True
        sheet.data.materials.append(material)
        covers.append(look(save_blend(tmp_path), tmp_path)[0])
    assert min(covers) == 0 and max(covers) > 0.2


def test_many_transparent_layers_are_not_black(tmp_path):
    """Thirty sheets of an alpha of 0.02 in front of a white cube."""
    new_scene().data.materials.append(
        painted("white", (1, 1, 1), **{"Emission Color": (1, 1, 1, 1), "Emission Strength": 1})
    )
    for i in range(30):
        bpy.ops.mesh.primitive_cube_add(size=1.02 + i / 100)
        bpy.context.object.data.materials.append(painted("leaf", (1, 1, 1), Alpha=0.02))
    _, seen = look(save_blend(tmp_path), tmp_path)
    assert seen.min() > 100


OBJ = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv 0.5 0.5 1\nvt 0 0\nvt 1 0\nvt 1 1\n"
OBJ_FACES = "f 1/1 3/3 2/2\nf 1/1 4/2 3/3\nf 1/1 2/2 5/3\nf 2/1 3/2 5/3\nf 3/1 4/2 5/3\nf 4/1 1/2 5/3\n"


def write_obj(tmp_path, mtl="newmtl wood\nKd 1 1 1\nmap_Kd tex/wood.png\n", head="mtllib a.mtl\n"):
    if mtl is not None:
        (tmp_path / "a.mtl").write_text(mtl)
    (tmp_path / "a.obj").write_text(f"{head}{OBJ}usemtl wood\n{OBJ_FACES}")
    return tmp_path / "a.obj"


def test_textures_that_cannot_be_decoded_are_failures(tmp_path):
    (tmp_path / "tex").mkdir()
    (tmp_path / "tex" / "wood.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match="wood.png of .* of the material wood cannot be decoded"):
        look(write_obj(tmp_path), tmp_path)
    material = {"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}
    cut_off = b"\x89PNG\r\n\x1a\n" + bytes(20)
    with pytest.raises(ValueError, match="cannot be decoded|has no image"):
        look(write_glb(tmp_path / "cut.glb", [{}], [material], [cut_off]), tmp_path)


def test_a_texture_node_without_an_image_is_a_failure(tmp_path):
    new_scene()
    material = painted("empty", (1, 0, 0))
    node = material.node_tree.nodes.new("ShaderNodeTexImage")
    links = material.node_tree.links
    links.new(node.outputs["Color"], material.node_tree.nodes["Principled BSDF"].inputs["Base Color"])
    bpy.context.object.data.materials.append(material)
    with pytest.raises(ValueError, match="Image Texture of the material empty has no image"):
        look(save_blend(tmp_path), tmp_path)


def test_materials_that_are_nowhere_defined_are_failures(tmp_path):
    with pytest.raises(ValueError, match="uses the material 'wood', but a.mtl is missing"):
        look(write_obj(tmp_path, mtl=None), tmp_path)
    with pytest.raises(ValueError, match="uses the material 'wood', but no material library defines it"):
        look(write_obj(tmp_path, mtl="newmtl stone\nKd 1 0 0\n"), tmp_path)


def test_objects_that_lack_some_materials_are_named(tmp_path, capsys):
    """One of two is defined, and shown."""
    path = write_obj(tmp_path, mtl="newmtl red\nKd 1 0 0\n")
    first, *rest = OBJ_FACES.splitlines(keepends=True)
    path.write_text(f"mtllib a.mtl\n{OBJ}usemtl wood\n{first}usemtl red\n{''.join(rest)}")
    output = tmp_path / "data"
    render.main(["--objects", str(path), "--output", str(output), "--size", "24", "--samples", "1", "--workers", "1"])
    assert "1 objects use materials that they do not define, which are plain: " in capsys.readouterr().err
    assert json.loads((output / "manifest.jsonl").read_text())["undefined_materials"] == ["wood"]


@pytest.mark.parametrize("name", (r"tex\wood.png", r"C:\Users\me\wood.png", "/Users/me/tex/wood.png"))
def test_paths_of_other_machines_are_found_beside_the_file(tmp_path, name):
    (tmp_path / "tex").mkdir()
    for folder in (tmp_path, tmp_path / "tex"):
        Image.new("RGB", (4, 4), (255, 0, 0)).save(folder / "wood.png")
    _, seen = look(write_obj(tmp_path, mtl=f"newmtl wood\nKd 1 1 1\nmap_Kd {name}\n"), tmp_path)
    assert seen[0] > 80 and seen[1] < 40


def test_vertex_colours_beside_a_plain_material_are_seen(tmp_path):
    coloured = "".join(f"{line} 1 0 0\n" if line.startswith("v ") else f"{line}\n" for line in OBJ.splitlines())
    (tmp_path / "a.mtl").write_text("newmtl plain\nKd 1 1 1\n")
    (tmp_path / "a.obj").write_text(f"mtllib a.mtl\n{coloured}usemtl plain\n{OBJ_FACES}")
    _, seen = look(tmp_path / "a.obj", tmp_path)
    assert seen[0] > 3 * seen[1]


def test_colours_at_faces_of_a_ply_are_a_failure(tmp_path):
    head = "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
    head += "element face 1\nproperty list uchar int vertex_indices\n"
    head += "".join(f"property uint8 {name}\n" for name in ("red", "green", "blue"))
    (tmp_path / "a.ply").write_text(head + "end_header\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2 255 0 0\n")
    with pytest.raises(ValueError, match="a.ply has colours at its faces"):
        look(tmp_path / "a.ply", tmp_path)


def test_up_of_files_that_do_not_say_it(tmp_path):
    """A tower along z."""
    tall = OBJ.replace("0.5 0.5 1", "0.5 0.5 5")
    (tmp_path / "a.obj").write_text(tall + OBJ_FACES)
    heights = []
    for up in ("y", "z"):
        blender.reset_scene(1)
        blender.load_object({"source": "file", "path": str(tmp_path / "a.obj"), "up": up})
        heights.append(np.ptp(blender.shown_points(), axis=0)[2])
    assert heights == pytest.approx([1, 5])


def test_an_object_that_hardly_covers_a_view_is_a_failure(tmp_path):
    """Two specks, far from each other."""
    new_scene().scale = (0.001,) * 3
    bpy.ops.mesh.primitive_cube_add(size=0.001, location=(1, 0, 0))
    item = {"id": "specks", "source": "file", "path": str(save_blend(tmp_path))}
    with pytest.raises(ValueError, match="The object covers at most 0.00.* of a target view, less than 0.01"):
        blender.render_object(item, 24, 24, 1, 0, "v1.2", None)


def test_files_that_blender_does_not_import_are_named(tmp_path, capsys):
    write_obj(tmp_path, mtl="newmtl wood\nKd 1 0 0\n")
    for name in ("old.dae", "part.3mf", "tex.png"):
        (tmp_path / name).write_text("")
    assert [item["source"] for item in render.file_items(tmp_path)] == ["a.obj"]
    assert "2 files of " in (said := capsys.readouterr().err) and "old.dae, part.3mf" in said


@pytest.mark.parametrize(
    "data",
    (b"\xef\xbb\xbfone\r\ntwo\r\n", "one\ntwo\n".encode("utf-16"), b"uid,name\none,Chair\ntwo,Bed\n"),
    ids=("mark", "utf-16", "table"),
)
def test_lists_of_names_in_other_forms(tmp_path, data):
    (tmp_path / "names.txt").write_bytes(data)
    assert render.read_names(tmp_path / "names.txt") == ["one", "two"]


def test_a_list_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "names.txt").write_bytes(b"\x80\x81\x82")
    with pytest.raises(ValueError, match="names.txt is no text in UTF-8"):
        render.read_names(tmp_path / "names.txt")


def cannot_import(item):
    raise ImportError("No module named 'argparse'")


def test_a_pool_that_breaks_is_no_failure_of_an_object():
    """The worker cannot import what it needs."""
    render.hide_inner_modules()
    with pytest.raises(ImportError, match="No module named 'argparse'"):
        render.render_shard([{"id": "cube"}], 1, cannot_import)


def cannot_be_shown(path, tmp_path, words):
    with pytest.raises(ValueError, match=words):
        look(path, tmp_path)


def texture_on(cube, image):
    material = painted("textured", (1, 1, 1))
    node = material.node_tree.nodes.new("ShaderNodeTexImage")
    node.image = image
    material.node_tree.links.new(
        node.outputs["Color"], material.node_tree.nodes["Principled BSDF"].inputs["Base Color"]
    )
    cube.data.materials.append(material)


@pytest.mark.parametrize("kind", ("gif", "damaged", "sequence"))
def test_a_texture_without_pixels_is_named(tmp_path, kind):
    """In place of which a render would be magenta."""
    name = {"gif": "t.gif", "damaged": "t.png", "sequence": "t_0001.png"}[kind]
    if kind == "gif":
        Image.new("RGB", (4, 4), (200, 30, 30)).save(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    new_scene()
    image = bpy.data.images.load(str(tmp_path / name))
    if kind == "sequence":
        image.source = "SEQUENCE"
    texture_on(bpy.context.object, image)
    cannot_be_shown(save_blend(tmp_path), tmp_path, f"{name} of .* cannot be decoded")


def test_an_environment_map_without_pixels_ends_the_command(tmp_path, capsys):
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "sky.exr").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    (tmp_path / "cube.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 2 3\nf 1 2 4\nf 1 3 4\nf 2 3 4\n")
    with pytest.raises(SystemExit, match="sky.exr cannot be decoded: it is damaged, or a pointer of git LFS"):
        render.main(
            ["--objects", str(tmp_path / "cube.obj"), "--hdris", str(tmp_path / "maps")]
            + ["--output", str(tmp_path / "out")]
        )
    assert not (tmp_path / "out").exists()


def test_a_texture_that_a_ply_names_is_refused(tmp_path):
    new_scene()
    bpy.ops.wm.ply_export(filepath=str(tmp_path / "cube.ply"), ascii_format=True)
    text = (tmp_path / "cube.ply").read_text()
    (tmp_path / "cube.ply").write_text(text.replace("format ascii 1.0", "format ascii 1.0\ncomment TextureFile t.png"))
    cannot_be_shown(tmp_path / "cube.ply", tmp_path, "cube.ply names a texture")


def test_what_a_usd_file_refers_to_is_named(tmp_path):
    new_scene()
    bpy.ops.wm.usd_export(filepath=str(tmp_path / "part.usda"))
    (tmp_path / "whole.usda").write_text(
        '#usda 1.0\ndef Xform "A" (references = @part.usda@</root>) {}\ndef Xform "B" (references = @lost.usda@) {}\n'
    )
    cannot_be_shown(tmp_path / "whole.usda", tmp_path, "whole.usda refers to .*lost.usda, which is missing")


@pytest.mark.parametrize("kind", ("objects", "meshes", "collections", "materials"))
def test_what_a_library_lacks_is_named(tmp_path, kind):
    """Linked things whose library is missing would vanish."""
    cube = new_scene()
    cube.data.materials.append(painted("paint", (1, 0, 0)))
    bpy.data.collections.new("Box").objects.link(cube)
    bpy.context.scene.collection.children.link(bpy.data.collections["Box"])
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "library.blend"))
    new_scene()
    with bpy.data.libraries.load(str(tmp_path / "library.blend"), link=True) as (there, here):
        setattr(here, kind, list(getattr(there, kind)))
    (linked, *_) = getattr(here, kind)
    if kind == "objects":
        bpy.context.scene.collection.objects.link(linked)
    elif kind == "meshes":
        bpy.context.scene.collection.objects.link(bpy.data.objects.new("linked", linked))
    elif kind == "collections":
        bpy.context.scene.collection.children.link(linked)
    else:
        bpy.context.object.data.materials.append(linked)
    path = save_blend(tmp_path)
    look(path, tmp_path)
    (tmp_path / "library.blend").unlink()
    cannot_be_shown(path, tmp_path, "of the library .*library.blend is missing")


def test_an_obj_without_mtllib_has_the_materials_of_its_name(tmp_path):
    new_scene().data.materials.append(painted("paint", (1, 0, 0)))
    bpy.ops.wm.obj_export(filepath=str(tmp_path / "cube.obj"))
    text = (tmp_path / "cube.obj").read_text()
    (tmp_path / "cube.obj").write_text("".join(x for x in text.splitlines(True) if not x.startswith("mtllib")))
    _, colour = look(tmp_path / "cube.obj", tmp_path)
    assert colour[0] > 100 > 60 > colour[1]


@pytest.mark.parametrize("suffix", ("glb", "blend"))
def test_of_several_colour_layers_that_of_renders_is_shown(tmp_path, suffix):
    """A .blend file says itself what is shown, and nothing is added."""
    cube = new_scene()
    for name, colour in (("mask", (0, 0, 1, 1)), ("paint", (1, 0, 0, 1))):
        layer = cube.data.color_attributes.new(name, "FLOAT_COLOR", "POINT")
        layer.data.foreach_set("color", np.tile(colour, len(cube.data.vertices)))
    cube.data.color_attributes.render_color_index = 1
    if suffix == "blend":
        _, colour = look(save_blend(tmp_path), tmp_path)
        assert np.ptp(colour) < 30
        return
    blender.show_vertex_colours()
    bpy.data.worlds.new("w")
    blender.prepare_scene(4)
    blender.normalise()
    blender.light(blender.hdri_paths()[0], 0.0, 1.0)
    rgba = blender.render_view(CAMERA, 48, str(tmp_path))["rgba"]
    red, green, blue, _ = rgba[rgba[..., 3] > 127].mean(0)
    assert red > 100 > 60 > blue


def test_hair_is_measured(tmp_path):
    """Curves of hair, 3 long, on a cube of edge 1."""
    new_scene()
    curves = bpy.data.hair_curves.new("hair")
    curves.add_curves([2])
    curves.points[0].position, curves.points[1].position = (0, 0, 0), (0, 0, 3)
    bpy.context.scene.collection.objects.link(bpy.data.objects.new("hair", curves))
    path = save_blend(tmp_path)
    blender.reset_scene(1)
    blender.load_object({"source": "file", "path": str(path)})
    assert blender.shown_points()[:, 2].max() == pytest.approx(3)


@pytest.mark.parametrize("animated", (False, True))
def test_a_collection_that_stands_and_is_instanced(tmp_path, animated):
    """It covers what plain objects at these places cover."""

    def build(instanced):
        cube = new_scene()
        trees = bpy.data.collections.new("trees")
        bpy.context.scene.collection.children.link(trees)
        bpy.context.scene.collection.objects.unlink(cube)
        trees.objects.link(cube)
        other = bpy.data.objects.new("other", None if instanced else cube.data)
        if instanced:
            other.instance_type, other.instance_collection = "COLLECTION", trees
        other.location = (0, 2, 0)
        bpy.context.scene.collection.objects.link(other)
        if animated:
            other.keyframe_insert("location", frame=1)
        return look(save_blend(tmp_path), tmp_path)[0]

    assert build(instanced=True) == pytest.approx(build(instanced=False), abs=0.005)
