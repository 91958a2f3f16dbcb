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

from . import files
from .checks import LAST, NAMES, check_target, join, names_in
from .exports import EXPORTS
from .mesh import GLTF_TO_WORLD
from .options import NUM_FACES
from .pictures import cut_out

logger = logging.getLogger(__name__)


def files_of(output: str, name: str) -> list[str]:
    """Paths or URLs of the files of a result, as far as generate.py writes them."""
    fs, path = fsspec.core.url_to_fs(join(output, name))
    files = (file.removeprefix(path).lstrip("/") for file in sorted(fs.find(path)))
    return [join(output, f"{name}/{file}") for file in files if PurePosixPath(file).parts[0] in NAMES]


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
    """Writes a picture's files into an empty folder: tile, views, exports (keys of `exports.EXPORTS`) and
    `cameras.json`, which has `extra` too. A warning says which exports the views of `name` cannot give.
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
    """Adds the exports that an earlier result lacks. Returns what it was made with otherwise than `made_with`, in
    words; what it does not say is passed over.

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
    """Puts a result in its place, whole: locally by a rename, elsewhere with `cameras.json` last. `write` fills an
    empty local folder. What else lies in the folder of a result that `overwrite` replaces is kept; with `resume` one
    that has appeared meanwhile is kept without an error.

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


def put_new(write, output: Path):
    """Puts a result into a new folder as [`put_result`] does, and prints its files."""
    put_result(write, str(output.absolute().parent), output.name)
    print(*sorted(map(str, output.iterdir())), sep="\n")
