"""Measures twelve views of one object: a mirrored input gives mirrored views, which show each azimuth at the other
elevation.

    python -m training.render --names evaluation/toys.txt --output data/heldout
    python -m evaluation.both_elevations --renders data/heldout

View j of the mirrored picture, mirrored back, stands at the azimuth of view 5 - j and has the elevation of view j. For
the six views, the second six and all twelve the table has the tile's PSNR against the true views (mean of both sixes
for twelve), and `metrics.hull_consistency`. Both calls have the same seed.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from pipeline import Cameras
from training.data import TileDataset, on_grey, read_object, select_targets, select_views
from zero123plus import loading
from zero123plus.options import add_checkpoint_options, command, count, load_from_options, scale
from zero123plus.pictures import foreground

from . import metrics
from .evaluate import markdown, mean_and_error
from .heldout import group_of


def generate(pipe, item: dict, options: argparse.Namespace) -> list[np.ndarray]:
    """The two sixes of views of one object in the order of the azimuths, each of shape (6, S, S, 3) in [0, 1]."""
    picture = Image.fromarray(on_grey(select_views(item, 0, False)[0]))
    first, second = (
        pipe(
            image,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).views[0]
        for image in (picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    )
    return [first, second[::-1, :, ::-1]]


def measure(made: list[list[np.ndarray]], items: list[dict], which: slice, cameras: Cameras) -> list[dict]:
    """Scores a part of each object's two sixes; its rows."""
    other = Cameras(cameras.azimuths, cameras.elevations[::-1], cameras.fov)
    poses = np.concatenate([part.poses() for part in (cameras, other)[which]])
    rows = []
    for views, item in zip(made, items):
        truths = [on_grey(select_targets(item["targets"][::step], 0, False)) / 255 for step in (1, -1)]
        masks = foreground(np.concatenate(views[which]))
        rows.append(
            {
                "PSNR": float(np.mean([metrics.psnr(*pair) for pair in zip(views[which], truths[which])])),
                "consistency": metrics.hull_consistency(masks, poses, cameras.intrinsics(*masks.shape[1:])),
            }
        )
    return rows


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure views at both elevations.")
    add = parser.add_argument
    add_checkpoint_options(add)
    add("--renders", type=Path, required=True, help="shards of the held-out toys")
    add("--steps", type=count, help="denoising steps; the checkpoint's if missing")
    add("--guidance", type=scale, help="guidance scale; the checkpoint's if missing")
    add("--limit", type=count, help="measure only the first N objects")
    o = parser.parse_args(argv)
    dataset = TileDataset(o.renders)
    pipe = load_from_options(o, "float32")
    if dataset.preset:
        loading.set_cameras(pipe, dataset.preset, f"`--renders` {o.renders}")
    pipe.set_progress_bar_config(disable=True)
    groups = {}
    for item in map(read_object, dataset.entries[: o.limit]):
        groups.setdefault(group_of(item["name"]), []).append(item)
    sets = {"six": slice(1), "second six": slice(1, 2), "all twelve": slice(2)}
    for group, items in groups.items():
        made = [generate(pipe, item, o) for item in tqdm(items, unit="object")]
        scores = {name: mean_and_error(measure(made, items, which, pipe.cameras)) for name, which in sets.items()}
        means, errors = ({name: score[i] for name, score in scores.items()} for i in (0, 1))
        print(markdown(f"{group} ({len(items)})", means, errors))


if __name__ == "__main__":
    main()
