"""Blender: the scene, its cameras, and the sample of one object. `training.render` writes samples into shards.

Needs the packages `bpy` and `OpenEXR`.
"""

import io
import itertools
import json
import math
import os
import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import bpy
import numpy as np
import OpenEXR
from mathutils import Matrix, Vector
from PIL import Image

from pipeline import CAMERAS, RADIUS, Cameras
from zero123plus.mesh import Mesh, overlap

from . import catalogue

INPUT_ELEVATIONS = (-10.0, 40.0)
INPUT_FOVS = (25.0, 45.0)
INPUT_MARGINS = (1.0, 1.2)  # of the distance at which the sphere just fills the view
STRETCH = (0.7, 1.4)  # of a variant, along each axis
TEXTURES = {".png", ".jpg", ".jpeg", ".bmp", ".tga"}  # of archives
MIN_COVER = 0.01  # of some target view
UP_SUFFIXES = (".obj", ".ply", ".stl")  # of files that do not say which axis is up
DEPTH_UNITS = 16384
MAX_FACES = 500_000  # of a mesh that is textured
MAX_OVERLAP = 0.01  # of the texels of own UVs that two faces may share
NO_DEPTH = np.iinfo(np.uint16).max  # where there is nothing


def hdri_paths(folder: Path | None = None) -> list[Path]:
    """Lists the environment maps of a folder, or those that Blender ships, in a fixed order.

    Raises:
        ValueError: if the folder has none.
    """
    folder = folder or Path(bpy.utils.system_resource("DATAFILES", path="studiolights/world"))
    found = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in (".exr", ".hdr"))
    if not found:
        raise ValueError(f"`--hdris` {folder} has no .exr or .hdr file.")
    return found


