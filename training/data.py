"""Makes training samples of rendered objects (`training.shards`)."""

import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline import AZIMUTH_STEP, COLUMNS, GREY, ROWS, load_pictures, pad_to_square
from zero123plus.checks import find_pictures
from zero123plus.pictures import STAYS, depth_picture, log_once, prepare, read_picture, to_tile

from .shards import check_shards, index_shards, read_object

logger = logging.getLogger(__name__)

INPUTS = ROWS * COLUMNS  # views of an object that are its inputs; as many targets stand around each
VARIANTS = 2 * INPUTS  # samples of an object: each input, plain and mirrored
PICTURE = 512  # pixels of the edge that pictures alone are brought to: the encoders of the public checkpoints see this
MAX_CORRUPT = 100  # samples in a row
CHECKED = 100  # pictures that are tried before a student learns from them
SHARES = 0.4, 0.3, 0.15, 0.15  # of steps with one, two, three and four pictures of each object
BACK_SHARE = 0.4  # share of second pictures that are of the back
PERMUTATIONS = list(itertools.permutations(range(3)))  # of colour channels; the first leaves them where they are


def on_grey(rgba: np.ndarray) -> np.ndarray:
    """Composites uint8 RGBA of shape (..., 4) on the grey of the training data: uint8 RGB of shape (..., 3)."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.round(rgba[..., :3] * alpha + GREY * (1 - alpha)).astype(np.uint8)


def target_columns(k: torch.Tensor, mirror: torch.Tensor) -> torch.Tensor:
    """The columns of the six targets that Zero123++ has for input views k, shape (B,), of which target j has elevation
    j mod 2: shape (B, 6).

    Target j stands at azimuth 30 + 60 j from input k, so in column (k + j) mod 6. A mirrored object is another object:
    every picture is flipped, and azimuths count the other way round.
    """
    j = torch.arange(INPUTS, device=k.device)
    return torch.where(mirror[:, None], k[:, None] - j - 1, k[:, None] + j) % INPUTS


def flip(views: torch.Tensor, mirror: torch.Tensor, is_colour: bool) -> torch.Tensor:
    """Flips the views of mirrored samples.

    Args:
        views: uint8 of shape (B, N, S, S, C).
        mirror: booleans of shape (B,).
        is_colour: whether the channels are colours; else they are a direction, whose x changes its sign where the
            object is seen.
    """
    mirror = mirror[:, None, None, None]
    views = torch.where(mirror[..., None], views.flip(-2), views)
    if is_colour:
        return views
    x = torch.where(mirror & (views != GREY).any(-1), 255 - views[..., 0], views[..., 0])
    return torch.cat([x[..., None], views[..., 1:]], dim=-1)


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
RGBA = Pass("targets", np.copy)
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
    """The pictures of the six targets of input view k, uint8 of shape (6, S, S, C)."""
    column = target_columns(torch.tensor([k]), torch.tensor([mirror]))[0]
    views = part.show(item[part.name][np.arange(INPUTS) % 2, column])
    return flip(torch.from_numpy(views)[None], torch.tensor([mirror]), part.is_colour)[0].numpy()


def select_views(item: dict, k: int, mirror: bool) -> tuple[np.ndarray, np.ndarray]:
    """Input view k of an object, shape (I, I, 4), and its six targets, shape (6, S, S, 4); both uint8 RGBA."""
    image = item["inputs"][k]
    return image[:, ::-1] if mirror else image, show_targets(item, RGBA, k, mirror)


def picture_at(item: dict, k: int, mirror: bool, azimuth: int) -> np.ndarray:
    """A picture of an object at a multiple of 30 degrees from input view k, uint8 RGBA of shape (S, S, 4): an
    input, or between two inputs the target at the elevation that the tile does not show.
    """
    if azimuth % 60 == 0:
        return select_views(item, (k + azimuth // 60 * (-1 if mirror else 1)) % INPUTS, mirror)[0]
    j = azimuth // 60
    column = target_columns(torch.tensor([k]), torch.tensor([mirror]))[0, j]
    picture = item["targets"][1 - j % 2, column]
    return picture[:, ::-1] if mirror else picture


def draw_azimuths(rng: np.random.Generator, count: int) -> list[int]:
    """The azimuths in degrees of `count` further pictures of an object. They differ from each other and from 0."""
    azimuths = rng.permutation(np.arange(AZIMUTH_STEP, 360, AZIMUTH_STEP)).tolist()
    if rng.random() < BACK_SHARE:
        azimuths.remove(180)
        azimuths.insert(0, 180)
    return azimuths[:count]


def choose_others(sample: dict, azimuths: list[int]) -> dict:
    """A sample that has of its further pictures those at some azimuths alone, and these as `azimuths`."""
    others = sample["others"][[azimuth // AZIMUTH_STEP - 1 for azimuth in azimuths]]
    return {**sample, "others": others, "azimuths": azimuths}


def channels_first(picture: np.ndarray) -> torch.Tensor:
    """A uint8 picture of shape (H, W, 3) as a tensor of shape (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))


