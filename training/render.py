"""Renders objects from Zero123++ cameras with Blender's Cycles into WebDataset shards.

    python -m training.render --toys 40 --output data/train

An object is normalised into the sphere of radius 0.5, lit by a random HDRI and seen by 6 input cameras (azimuth a0 +
60k degrees, random elevation) and 12 target cameras (the six azimuths in between, at both target elevations): input k
has the six targets of Zero123++ among them (see `training.data`), so that 18 renders make 6 training samples. A
sample of a shard holds `inputs.webp` (6 views in a row), `targets.webp` (6 azimuths x 2 elevations), both RGBA with
straight alpha, and `json` (object, cameras, lighting, versions). Everything drawn at random is a function of the
object and `--seed`.

A shard appears whole or not at all; the same command continues a run that was interrupted. Needs the package `bpy`.
"""

import argparse
import io
import json
import math
import multiprocessing
import os
import random
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import bpy
import numpy as np
import webdataset
from mathutils import Matrix, Vector
from PIL import Image
from tqdm import tqdm

from . import toys

# Zero123++ v1.2: six azimuths 60 degrees apart, elevations 20 and -10, vertical field of view 30, object in a sphere
# of radius 0.5 that the view just encloses (arXiv 2310.15110; the camera distance follows from radius and field of
# view).
RADIUS = 0.5
TARGET_ELEVATIONS = (20.0, -10.0)
FOV = 30.0
DISTANCE = RADIUS / math.tan(math.radians(FOV) / 2)
INPUT_ELEVATIONS = (-10.0, 40.0)
SHARD_SIZE = 20


def hdri_paths() -> list[Path]:
    """The environment maps that Blender ships, in a fixed order."""
    return sorted(Path(bpy.utils.system_resource("DATAFILES", path="studiolights/world")).glob("*.exr"))


def reset_scene(size: int, samples: int):
    """Empties Blender and sets up Cycles: `size` x `size` pixels, `samples` per pixel, denoised, transparent
    background.
    """
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
    scene.render.resolution_x = scene.render.resolution_y = size
    scene.render.resolution_percentage = 100
    scene.render.image_settings.file_format = "PNG"
    scene.render.image_settings.color_mode = "RGBA"
    scene.view_settings.view_transform = "Standard"  # colours as painted: the default tone mapping greys them
    camera = bpy.data.cameras.new("camera")
    scene.camera = bpy.data.objects.new("camera", camera)
    scene.collection.objects.link(scene.camera)
    camera.sensor_fit, camera.angle = "VERTICAL", math.radians(FOV)


def normalise(radius: float = RADIUS):
    """Moves and scales all meshes of the scene together: bounding-box centre to the origin, farthest vertex to
    `radius`.

    Raises:
        ValueError: if the scene has no vertices, or all of them in one point.
    """
    graph = bpy.context.evaluated_depsgraph_get()
    meshes = [thing for thing in bpy.context.scene.objects if thing.type == "MESH"]
    points = [np.zeros((0, 3))]
    for thing in meshes:
        mesh = thing.evaluated_get(graph).to_mesh()
        flat = np.empty(3 * len(mesh.vertices))
        mesh.vertices.foreach_get("co", flat)
        points.append(
            flat.reshape(-1, 3) @ np.array(thing.matrix_world)[:3, :3].T + np.array(thing.matrix_world)[:3, 3]
        )
    points = np.concatenate(points)
    centre = (points.min(0) + points.max(0)) / 2 if len(points) else 0
    extent = np.linalg.norm(points - centre, axis=1).max() if len(points) else 0
    if not extent > 0:
        raise ValueError("The object has no extent: it needs at least one mesh with two distinct vertices.")
    fit = Matrix.Scale(radius / extent, 4) @ Matrix.Translation(-Vector(centre))
    for thing in meshes:
        if thing.parent is None:
            thing.matrix_world = fit @ thing.matrix_world


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


def render_view(azimuth: float, elevation: float, folder: str) -> Image.Image:
    """One RGBA view from (azimuth, elevation) in degrees, looking at the origin with world Z up."""
    a, e = math.radians(azimuth), math.radians(elevation)
    position = DISTANCE * Vector((math.cos(a) * math.cos(e), math.sin(a) * math.cos(e), math.sin(e)))
    scene = bpy.context.scene
    scene.camera.matrix_world = Matrix.Translation(position) @ position.to_track_quat("Z", "Y").to_matrix().to_4x4()
    scene.render.filepath = os.path.join(folder, "view.png")
    bpy.ops.render.render(write_still=True)
    with Image.open(scene.render.filepath) as view:
        return view.convert("RGBA")


