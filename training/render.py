"""Renders objects from Zero123++ cameras with Blender's Cycles into WebDataset shards.

    python -m training.render --objects meshes --size 320 --input-size 512 --samples 64 --output data/meshes
    python -m training.render --objaverse uids.txt --size 320 --input-size 512 --samples 64 --output data/objaverse \
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

All random choices follow from the object's id and `--seed`. A shard appears whole or not at all, and the same command
continues a run that was interrupted. What cannot be rendered is left out and named in `failures.jsonl`. Needs the
packages `bpy` and `OpenEXR`.
"""

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, TimeoutError, as_completed
from functools import partial
from pathlib import Path

import bpy
import webdataset
from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

from pipeline import CAMERAS
from zero123plus.files import ray_environment, walk, write_file
from zero123plus.options import Parser, command, count, number, share, whole

from . import catalogue
from .blender import hdri_paths, importer, load_hdri, render_object, silence_blender
from .shards import check_shards, index_shards, read_member, read_object

SECONDS = 2.5  # of a worker for an object at 128 pixels and 8 samples, two cores of an AMD EPYC
MAX_ID = 100  # characters; file systems take 255 bytes of a name, suffixes among them
# Suffixes of files beside objects: materials, buffers, textures, lists
COMPANIONS = {".mtl", ".bin", ".txt", ".md", ".json", ".jsonl", ""}
COMPANIONS |= {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".tga", ".bmp", ".exr", ".hdr", ".dds"}


def render_shard(items: list[dict], minutes: float, work) -> tuple[bytes, list[dict]]:
    """Renders the objects of one shard, one after another, in a process of their own that may die, or is killed when
    an object takes longer than `minutes`. `work` is [`render_object`] with all but its first argument.

    Returns:
        The shard, and for each object that failed its `id` and `error`.
    """
    buffer, failures = io.BytesIO(), []
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPool(1, context=context, initializer=silence_blender) as pool,
        webdataset.TarWriter(buffer, encoder=False, mtime=0) as shard,
    ):
        for item in items:
            try:
                try:
                    sample = pool.schedule(work, (item,), timeout=60 * minutes).result()
                except ProcessExpired:  # once more: it may have been the process alone
                    sample = pool.schedule(work, (item,), timeout=60 * minutes).result()
                shard.write(sample)
            except ImportError:  # of the worker, which no object is to blame for
                raise
            except Exception as error:  # whatever a file does to Blender, the others are to be rendered
                if not pool.active:
                    raise
                reason = f"over {minutes} minutes" if isinstance(error, TimeoutError) else f"{error}"
                failures.append({"id": item["id"], "error": f"{type(error).__name__}: {reason}"})
    return buffer.getvalue(), failures


def hide_inner_modules():
    """Lets new processes find the package `bpy`, not the inner module of that name whose folder Blender adds to the
    path. To be called before there are threads.
    """
    sys.path[:] = [folder for folder in sys.path if folder not in bpy.utils.script_paths(subdir="modules")]


