"""Renders objects from Zero123++ cameras with Blender's Cycles into WebDataset shards.

    python -m training.render --toys 40 --output data/toys
    python -m training.render --objects meshes --size 320 --input_size 512 --samples 64 --output data/meshes
    python -m training.render --objaverse uids.txt --size 320 --input_size 512 --samples 64 --output data/objaverse \
        --ray auto

An object is normalised into the sphere of radius 0.5, lit by a random HDRI and seen by 6 input cameras (azimuth a0 +
60k degrees; random elevation, field of view and distance) and 12 target cameras (the six azimuths in between, at both
target elevations): input k has the six targets of Zero123++ among them (see `training.data`), so that 18 renders make
6 training samples. A sample of a shard holds, for the inputs (6 views in a row) and the targets (6 azimuths x 2
elevations),

- `inputs.webp`, `targets.webp`: RGBA with straight alpha, lossless;
- `inputs.depth.png`, `targets.depth.png`: linear camera-plane depth in units of 1 / `DEPTH_UNITS`, 16 bits, 65535
  where there is nothing;
- `inputs.normal.png`, `targets.normal.png`: view-space normals (+X right, +Y up, +Z to the camera), 127.5 (n + 1);
- `json`: object, source, licence, cameras, lighting, versions.

All that is random follows from the object's id and `--seed`. A shard appears whole or not at all, and the same command
continues a run that was interrupted. What cannot be rendered is left out and named in `failures.jsonl`. Needs the
packages `bpy` and `OpenEXR`.
"""

import argparse
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, TimeoutError, as_completed
from functools import partial
from pathlib import Path

import bpy
import numpy as np
import OpenEXR
import webdataset
from mathutils import Matrix, Vector
from pebble import ProcessPool
from PIL import Image
from tqdm import tqdm

from . import toys

RADIUS = 0.5
# Elevations and vertical field of view of the targets (facts of the public checkpoints, arXiv 2310.15110)
CAMERAS = {
    "v1.1": {"elevations": (30.0, -20.0), "fov": math.degrees(2 * math.atan(16 / 35))},
    "v1.2": {"elevations": (20.0, -10.0), "fov": 30.0},
}
INPUT_ELEVATIONS = (-10.0, 40.0)
INPUT_FOVS = (25.0, 45.0)
INPUT_MARGINS = (1.0, 1.2)  # of the distance at which the sphere just fills the view
DEPTH_UNITS = 16384
NO_DEPTH = np.iinfo(np.uint16).max  # where there is nothing


def hdri_paths(folder: Path | None = None) -> list[Path]:
    """The environment maps of a folder, or those that Blender ships, in a fixed order.

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


def normalise(radius: float = RADIUS):
    """Moves and scales all of the scene together: bounding-box centre to the origin, farthest vertex to `radius`.

    The bounds are those of the meshes as they are rendered, with modifiers, instances and animation.

    Raises:
        ValueError: if the scene has no vertices, or all of them in one point.
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
    points = np.concatenate(points)
    centre = (points.min(0) + points.max(0)) / 2 if len(points) else 0
    extent = np.linalg.norm(points - centre, axis=1).max() if len(points) else 0
    if not 0 < extent < math.inf:
        raise ValueError("The object has no extent: it needs at least one mesh with two distinct vertices.")
    # Under a parent, because an animated object's own matrix is written anew for every frame
    fit = bpy.data.objects.new("fit", None)
    fit.matrix_world = Matrix.Scale(radius / extent, 4) @ Matrix.Translation(-Vector(centre))
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
    """Blender's own importer for a file, or None if it has none."""

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
        ".fbx": bpy.ops.import_scene.fbx,
        ".usd": bpy.ops.wm.usd_import,
        ".usda": bpy.ops.wm.usd_import,
        ".usdc": bpy.ops.wm.usd_import,
        ".usdz": bpy.ops.wm.usd_import,
        ".blend": append,
    }.get(path.suffix.lower())


def load_object(item: dict):
    """Adds an object to the empty scene: a toy, or what a file has of meshes, at frame 1."""
    if item["source"] == "toys":
        kind, seed = item["id"].rsplit("-", 1)
        toys.build(kind, int(seed))
    else:
        importer(Path(item["path"]))(filepath=str(item["path"]))
        for thing in list(bpy.context.scene.objects):
            if thing.type in ("CAMERA", "LIGHT", "LIGHT_PROBE", "SPEAKER") and thing != bpy.context.scene.camera:
                bpy.data.objects.remove(thing, do_unlink=True)
    bpy.context.scene.frame_set(1)
    bpy.context.view_layer.update()


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


def tile_cameras(preset: str) -> list[dict]:
    """The six cameras of a tile, of an input view at azimuth 0."""
    fov = CAMERAS[preset]["fov"]
    high, low = CAMERAS[preset]["elevations"]
    return [
        {"azimuth": 30 + 60 * j, "elevation": (high, low)[j % 2], "fov": fov, "distance": fitting_distance(fov)}
        for j in range(6)
    ]


