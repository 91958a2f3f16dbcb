"""Blender: the scene, its cameras, and the sample of one object. `training.render` writes samples into shards.

Needs the packages `bpy` and `OpenEXR`.
"""

import io
import json
import math
import os
import random
import tempfile
from pathlib import Path

import bpy
import numpy as np
import OpenEXR
from mathutils import Matrix, Vector
from PIL import Image

from pipeline import CAMERAS, RADIUS, Cameras

from . import catalogue, toys

INPUT_ELEVATIONS = (-10.0, 40.0)
INPUT_FOVS = (25.0, 45.0)
INPUT_MARGINS = (1.0, 1.2)  # of the distance at which the sphere just fills the view
STRETCH = (0.7, 1.4)  # of a variant, along each axis
DEPTH_UNITS = 16384
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
    """Empties Blender and sets up Cycles: `samples` per pixel, denoised, transparent background."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    scene = bpy.context.scene
    scene.render.engine = "CYCLES"
    scene.cycles.samples = samples
    scene.cycles.use_denoising, scene.cycles.denoising_quality = True, "FAST"
    scene.cycles.denoising_input_passes = "RGB"  # albedo and normal passes would double the time of so small a view
    scene.cycles.max_bounces = 4
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


def normalise(min_thickness: float = 0.0, stretch=(1.0, 1.0, 1.0)):
    """Moves and scales all of the scene together: bounding-box centre to the origin, farthest vertex to `RADIUS`.

    The bounds are those of the meshes as they are rendered, with modifiers, instances and animation.

    Args:
        min_thickness: the least ratio of the bounds' shortest edge to their longest.
        stretch: factor along each axis, before that.

    Raises:
        ValueError: if the scene has no vertices, or all of them in one point, or is flatter than that.
    """
    points = [np.zeros((0, 3))]
    for instance in bpy.context.evaluated_depsgraph_get().object_instances:
        if instance.object.type != "MESH":
            continue
        mesh = instance.object.to_mesh()
        flat = np.empty(3 * len(mesh.vertices))
        mesh.vertices.foreach_get("co", flat)
        matrix = np.array(instance.matrix_world)
        points.append(flat.reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3])
    points = np.concatenate(points) * stretch
    centre = (points.min(0) + points.max(0)) / 2 if len(points) else 0
    extent = np.linalg.norm(points - centre, axis=1).max() if len(points) else 0
    if not 0 < extent < math.inf:
        raise ValueError("The object has no extent: it needs at least one mesh with two distinct vertices.")
    edges = np.ptp(points, axis=0)
    if edges.min() < min_thickness * edges.max():
        raise ValueError(f"The object is flat: its shortest edge is {edges.min() / edges.max():.3f} of its longest.")
    # Under a parent, because an animated object's own matrix is written anew for every frame
    fit = bpy.data.objects.new("fit", None)
    fit.matrix_world = (
        Matrix.Scale(RADIUS / extent, 4) @ Matrix.Translation(-Vector(centre)) @ Matrix.Diagonal((*stretch, 1))
    )
    for thing in bpy.context.scene.objects:
        if thing.parent is None and thing != bpy.context.scene.camera:
            thing.parent = fit
    bpy.context.collection.objects.link(fit)
    bpy.context.view_layer.update()


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
    environment.image = bpy.data.images.load(str(hdri))
    mapping = nodes.new("ShaderNodeMapping")
    mapping.inputs["Rotation"].default_value[2] = rotation
    links.new(nodes.new("ShaderNodeTexCoord").outputs["Generated"], mapping.inputs["Vector"])
    links.new(mapping.outputs["Vector"], environment.inputs["Vector"])
    links.new(environment.outputs["Color"], nodes["Background"].inputs["Color"])


def importer(path: Path):
    """Returns Blender's own importer for a file, or None if it has none. Scripts in .blend files do not run."""

    def append(filepath):
        with bpy.data.libraries.load(filepath) as (source, target):
            target.objects = source.objects
        for thing in target.objects:
            bpy.context.collection.objects.link(thing)

    return {
        ".glb": bpy.ops.import_scene.gltf,
        ".gltf": bpy.ops.import_scene.gltf,
        ".obj": bpy.ops.wm.obj_import,
        ".ply": bpy.ops.wm.ply_import,
        ".stl": bpy.ops.wm.stl_import,
        ".fbx": bpy.ops.import_scene.fbx,
        ".usd": bpy.ops.wm.usd_import,
        ".usda": bpy.ops.wm.usd_import,
        ".usdc": bpy.ops.wm.usd_import,
        ".usdz": bpy.ops.wm.usd_import,
        ".blend": append,
    }.get(path.suffix.lower())