def read_names(path: Path) -> list[str]:
    """Reads a text file of names or uids: one a line, or the first column of a table, with or without a head.

    Raises:
        ValueError: if it has none, or is no text in UTF-8 or UTF-16.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}): save it as that.") from error
    names = [re.split(r"[,;\t]", line)[0].strip().strip('"') for line in text.splitlines()]
    names = [name for name in names if name and name.lower() not in ("uid", "id", "name", "object")]
    if not names:
        raise ValueError(f"{path} has no names: give one a line.")
    return names


def file_items(path: Path) -> list[dict]:
    """A file, or all files of a folder and those below, that Blender can import; the objects of an archive of Sweet
    Home 3D. What a catalogue says of a file is in its item (see `training.catalogue`).

    Raises:
        ValueError: if there is none.
    """
    if path.suffix.lower() == catalogue.ARCHIVE:
        return catalogue.archive_items(path)
    files = [path] if path.is_file() else sorted(walk(path))
    paths = [file for file in files if importer(file)]
    left_out = [file.name for file in files if not importer(file) and file.suffix.lower() not in COMPANIONS]
    named = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
    if not paths:
        raise ValueError(
            f"`--objects` {path} has no file that Blender imports (.glb, .obj, .ply, .stl, .usd, .blend, ...)"
            + (f", but {named}." if left_out else ".")
        )
    if left_out:
        print(f"{len(left_out)} files of {path} are left out, which Blender does not import: {named}", file=sys.stderr)
    root = path.parent if path.is_file() else path
    known = catalogue.folder_catalogue(root)
    names = [str(file.relative_to(root)) for file in paths]
    # Without the suffix, because a dot would end a WebDataset key
    ids = [re.sub(r"[^\w-]", "_", str(Path(name).with_suffix(""))) for name in names]
    ids = [key if len(key) <= MAX_ID else f"{key[: MAX_ID - 9]}_{short_hash(key)}" for key in ids]
    items = [
        {"id": key, "source": name, "licence": None, "path": str(path)} for key, name, path in zip(ids, names, paths)
    ]
    return distinct([{**item, **known.get(item["source"], {})} for item in items])


def short_hash(text: str) -> str:
    """Eight digits by which texts are told apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def distinct(items: list[dict]) -> list[dict]:
    """The items, each once. Those whose ids are alike, because their paths differ in the folder that was given, in the
    suffix or in a special character alone, get a part of the hash of their path.
    """
    items = {(os.path.realpath(item["path"]), item.get("member")): item for item in items}
    counts = Counter(item["id"] for item in items.values())
    sources = Counter((item["id"], item["source"]) for item in items.values())
    for (path, _), item in items.items():
        if counts[item["id"]] > 1:
            differs = item["source"] if sources[item["id"], item["source"]] == 1 else path
            item["id"] = f"{item['id']}_{short_hash(differs)}"
    return list(items.values())


def listed(items: list[dict], path: Path, option: str) -> list[dict]:
    """The items that a list names ([`catalogue.read_list`]), by id, file, path or name. Says what matches none."""
    ids, names = catalogue.read_list(path)
    known = [{item["id"], item["source"], Path(item["source"]).name} for item in items]
    missing = sorted(ids.difference(*known)) + sorted(names.difference(str(item.get("name")) for item in items))
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        print(f"{len(missing)} entries of `{option}` {path} match no object: {shown}", file=sys.stderr)
    return [item for item, keys in zip(items, known) if ids & keys or item.get("name") in names]


def add_variants(items: list[dict], count: int) -> list[dict]:
    """The objects, none of which is held out, and, of each, `count` variants, as ID_v1, ID_v2, ...: stretched along
    the three axes and, where they are of an archive, with the textures of another object of their category, which
    follows from the id.
    """
    categories = {}
    for item in items if count else ():
        if "member" in item:
            categories.setdefault(item["category"], []).append(item)
    found = list(items)
    for item, i in itertools.product(items, range(1, count + 1)):
        variant = {**item, "id": f"{item['id']}_v{i}", "of": item["id"]}
        others = [other for other in categories.get(item.get("category"), []) if other["id"] != item["id"]]
        if others:
            variant["textures"] = random.Random(variant["id"]).choice(others)
        found.append(variant)
    return found


def objaverse_items(given: str) -> list[dict]:
    """Objects of Objaverse, downloaded where they are not yet: those of a text file with one uid a line, or of an LVIS
    category.

    Raises:
        ValueError: if it is neither.
    """
    import objaverse

    if Path(given).is_file():
        uids = read_names(Path(given))
    else:
        categories = objaverse.load_lvis_annotations()
        if given not in categories:
            raise ValueError(f"`--objaverse` {given} is neither a file of uids nor an LVIS category.")
        uids = categories[given]
    licences = objaverse.load_annotations(uids)
    unknown = [uid for uid in uids if uid not in licences]
    if unknown:
        print(f"{len(unknown)} uids are not in Objaverse and are left out: {', '.join(unknown[:5])}", file=sys.stderr)
    if not licences:
        raise ValueError(f"`--objaverse` {given}: none of its {len(uids)} uids is in Objaverse, such as {uids[0]!r}.")
    paths = objaverse.load_objects([uid for uid in uids if uid in licences])
    return [
        {"id": uid, "source": f"objaverse/{uid}", "licence": licences[uid].get("license"), "path": paths[uid]}
        for uid in uids
        if uid in paths
    ]