def reset_scene(samples: int):
    """Empties Blender and sets up Cycles ([`prepare_scene`])."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    prepare_scene(samples)


def prepare_scene(samples: int):
    """Sets up Cycles in the active scene: `samples` per pixel, denoised, transparent background; and a camera."""
    scene = bpy.context.scene
    scene.render.engine = "CYCLES"
    scene.cycles.samples = samples
    scene.cycles.use_denoising, scene.cycles.denoising_quality = True, "FAST"
    scene.cycles.denoising_input_passes = "RGB"  # albedo and normal passes would double the time of so small a view
    scene.cycles.max_bounces = 4
    scene.cycles.transparent_max_bounces = 128  # layers of leaves or hair, beyond which Cycles shows black
    scene.render.film_transparent = True
    scene.render.use_persistent_data = True
    scene.render.threads_mode, scene.render.threads = "FIXED", 1
    scene.render.resolution_percentage = 100
    scene.render.image_settings.file_format = "PNG"
    scene.render.image_settings.color_mode = "RGBA"
    scene.view_settings.view_transform = "Standard"  # colours as painted: the default tone mapping greys them
    camera = bpy.data.cameras.new("camera")
    scene.camera = bpy.data.objects.new("camera", camera)
    scene.collection.objects.link(scene.camera)
    camera.sensor_fit = "VERTICAL"
    layer = scene.view_layers[0]
    layer.use_pass_z = layer.use_pass_normal = True


class ShownFaces(bpy.types.RenderEngine):
    """A render engine that draws nothing and notes the triangles of all faces that a render shows: with the modifiers,
    instances and visibility of renders, which no other way of Blender's tells. And the points of hair.
    """

    bl_idname, bl_label = "SHOWN_FACES", "Shown faces"
    parts: list[tuple[np.ndarray, ...]] | None = None
    hair: list[np.ndarray] | None = None

    def render(self, depsgraph):
        ShownFaces.parts, ShownFaces.hair = [], []
        for instance in depsgraph.object_instances:
            thing, matrix = instance.object, np.array(instance.matrix_world)
            if not (instance.show_self and thing.visible_camera):
                continue
            if thing.type in ("CURVES", "POINTCLOUD"):
                points = np.empty((len(thing.data.points), 3), np.float32)
                thing.data.attributes["position"].data.foreach_get("vector", points.ravel())
                ShownFaces.hair.append(points @ matrix[:3, :3].T + matrix[:3, 3])
            if thing.type not in ("MESH", "CURVE", "SURFACE", "FONT", "META"):
                continue
            mesh = thing.to_mesh()
            mesh.calc_loop_triangles()
            vertices, count = np.empty((len(mesh.vertices), 3)), len(mesh.loop_triangles)
            mesh.vertices.foreach_get("co", vertices.ravel())
            faces, loops = (np.empty((count, 3), np.int32) for _ in range(2))
            mesh.loop_triangles.foreach_get("vertices", faces.ravel())
            mesh.loop_triangles.foreach_get("loops", loops.ravel())
            material = np.empty(count, np.int32)
            mesh.loop_triangles.foreach_get("material_index", material)
            layer = next((layer for layer in mesh.uv_layers if layer.active_render), None)
            places = np.full((len(mesh.loops), 2), np.nan, np.float32)
            if layer:
                layer.uv.foreach_get("vector", places.ravel())
            shown = np.array([not is_invisible(slot.material) for slot in thing.material_slots] or [True])
            order = [0, 1, 2] if np.linalg.det(matrix[:3, :3]) > 0 else [0, 2, 1]  # of a mirrored instance's corners
            faces, loops = (part[shown[material.clip(0, len(shown) - 1)]][:, order] for part in (faces, loops))
            ShownFaces.parts.append((vertices @ matrix[:3, :3].T + matrix[:3, 3], faces, places[loops]))
            thing.to_mesh_clear()


bpy.utils.register_class(ShownFaces)


def is_invisible(material: bpy.types.Material | None) -> bool:
    """Whether a material is fully transparent everywhere."""
    if material is None or not material.use_nodes:
        return False
    output = material.node_tree.get_output_node("CYCLES")
    links = output.inputs["Surface"].links if output else ()
    shader = links[0].from_node if links else None
    if shader is not None and shader.type == "BSDF_PRINCIPLED":
        return not shader.inputs["Alpha"].links and shader.inputs["Alpha"].default_value < 1 / 255
    return shader is not None and shader.type == "BSDF_TRANSPARENT"


def shown_faces() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All faces that a render of the scene shows, in the world: vertices, shape (V, 3); triangles, shape (F, 3); and
    the coordinates of their corners in the texture, from below, shape (F, 3, 2), NaN without any.
    """
    scene = bpy.context.scene
    before, ShownFaces.parts = scene.render.engine, None
    scene.render.engine = ShownFaces.bl_idname
    bpy.ops.render.render()
    scene.render.engine = before
    empty = np.zeros((0, 3)), np.zeros((0, 3), int), np.zeros((0, 3, 2))
    vertices, faces, corners = zip(empty, *ShownFaces.parts)
    offsets = np.cumsum([0, *map(len, vertices[:-1])])
    return np.concatenate(vertices), np.concatenate([f + o for f, o in zip(faces, offsets)]), np.concatenate(corners)


def shown_points() -> np.ndarray:
    """Corners of all faces, and hair, that a render of the scene shows, in the world, shape (P, 3)."""
    vertices, faces, _ = shown_faces()
    return np.concatenate([vertices[np.unique(faces)], *ShownFaces.hair])


def shown_mesh(name: str) -> tuple[Mesh, np.ndarray]:
    """Normalises the scene, and returns all faces that a render of it shows, in the cameras' world.

    Returns:
        The mesh, with the file's own UVs where they lie in [0, 1] and do not overlap; and the matrix from the world to
        the axes and scale that the file has in glTF, shape (4, 4).

    Raises:
        ValueError: if there are too many faces, or vertices that are not finite, or as [`normalise`]. The message
            begins with `name`.
    """
    vertices, faces, corners = shown_faces()
    if not np.isfinite(vertices).all():
        raise ValueError(f"{name} has vertices that are not finite numbers: repair it.")
    if len(faces) > MAX_FACES:
        raise ValueError(f"{name} has {len(faces):,} triangles, but at most {MAX_FACES:,} are taken: simplify it.")
    normalise()
    fit = np.array(bpy.data.objects["fit"].matrix_world)
    normals = np.cross(*(vertices[faces[:, i]] - vertices[faces[:, 0]] for i in (1, 2)))
    lengths = np.linalg.norm(normals, axis=1)
    kept = lengths > 1e-12 * lengths.max()
    # Each face has vertices of its own, and so its own normal
    normals = np.repeat(normals[kept] / lengths[kept, None], 3, axis=0)
    vertices = vertices[faces[kept]].reshape(-1, 3) @ fit[:3, :3].T + fit[:3, 3]
    corners = corners[kept] * (1, -1) + (0, 1)  # ours count from above
    own = ((corners >= 0) & (corners <= 1)).all() and overlap(corners) <= MAX_OVERLAP
    mesh = Mesh(vertices, np.arange(len(vertices)).reshape(-1, 3), normals, corners if own else None)
    up = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])  # Blender's +Z up to glTF's +Y up
    return mesh, up @ np.linalg.inv(fit)


