"""Scores a checkpoint, and the baselines, on held-out toys.

    python -m evaluation.evaluate

Protocol: one input view an object, one sample a picture, the seed its place in the list; views of 64 pixels on grey,
v1.2 cameras around an object in the sphere of radius 0.5. LPIPS and PSNR are of the six views tiled, as in the paper;
the mask is what differs from the grey background; saturation is relative to the truth's. Writes `results.json`,
`results.md` and `views.png` (rows of input, generated and true views).
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image
from tqdm import tqdm

from generate import ROOT, load_pipeline, tile_size
from pipeline import load_pictures, split_views
from training.train import Conditions, Encoder, one_step_psnr

from . import metrics
from .heldout import FOLDER

UNSEEN = ("teapot", "windmill", "bed")
COLUMNS = ("PSNR dB", "LPIPS", "mask IoU", "saturation")


def read(path: Path) -> np.ndarray:
    """A picture on grey, float32 of shape (H, W, 3) in [0, 1]."""
    with Image.open(path) as picture:
        return np.asarray(load_pictures(picture, str(path))[0], np.float32) / 255


def score(tiles: np.ndarray, truths: np.ndarray, masks: np.ndarray) -> list[float]:
    """Mean over objects of the four columns, for tiles and truths of shape (N, H, W, 3) and true masks (N, H, W)."""
    rows = []
    for ours, truth, mask in zip(tiles, truths, masks):
        ratio = metrics.saturation(ours, mask) / max(metrics.saturation(truth, mask), 1e-6)
        rows.append(
            (
                metrics.psnr(ours, truth),
                metrics.lpips(ours, truth),
                metrics.mask_iou(metrics.foreground(ours), mask),
                ratio,
            )
        )
    return np.mean(rows, axis=0).tolist()


def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Score a checkpoint on held-out toys.")
    parser.add_argument(
        "--checkpoint", default=str(ROOT), help="folder or Hub name (default: the one in this repository)"
    )
    parser.add_argument("--heldout", type=Path, default=FOLDER, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("out/evaluation"), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=28, help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=4.0, help="default: %(default)s")
    parser.add_argument("--limit", type=int, help="score only the first N objects of each group")
    parser.add_argument("--batch_size", type=int, default=8, help="default: %(default)s")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    options = parser.parse_args(argv)

    folders = sorted(path.parent for path in options.heldout.glob("*/views.webp"))
    if not folders:
        raise SystemExit(f"{options.heldout} has no objects: make them with `python -m evaluation.heldout`.")
    groups = {
        "trained kinds, new seeds": [path for path in folders if path.name.rsplit("-", 1)[0] not in UNSEEN][
            : options.limit
        ],
        "kinds never trained": [path for path in folders if path.name.rsplit("-", 1)[0] in UNSEEN][: options.limit],
    }
    pipe = load_pipeline(options.checkpoint, options.device, "float32")
    pipe.set_progress_bar_config(disable=True)
    size = tile_size(pipe)

    report, rows, everything = {}, [], sum(groups.values(), [])
    with tqdm(total=len(everything), unit="object") as bar:
        for group, members in groups.items():
            truths = np.stack([read(path / "views.webp") for path in members])
            masks = np.stack([np.asarray(Image.open(path / "views.webp"))[..., 3] > 127 for path in members])
            pictures = [Image.open(path / "input.webp") for path in members]
            inputs = np.stack([read(path / "input.webp") for path in members])
            ours = []
            for i in range(0, len(members), options.batch_size):
                batch = pictures[i : i + options.batch_size]
                seeds = [torch.Generator().manual_seed(i + j) for j in range(len(batch))]
                result = pipe(
                    batch,
                    **size,
                    num_inference_steps=options.steps,
                    guidance_scale=options.guidance,
                    generator=seeds,
                    output_type="pil",
                )
                ours += [tile.resize(truths.shape[2:0:-1], Image.Resampling.BOX) for tile in result.images]
                bar.update(len(batch))
            ours = np.stack([np.asarray(tile, np.float32) / 255 for tile in ours])
            mean = read(options.heldout / "mean.webp")
            report[group] = {
                "this checkpoint": score(ours, truths, masks),
                "copy of the input": score(np.tile(inputs, (1, 3, 2, 1)), truths, masks),
                "nearest training object": score(
                    np.stack([read(path / "nearest.webp") for path in members]), truths, masks
                ),
                "mean training tile": score(np.broadcast_to(mean, truths.shape), truths, masks),
            }
            rows += [
                np.concatenate(
                    [a, *split_views(b[None])[0], np.ones((a.shape[0], 8, 3)), *split_views(c[None])[0]], axis=1
                )
                for a, b, c in zip(inputs, ours, truths)
            ]

    members = groups["trained kinds, new seeds"]
    truths = [torch.from_numpy(read(path / "views.webp")).permute(2, 0, 1) * 2 - 1 for path in members]
    samples = [
        {"index": i, "image": load_pictures(Image.open(path / "input.webp"), "input")[0], "tile": truths[i]}
        for i, path in enumerate(members)
    ]
    model = Conditions(pipe.unet, pipe.vision_encoder, torch.tensor(pipe.config.ramping_coefficients)).to(
        options.device
    )
    encoder = Encoder(pipe, torch.device(options.device), cache_latents=False)
    one_step = one_step_psnr(pipe, model, DDPMScheduler.from_config(pipe.scheduler.config), encoder, samples)

    lines = []
    for group, table in report.items():
        lines += [f"| {group} ({len(groups[group])}) | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
        lines += [
            f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |" for name, values in table.items()
        ]
        lines.append("")
    lines.append(
        f"One step from t = 999, {len(members)} trained kinds: {one_step['psnr_t999_with']:.2f} dB with the condition,"
        f" {one_step['psnr_t999_without']:.2f} dB without."
    )
    print("\n".join(lines))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.md").write_text("\n".join(lines) + "\n")
    report = {group: {name: dict(zip(COLUMNS, row)) for name, row in table.items()} for group, table in report.items()}
    (options.output / "results.json").write_text(json.dumps({**report, "one step": one_step}, indent=2))
    Image.fromarray(np.round(np.concatenate(rows) * 255).astype(np.uint8)).save(options.output / "views.png")


if __name__ == "__main__":
    main()