def write_manifest(output: Path):
    """Writes `manifest.jsonl`: each object's record, its shard and the shard's hash. Names objects to look at."""
    digests, lines = {}, []
    notes = {
        "animated": "are animated, of which one frame is shown",
        "undefined_materials": "use materials that they do not define, which are plain",
    }
    noted = {note: [] for note in notes}
    for entry in index_shards(output, needed=False):
        shard = entry["shard"]
        if shard not in digests:
            digests[shard] = hashlib.sha256(shard.read_bytes()).hexdigest()
        record = json.loads(read_member(entry, "json"))
        lines.append(json.dumps({**record, "shard": shard.name, "sha256": digests[shard]}))
        for note in notes.keys() & record.keys():
            noted[note].append(record["object"])
    write_file(output / "manifest.jsonl", "".join(f"{line}\n" for line in lines).encode())
    for note, objects in noted.items():
        if objects:
            print(f"{len(objects)} objects {notes[note]}: {', '.join(objects[:5])}", file=sys.stderr)


def run_here(jobs: list[tuple], workers: int) -> Iterator[tuple]:
    """Renders shards on this machine; yields (path, shard, failures) as they are finished."""
    hide_inner_modules()
    with ThreadPoolExecutor(workers) as threads:
        futures = {threads.submit(render_shard, *job): path for path, job in jobs}
        for future in as_completed(futures):
            yield futures[future], *future.result()


def run_on_ray(jobs: list[tuple], address: str) -> Iterator[tuple]:
    """The same on a Ray cluster; a shard whose worker is lost is rendered again elsewhere."""
    import ray

    ray.init(address=address, log_to_driver=False, runtime_env=ray_environment("*.safetensors"))

    def render_shard_there(*job):
        hide_inner_modules()
        return render_shard(*job)

    task = ray.remote(num_cpus=1, max_retries=5)(render_shard_there)
    paths = {task.remote(*job): path for path, job in jobs}
    waiting = list(paths)
    while waiting:
        (ready,), waiting = ray.wait(waiting, num_returns=1)
        yield paths[ready], *ray.get(ready)
    ray.shutdown()


def check_output(output: Path, entries: list[dict], asked: dict):
    """Checks that the shards that are there were rendered as is asked for now, by the names of the options. Raises
    ValueError naming both.
    """
    if not entries:
        return
    item, there = read_object(entries[0]), json.loads(read_member(entries[0], "json"))
    there |= {"size": item["targets"].shape[2], "input-size": item["inputs"].shape[1]}
    there["cameras"] = check_shards(entries) or asked["cameras"]
    for name, value in asked.items():
        if there.get(name, value) != value:
            raise ValueError(
                f"`--output` {output} was rendered with `--{name}` {there[name]}, but {value} is asked for now: choose"
                " another folder."
            )


def plan(output: Path, items: list[dict], entries: list[dict], shard_size: int, retry: bool):
    """The shards that are to be rendered, under names that are free, and their objects: those that no shard has and
    that have not failed, or have and are to be tried again. Pairs of a shard's path and its objects.
    """
    done = {entry["key"] for entry in entries}
    failures = output / "failures.jsonl"
    if failures.exists() and not retry:
        done |= {json.loads(line)["id"] for line in failures.read_text().splitlines()}
    left = list({item["id"]: item for item in items if item["id"] not in done}.values())
    names = (path for i in itertools.count() if not (path := output / f"shard-{i:05d}.tar").exists())
    return [(next(names), left[i : i + shard_size]) for i in range(0, len(left), shard_size)]


def render(output: Path, shards: list[tuple[Path, list[dict]]], minutes: float, work, workers: int, ray: str | None):
    """Renders shards of [`plan`], in processes on this machine or on a Ray cluster."""
    output.mkdir(parents=True, exist_ok=True)
    jobs = [(path, (members, minutes, work)) for path, members in shards]
    members_of, failed = dict(shards), 0
    with tqdm(total=sum(len(members) for _, members in shards), unit="object") as bar:
        for path, shard, failures in run_on_ray(jobs, ray) if ray else run_here(jobs, workers):
            record_failures(output / "failures.jsonl", members_of[path], failures)
            write_file(path, shard)
            failed += len(failures)
            bar.update(len(members_of[path]))
            bar.set_postfix(failed=failed)
    write_manifest(output)
    if failed:
        print(f"{failed} objects failed: see {output / 'failures.jsonl'}.", file=sys.stderr)