def normalise(min_thickness: float = 0.0, stretch=(1.0, 1.0, 1.0)):
    """Moves and scales all of the scene together: bounding-box centre to the origin, farthest vertex to `RADIUS`.

    The bounds are those of [`shown_points`]. The scene then shows one instance of all that it had: objects keep their
    own matrices, because an animated object's is written anew for every frame, and what a collection has may both
    stand in the scene and be instanced there.

    Args:
        min_thickness: the least ratio of the bounds' shortest edge to their longest.
        stretch: factor along each axis, before that.

    Raises:
        ValueError: if a render shows no faces, or all of them in one point, or is flatter than that.
    """
    points = shown_points() * stretch
    centre = (points.min(0) + points.max(0)) / 2 if len(points) else 0
    extent = np.linalg.norm(points - centre, axis=1).max() if len(points) else 0
    if not 0 < extent < math.inf:
        raise ValueError("A render shows no faces: all are hidden or transparent, or lie in one point.")
    edges = np.ptp(points, axis=0)
    if edges.min() < min_thickness * edges.max():
        raise ValueError(f"The object is flat: its shortest edge is {edges.min() / edges.max():.3f} of its longest.")
    scene, whole = bpy.context.scene, bpy.data.collections.new("whole")
    for old, kind in ((scene.collection.children, whole.children), (scene.collection.objects, whole.objects)):
        for thing in [thing for thing in old if thing != scene.camera]:
            kind.link(thing)
            old.unlink(thing)
    fit = bpy.data.objects.new("fit", None)
    fit.instance_type, fit.instance_collection = "COLLECTION", whole
    fit.matrix_world = (
        Matrix.Scale(RADIUS / extent, 4) @ Matrix.Translation(-Vector(centre)) @ Matrix.Diagonal((*stretch, 1))
    )
    scene.collection.objects.link(fit)
    bpy.context.view_layer.update()


def load_hdri(path: Path) -> bpy.types.Image:
    """Loads an environment map.

    Raises:
        ValueError: if it has no pixels, in place of which Blender would light the object in magenta.
    """
    image = bpy.data.images.load(str(path))
    if not all(image.size):
        raise ValueError(f"The environment map {path} cannot be decoded: it is damaged, or a pointer of git LFS.")
    return image


def light(hdri: Path, rotation: float, strength: float):
    """Lights the scene by an environment map, turned around Z by `rotation` radians."""
    world = bpy.data.worlds.new("world")
    bpy.context.scene.world = world
    # Blender's own choice, an importance map of the HDRI's full size, takes seconds for every object.
    world.cycles.sampling_method, world.cycles.sample_map_resolution = "MANUAL", 128
    world.use_nodes = True
    nodes, links = world.node_tree.nodes, world.node_tree.links
    nodes["Background"].inputs["Strength"].default_value = strength
    environment = nodes.new("ShaderNodeTexEnvironment")
    environment.image = load_hdri(hdri)
    mapping = nodes.new("ShaderNodeMapping")
    mapping.inputs["Rotation"].default_value[2] = rotation
    links.new(nodes.new("ShaderNodeTexCoord").outputs["Generated"], mapping.inputs["Vector"])
    links.new(mapping.outputs["Vector"], environment.inputs["Vector"])
    links.new(environment.outputs["Color"], nodes["Background"].inputs["Color"])


