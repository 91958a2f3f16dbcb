"""Files and folders that appear whole or not at all: they are written beside their place, then renamed. Nothing else
in this repository renames.
"""

import contextlib
import getpass
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock


def walk(folder: Path) -> Iterator[Path]:
    """The files of a folder and of those below. Links to folders are followed, each real folder once."""
    seen = set()
    for path, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(path, name) for name in sorted(names))


def ray_environment(*excludes: str) -> dict:
    """What Ray sends to the nodes of a cluster: all of this repository that its modules import."""
    root = str(Path(__file__).resolve().parent.parent)
    return {"working_dir": root, "excludes": [".git", "out", "data", *excludes]}


def beside(path: Path, kind: str) -> Path:
    """A hidden name in the folder of a path that nothing has: two writers of one path do not meet."""
    return path.with_name(f".{path.name}-{uuid.uuid4().hex}.{kind}")


def write_file(path: Path, data: bytes):
    """Writes a file, in place of an earlier one."""
    fresh = beside(path, "partial")
    try:
        fresh.write_bytes(data)
        fresh.rename(path)
    finally:
        fresh.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: Path, owned: Callable[[str], bool] | None = None, mark: str = "") -> Iterator[Path]:
    """Yields an empty folder beside `target`. When the block ends, [`put_folder`], which says the arguments, puts it
    there, or after an error it is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = beside(target, "partial")
    fresh.mkdir()
    try:
        yield fresh
        put_folder(fresh, target, owned, mark)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def put_folder(fresh: Path, target: Path, owned: Callable[[str], bool] | None = None, mark: str = ""):
    """Puts a folder in its place. One process at a time does so for a place.

    Args:
        fresh: beside it.
        target: its place.
        owned: whether the file or folder of a name in an earlier folder at `target` may be removed; what may not is
            kept in the new one. None if there must be no earlier folder.
        mark: a file by which an earlier folder is known.

    Raises:
        FileExistsError: if there is something at `target`, and `owned` is None or it is no such folder.
    """
    key = hashlib.sha256(f"{getpass.getuser()} {target.absolute()}".encode()).hexdigest()[:16]
    with FileLock(Path(tempfile.gettempdir(), f"zero123plus-{key}.lock")):
        if not target.exists():
            fresh.rename(target)
            return
        if owned is None or not target.is_dir() or not (target / mark).exists():
            raise FileExistsError(f"{target} exists: choose another place, or move it.")
        old = beside(target, "old")
        target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            old.rename(target)
            raise
        for other in old.iterdir():
            if not (owned(other.name) or (target / other.name).exists()):
                other.rename(target / other.name)
        shutil.rmtree(old)
