"""Measures `zero123plus.upscale` on true views of held-out toys, beside bicubic interpolation.

    python -m training.render --names evaluation/toys.txt --size 128 --output data/heldout
    python -m training.render --names evaluation/toys.txt --size 512 --output data/heldout-512
    python -m evaluation.upscaling --small data/heldout --large data/heldout-512

The six views of each toy, on grey, are made four times as large and compared with renders of that size: the mean PSNR
and LPIPS of single views. Needs the packages of `requirements-training.txt` and `zero123plus.upscale`.
"""

import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from training.data import on_grey, select_views
from training.shards import index_shards, read_object
from zero123plus.options import DEVICE_HELP, Parser, command, count
from zero123plus.upscale import SCALE, Upscaler

from . import metrics
from .evaluate import markdown, mean_and_error


def bicubic(view: Image.Image) -> Image.Image:
    """Interpolates a view to the size that [`Upscaler`] makes."""
    return view.resize((SCALE * view.width, SCALE * view.height), Image.Resampling.BICUBIC)


def measure_ways(ways: dict, small: np.ndarray, large: np.ndarray) -> dict[str, dict]:
    """Scores each way of enlarging the views of one object.

    Args:
        ways: by name, functions of a picture.
        small: uint8 RGB of shape (6, S, S, 3).
        large: likewise, four times as large.
    """
    rows = {}
    for name, enlarge in ways.items():
        start = time.perf_counter()
        made = np.stack([np.asarray(enlarge(Image.fromarray(view)), np.float32) / 255 for view in small])
        seconds = time.perf_counter() - start
        psnr = [metrics.psnr(ours, truth / 255) for ours, truth in zip(made, large)]
        rows[name] = {
            "PSNR": float(np.mean(psnr)),
            "LPIPS": metrics.lpips(made, large / 255),
            "seconds a tile": seconds,
        }
    return rows


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = Parser("Measure the upscaling of views.")
    add = parser.add_argument
    add("--small", type=Path, required=True, help="shards of held-out toys")
    add("--large", type=Path, required=True, help="shards of the same toys, four times as large")
    add("--device", default="cpu", help=DEVICE_HELP)
    add("--limit", type=count, help="measure only the first N toys")
    o = parser.parse_args(argv)
    ways = {"bicubic": bicubic, "Real-ESRGAN": Upscaler(o.device)}
    large = {item["name"]: item for item in map(read_object, index_shards(o.large))}
    small = [item for item in map(read_object, index_shards(o.small)) if item["name"] in large][: o.limit]
    if not small:
        raise ValueError(f"`--small` {o.small} and `--large` {o.large} have no toy in common: render the same names.")
    rows = {name: [] for name in ways}
    for item in tqdm(small, unit="object"):
        pair = (on_grey(select_views(thing, 0, False)[1]) for thing in (item, large[item["name"]]))
        for name, row in measure_ways(ways, *pair).items():
            rows[name].append(row)
    scores = {name: mean_and_error(measured) for name, measured in rows.items()}
    means, errors = ({name: score[i] for name, score in scores.items()} for i in (0, 1))
    size = small[0]["targets"].shape[2]
    print(markdown(f"{size} to {SCALE * size} pixels ({len(small)} toys)", means, errors))


if __name__ == "__main__":
    main()