def load_object(item: dict, folder: str | None = None):
    """Adds an object to the empty scene: a toy, or the meshes of a file, at frame 1.

    Args:
        item: as `training.render` lists it.
        folder: to extract an archive's object into.

    Raises:
        ValueError: if the file has no faces, or an image that it uses is missing.
    """
    if item["source"] == "toys":
        kind, seed = item["id"].rsplit("-", 1)
        toys.build(kind, int(seed))
    else:
        path = catalogue.extract(item, folder) if "member" in item else Path(item["path"])
        importer(path)(filepath=str(path))
        for thing in list(bpy.context.scene.objects):
            if thing.type in ("CAMERA", "LIGHT", "LIGHT_PROBE", "SPEAKER") and thing != bpy.context.scene.camera:
                bpy.data.objects.remove(thing, do_unlink=True)
        if "rotation" in item:
            turn(item["rotation"])
        check_import()
        show_vertex_colours()
    bpy.context.scene.frame_set(1)
    bpy.context.view_layer.update()


def turn(rotation: list[float]):
    """Turns the scene by 9 numbers, row by row, that are in axes with +Y up, as in the files that Blender imports."""
    upright = Matrix(((1, 0, 0), (0, 0, -1), (0, 1, 0)))  # +Y up to +Z up
    matrix = upright @ Matrix([rotation[i : i + 3] for i in (0, 3, 6)]) @ upright.transposed()
    for thing in bpy.context.scene.objects:
        if thing.parent is None and thing != bpy.context.scene.camera:
            thing.matrix_world = matrix.to_4x4() @ thing.matrix_world


def check_import():
    """Checks what an importer made: it reports neither faces nor textures that are missing.

    Raises:
        ValueError: naming what is missing.
    """
    meshes = [thing.data for thing in bpy.data.objects if thing.type == "MESH"]
    if not any(len(mesh.polygons) for mesh in meshes):
        count = sum(len(mesh.vertices) for mesh in meshes)
        raise ValueError(f"The file has {count} points but no faces: a point cloud cannot be rendered. Mesh it first.")
    for image in bpy.data.images:
        path = bpy.path.abspath(image.filepath)
        if image.source == "FILE" and not image.packed_file and not os.path.isfile(path):
            raise ValueError(f"The texture {path} is missing: put it there, or pack it into the file.")


def show_vertex_colours():
    """Gives meshes that have vertex colours and no material one that shows the colours."""
    for thing in bpy.data.objects:
        mesh = thing.data
        if thing.type != "MESH" or not mesh.color_attributes or any(mesh.materials):
            continue
        material = bpy.data.materials.new("vertex colours")
        material.use_nodes = True
        nodes, links = material.node_tree.nodes, material.node_tree.links
        attribute = nodes.new("ShaderNodeVertexColor")
        attribute.layer_name = mesh.color_attributes[0].name
        links.new(attribute.outputs["Color"], nodes["Principled BSDF"].inputs["Base Color"])
        mesh.materials.clear()
        mesh.materials.append(material)


def render_view(camera: dict, size: int, folder: str) -> dict[str, np.ndarray]:
    """One view that looks at the origin with world Z up.

    Args:
        camera: `azimuth`, `elevation` and vertical `fov` in degrees, and `distance`.
        size: S, pixels of the view's edge.
        folder: for temporary files.

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
        ValueError: if it has nothing to render, is flatter than `min_thickness`, or covers less than `min_cover` of
            some target view.
    """
    rng = random.Random(f"{seed}/{item['id']}")
    hdri, rotation, strength = rng.choice(hdri_paths(hdris)), rng.uniform(0, 2 * math.pi), rng.uniform(0.9, 1.4)
    inputs, targets = choose_cameras(rng, preset)
    stretch = [rng.uniform(*STRETCH) if "of" in item else 1.0 for _ in range(3)]
    reset_scene(samples)
    with tempfile.TemporaryDirectory() as folder:
        load_object(item, folder)
        normalise(min_thickness, stretch)
        light(hdri, rotation, strength)
        views = {
            "inputs": [render_view(camera, input_size, folder) for camera in inputs],
            "targets": [render_view(camera, size, folder) for camera in targets],
        }
    if not any(view["rgba"][..., 3].any() for view in views["targets"]):
        raise ValueError("No target view shows the object: it is transparent, or its faces are too small.")
    cover = min((view["rgba"][..., 3] > 0).mean() for view in views["targets"])
    if cover < min_cover:
        raise ValueError(f"The object covers {cover:.3f} of a target view, less than {min_cover}.")
    record = {
        "object": item["id"],
        **{name: item[name] for name in ("source", *catalogue.FIELDS, "of") if name in item},
        **({"stretch": stretch} if "of" in item else {}),
        "cameras": {"preset": preset, "inputs": inputs, "targets": targets},
        "light": {"hdri": hdri.name, "rotation": rotation, "strength": strength},
        "blender": bpy.app.version_string,
        "samples": samples,
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