def fitting_distance(fov: float) -> float:
    """At which the sphere just fills a view of `fov` degrees in the plane of its centre."""
    return RADIUS / math.tan(math.radians(fov) / 2)


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
                "distance": fitting_distance(fov) * rng.uniform(*INPUT_MARGINS),
            }
        )
    fov = CAMERAS[preset]["fov"]
    targets = [
        {"azimuth": first + 30 + 60 * k, "elevation": elevation, "fov": fov, "distance": fitting_distance(fov)}
        for elevation in CAMERAS[preset]["elevations"]
        for k in range(6)
    ]
    return inputs, targets


def render_object(
    item: dict, size: int, input_size: int, samples: int, seed: int, preset: str, hdris: Path | None
) -> dict:
    """Renders an object, in this process, and returns its sample for a WebDataset shard."""
    rng = random.Random(f"{seed}/{item['id']}")
    hdri, rotation, strength = rng.choice(hdri_paths(hdris)), rng.uniform(0, 2 * math.pi), rng.uniform(0.9, 1.4)
    inputs, targets = choose_cameras(rng, preset)
    reset_scene(samples)
    load_object(item)
    normalise()
    light(hdri, rotation, strength)
    with tempfile.TemporaryDirectory() as folder:
        views = {
            "inputs": [render_view(camera, input_size, folder) for camera in inputs],
            "targets": [render_view(camera, size, folder) for camera in targets],
        }
    record = {
        "object": item["id"],
        "source": item["source"],
        "licence": item["licence"],
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


def render_shard(items: list[dict], minutes: float, work) -> tuple[bytes, list[dict]]:
    """Renders the objects of one shard, one after another, in a process of their own that may die.

    Args:
        items: the objects.
        minutes: time limit of an object; its process is killed, and the next object has a new one.
        work: [`render_object`] with all but its first argument.

    Returns:
        The shard, and for each object that failed its `id` and `error`.
    """
    # The process must find the package `bpy`, not the inner module of that name whose folder Blender adds to the path.
    sys.path[:] = [folder for folder in sys.path if folder not in bpy.utils.script_paths(subdir="modules")]
    buffer, failures = io.BytesIO(), []
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPool(1, context=context, initializer=silence_blender) as pool,
        webdataset.TarWriter(buffer, encoder=False, mtime=0) as shard,
    ):
        for item in items:
            try:
                shard.write(pool.schedule(work, (item,), timeout=60 * minutes).result())
            except Exception as error:  # whatever a file does to Blender, the others are to be rendered
                reason = f"over {minutes} minutes" if isinstance(error, TimeoutError) else f"{error}"
                failures.append({"id": item["id"], "error": f"{type(error).__name__}: {reason}"})
    return buffer.getvalue(), failures


def toy_items(count: int, first_seed: int, names: Path | None) -> list[dict]:
    """`count` toys of each kind, or those that a file names, one KIND-SEED a line."""
    seeds = range(first_seed, first_seed + count)
    ids = names.read_text().split() if names else [f"{kind}-{seed}" for seed in seeds for kind in toys.KINDS]
    return [{"id": name, "source": "toys", "licence": "Apache-2.0"} for name in ids]


