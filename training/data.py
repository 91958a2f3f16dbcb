"""Reads the shards of `training.render` and makes training samples of them."""

import io
import itertools
import json
import logging
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline import COLUMNS, GREY, ROWS
from zero123plus.pictures import depth_picture, to_tile

logger = logging.getLogger(__name__)

AZIMUTHS = 6
MEMBERS = ("inputs.webp", "targets.webp", "json")
MAX_CORRUPT = 100  # samples in a row
PERMUTATIONS = list(itertools.permutations(range(3)))  # of colour channels; the first leaves them where they are


def write_whole(path: Path, data: bytes):
    """Writes a file that appears whole or not at all."""
    fresh = path.with_name(path.name + ".partial")
    fresh.write_bytes(data)
    fresh.rename(path)


def index_shards(folder: Path, passes: tuple[str, ...] = (), needed: bool = True) -> list[dict]:
    """Where each object of a folder of shards lies, in order; reads the shards' headers only.

    Args:
        folder: with `shard-*.tar`; unfinished shards are left out.
        passes: members that are needed beside `MEMBERS`.
        needed: whether there must be objects.

    Returns:
        For each object `shard` (its path), `key`, and `members`: offset and size in bytes of each.

    Raises:
        ValueError: if the folder has no shards but `needed`, or they lack the members.
    """
    shards = sorted(Path(folder).glob("shard-*.tar"))
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


def depth_pictures(depth: np.ndarray) -> np.ndarray:
    """Depth maps, integers of shape (..., S, S, 1), as a ControlNet sees them, on grey: uint8 of shape (..., S, S, 3).
    The largest integer is where there is nothing.
    """
    nothing = np.iinfo(depth.dtype).max
    maps = depth.reshape(-1, *depth.shape[-3:-1])
    return on_grey(np.stack([depth_picture(view, view < nothing) for view in maps])).reshape(*depth.shape[:-1], 3)


@dataclass(frozen=True)
class Pass:
    """One of the pictures that are rendered of each target.

    Args:
        name: in what [`read_object`] returns.
        show: makes pictures of it, from shape (..., S, S, C) to uint8 RGB of shape (..., S, S, 3).
        is_colour: whether the channels are colours; else they are a direction, whose x changes its sign in a mirror.
    """

    name: str
    show: Callable[[np.ndarray], np.ndarray]
    is_colour: bool = True


RGB = Pass("targets", on_grey)
DEPTH = Pass("targets.depth.png", depth_pictures)
NORMALS = Pass("targets.normal.png", np.copy, is_colour=False)


@dataclass(frozen=True)
class Condition:
    """What a ControlNet is trained for.

    Args:
        sees: what it is given.
        predicts: what the tile shows.
    """

    sees: Pass
    predicts: Pass

    @property
    def passes(self) -> tuple[str, ...]:
        """The members of a sample that it needs beside `MEMBERS`."""
        return tuple(part.name for part in (self.sees, self.predicts) if part is not RGB)


CONDITIONS = {"depth": Condition(DEPTH, RGB), "normals": Condition(NORMALS, RGB), "rgb": Condition(RGB, NORMALS)}


def show_targets(item: dict, part: Pass, k: int, mirror: bool) -> np.ndarray:
    """The pictures of the six targets of input view k, uint8 RGB of shape (6, S, S, 3)."""
    views = part.show(select_targets(item[part.name], k, mirror))
    if part.is_colour or not mirror:
        return views
    seen = (views != GREY).any(-1)  # left is right
    return np.concatenate([np.where(seen, 255 - views[..., 0], GREY)[..., None], views[..., 1:]], axis=-1)


def tile_of(views: np.ndarray) -> torch.Tensor:
    """Six uint8 views of shape (6, S, S, 3) as a tile in [-1, 1], shape (3, 3 S, 2 S)."""
    return torch.from_numpy(to_tile(views)).permute(2, 0, 1) / 127.5 - 1


class TileDataset(torch.utils.data.Dataset):
    """Training samples: each object gives 12, six inputs, plain and mirrored.

    A sample is a dictionary of `index`, `image`, the input view as an RGB picture on grey, and `tile`, float32 of
    shape (3, 3 S, 2 S) in [-1, 1]; with a condition also `control`, the tile that a ControlNet sees, likewise.
    """

    def __init__(self, folder: Path, condition: str | None = None):
        """
        Args:
            folder: of shards.
            condition: a key of `CONDITIONS`; with "rgb" `tile` is of normals.

        Raises:
            ValueError: if there are no shards, they lack what the condition needs, or differ in size or cameras.
        """
        self.condition = CONDITIONS[condition] if condition else None
        self.entries = index_shards(folder, self.condition.passes if condition else ())
        self.preset = check_shards(self.entries)  # of the targets' cameras, a key of `pipeline.CAMERAS`

    def __len__(self):
        return len(self.entries) * 2 * AZIMUTHS

    def __getitem__(self, index: int) -> dict:
        """Raises ValueError if the object cannot be read, or nothing is seen in the sample."""
        place, variant = divmod(index, 2 * AZIMUTHS)
        item = read_object(self.entries[place])
        k, mirror = variant // 2, bool(variant % 2)
        image, views = select_views(item, k, mirror)
        if not (image[..., 3].any() and views[..., 3].any()):
            raise ValueError(f"{item['name']} of {self.entries[place]['shard']} is empty: nothing is seen in it.")
        sample = {"index": index, "image": Image.fromarray(on_grey(image))}
        predicts = self.condition.predicts if self.condition else RGB
        sample["tile"] = tile_of(show_targets(item, predicts, k, mirror))
        if self.condition:
            sample["control"] = tile_of(show_targets(item, self.condition.sees, k, mirror))
        return sample


