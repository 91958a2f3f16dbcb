"""A picture's folder of results, which appears whole or not at all: tile, views, cameras and exports."""

import io
import json
import logging
import shutil
import tempfile
from pathlib import Path, PurePosixPath

import fsspec
import numpy as np
import PIL.Image
from fsspec.implementations.local import LocalFileSystem

from pipeline import COLUMNS, ROWS

from . import files
from .exports import EXPORTS
from .mesh import GLTF_TO_WORLD
from .options import NUM_FACES
from .pictures import LAST, cut_out

logger = logging.getLogger(__name__)

NAMES = {LAST, "tile.png", *(f"view_{i}.png" for i in range(ROWS * COLUMNS)), *EXPORTS}


def join(output: str, name: str) -> str:
    """Path or URL of `name` in `output`."""
    return f"{output.rstrip('/') or '/'}/{name}"


def is_done(output: str, name: str) -> bool:
    """Whether a result is there and whole."""
    fs, path = fsspec.core.url_to_fs(join(output, name))
    return fs.exists(f"{path}/{LAST}")


def names_in(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """Names of what a folder holds."""
    return [PurePosixPath(entry).name for entry in fs.ls(path, detail=False)]


def check_target(output: str, name: str, overwrite: bool, resume: bool = False) -> bool:
    """Checks that a result can be written without losing anything.

    Args:
        output: folder or URL.
        name: of the result's folder in it.
        overwrite: whether an earlier result may be replaced.
        resume: whether an earlier result is to be kept.

    Returns:
        Whether there is an earlier result, to be kept.

    Raises:
        ValueError: if something else has the name, the name lies outside of the output or inside of another result, or
            there is a result and neither `overwrite` nor `resume`.
    """
    fs, path = fsspec.core.url_to_fs(join(output, name))
    local = isinstance(fs, LocalFileSystem)
    if local:
        root = Path(output).resolve()
        if root not in Path(path).resolve().parents:
            raise ValueError(f"{path} does not lie below {output}: rename the picture, or remove the link.")
    for parent in PurePosixPath(name).parents[:-1]:
        if is_done(output, str(parent)):
            raise ValueError(f"{path} would lie inside of the result {parent}: choose another --output.")
    if is_done(output, name):
        if not (overwrite or resume):
            raise ValueError(f"{path} exists: choose another --output, --overwrite it, or --resume.")
        return resume and not overwrite
    # Elsewhere a folder does not appear whole, and a run that was killed leaves a part of it
    partial = not local and fs.isdir(path) and set(names_in(fs, path)) <= NAMES
    if fs.exists(path) and not (partial and (overwrite or resume)):
        raise ValueError(f"{path} exists and is no result (it has no {LAST}): choose another --output, or move it.")
    return False


def write_result(
    folder: Path,
    pipe,
    tile: PIL.Image.Image,
    views: list[PIL.Image.Image],
    exports=(),
    name="the picture",
    faces: int = NUM_FACES,
    **extra,
):
    """Writes a picture's files into an empty folder. A warning says which exports its views cannot give.

    Args:
        folder: that exists.
        pipe: the pipeline, for its cameras.
        tile: the six views as one picture.
        views: the six views.
        exports: keys of `exports.EXPORTS`.
        name: of the picture, for the warning.
        faces: of a mesh, about.
        extra: more entries of `cameras.json`: what the views were made with.
    """
    tile.save(folder / "tile.png")
    poses = pipe.camera_poses()
    height, width = views[0].height, views[0].width
    intrinsics = pipe.camera_intrinsics(height, width)
    frames = []
    for i, view in enumerate(views):
        view.save(folder / f"view_{i}.png")
        frames.append({"file": f"view_{i}.png", "camera_to_world": poses[i].tolist()})
    write_exports(folder, views, poses, intrinsics, exports, name, faces)
    cameras = {
        "convention": "OpenGL: +X right, +Y up, looking along -Z; world +Z up, input view at azimuth 0 on +X",
        "height": height,
        "width": width,
        "intrinsics": np.asarray(intrinsics).tolist(),
        "gltf_to_world": GLTF_TO_WORLD.tolist(),
        "frames": frames,
        **extra,
    }
    (folder / LAST).write_text(json.dumps(cameras, indent=2) + "\n")


def write_exports(folder: Path, views: list[PIL.Image.Image], poses, intrinsics, exports, name: str, faces: int):
    """Writes the exports of a result into its folder. A warning says which its views cannot give."""
    cut = [cut_out(view, f"view_{i} of {name}") for i, view in enumerate(views)] if exports else []
    for form in exports:
        try:
            EXPORTS[form](folder / form, cut, poses, intrinsics, **({"faces": faces} if form == "glb" else {}))
        except ValueError as error:
            logger.warning("There is no %s of %s: %s", form, name, error)
            shutil.rmtree(folder / form, ignore_errors=True)


def complete(output: str, name: str, exports, faces: int, made_with: dict) -> str:
    """Adds the exports that an earlier result lacks.

    Args:
        output: folder or URL.
        name: of the result's folder in it.
        exports: keys of `exports.EXPORTS`.
        faces: of a mesh, about.
        made_with: entries of `cameras.json` that a result of this run would have. What it does not say is passed over.

    Returns:
        What it was made with otherwise, in words; empty if with the same.

    Raises:
        ValueError: if the result is damaged.
    """
    fs, path = fsspec.core.url_to_fs(join(output, name))
    try:
        cameras = json.loads(fs.cat_file(f"{path}/{LAST}"))
        missing = [form for form in exports if not fs.exists(f"{path}/{form}")]
        with tempfile.TemporaryDirectory() as folder:
            if missing:
                frames = cameras["frames"]
                views = [PIL.Image.open(io.BytesIO(fs.cat_file(f"{path}/view_{i}.png"))) for i in range(len(frames))]
                poses = np.array([frame["camera_to_world"] for frame in frames])
                write_exports(Path(folder), views, poses, np.array(cameras["intrinsics"]), missing, name, faces)
            for form in Path(folder).iterdir():
                if isinstance(fs, LocalFileSystem):
                    with files.new_folder(Path(path, form.name)) as fresh:
                        shutil.copytree(form, fresh, dirs_exist_ok=True)
                else:
                    fs.put(str(form), f"{path}/{form.name}", recursive=True)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): move it, or --overwrite it.") from error
    both = [(key, cameras[key], value) for key, value in made_with.items() if key in cameras]
    other = [f"{key} {before}, not {value}" for key, before, value in both if before != value]
    return ", ".join(other)