def record_failures(path: Path, members: list[dict], failures: list[dict]):
    """Replaces what a file of failures says of the objects of a shard."""
    ids = {item["id"] for item in members}
    lines = path.read_text().splitlines() if path.exists() else []
    lines = [line for line in lines if json.loads(line)["id"] not in ids] + [json.dumps(entry) for entry in failures]
    if lines:
        write_file(path, "".join(f"{line}\n" for line in lines).encode())
    else:
        path.unlink(missing_ok=True)


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = Parser("Render objects into WebDataset shards.")
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--objects", type=Path, nargs="+", help="files for Blender, folders of them, or .sh3f")
    what.add_argument("--objaverse", help="text file of Objaverse uids, or an LVIS category")
    add("--only", type=Path, help="file of objects, one id a line or JSON lines: render these alone")
    add("--without", type=Path, help="file of objects, likewise: leave these out")
    add("--output", type=Path, required=True, help="folder of the shards; an interrupted run continues")
    add("--cameras", choices=CAMERAS, default="v1.2", help="cameras of the targets")
    add("--hdris", type=Path, help="folder of .exr or .hdr environment maps; those of Blender if missing")
    add("--size", type=count, default=128, help="pixels of a target's edge")
    add("--input-size", type=count, help="pixels of an input's edge; that of a target if missing")
    add("--samples", type=count, default=8, help="Cycles samples a pixel")
    add("--seed", type=whole, default=0, help="seed of cameras and lighting")
    add("--shard-size", type=count, default=20, help="objects a shard")
    add("--variants", type=whole, default=0, help="variants of each object: stretched, with other textures")
    add("--up", choices=("y", "z"), default="y", help="axis that is up in .obj, .ply and .stl, which do not say it")
    add("--min-thickness", type=share, default=0, help="least ratio of an object's shortest edge to its longest")
    add("--min-cover", type=share, default=0, help="least share of each target view that an object covers")
    add("--minutes", type=number(float, 0), default=5, help="time limit of an object")
    add("--retry-failed", action="store_true", help="render objects that failed before once more")
    add("--workers", type=count, default=os.cpu_count(), help="processes that render")
    add("--ray", metavar="ADDRESS", help="render on this Ray cluster ('auto': the one at hand)")
    add("--dry-run", action="store_true", help="say what would be rendered, and stop")
    o = parser.parse_args(argv)
    for path in hdri_paths(o.hdris):
        load_hdri(path)
    if o.objects:
        items = distinct([{**item, "up": o.up} for path in o.objects for item in file_items(path)])
    else:
        items = objaverse_items(o.objaverse)
    if o.without:
        left_out = listed(items, o.without, "--without")
        items = [item for item in items if item not in left_out]
    items = add_variants(items, o.variants)
    if o.only:
        items = listed(items, o.only, "--only")
    input_size = o.input_size or o.size
    entries = index_shards(o.output, needed=False)
    maps = [path.name for path in hdri_paths(o.hdris)]
    asked = {"size": o.size, "input-size": input_size, "cameras": o.cameras, "samples": o.samples, "seed": o.seed}
    check_output(o.output, entries, asked | {"hdris": maps, **({"up": o.up} if o.objects else {})})
    shards = plan(o.output, items, entries, o.shard_size, o.retry_failed)
    left = sum(len(members) for _, members in shards)
    print(
        f"{left} of {len(items)} objects in {len(shards)} shards, 18 views of {o.size} x {o.size} pixels each,"
        f" cameras of {o.cameras}; at least {left * SECONDS / o.workers / 3600:.1f} hours"
    )
    if o.dry_run:
        return
    options = {"size": o.size, "input_size": input_size, "samples": o.samples, "seed": o.seed, "preset": o.cameras}
    options |= {"min_thickness": o.min_thickness, "min_cover": o.min_cover, "hdris": o.hdris}
    render(o.output, shards, o.minutes, partial(render_object, **options), o.workers, o.ray)


if __name__ == "__main__":
    main()
