"""Reads the shards of `training.render` and makes training samples of them."""

import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline import GREY
from zero123plus.pictures import depth_picture, to_tile

logger = logging.getLogger(__name__)

AZIMUTHS = 6
MEMBERS = ("inputs.webp", "targets.webp", "json")
MAX_CORRUPT = 100  # samples in a row


def write_whole(path: Path, data: bytes):
    """Writes a file that appears whole or not at all."""
    fresh = path.with_name(path.name + ".partial")
    fresh.write_bytes(data)
    fresh.rename(path)


def index_shards(folder: Path, passes: tuple[str, ...] = ()) -> list[dict]:
    """Where each object of a folder of shards lies, in order; reads the shards' headers only.

    Args:
        folder: with `shard-*.tar`; unfinished shards are left out.
        passes: members that are needed beside `MEMBERS`.

    Returns:
        For each object `shard` (its path) and `members`: offset and size in bytes of each.

    Raises:
        ValueError: if the folder has no shards, or they lack the members.
    """
    shards = sorted(Path(folder).glob("shard-*.tar"))
    if not shards:
        raise ValueError(
            f"{folder} has no shards (shard-*.tar): render them with `python -m training.render --output {folder}`."
        )
    entries = {}
    for shard in shards:
        try:
            with tarfile.open(shard) as archive:
                for member in archive:
                    key, _, kind = member.name.partition(".")
                    entry = entries.setdefault((shard, key), {"shard": shard, "members": {}})
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
    if not entries:
        raise ValueError(f"{folder} has no sample that can be read: render again.")
    return list(entries.values())


def read_member(entry: dict, kind: str) -> bytes:
    """Reads one member of an entry of [`index_shards`]."""
    offset, size = entry["members"][kind]
    with open(entry["shard"], "rb") as file:
        file.seek(offset)
        return file.read(size)


def check_shards(entries: list[dict]) -> str | None:
    """Checks that all shards have views of one size and of one camera preset, by the first sample of each.

    Args:
        entries: of [`index_shards`].

    Returns:
        The key in `pipeline.CAMERAS` of their targets; None where they do not say it.

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
    size = sheet.shape[1] // AZIMUTHS
    return sheet.reshape(-1, size, AZIMUTHS, size, sheet.shape[2]).swapaxes(1, 2)


def read_object(entry: dict) -> dict:
    """Reads one object.

    Args:
        entry: of [`index_shards`].

    Returns:
        `name`, `inputs` of shape (6, I, I, 4) and `targets` of shape (2, 6, S, S, 4): elevations by azimuths; both
        uint8 RGBA with straight alpha. Where they are indexed also `targets.depth.png`, uint16 of shape
        (2, 6, S, S, 1), and `targets.normal.png`, uint8 of shape (2, 6, S, S, 3).

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


def on_grey(rgba: np.ndarray) -> np.ndarray:
    """Composites uint8 RGBA of shape (..., 4) on the grey of the training data: uint8 RGB of shape (..., 3)."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.round(rgba[..., :3] * alpha + GREY * (1 - alpha)).astype(np.uint8)


def select_targets(targets: np.ndarray, k: int, mirror: bool) -> np.ndarray:
    """The six of an object's targets, shape (2, 6, S, S, C), that Zero123++ has for input view k: (6, S, S, C).

    Target j stands at azimuth 30 + 60 j from the input, so in column (k + j) mod 6; the elevations alternate. A
    mirrored object is another object: every picture is flipped, and azimuths count the other way round.
    """
    columns = [(k - j - 1 if mirror else k + j) % AZIMUTHS for j in range(AZIMUTHS)]
    views = np.stack([targets[j % 2, column] for j, column in enumerate(columns)])
    return views[:, :, ::-1] if mirror else views


def select_views(item: dict, k: int, mirror: bool) -> tuple[np.ndarray, np.ndarray]:
    """Input view k of an object, shape (I, I, 4), and its six targets, shape (6, S, S, 4); both uint8 RGBA."""
    image = item["inputs"][k]
    return image[:, ::-1] if mirror else image, select_targets(item["targets"], k, mirror)


def select_depth(item: dict, k: int, mirror: bool) -> np.ndarray:
    """The targets' depth pictures on grey, uint8 of shape (6, S, S, 3)."""
    depth = select_targets(item["targets.depth.png"], k, mirror)[..., 0]
    return on_grey(np.stack([depth_picture(view, view < np.iinfo(view.dtype).max) for view in depth]))


def select_normals(item: dict, k: int, mirror: bool) -> np.ndarray:
    """The targets' view-space normals, 127.5 (n + 1), on grey; uint8 of shape (6, S, S, 3)."""
    normals = select_targets(item["targets.normal.png"], k, mirror)
    if mirror:  # left is right
        seen = (normals != GREY).any(-1)
        normals = normals.copy()
        normals[..., 0] = np.where(seen, 255 - normals[..., 0], GREY)
    return normals