def collate(samples: list[dict]) -> dict:
    """Samples as a batch: tensors of shape (B, ...), and lists of everything else."""
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {name: torch.stack(v) if isinstance(v[0], torch.Tensor) else v for name, v in columns.items()}


class TileDataset(torch.utils.data.Dataset):
    """Training samples: each object gives 12, six inputs, plain and mirrored.

    A sample is a dictionary of `index`, `image`, the input view on grey, uint8 of shape (3, I, I), and `tile`, uint8
    of shape (3, 3 S, 2 S); with a condition also `control`, the tile that a ControlNet sees, likewise; and with
    several pictures `others`, those at 30, 60, ... 330 degrees from the input, shape (11, 3, I, I).
    """

    def __init__(self, folder: Path, condition: str | None = None, pictures: int = 1):
        """Several pictures of each object are read if `pictures` is more than 1. With the condition "rgb" `tile` is of
        normals.

        Raises:
            ValueError: if there are no shards, they lack what the condition needs, or differ in size or cameras.
        """
        self.condition, self.pictures = CONDITIONS[condition] if condition else None, pictures
        self.entries = index_shards(folder, self.condition.passes if condition else ())
        self.preset = check_shards(self.entries)  # of the targets' cameras, a key of `pipeline.CAMERAS`

    def describe(self) -> str:
        """How many objects and shards there are, in words."""
        return f"{len(self.entries):,} objects of {len({entry['shard'] for entry in self.entries}):,} shards"

    def __len__(self):
        return len(self.entries) * VARIANTS

    def __getitem__(self, index: int) -> dict:
        """Raises ValueError if the object cannot be read, or nothing is seen in the sample."""
        place, variant = divmod(index, VARIANTS)
        item = read_object(self.entries[place])
        k, mirror = variant // 2, bool(variant % 2)
        image, views = select_views(item, k, mirror)
        if not (image[..., 3].any() and views[..., 3].any()):
            raise ValueError(f"{item['name']} of {self.entries[place]['shard']} is empty: nothing is seen in it.")
        predicts = self.condition.predicts if self.condition else RGB
        tile = to_tile(show_targets(item, predicts, k, mirror))
        sample = {"index": index, "image": channels_first(on_grey(image)), "tile": channels_first(tile)}
        if self.condition:
            sample["control"] = channels_first(to_tile(show_targets(item, self.condition.sees, k, mirror)))
        if self.pictures > 1:
            others = (picture_at(item, k, mirror, a) for a in range(AZIMUTH_STEP, 360, AZIMUTH_STEP))
            others = (Image.fromarray(on_grey(other)).resize(image.shape[:2]) for other in others)
            sample["others"] = torch.stack([channels_first(np.asarray(other)) for other in others])
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
    [`TilesInMemory.batch`] puts batches together. An object of 128 pixels takes 0.9 MB. Objects that are not seen in
    all views are left out.

    Args:
        workers: processes that decode.
        permute_colours: whether each sample's colour channels change their places at random, which makes other objects
            of the same shape.
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
        return len(self.parts["tile"]) * VARIANTS

    def __getitem__(self, index: int) -> dict:
        return {"index": index}

    def batch(self, samples: list[dict]) -> dict:
        """The batch of samples, as [`collate`] gives it of a `TileDataset`'s. The permutations of colours follow from
        their seeds.
        """
        seeds = [sample["seed"] for sample in samples]
        index = torch.tensor([sample["index"] for sample in samples], device=self.device)
        place, k, mirror = index // VARIANTS, index % VARIANTS // 2, index % 2 == 1
        row, column = torch.arange(INPUTS, device=self.device) % 2, target_columns(k, mirror)
        # Seeds count the samples of a run, whose order is random, so that each sample meets all six by and by
        orders = [PERMUTATIONS[seed % len(PERMUTATIONS) if self.permute_colours else 0] for seed in seeds]
        channels = torch.tensor(orders, device=self.device)[:, None, None, None]
        batch = collate(samples)
        for name, part in self.parts.items():
            views = part[place, k][:, None] if name == "image" else part[place[:, None], row, column]
            views = flip(views, mirror, self.is_colour[name])  # (B, N, S, S, 3)
            if self.is_colour[name]:
                views = views.gather(-1, channels.expand_as(views))
            rows = views.unflatten(1, (1, 1) if name == "image" else (ROWS, COLUMNS)).transpose(2, 3)
            batch[name] = rows.flatten(3, 4).flatten(1, 2).movedim(-1, 1)  # (B, 3, 3 S, 2 S)
        return batch