def importer(path: Path):
    """Returns Blender's own importer for a file, or None if it has none. Scripts in .blend files do not run."""
    return {
        ".glb": import_rest_pose,
        ".gltf": import_rest_pose,
        ".obj": bpy.ops.wm.obj_import,
        ".ply": bpy.ops.wm.ply_import,
        ".stl": bpy.ops.wm.stl_import,
        ".fbx": bpy.ops.import_scene.fbx,
        ".usd": bpy.ops.wm.usd_import,
        ".usda": bpy.ops.wm.usd_import,
        ".usdc": bpy.ops.wm.usd_import,
        ".usdz": bpy.ops.wm.usd_import,
        ".blend": open_scene,
    }.get(path.suffix.lower())


def import_rest_pose(filepath: str):
    """Imports a glTF file in the rest pose of its nodes, because an animation may begin with parts that are away."""
    from io_scene_gltf2.io.imp.gltf2_io_gltf import glTFImporter

    read = glTFImporter.read

    def read_without_animations(self):
        read(self)
        self.data.animations = None

    glTFImporter.read = read_without_animations
    try:
        bpy.ops.import_scene.gltf(filepath=filepath)
    finally:
        glTFImporter.read = read


def open_scene(filepath: str):
    """Shows the active scene of a .blend file, as it is at its frame, in a scene with the settings of ours."""
    samples = bpy.context.scene.cycles.samples
    bpy.ops.wm.open_mainfile(filepath=filepath, load_ui=False, use_scripts=False)
    theirs, layer = bpy.context.scene, bpy.context.view_layer
    hidden = [layer.layer_collection]
    for collection in hidden:  # which grows
        hidden += collection.children
        collection.collection.hide_render |= collection.exclude and collection is not layer.layer_collection
    ours = bpy.data.scenes.new("ours")
    for child in theirs.collection.children:
        ours.collection.children.link(child)
    for thing in theirs.collection.objects:
        ours.collection.objects.link(thing)
    bpy.context.window.scene = ours
    ours.frame_set(theirs.frame_current, subframe=theirs.frame_subframe)
    prepare_scene(samples)


def load_object(item: dict, folder: str | None = None) -> list[str]:
    """Adds what a render of an object's file shows, without its lights, to the empty scene. An archive's object is
    extracted into a folder. Returns the materials that its file uses but does not define.

    Raises:
        ValueError: if the file has no faces, or lacks something that its materials need.
    """
    path = catalogue.extract(item, folder) if "member" in item else Path(item["path"])
    undefined = check_source(path)
    axes = {"up_axis": "Z", "forward_axis": "Y"} if item.get("up") == "z" else {}
    importer(path)(filepath=str(path), **(axes if path.suffix.lower() in UP_SUFFIXES else {}))
    for thing in bpy.context.scene.objects:
        if thing.type in ("LIGHT", "LIGHT_PROBE"):  # not removed: its children have their place by it
            thing.hide_render = True
    if "rotation" in item:
        turn(item["rotation"])
    find_textures(path.parent)
    if "textures" in item:
        exchange_textures(item["textures"], random.Random(item["id"]), os.path.join(folder, "textures"))
    check_import()
    if path.suffix.lower() != ".blend":  # which says itself what is shown
        show_vertex_colours()
    cull_backfaces()
    bpy.context.view_layer.update()
    return undefined


def is_animated() -> bool:
    """Whether something in the scene moves, so that a render shows one frame of it."""
    moving = (thing.animation_data for thing in bpy.context.scene.objects)
    return any(data and (data.action or data.nla_tracks or data.drivers) for data in moving)


def turn(rotation: list[float]):
    """Turns the scene by 9 numbers, row by row, that are in axes with +Y up, as in the files that Blender imports."""
    upright = Matrix(((1, 0, 0), (0, 0, -1), (0, 1, 0)))  # +Y up to +Z up
    matrix = upright @ Matrix([rotation[i : i + 3] for i in (0, 3, 6)]) @ upright.transposed()
    for thing in bpy.context.scene.objects:
        if thing.parent is None and thing != bpy.context.scene.camera:
            thing.matrix_world = matrix.to_4x4() @ thing.matrix_world