def select_rgb(item: dict, k: int, mirror: bool) -> np.ndarray:
    """The targets on grey, uint8 of shape (6, S, S, 3)."""
    return on_grey(select_targets(item["targets"], k, mirror))


@dataclass(frozen=True)
class Condition:
    """What a ControlNet is trained for.

    Args:
        passes: members of a sample that it needs beside `MEMBERS`.
        sees: gives the ControlNet's six views of (object, input view, whether mirrored), uint8 of shape (6, S, S, 3).
        predicts: gives the six views that the tile shows, likewise.
    """

    passes: tuple[str, ...]
    sees: Callable[[dict, int, bool], np.ndarray]
    predicts: Callable[[dict, int, bool], np.ndarray]


CONDITIONS = {
    "depth": Condition(("targets.depth.png",), select_depth, select_rgb),
    "normals": Condition(("targets.normal.png",), select_normals, select_rgb),
    "rgb": Condition(("targets.normal.png",), select_rgb, select_normals),
}


class LatentCache:
    """Encoded samples in files that all processes of a run share, in half precision. A run that continues finds them.

    Args:
        folder: of the files; made if missing.
        count: number of samples.
        shapes: by name, the shape of each part of a sample.
    """

    def __init__(self, folder: Path, count: int, shapes: dict[str, tuple[int, ...]]):
        folder.mkdir(parents=True, exist_ok=True)

        def memory(name, dtype, shape):
            path = folder / f"{name}.bin"
            if not path.exists():
                with open(path, "ab") as file:  # appears empty and grows: another process may do the same
                    file.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
            return np.memmap(path, dtype, "r+", shape=shape)

        self.parts = {name: memory(name, np.float16, (count, *shape)) for name, shape in shapes.items()}
        self.done = memory("done", np.uint8, (count,))

    def __contains__(self, index: int) -> bool:
        return bool(self.done[index])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {
            name: part[index] if isinstance(part, torch.Tensor) else torch.from_numpy(np.array(part[index]))
            for name, part in self.parts.items()
        }

    def keep(self, index: int, sample: dict[str, torch.Tensor]):
        """Writes a sample."""
        for name, part in self.parts.items():
            part[index] = sample[name].cpu().numpy()
        self.done[index] = 1

    def move_to_gpu(self, device: torch.device) -> bool:
        """Holds the samples on a GPU from now on, if they take less than half of its free memory; says whether."""
        if sum(part.nbytes for part in self.parts.values()) > torch.cuda.mem_get_info(device)[0] / 2:
            return False
        self.parts = {name: torch.from_numpy(np.array(part)).to(device) for name, part in self.parts.items()}
        return True


def fingerprint(entries: list[dict], *settings) -> str:
    """A name for the encoded samples of some shards, which changes with the shards and with `settings`."""
    shards = sorted({(entry["shard"].name, entry["shard"].stat().st_size) for entry in entries})
    return hashlib.sha256(repr((shards, settings)).encode()).hexdigest()[:16]


class TileDataset(torch.utils.data.Dataset):
    """Training samples: each object gives 12, six inputs, plain and mirrored.

    A sample is a dictionary of `index`, `image`, the input view as an RGB picture on grey, and `tile`, float32 of
    shape (3, 3 S, 2 S) in [-1, 1]; with a condition also `control`, the tile that a ControlNet sees, likewise. A
    sample that is in `latents` has `encoded` instead.
    """

    def __init__(self, folder: Path, keep: bool = False, condition: str | None = None):
        """
        Args:
            folder: of shards.
            keep: whether to keep the decoded objects, for data that fits the memory.
            condition: a key of `CONDITIONS`; with "rgb" `tile` is of normals.

        Raises:
            ValueError: if there are no shards, they lack what the condition needs, or differ in size or cameras.
        """
        self.condition = CONDITIONS[condition] if condition else None
        self.entries = index_shards(folder, self.condition.passes if condition else ())
        self.preset = check_shards(self.entries)  # of the targets' cameras, a key of `pipeline.CAMERAS`
        self.kept = {} if keep else None
        self.latents: LatentCache | None = None

    def __len__(self):
        return len(self.entries) * 2 * AZIMUTHS

    def __getitem__(self, index: int) -> dict:
        """Raises ValueError if the object cannot be read, or nothing is seen in the sample."""
        known = self.latents is not None and index in self.latents
        encoded = {"encoded": self.latents[index]} if known else {}
        if known and self.condition is None:
            return {"index": index, **encoded}
        place = index // (2 * AZIMUTHS)
        item = self.kept.get(place) if self.kept is not None else None
        if item is None:
            item = read_object(self.entries[place])
            if self.kept is not None:
                self.kept[place] = item
        return {**self.sample(item, index), **encoded}

    def sample(self, item: dict, index: int) -> dict:
        """A sample of an object that is read; raises ValueError if nothing is seen in it."""
        place, variant = divmod(index, 2 * AZIMUTHS)
        sample = {"index": index}
        k, mirror = variant // 2, bool(variant % 2)
        image, views = select_views(item, k, mirror)
        if not (image[..., 3].any() and views[..., 3].any()):
            raise ValueError(f"{item['name']} of {self.entries[place]['shard']} is empty: nothing is seen in it.")
        tile = self.condition.predicts(item, k, mirror) if self.condition else on_grey(views)
        sample["image"] = Image.fromarray(on_grey(image))
        sample["tile"] = torch.from_numpy(to_tile(tile)).permute(2, 0, 1) / 127.5 - 1
        if self.condition:
            control = self.condition.sees(item, k, mirror)
            sample["control"] = torch.from_numpy(to_tile(control)).permute(2, 0, 1) / 127.5 - 1
        return sample