def file_items(folder: Path) -> list[dict]:
    """All files of a folder and those below that Blender can import.

    Raises:
        ValueError: if there is none.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and importer(path))
    if not paths:
        raise ValueError(
            f"`--objects` {folder} has no file that Blender imports (.glb, .obj, .ply, .usd, .blend, ...)."
        )
    names = [str(path.relative_to(folder)) for path in paths]
    ids = [re.sub(r"[^\w-]", "_", name) for name in names]  # a dot would end a WebDataset key
    return [
        {"id": key, "source": name, "licence": None, "path": str(path)} for key, name, path in zip(ids, names, paths)
    ]


def objaverse_items(given: str) -> list[dict]:
    """Objects of Objaverse, downloaded where they are not yet.

    Args:
        given: a text file with one uid a line, or the name of an LVIS category.

    Raises:
        ValueError: if it is neither.
    """
    import objaverse

    if Path(given).is_file():
        uids = Path(given).read_text().split()
    else:
        categories = objaverse.load_lvis_annotations()
        if given not in categories:
            raise ValueError(f"`--objaverse` {given} is neither a file of uids nor an LVIS category.")
        uids = categories[given]
    licences = objaverse.load_annotations(uids)
    paths = objaverse.load_objects(uids)
    return [
        {"id": uid, "source": f"objaverse/{uid}", "licence": licences[uid].get("license"), "path": paths[uid]}
        for uid in uids
        if uid in paths
    ]


def write_whole(path: Path, data: bytes):
    """Writes a file that appears whole or not at all."""
    fresh = path.with_name(path.name + ".partial")
    fresh.write_bytes(data)
    fresh.rename(path)


def write_manifest(output: Path):
    """Writes `manifest.jsonl`: each object's record, its shard and the shard's hash."""
    lines = []
    for path in sorted(output.glob("shard-*.tar")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        for sample in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False):
            lines.append(json.dumps({**json.loads(sample["json"]), "shard": path.name, "sha256": digest}))
    write_whole(output / "manifest.jsonl", "".join(f"{line}\n" for line in lines).encode())


def run_here(jobs: list[tuple], workers: int) -> Iterator[tuple]:
    """Renders shards on this machine; yields (path, shard, failures) as they are finished."""
    with ThreadPoolExecutor(workers) as threads:
        futures = {threads.submit(render_shard, *job): path for path, job in jobs}
        for future in as_completed(futures):
            yield futures[future], *future.result()


def run_on_ray(jobs: list[tuple], address: str) -> Iterator[tuple]:
    """The same on a Ray cluster; a shard whose worker is lost is rendered again elsewhere."""
    import ray

    ray.init(address=address, log_to_driver=False, runtime_env={"py_modules": [str(Path(__file__).parent)]})
    task = ray.remote(num_cpus=1, max_retries=5)(render_shard)
    paths = {task.remote(*job): path for path, job in jobs}
    waiting = list(paths)
    while waiting:
        (ready,), waiting = ray.wait(waiting, num_returns=1)
        yield paths[ready], *ray.get(ready)
    ray.shutdown()


def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Render objects into WebDataset shards.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--toys", type=int, default=40, help="procedural toys of each kind")
    what.add_argument("--names", type=Path, help="text file of toys, one KIND-SEED a line")
    what.add_argument("--objects", type=Path, help="folder of files that Blender imports")
    what.add_argument("--objaverse", help="text file of Objaverse uids, or an LVIS category")
    add("--output", type=Path, required=True, help="folder of the shards; an interrupted run continues")
    add("--cameras", choices=CAMERAS, default="v1.2", help="of the targets")
    add("--hdris", type=Path, help="folder of .exr or .hdr environment maps; those of Blender if missing")
    add("--first_seed", type=int, default=1000, help="the toys' seeds count up from here")
    add("--size", type=int, default=64, help="pixels of a target's edge")
    add("--input_size", type=int, help="pixels of an input's edge; that of a target if missing")
    add("--samples", type=int, default=8, help="Cycles samples a pixel")
    add("--seed", type=int, default=0, help="of cameras and lighting")
    add("--shard_size", type=int, default=20, help="objects a shard")
    add("--minutes", type=float, default=5, help="time limit of an object")
    add("--workers", type=int, default=os.cpu_count(), help="processes")
    add("--ray", metavar="ADDRESS", help="render on this Ray cluster ('auto': the one at hand)")
    add("--dry_run", "--dry-run", action="store_true", help="say what would be rendered, and stop")
    o = parser.parse_args(argv)

    try:
        hdri_paths(o.hdris)
        if o.objects:
            items = file_items(o.objects)
        elif o.objaverse:
            items = objaverse_items(o.objaverse)
        else:
            items = toy_items(o.toys, o.first_seed, o.names)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    shards = [
        (o.output / f"shard-{i // o.shard_size:05d}.tar", items[i : i + o.shard_size])
        for i in range(0, len(items), o.shard_size)
    ]
    missing = [(path, members) for path, members in shards if not path.exists()]
    left = sum(len(members) for _, members in missing)
    if o.dry_run:
        print(
            f"{left} of {len(items)} objects in {len(missing)} of {len(shards)} shards, 18 views of"
            f" {o.size} x {o.size} pixels each, cameras of {o.cameras}"
        )
        return
    o.output.mkdir(parents=True, exist_ok=True)
    work = partial(
        render_object,
        size=o.size,
        input_size=o.input_size or o.size,
        samples=o.samples,
        seed=o.seed,
        preset=o.cameras,
        hdris=o.hdris,
    )
    jobs = [(path, (members, o.minutes, work)) for path, members in missing]
    sizes, failed = {path: len(members) for path, members in missing}, 0
    with tqdm(total=len(items), initial=len(items) - left, unit="object") as bar:
        for path, shard, failures in run_on_ray(jobs, o.ray) if o.ray else run_here(jobs, o.workers):
            if failures:
                with open(o.output / "failures.jsonl", "a") as file:
                    file.writelines(json.dumps(failure) + "\n" for failure in failures)
            write_whole(path, shard)
            failed += len(failures)
            bar.update(sizes[path])
            bar.set_postfix(failed=failed)
    write_manifest(o.output)
    if failed:
        print(f"{failed} objects failed: see {o.output / 'failures.jsonl'}.", file=sys.stderr)


if __name__ == "__main__":
    from training import render  # workers find functions by their module's name, which is not __main__

    render.main()
