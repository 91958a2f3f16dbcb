"""Reads the shards of `training.render` and makes training samples of them."""

import io
import json
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from pipeline import COLUMNS, GREY, ROWS

AZIMUTHS = 6


def load_objects(folder: Path) -> list[dict]:
    """Reads all objects of a folder of shards, in order.

    Args:
        folder: with `shard-*.tar`; unfinished shards are left out.

    Returns:
        For each object `name`, `inputs` of shape (6, S, S, 4) and `targets` of shape (2, 6, S, S, 4): elevations by
        azimuths; both uint8 RGBA with straight alpha.

    Raises:
        ValueError: if the folder has no shards.
    """
    shards = sorted(str(path) for path in Path(folder).glob("shard-*.tar"))
    if not shards:
        raise ValueError(
            f"{folder} has no shards (shard-*.tar): render them with `python -m training.render --output {folder}`."
        )
    objects = []
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        sheets = {
            name: np.asarray(Image.open(io.BytesIO(sample[f"{name}.webp"])).convert("RGBA"))
            for name in ("inputs", "targets")
        }
        size = sheets["inputs"].shape[0]
        targets = sheets["targets"].reshape(2, size, AZIMUTHS, size, 4).swapaxes(1, 2)
        inputs = sheets["inputs"].reshape(size, AZIMUTHS, size, 4).swapaxes(0, 1)
        objects.append({"name": json.loads(sample["json"])["object"], "inputs": inputs, "targets": targets})
    return objects


def on_grey(rgba: np.ndarray) -> np.ndarray:
    """Composites uint8 RGBA of shape (..., 4) on the grey of the training data: uint8 RGB of shape (..., 3)."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.round(rgba[..., :3] * alpha + GREY * (1 - alpha)).astype(np.uint8)


def select_views(item: dict, k: int, mirror: bool) -> tuple[np.ndarray, np.ndarray]:
    """Input view k of an object and the six targets that Zero123++ has for it.

    Target j stands at azimuth 30 + 60 j from the input, so in column (k + j) mod 6; the elevations alternate. A
    mirrored object is another object: every picture is flipped, and azimuths count the other way round.

    Returns:
        uint8 RGBA: the input of shape (S, S, 4), and the targets of shape (6, S, S, 4).
    """
    columns = [(k - j - 1 if mirror else k + j) % AZIMUTHS for j in range(AZIMUTHS)]
    views = np.stack([item["targets"][j % 2, column] for j, column in enumerate(columns)])
    return (item["inputs"][k][:, ::-1], views[:, :, ::-1]) if mirror else (item["inputs"][k], views)


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
    shape (3, 3 S, 2 S) in [-1, 1].
    """

    def __init__(self, folder: Path):
        self.objects = load_objects(folder)

    def __len__(self):
        return len(self.objects) * 2 * AZIMUTHS

    def __getitem__(self, index: int) -> dict:
        item, variant = divmod(index, 2 * AZIMUTHS)
        image, views = select_views(self.objects[item], variant // 2, bool(variant % 2))
        tile = torch.from_numpy(to_tile(on_grey(views))).permute(2, 0, 1) / 127.5 - 1
        return {"index": index, "image": Image.fromarray(on_grey(image)), "tile": tile}


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