def check_source(path: Path) -> list[str]:
    """Checks what Blender's importers pass over in a file.

    Returns:
        The materials that an .obj file uses beside others but does not define.

    Raises:
        ValueError: if an .obj file defines none of the materials that it uses, a .usd file refers to one that is
            missing, or a .ply file has colours at its faces or a texture.
    """
    if path.suffix.lower() == ".ply":
        header = path.read_bytes()[:65536].partition(b"end_header")[0].decode("latin-1")
        if re.search(r"^comment\s+TextureFile", header, re.MULTILINE | re.IGNORECASE):
            raise ValueError(
                f"{path.name} names a texture, which Blender does not read of .ply: convert it to .obj or .glb."
            )
        if re.search(r"property \w+ red", header.partition("element face")[2]):
            raise ValueError(
                f"{path.name} has colours at its faces, which Blender does not import: move them to the vertices."
            )
    if path.suffix.lower().startswith(".usd"):
        bpy.utils.expose_bundled_modules()
        from pxr import UsdUtils

        lacking = [name for name in UsdUtils.ComputeAllDependencies(str(path))[2] if ".usd" in Path(name).suffix]
        if lacking:
            raise ValueError(f"{path.name} refers to {lacking[0]}, which is missing: put it there.")
    if path.suffix.lower() != ".obj":
        return []
    used, defined, missing = set(), set(), []
    lines = [line.strip().partition(" ") for line in path.read_text("utf-8", errors="replace").splitlines()]
    beside = path.with_suffix(".mtl")
    if beside.is_file() and not any(word == "mtllib" for word, _, _ in lines):  # as Blender reads it
        lines.append(("mtllib", " ", beside.name))
    for word, _, rest in lines:
        if word == "usemtl":
            used.add(rest.strip())
        elif word == "mtllib":
            library = path.parent / rest.strip().replace("\\", "/")
            if not library.is_file():
                missing.append(library.name)
                continue
            lines = library.read_text("utf-8", errors="replace").splitlines()
            defined |= {line.split(None, 1)[1].strip() for line in lines if line.strip().startswith("newmtl ")}
    lacking = sorted(name for name in used - defined if name not in ("", "None", "(null)"))
    if lacking and not used & defined:
        where = f"{', '.join(missing)} is missing" if missing else "no material library defines it"
        raise ValueError(f"{path.name} uses the material {lacking[0]!r}, but {where}: put it there.")
    return lacking


def find_textures(folder: Path):
    """Finds textures that a file names by a path of another machine or with backslashes: what stands at the end of the
    path, in the file's folder.
    """
    for image in bpy.data.images:
        if image.source != "FILE" or image.packed_file or os.path.isfile(bpy.path.abspath(image.filepath)):
            continue
        parts = [part for part in re.split(r"[\\/]", image.filepath) if part]
        for first in range(len(parts)):
            path = folder.joinpath(*parts[first:])
            if path.is_file():
                image.filepath = str(path)
                image.reload()
                break


def exchange_textures(other: dict, rng: random.Random, folder: str):
    """Gives what has a texture for its colour one of another object of an archive, if that has any, chosen at random.
    They are extracted into a folder.
    """
    beside = catalogue.extract(other, folder).parent
    paths = sorted(path for path in beside.iterdir() if path.suffix.lower() in TEXTURES)
    for _, node in material_nodes() if paths else ():
        sockets = [link.to_socket.name for output in node.outputs for link in output.links]
        if node.type == "TEX_IMAGE" and "Base Color" in sockets:
            node.image = bpy.data.images.load(str(rng.choice(paths)))


def material_nodes() -> Iterator[tuple[str, bpy.types.Node]]:
    """The material's name and the node, of all nodes of all materials, in groups too."""
    for material in bpy.data.materials:
        trees = [material.node_tree] if material.node_tree else []
        for tree in trees:  # which grows
            for node in tree.nodes:
                if node.type == "GROUP" and node.node_tree and node.node_tree not in trees:
                    trees.append(node.node_tree)
                yield material.name, node


