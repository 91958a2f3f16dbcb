"""Makes the fixed list of held-out objects that `evaluation.evaluate` scores, from renders.

    python -m training.render --names evaluation/toys.txt --output data/heldout
    python -m evaluation.heldout --renders data/heldout --train_data data/train

For each object `evaluation/toys/NAME/` gets `input.webp`, `views.webp` (the true tile), both RGBA, `depth.webp` and
`normals.webp` as a ControlNet sees them, and `nearest.webp` (the tile of the training sample whose input looks most
alike); `evaluation/toys/mean.webp` is the mean training tile.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import camera_intrinsics, camera_poses
from training.data import (
    AZIMUTHS,
    CONDITIONS,
    load_objects,
    on_grey,
    select_depth,
    select_normals,
    select_views,
    to_tile,
)

FOLDER = Path(__file__).parent / "toys"
UNSEEN = ("teapot", "windmill", "bed")  # kinds that are never trained
FOV = 30.0  # degrees, of v1.2
POSES = camera_poses(range(30, 360, 60), [20, -10] * 3, 0.5 / math.tan(math.radians(FOV) / 2))  # of v1.2


def intrinsics(size: int) -> np.ndarray:
    """Of the true views when they have `size` x `size` pixels, shape (3, 3)."""
    return camera_intrinsics(FOV, size, size)


def group_of(name: str) -> str:
    """The group that an object is reported in: toys are named KIND-SEED."""
    kind, dash, _ = name.rpartition("-")
    if not dash:
        return "other objects"
    return "kinds never trained" if kind in UNSEEN else "trained kinds, new seeds"


def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the held-out list from renders.")
    parser.add_argument("--renders", type=Path, required=True, help="shards of the held-out objects")
    parser.add_argument("--train_data", type=Path, required=True, help="shards that the checkpoint is trained on")
    parser.add_argument("--output", type=Path, default=FOLDER, help="default: %(default)s")
    options = parser.parse_args(argv)

    train = load_objects(options.train_data)
    variants = [(item, k, mirror) for item in train for k in range(AZIMUTHS) for mirror in (False, True)]
    inputs = np.stack([on_grey(select_views(*variant)[0]).ravel() for variant in variants]).astype(np.float32)
    lengths = np.square(inputs).sum(1)
    options.output.mkdir(parents=True, exist_ok=True)
    mean = np.mean(
        [on_grey(to_tile(select_views(*variant)[1])).astype(np.float32) for variant in variants[::5]], axis=0
    )
    Image.fromarray(np.round(mean).astype(np.uint8)).save(options.output / "mean.webp", lossless=True)
    for item in load_objects(options.renders, CONDITIONS["depth"] + CONDITIONS["normals"]):
        folder = options.output / item["name"]
        folder.mkdir(exist_ok=True)
        image, views = select_views(item, 0, False)
        Image.fromarray(image).save(folder / "input.webp", lossless=True)
        Image.fromarray(to_tile(views)).save(folder / "views.webp", lossless=True)
        for name, select in (("depth", select_depth), ("normals", select_normals)):
            Image.fromarray(to_tile(select(item, 0, False))).save(folder / f"{name}.webp", lossless=True)
        # |a - b|^2 less |a|^2, which is the same for all
        nearest = np.argmin(lengths - 2 * inputs @ on_grey(image).ravel().astype(np.float32))
        tile = on_grey(to_tile(select_views(*variants[nearest])[1]))
        Image.fromarray(tile).save(folder / "nearest.webp", quality=90)


if __name__ == "__main__":
    main()