class Objects(torch.utils.data.Dataset):
    """The pictures of each whole object of a [`TileDataset`], uint8 RGB: `image` of shape (6, I, I, 3), `tile` and,
    with a condition, `control`, both of shape (2, 6, S, S, 3). None for an object that cannot be read, or that some
    input or target does not show.
    """

    def __init__(self, dataset: TileDataset):
        self.entries, condition = dataset.entries, dataset.condition
        self.parts = {"tile": condition.predicts if condition else RGB}
        self.parts |= {"control": condition.sees} if condition else {}

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, place: int) -> dict[str, np.ndarray] | None:
        try:
            item = read_object(self.entries[place])
        except ValueError as error:
            logger.warning("Skipped: %s", error)
            return None
        if not all(item[name][..., 3].any((-2, -1)).all() for name in ("inputs", "targets")):
            logger.warning("Skipped: %s of %s is not seen in all views.", item["name"], self.entries[place]["shard"])
            return None
        pictures = {name: part.show(item[part.name]) for name, part in self.parts.items()}
        return {"image": on_grey(item["inputs"]), **pictures}


class TilesInMemory(torch.utils.data.Dataset):
    """The samples of a [`TileDataset`] whose objects all lie decoded in the memory of the device that trains, where
    [`TilesInMemory.batch`] puts batches together. An object of 128 pixels takes 0.9 MB.

    Args:
        dataset: of the samples. Objects that are not seen in all views are left out.
        device: to hold them.
        workers: processes that decode.
        permute_colours: whether each sample's colour channels change their places at random, which makes other
            objects of the same shape.
        progress: wraps the loader of objects in a progress bar.
    """

    def __init__(self, dataset: TileDataset, device, workers=0, permute_colours=False, progress=lambda loader: loader):
        objects = Objects(dataset)
        loader = torch.utils.data.DataLoader(objects, batch_size=None, num_workers=workers)
        self.device, self.permute_colours = device, permute_colours
        self.is_colour = {"image": True, **{name: part.is_colour for name, part in objects.parts.items()}}
        self.parts, count = {}, 0
        for pictures in progress(loader):
            if pictures is None:
                continue
            for name, picture in pictures.items():
                if name not in self.parts:
                    self.parts[name] = torch.empty(len(objects), *picture.shape, dtype=torch.uint8, device=device)
                self.parts[name][count] = torch.as_tensor(picture)
            count += 1
        if not count:
            raise ValueError("No object can be read whole: render again.")
        self.parts = {name: part[:count] for name, part in self.parts.items()}

    def __len__(self):
        return len(self.parts["tile"]) * 2 * AZIMUTHS

    def __getitem__(self, index: int) -> dict:
        return {"index": index}

    def batch(self, samples: list[dict]) -> dict:
        """The pictures of samples in [-1, 1]: `image` of shape (B, 3, I, I), `tile` and, with a condition, `control`,
        of shape (B, 3, 3 S, 2 S); and their `seed`, a list, from which the permutations of colours follow.
        """
        seeds = [sample["seed"] for sample in samples]
        index = torch.tensor([sample["index"] for sample in samples], device=self.device)
        place, k = index // (2 * AZIMUTHS), index // 2 % AZIMUTHS
        mirror, steps = index % 2 == 1, torch.arange(AZIMUTHS, device=self.device)
        # As in `select_targets`
        column = torch.where(mirror[:, None], k[:, None] - steps - 1, k[:, None] + steps) % AZIMUTHS
        # Seeds count the samples of a run, whose order is random, so that each sample meets all six by and by
        orders = [PERMUTATIONS[seed % len(PERMUTATIONS) if self.permute_colours else 0] for seed in seeds]
        channels = torch.tensor(orders, device=self.device)
        batch = {"seed": seeds}
        for name, part in self.parts.items():
            if name == "image":
                views = part[place, k][:, None]
            else:
                views = part[place[:, None], steps % 2, column]
            views = views.movedim(-1, 1)  # (B, 3, N, S, S)
            views = torch.where(mirror[:, None, None, None, None], views.flip(-1), views)
            if self.is_colour[name]:
                views = views.gather(1, channels[:, :, None, None, None].expand_as(views))
            else:
                seen = (views != GREY).any(1)
                x = torch.where(seen & mirror[:, None, None, None], 255 - views[:, 0], views[:, 0])
                views = torch.cat([x[:, None], views[:, 1:]], dim=1)
            if name == "image":
                batch[name] = views[:, :, 0] / 127.5 - 1
            else:
                rows = views.unflatten(2, (ROWS, COLUMNS)).transpose(3, 4)  # (B, 3, rows, S, columns, S)
                batch[name] = rows.flatten(4, 5).flatten(2, 3) / 127.5 - 1
        return batch


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
        seed = (self.seed << 40) + self.start + offset
        for skipped in range(MAX_CORRUPT):
            try:
                sample = self.dataset[int(self.order[1][(place + skipped) % len(self.dataset)])]
                if self.image_sizes:
                    size = int(np.random.default_rng(seed).integers(*self.image_sizes, endpoint=True))
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