def contact_sheet(views: list[Image.Image], columns: int) -> bytes:
    """Views of one size in rows of `columns`, as lossless WebP."""
    width, height = views[0].size
    sheet = Image.new("RGBA", (columns * width, len(views) // columns * height))
    for i, view in enumerate(views):
        sheet.paste(view, (i % columns * width, i // columns * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def render_toy(name: str, size: int, samples: int, seed: int) -> dict:
    """Renders the toy `name` ("kind-seed") and returns its sample for a WebDataset shard."""
    kind, toy_seed = name.rsplit("-", 1)
    rng = random.Random(f"{seed}/{name}")
    hdri, rotation, strength = rng.choice(hdri_paths()), rng.uniform(0, 2 * math.pi), rng.uniform(0.9, 1.4)
    first = rng.uniform(0, 60)
    inputs = [(first + 60 * k, rng.uniform(*INPUT_ELEVATIONS)) for k in range(6)]
    targets = [(first + 30 + 60 * k, elevation) for elevation in TARGET_ELEVATIONS for k in range(6)]

    reset_scene(size, samples)
    toys.build(kind, int(toy_seed))
    bpy.context.view_layer.update()
    normalise()
    light(hdri, rotation, strength)
    with tempfile.TemporaryDirectory() as folder:
        views = [render_view(*camera, folder) for camera in inputs + targets]
    cameras = {"inputs": inputs, "targets": targets, "fov": FOV, "distance": DISTANCE}
    lighting = {"hdri": hdri.name, "rotation": rotation, "strength": strength}
    record = {
        "object": name,
        "cameras": cameras,
        "light": lighting,
        "blender": bpy.app.version_string,
        "samples": samples,
    }
    return {
        "__key__": name,
        "inputs.webp": contact_sheet(views[:6], 6),
        "targets.webp": contact_sheet(views[6:], 6),
        "json": json.dumps(record).encode(),
    }


def silence_blender():
    """Blender prints a line for every render, whatever its log level: sends the process's standard output nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def render_shard(job: tuple[Path, list[str]], size: int, samples: int, seed: int) -> int:
    """Renders the toys of one shard and returns how many."""
    path, names = job
    partial_path = path.with_suffix(".partial")
    with open(partial_path, "wb") as file, webdataset.TarWriter(file, encoder=False) as shard:
        for name in names:
            shard.write(render_toy(name, size, samples, seed))
    partial_path.rename(path)
    return len(names)


def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Render toys into WebDataset shards.")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the shards; an interrupted run continues"
    )
    parser.add_argument("--toys", type=int, default=40, help="toys of each kind (default: %(default)s)")
    parser.add_argument(
        "--first_seed", type=int, default=1000, help="the toys' seeds count up from here (default: %(default)s)"
    )
    parser.add_argument("--names", type=Path, help="a text file with one KIND-SEED a line, rendered instead of --toys")
    parser.add_argument("--size", type=int, default=64, help="pixels of a view's edge (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="Cycles samples a pixel (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of cameras and lighting (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    options = parser.parse_args(argv)

    if options.names:
        names = options.names.read_text().split()
    else:
        seeds = range(options.first_seed, options.first_seed + options.toys)
        names = [f"{kind}-{seed}" for seed in seeds for kind in toys.KINDS]
    options.output.mkdir(parents=True, exist_ok=True)
    jobs = [
        (options.output / f"shard-{i // SHARD_SIZE:05d}.tar", names[i : i + SHARD_SIZE])
        for i in range(0, len(names), SHARD_SIZE)
    ]
    todo = [job for job in jobs if not job[0].exists()]
    work = partial(render_shard, size=options.size, samples=options.samples, seed=options.seed)
    # A worker must find the package `bpy`, not the inner module of that name whose folder Blender adds to the path.
    sys.path[:] = [folder for folder in sys.path if folder not in bpy.utils.script_paths(subdir="modules")]
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(options.workers, context, silence_blender) as pool,
        tqdm(total=len(names), unit="object") as bar,
    ):
        bar.update(len(names) - sum(len(names) for _, names in todo))
        for finished in as_completed([pool.submit(work, job) for job in todo]):
            bar.update(finished.result())


if __name__ == "__main__":
    main()
