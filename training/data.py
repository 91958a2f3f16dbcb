"""Reads the shards of `training.render` and makes training samples of them."""

import io
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline import COLUMNS, GREY, ROWS

logger = logging.getLogger(__name__)

AZIMUTHS = 6
MEMBERS = ("inputs.webp", "targets.webp", "json")
# What a ControlNet sees, and the passes that its samples need beside `MEMBERS`; of "rgb" it makes normals
CONDITIONS = {"depth": ("targets.depth.png",), "normals": ("targets.normal.png",), "rgb": ("targets.normal.png",)}
MAX_CORRUPT = 100  # samples in a row


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
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, kind = member.name.partition(".")
                entry = entries.setdefault((shard, key), {"shard": shard, "members": {}})
                if kind in (*MEMBERS, *passes):
                    entry["members"][kind] = member.offset_data, member.size
    for (shard, key), entry in entries.items():
        missing = [kind for kind in (*MEMBERS, *passes) if kind not in entry["members"]]
        if missing:
            raise ValueError(
                f"Sample {key} of {shard} has no {', '.join(missing)}: it is no shard of training.render."
            )
    return list(entries.values())


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
        data = {}
        with open(entry["shard"], "rb") as file:
            for kind, (offset, size) in entry["members"].items():
                file.seek(offset)
                data[kind] = file.read(size)
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


def depth_picture(depth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A depth map as the ControlNet sees it: linear, the nearest point 0, the farthest 255, background transparent.

    Args:
        depth: to the camera's plane, in any unit, shape (H, W).
        mask: where the object is, shape (H, W).

    Returns:
        uint8 RGBA of shape (H, W, 4).
    """
    low, high = (depth[mask].min(), depth[mask].max()) if mask.any() else (0, 1)
    grey = np.where(mask, (depth.astype(np.float64) - low) / max(high - low, 1e-9), 0)
    return np.round(255 * np.stack([grey, grey, grey, mask], axis=-1)).astype(np.uint8)


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


def to_tile(views: np.ndarray) -> np.ndarray:
    """Six views of shape (6, S, S, C) to a tile of shape (3 S, 2 S, C), row-major."""
    _, size, _, channels = views.shape
    return (
        views.reshape(ROWS, COLUMNS, size, size, channels)
        .swapaxes(1, 2)
        .reshape(ROWS * size, COLUMNS * size, channels)
    )


class TileDataset(torch.utils.data.Dataset):
    """Training samples: each object gives 12, six inputs, plain and mirrored.

    A sample is a dictionary of `index`, `image`, the input view as an RGB picture on grey, and `tile`, float32 of
    shape (3, 3 S, 2 S) in [-1, 1]; with a condition also `control`, the tile that a ControlNet sees, likewise.
    """

    def __init__(self, folder: Path, keep: bool = False, condition: str | None = None):
        """
        Args:
            folder: of shards.
            keep: whether to keep the decoded objects, for data that fits the memory.
            condition: one of `CONDITIONS`; with "rgb" `tile` is of normals.
        """
        self.entries = index_shards(folder, CONDITIONS.get(condition, ()))
        self.kept = {} if keep else None
        self.condition = condition

    def __len__(self):
        return len(self.entries) * 2 * AZIMUTHS

    def __getitem__(self, index: int) -> dict:
        """Raises ValueError if the object cannot be read."""
        place, variant = divmod(index, 2 * AZIMUTHS)
        item = self.kept.get(place) if self.kept is not None else None
        if item is None:
            item = read_object(self.entries[place])
            if self.kept is not None:
                self.kept[place] = item
        k, mirror = variant // 2, bool(variant % 2)
        image, views = select_views(item, k, mirror)
        views, control = on_grey(views), None
        if self.condition == "depth":
            control = select_depth(item, k, mirror)
        elif self.condition == "normals":
            control = select_normals(item, k, mirror)
        elif self.condition == "rgb":
            views, control = select_normals(item, k, mirror), views
        sample = {"index": index, "image": Image.fromarray(on_grey(image))}
        sample["tile"] = torch.from_numpy(to_tile(views)).permute(2, 0, 1) / 127.5 - 1
        if control is not None:
            sample["control"] = torch.from_numpy(to_tile(control)).permute(2, 0, 1) / 127.5 - 1
        return sample


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
