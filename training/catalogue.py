"""Objects with names and licences: archives of Sweet Home 3D, and folders with a `catalogue.jsonl`.

A `.sh3f` file, as Debian's package `sweethome3d-furniture` has five of, is a ZIP archive of OBJ models, with their
materials and textures, and of a catalogue that says name, category, creator and licence of each. A folder of any files
may say the same in `catalogue.jsonl`: a line for each file, such as
`{"file": "chairs/armchair.glb", "name": "Armchair", "category": "Office", "creator": "...", "licence": "CC0"}`.
"""

import json
import re
import zipfile
from pathlib import Path

ARCHIVE = ".sh3f"
CATALOGUE = "PluginFurnitureCatalog.properties"
FOLDER_CATALOGUE = "catalogue.jsonl"
FIELDS = "name", "category", "creator", "licence"
MAX_EXTRACTED = 2**30  # bytes of one model with its textures


def read_properties(text: str) -> dict[str, str]:
    """Reads a Java properties file: `key=value` a line, `#` before comments, `\\u00e9` for other letters."""
    pairs = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith(("#", "!")):
            pairs[key.strip()] = re.sub(r"\\u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), value.strip())
    return pairs


def archive_items(path: Path) -> list[dict]:
    """The objects of a `.sh3f` archive, as `training.render` takes them: for each `id`, which is the archive's own and
    so the same everywhere; `source`, the archive's name and the model's path in it; `name`, `category`, `creator` and
    `licence`; `path`, of the archive; `member`, of the model; and where the catalogue turns the model `rotation`, 9
    numbers, row by row, in the model's own axes (+Y up).

    Raises:
        ValueError: if the file is no such archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pairs = read_properties(archive.read(CATALOGUE).decode("latin-1"))
            members = set(archive.namelist())
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no archive of Sweet Home 3D, with {CATALOGUE} in it: {error}.") from error
    items = []
    for key, identity in pairs.items():
        if not re.fullmatch(r"id#\d+", key):
            continue
        number = key.removeprefix("id#")
        member = pairs.get(f"model#{number}", "").lstrip("/")
        if member not in members:
            raise ValueError(f"{path} names the model {member!r} of {identity!r}, but has no such file.")
        item = {
            "id": re.sub(r"[^\w-]", "_", identity),
            "source": f"{path.name}/{member}",
            "name": pairs.get(f"name#{number}"),
            "category": pairs.get(f"category#{number}"),
            "creator": pairs.get(f"creator#{number}"),
            "licence": pairs.get("license"),
            "path": str(path),
            "member": member,
        }
        if f"modelRotation#{number}" in pairs:
            item["rotation"] = [float(value) for value in pairs[f"modelRotation#{number}"].split()]
        items.append(item)
    return items


def extract(item: dict, folder: str) -> Path:
    """Extracts a model of [`archive_items`] into a folder, with the files beside it, and returns its path.

    Raises:
        ValueError: if the files are larger than `MAX_EXTRACTED` in all.
    """
    beside = item["member"].rpartition("/")[0] + "/"
    beside = "" if beside == "/" else beside  # a model at the archive's root
    with zipfile.ZipFile(item["path"]) as archive:
        members = [member for member in archive.infolist() if member.filename.startswith(beside)]
        size = sum(member.file_size for member in members)
        if size > MAX_EXTRACTED:
            raise ValueError(f"{item['source']} has {size} bytes with its textures, more than {MAX_EXTRACTED}.")
        archive.extractall(folder, members)  # which leaves no file outside of the folder
    return Path(folder, item["member"])


def folder_catalogue(folder: Path) -> dict[str, dict]:
    """What the `catalogue.jsonl` of a folder says of its files, by their path in the folder; nothing without one.

    Raises:
        ValueError: naming a line that is not as the module says.
    """
    path, found = folder / FOLDER_CATALOGUE, {}
    for number, line in enumerate(path.read_text("utf-8-sig").splitlines() if path.is_file() else [], 1):
        try:
            record = json.loads(line)
            found[record["file"]] = {field: record.get(field) for field in FIELDS}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{path}, line {number}: {line[:80]!r} is no record such as {{"file": "a.glb", "licence": "CC0"}}.'
            ) from error
    return found


def read_list(path: Path) -> tuple[set[str], set[str]]:
    """Reads a list of objects: one id a line, or JSON lines such as `{"object": "ID", "name": "Chair", "whole_name":
    true}`.

    Returns:
        The ids, and the names of which all objects are meant.
    """
    ids, names = set(), set()
    for line in path.read_text("utf-8-sig").splitlines():
        record = json.loads(line) if line.startswith("{") else {"object": line.strip()}
        ids.add(record["object"])
        if record.get("whole_name"):
            names.add(record["name"])
    return ids - {""}, names
