"""Reads the shards of `training.render`."""

import io
import json
import logging
import tarfile
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from PIL import Image

from zero123plus.files import walk

logger = logging.getLogger(__name__)

COLUMNS = 6  # views in a row of a sheet: the azimuths
MEMBERS = ("inputs.webp", "targets.webp", "json")


def find_shards(folder: Path) -> list[Path]:
    """The shards of a folder and of those below, in order."""
    return sorted(path for path in walk(folder) if fnmatch(path.name, "shard-*.tar"))


def index_shards(folder: Path, passes: tuple[str, ...] = (), needed: bool = True) -> list[dict]:
    """Where each object of a folder of shards lies, in order; reads the shards' headers only.

    Args:
        folder: with `shard-*.tar`, or with folders below that have them; unfinished shards are left out.
        passes: members that are needed beside `MEMBERS`.
        needed: whether there must be objects; if not, those below are not looked at.

    Returns:
        For each object `shard` (its path), `key`, and `members`: offset and size in bytes of each.

    Raises:
        ValueError: if the folder has no shards but `needed`, or they lack the members.
    """
    shards = find_shards(folder) if needed else sorted(Path(folder).glob("shard-*.tar"))
    if needed and not shards:
        raise ValueError(
            f"{folder} has no shards (shard-*.tar): render them with `python -m training.render --output {folder}`."
        )
    entries = {}
    for shard in shards:
        try:
            with tarfile.open(shard) as archive:
                for member in archive:
                    key, _, kind = member.name.partition(".")
                    entry = entries.setdefault((shard, key), {"shard": shard, "key": key, "members": {}})
                    if kind in (*MEMBERS, *passes):
                        entry["members"][kind] = member.offset_data, member.size
        except (tarfile.TarError, OSError) as error:
            # What stands in front of the damage can be read, but for the sample that it cuts through
            damaged = [key for key in entries if key[0] == shard][-1:]
            for key in damaged:
                del entries[key]
            logger.warning("%s is damaged (%s): what follows the damage is left out.", shard, error)
    for (shard, key), entry in entries.items():
        missing = [kind for kind in (*MEMBERS, *passes) if kind not in entry["members"]]
        if missing:
            raise ValueError(
                f"Sample {key} of {shard} has no {', '.join(missing)}: it is no shard of training.render."
            )
    if needed and not entries:
        raise ValueError(f"{folder} has no sample that can be read: render again.")
    return list(entries.values())


def read_member(entry: dict, kind: str) -> bytes:
    """Reads one member of an entry of [`index_shards`]."""
    offset, size = entry["members"][kind]
    with open(entry["shard"], "rb") as file:
        file.seek(offset)
        return file.read(size)


def check_shards(entries: list[dict]) -> str | None:
    """Checks that all shards have views of one size and of one camera preset, by the first sample of each. Returns the
    preset, a key of `pipeline.CAMERAS`; None where they do not say it.

    Raises:
        ValueError: naming two shards that differ.
    """
    first = {}
    for entry in entries:
        if entry["shard"] in first:
            continue
        record = json.loads(read_member(entry, "json"))
        sizes = [Image.open(io.BytesIO(read_member(entry, kind))).size for kind in MEMBERS[:2]]
        first[entry["shard"]] = (*sizes, record.get("cameras", {}).get("preset"))
    (shard, expected), *others = first.items()
    for other, found in others:
        if found != expected:
            raise ValueError(
                f"{shard} has views and cameras of {expected}, but {other} of {found} (pixels of the inputs' and"
                " targets' sheets, camera preset): keep them in different folders."
            )
    return expected[2]


def split_sheet(sheet: np.ndarray) -> np.ndarray:
    """A contact sheet of shape (R S, 6 S, C) to views of shape (R, 6, S, S, C)."""
    size = sheet.shape[1] // COLUMNS
    return sheet.reshape(-1, size, COLUMNS, size, sheet.shape[2]).swapaxes(1, 2)


def read_object(entry: dict) -> dict:
    """Reads one object of [`index_shards`].

    Returns:
        `name`, `inputs` of shape (6, I, I, 4) and `targets` of shape (2, 6, S, S, 4): elevations by azimuths; both
        uint8 RGBA with straight alpha. Where they are indexed also `targets.depth.png`, uint16 of shape (2, 6, S, S,
        1), and `targets.normal.png`, uint8 of shape (2, 6, S, S, 3).

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        data = {kind: read_member(entry, kind) for kind in entry["members"]}
        sheets = {}
        for kind in set(data) - {"json"}:
            picture = Image.open(io.BytesIO(data[kind]))
            pixels = np.asarray(picture.convert("RGBA") if kind.endswith(".webp") else picture)
            sheets[kind.removesuffix(".webp")] = split_sheet(pixels.reshape(*pixels.shape[:2], -1))
        return {**sheets, "name": json.loads(data["json"])["object"], "inputs": sheets["inputs"][0]}
    except (OSError, SyntaxError, ValueError, KeyError) as error:
        raise ValueError(f"A sample of {entry['shard']} cannot be read: {error}") from error


def load_objects(folder: Path, passes: tuple[str, ...] = ()) -> list[dict]:
    """All objects of a folder of shards, as [`read_object`] gives them; for `passes` see [`index_shards`]."""
    return [read_object(entry) for entry in index_shards(folder, passes)]