def check_import():
    """Checks what an importer made: it reports neither faces nor textures that are missing.

    Raises:
        ValueError: naming what is missing.
    """
    things = [thing for thing in bpy.data.objects if thing.type == "MESH"]
    if not any(thing.data.polygons or thing.modifiers for thing in things) and not any(
        thing.type in ("CURVE", "CURVES", "SURFACE", "FONT", "META") for thing in bpy.data.objects
    ):
        count = sum(len(thing.data.vertices) for thing in things)
        raise ValueError(f"The file has {count} points but no faces: a point cloud cannot be rendered. Mesh it first.")
    linked = (bpy.data.objects, bpy.data.collections, bpy.data.meshes, bpy.data.materials, bpy.data.node_groups)
    for block in itertools.chain(*linked):
        if block.is_missing and block.users:
            raise ValueError(
                f"{block.name} of the library {block.library.filepath} is missing: put the library there."
            )
    for material, node in material_nodes():
        if node.type not in ("TEX_IMAGE", "TEX_ENVIRONMENT") or not any(output.links for output in node.outputs):
            continue
        where = f"{node.name} of the material {material}"
        if node.image is None:
            raise ValueError(f"The texture node {where} has no image: give it one, or remove it.")
        path = bpy.path.abspath(node.image.filepath)
        if node.image.source == "FILE" and not node.image.packed_file and not os.path.isfile(path):
            raise ValueError(f"The texture {path} of {where} is missing: put it there, or pack it into the file.")
        if not all(node.image.size):
            raise ValueError(
                f"The texture {path or node.image.name} of {where} cannot be decoded: it is damaged, or of a kind that"
                " Blender does not read."
            )


def is_plain(material: bpy.types.Material | None) -> bool:
    """Whether a material is white or of the grey that importers give where a file says nothing."""
    shader = material and material.node_tree and material.node_tree.nodes.get("Principled BSDF")
    if material is None or not shader:
        return material is None
    colour = shader.inputs["Base Color"]
    return (
        not colour.links
        and max(colour.default_value[:3]) - min(colour.default_value[:3]) < 0.01
        and any(
            abs(colour.default_value[0] - grey) < 0.02
            for grey in (0.8, 1.0, 0.604)  # 0.8 in sRGB is 0.604
        )
    )


def show_vertex_colours():
    """Gives meshes that have vertex colours and plain materials one that shows the colours."""
    for thing in bpy.data.objects:
        mesh = thing.data
        if thing.type != "MESH" or not mesh.color_attributes or not all(map(is_plain, mesh.materials)):
            continue
        material = bpy.data.materials.new("vertex colours")
        material.use_nodes = True
        nodes, links = material.node_tree.nodes, material.node_tree.links
        attribute = nodes.new("ShaderNodeVertexColor")
        layers = mesh.color_attributes
        attribute.layer_name = layers[max(0, layers.render_color_index)].name
        links.new(attribute.outputs["Color"], nodes["Principled BSDF"].inputs["Base Color"])
        if not len(mesh.materials):
            mesh.materials.append(material)
        for i in range(len(mesh.materials)):
            mesh.materials[i] = material


def cull_backfaces():
    """Makes single-sided materials (glTF's default) show nothing from behind, where Cycles shows their backs.

    Closed parts that face inwards, such as the shell of a toon outline, show nothing from outside, and would keep the
    light from what they enclose: they are removed.
    """
    culled = {material for material in bpy.data.materials if material.use_backface_culling and material.node_tree}
    for thing in bpy.data.objects:
        if thing.type == "MESH" and any(material in culled for material in thing.data.materials):
            remove_inward_parts(thing, culled)
    for material in culled:
        nodes, links = material.node_tree.nodes, material.node_tree.links
        output = material.node_tree.get_output_node("CYCLES")
        if not output or not output.inputs["Surface"].links:
            continue
        mix = nodes.new("ShaderNodeMixShader")
        links.new(nodes.new("ShaderNodeNewGeometry").outputs["Backfacing"], mix.inputs["Fac"])
        links.new(output.inputs["Surface"].links[0].from_socket, mix.inputs[1])
        links.new(nodes.new("ShaderNodeBsdfTransparent").outputs["BSDF"], mix.inputs[2])
        links.new(mix.outputs["Shader"], output.inputs["Surface"])