def put_result(write, output: str, name: str, overwrite: bool = False, resume: bool = False):
    """Puts a result in its place, whole: locally by a rename, elsewhere with `cameras.json` last.

    Args:
        write: is called with an empty local folder, and fills it.
        output: folder or URL.
        name: of the result's folder in it.
        overwrite: whether an earlier result may be replaced. What else lies in its folder is kept.
        resume: whether a result that has appeared meanwhile is kept without an error.

    Raises:
        ValueError: as [`check_target`].
        FileExistsError: if something else has appeared there meanwhile.
    """
    if check_target(output, name, overwrite, resume):
        return
    fs, path = fsspec.core.url_to_fs(join(output, name))
    if not isinstance(fs, LocalFileSystem):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            there = names_in(fs, path) if fs.exists(path) else []
            for old in sorted(NAMES.intersection(there), key=lambda old: old != LAST):  # no whole result from now on
                fs.rm(f"{path}/{old}", recursive=True)
            made = sorted((p for p in Path(folder).rglob("*") if p.is_file()), key=lambda p: p.name == LAST)
            for file in made:
                fs.put_file(str(file), f"{path}/{file.relative_to(folder).as_posix()}")
        return
    with files.new_folder(Path(path), NAMES.__contains__ if overwrite else None, mark=LAST) as folder:
        write(folder)