class Stream(torch.utils.data.Dataset):
    """The samples of a training run by their place in it, from `start` to before `stop`: shuffled epochs, one after
    another.

    Which sample stands at a place, and the `seed` of all that is drawn for it, follow from the place alone. So a run
    that was interrupted goes on as if it had not been, on any number of processes. A sample that cannot be read is
    left out for the next one; `skipped` counts these.

    Args:
        image_sizes: least and greatest edge in pixels of `image_size`, which a sample's `image` is to be resized to at
            random (section 3 of the paper), or None.
        pictures: of each object at most. All samples of a step, which are `batch_size`, have as many.
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset,
        seed: int,
        start: int,
        stop: int,
        image_sizes: tuple[int, int] | None = None,
        pictures: int = 1,
        batch_size: int = 1,
    ):
        self.dataset, self.seed, self.start, self.stop = dataset, seed, start, stop
        self.image_sizes, self.pictures, self.batch_size = image_sizes, pictures, batch_size
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
                    size = np.random.default_rng(seed).integers(*self.image_sizes, endpoint=True)
                    sample["image_size"] = int(size)
                if self.pictures > 1:
                    rng = np.random.default_rng((self.seed, 1, (self.start + offset) // self.batch_size))
                    shares = np.array(SHARES[: self.pictures])
                    count = int(rng.choice(self.pictures, p=shares / shares.sum()))
                    sample = choose_others(sample, draw_azimuths(np.random.default_rng((seed, 1)), count))
                return {**sample, "seed": seed, "skipped": skipped}
            except ValueError as error:
                logger.warning("Skipped: %s", error)
        raise ValueError(f"{MAX_CORRUPT} samples in a row cannot be read: see the warnings above.")


class PictureDataset(torch.utils.data.Dataset):
    """Pictures alone, which is all that a student needs: samples of `index` and `image`, the object cut out, in the
    middle and on grey, uint8 of shape (3, 512, 512). With the background "keep" they are learned from as they are.

    Raises:
        ValueError: if the folder has none, or one of `CHECKED`, evenly spread, has a background that cannot be
            removed.
    """

    preset = None  # of cameras, which pictures do not have

    def __init__(self, folder: Path, background: str = "auto"):
        self.paths, self.background = [path for path, _ in find_pictures([str(folder)])[0]], background
        for path in self.paths[:: math.ceil(len(self.paths) / CHECKED)]:
            self.prepare(path)

    def prepare(self, path: str) -> Image.Image:
        """Reads a picture and cuts the object out.

        Raises:
            ValueError: if it cannot be read, or its background cannot be removed.
        """

        def refuse(message: str):
            if message.startswith(STAYS):
                raise ValueError(f"{path}: {message} `--keep-background` trains on pictures as they are.")
            log_once(message)

        return prepare(read_picture(path, path), self.background, warn=refuse)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        """Raises ValueError if the picture cannot be read."""
        square = pad_to_square(load_pictures(self.prepare(self.paths[index]), self.paths[index])[0])
        return {"index": index, "image": channels_first(np.asarray(square.resize((PICTURE, PICTURE))))}