def remove_inward_parts(thing: bpy.types.Object, culled: set):
    """Removes the faces of a material of `culled` that together are closed and have a negative volume."""
    import bmesh  # which can be found only after bpy

    mesh = bmesh.new()
    mesh.from_mesh(thing.data)
    mirrored = -1 if thing.matrix_world.determinant() < 0 else 1
    for place, material in enumerate(thing.data.materials):
        faces = [face for face in mesh.faces if face.material_index == place]
        if material not in culled or not faces:
            continue
        own = set(faces)
        if any(sum(other in own for other in edge.link_faces) != 2 for face in faces for edge in face.edges):
            continue
        fans = ((face.verts[0].co, a.co, b.co) for face in faces for a, b in zip(face.verts[1:], face.verts[2:]))
        if mirrored * sum(a.dot(b.cross(c)) for a, b, c in fans) < 0:
            bmesh.ops.delete(mesh, geom=faces, context="FACES")
    mesh.to_mesh(thing.data)
    mesh.free()


def render_view(camera: dict, size: int, folder: str) -> dict[str, np.ndarray]:
    """One view, S pixels an edge, that looks at the origin with world Z up, of a camera's `azimuth`, `elevation` and
    vertical `fov` in degrees, and `distance`. Temporary files are written into a folder.

    Returns:
        `rgba`, uint8 of shape (S, S, 4); `depth`, uint16 of shape (S, S); `normal`, uint8 of shape (S, S, 3).
    """
    a, e = math.radians(camera["azimuth"]), math.radians(camera["elevation"])
    position = Vector((math.cos(a) * math.cos(e), math.sin(a) * math.cos(e), math.sin(e))) * camera["distance"]
    rotation = position.to_track_quat("Z", "Y").to_matrix()
    scene = bpy.context.scene
    scene.render.resolution_x = scene.render.resolution_y = size
    scene.camera.matrix_world = Matrix.Translation(position) @ rotation.to_4x4()
    scene.camera.data.angle = math.radians(camera["fov"])
    bpy.ops.render.render()
    settings, result = scene.render.image_settings, bpy.data.images["Render Result"]

    settings.media_type, settings.file_format, settings.color_mode = "IMAGE", "PNG", "RGBA"
    result.save_render(os.path.join(folder, "view.png"), scene=scene)
    with Image.open(os.path.join(folder, "view.png")) as picture:
        rgba = np.asarray(picture.convert("RGBA"))
    settings.media_type, settings.file_format, settings.color_depth = "MULTI_LAYER_IMAGE", "OPEN_EXR_MULTILAYER", "32"
    settings.exr_codec = "NONE"
    result.save_render(os.path.join(folder, "view.exr"), scene=scene)
    parts = OpenEXR.File(os.path.join(folder, "view.exr"), separate_channels=True).parts
    passes = {name.split(".", 1)[1]: value.pixels for part in parts for name, value in part.channels.items()}

    units = np.round(passes["Depth.Z"] * DEPTH_UNITS)
    seen = (rgba[..., 3] > 0) & (units < NO_DEPTH)
    depth = np.where(seen, units, NO_DEPTH).astype(np.uint16)
    normal = np.stack([passes[f"Normal.{axis}"] for axis in "XYZ"], axis=-1) @ np.array(rotation)  # world to view
    normal = np.where(seen[..., None], np.clip(np.round(127.5 * (normal + 1)), 0, 255), 127).astype(np.uint8)
    return {"rgba": rgba, "depth": depth, "normal": normal}


def contact_sheet(views: list[np.ndarray], kind: str) -> bytes:
    """Views of one size in rows of 6, as lossless WebP or as PNG."""
    rows = [np.concatenate(views[i : i + 6], axis=1) for i in range(0, len(views), 6)]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(buffer, kind, lossless=True)
    return buffer.getvalue()