class ObjectSamples(torch.utils.data.Dataset):
    """Lists of the samples of each object that are not in its data set's `latents`, so that an object is decoded once.
    Samples that cannot be read are left out.

    Args:
        dataset: with `latents`.
        part: which of several processes this is, and their number.
    """

    def __init__(self, dataset: TileDataset, part: tuple[int, int] = (0, 1)):
        self.dataset, self.missing = dataset, {}
        for index in range(len(dataset)):
            if index not in dataset.latents:
                self.missing.setdefault(index // (2 * AZIMUTHS), []).append(index)
        self.places = list(self.missing)[part[0] :: part[1]]

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i: int) -> list[dict]:
        samples = []
        try:
            item = read_object(self.dataset.entries[self.places[i]])
            for index in self.missing[self.places[i]]:
                samples.append(self.dataset.sample(item, index))
        except ValueError:  # the trainer's stream warns of these and counts them
            pass
        return samples


class Stream(torch.utils.data.Dataset):
    """The samples of a training run by their place in it: shuffled epochs, one after another.

    Which sample stands at a place, and the `seed` of all that is drawn for it, follow from the place alone. So a run
    that was interrupted goes on as if it had not been, on any number of processes. A sample that cannot be read is
    left out for the next one; `skipped` counts these.

    Args:
        dataset: of the samples.
        seed: of the order, and of the samples' seeds.
        start: the first place.
        stop: the place after the last.
        image_sizes: least and greatest edge in pixels that `image` is resized to at random (section 3 of the paper),
            or None.
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset,
        seed: int,
        start: int,
        stop: int,
        image_sizes: tuple[int, int] | None = None,
    ):
        self.dataset, self.seed, self.start, self.stop = dataset, seed, start, stop
        self.image_sizes = image_sizes
        self.order = (-1, None)  # of the last epoch that was asked for

    def __len__(self):
        return max(0, self.stop - self.start)

    def __getitem__(self, offset: int) -> dict:
        if not 0 <= offset < len(self):
            raise IndexError(offset)
        epoch, place = divmod(self.start + offset, len(self.dataset))
        if self.order[0] != epoch:
            self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))
        rng = np.random.default_rng((self.seed, epoch, place))
        seed = int(rng.integers(2**62))
        for skipped in range(MAX_CORRUPT):
            try:
                sample = self.dataset[int(self.order[1][(place + skipped) % len(self.dataset)])]
                if self.image_sizes:
                    size = int(rng.integers(*self.image_sizes, endpoint=True))
                    sample["image"] = sample["image"].resize((size, size), Image.Resampling.BICUBIC)
                return {**sample, "seed": seed, "skipped": skipped}
            except ValueError as error:
                logger.warning("Skipped: %s", error)
        raise ValueError(f"{MAX_CORRUPT} samples in a row cannot be read: see the warnings above.")


class ViewDataset(torch.utils.data.Dataset):
    """Single views for the VAE: `pixels`, RGB on grey, float32 of shape (3, S, S) in [-1, 1], and `alpha` of shape
    (1, S, S)."""

    def __init__(self, folder: Path):
        self.views = np.concatenate(
            [
                view
                for item in load_objects(folder)
                for view in (item["inputs"], item["targets"].reshape(-1, *item["targets"].shape[2:]))
            ]
        )

    def __len__(self):
        return 2 * len(self.views)

    def __getitem__(self, index: int) -> dict:
        view = self.views[index // 2]
        view = np.ascontiguousarray(view[:, ::-1] if index % 2 else view)
        return {
            "pixels": torch.from_numpy(on_grey(view)).permute(2, 0, 1) / 127.5 - 1,
            "alpha": torch.from_numpy(view[..., 3]).float()[None] / 255,
        }