def tile_cameras(cameras: Cameras) -> list[dict]:
    """The six cameras of a tile, of an input view at azimuth 0."""
    return [
        {"azimuth": azimuth, "elevation": elevation, "fov": cameras.fov, "distance": cameras.radius}
        for azimuth, elevation in zip(cameras.azimuths, cameras.elevations)
    ]


def choose_cameras(rng: random.Random, preset: str) -> tuple[list[dict], list[dict]]:
    """The 6 input and the 12 target cameras of an object."""
    first = rng.uniform(0, 60)
    inputs = []
    for k in range(6):
        fov = rng.uniform(*INPUT_FOVS)
        inputs.append(
            {
                "azimuth": first + 60 * k,
                "elevation": rng.uniform(*INPUT_ELEVATIONS),
                "fov": fov,
                "distance": Cameras((), (), fov).radius * rng.uniform(*INPUT_MARGINS),
            }
        )
    cameras = CAMERAS[preset]
    targets = [
        {"azimuth": first + azimuth, "elevation": elevation, "fov": cameras.fov, "distance": cameras.radius}
        for elevation in cameras.elevations[:2]  # they alternate
        for azimuth in cameras.azimuths
    ]
    return inputs, targets


def render_object(
    item: dict,
    size: int,
    input_size: int,
    samples: int,
    seed: int,
    preset: str,
    hdris: Path | None,
    min_thickness: float = 0.0,
    min_cover: float = 0.0,
) -> dict:
    """Renders an object, in this process, and returns its sample for a WebDataset shard.

    Raises:
        ValueError: if it has nothing to render, lacks something that its materials need, is flatter than
            `min_thickness`, or covers less than `min_cover` of some target view, or than `MIN_COVER` of all.
    """
    rng = random.Random(f"{seed}/{item['id']}")
    hdri, rotation, strength = rng.choice(hdri_paths(hdris)), rng.uniform(0, 2 * math.pi), rng.uniform(0.9, 1.4)
    inputs, targets = choose_cameras(rng, preset)
    stretch = [rng.uniform(*STRETCH) if "of" in item else 1.0 for _ in range(3)]
    reset_scene(samples)
    with tempfile.TemporaryDirectory() as folder:
        undefined = load_object(item, folder)
        animated = is_animated()
        normalise(min_thickness, stretch)
        light(hdri, rotation, strength)
        views = {
            "inputs": [render_view(camera, input_size, folder) for camera in inputs],
            "targets": [render_view(camera, size, folder) for camera in targets],
        }
    cover = [(view["rgba"][..., 3] > 0).mean() for view in views["targets"]]
    if max(cover) < MIN_COVER:
        raise ValueError(
            f"The object covers at most {max(cover):.4f} of a target view, less than {MIN_COVER}: it is transparent,"
            " or something that cannot be seen is far away from it."
        )
    if min(cover) < min_cover:
        raise ValueError(f"The object covers {min(cover):.3f} of a target view, less than {min_cover}.")
    record = {
        "object": item["id"],
        **{name: item[name] for name in ("source", *catalogue.FIELDS, "of") if name in item},
        **({"stretch": stretch} if "of" in item else {}),
        **({"textures": item["textures"]["id"]} if "textures" in item else {}),
        **({"animated": True} if animated else {}),
        **({"undefined_materials": undefined} if undefined else {}),
        "cameras": {"preset": preset, "inputs": inputs, "targets": targets},
        "light": {"hdri": hdri.name, "rotation": rotation, "strength": strength},
        "blender": bpy.app.version_string,
        "samples": samples,
        "seed": seed,
        "hdris": [path.name for path in hdri_paths(hdris)],
        **({"up": item["up"]} if "up" in item else {}),
    }
    sample = {"__key__": item["id"], "json": json.dumps(record).encode()}
    for name, part in views.items():
        sample[f"{name}.webp"] = contact_sheet([view["rgba"] for view in part], "WEBP")
        sample[f"{name}.depth.png"] = contact_sheet([view["depth"] for view in part], "PNG")
        sample[f"{name}.normal.png"] = contact_sheet([view["normal"] for view in part], "PNG")
    return sample


def silence_blender():
    """Blender prints a line for every render, whatever its log level: sends the process's standard output nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
