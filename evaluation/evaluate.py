"""Scores a checkpoint, or the views that any system made, and the baselines on held-out objects.

    python -m evaluation.evaluate
    python -m evaluation.evaluate --checkpoint sudo-ai/zero123plus-v1.2 --clip openai/clip-vit-large-patch14
    python -m evaluation.evaluate --controlnet controlnet --condition depth
    python -m evaluation.evaluate --predictions DIR

Protocol: one input view an object, `--samples` samples of it (seed: place in the list + 1000 x sample), views of the
size of the true ones (64 pixels in `evaluation/toys`; others are resampled by area) on grey 127, v1.2 cameras at
distance 0.5 / tan(15 degrees) around an object whose bounding sphere has radius 0.5. "tile" scores the six views tiled
as one picture, as the paper does; "view" is the mean over single views. The mask is what differs from the background;
saturation is relative to the truth's; consistency is `metrics.hull_consistency`, which needs no truth. Writes
`results.json`, `results.md` and `views.webp` (rows of input, generated and true views).
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel, DDPMScheduler
from PIL import Image
from tqdm import tqdm

from generate import ROOT, load_pipeline, tile_size
from pipeline import load_pictures, split_views
from training.train import Conditions, Encoder, one_step_psnr

from . import metrics
from .heldout import FOLDER, POSES, group_of, intrinsics


def read(path: Path) -> np.ndarray:
    """A picture on grey, float32 of shape (H, W, 3) in [0, 1]."""
    with Image.open(path) as picture:
        return np.asarray(load_pictures(picture, str(path))[0], np.float32) / 255


def score(tile: np.ndarray, truth: np.ndarray, mask: np.ndarray, clip: metrics.ClipSimilarity | None) -> dict:
    """All measures of one object.

    Args:
        tile: shape (H, W, 3).
        truth: likewise.
        mask: true mask, shape (H, W).
        clip: to measure CLIP similarity too.
    """
    views, true_views = split_views(tile[None])[0], split_views(truth[None])[0]
    mask_views = metrics.foreground(views)
    result = {"tile PSNR": metrics.psnr(tile, truth), "tile SSIM": metrics.ssim(tile, truth)}
    result["tile LPIPS"] = metrics.lpips(tile, truth)
    if clip:
        result["tile CLIP"] = clip(tile, truth)
    for name, measure in (("PSNR", metrics.psnr), ("SSIM", metrics.ssim)):
        result[f"view {name}"] = float(np.mean([measure(a, b) for a, b in zip(views, true_views)]))
    result["view LPIPS"] = metrics.lpips(np.stack(views), np.stack(true_views))
    if clip:
        result["view CLIP"] = clip(np.stack(views), np.stack(true_views))
    result["mask IoU"] = metrics.mask_iou(metrics.foreground(tile), mask)
    result["saturation"] = metrics.saturation(tile, mask) / max(metrics.saturation(truth, mask), 1e-6)
    result["consistency"] = metrics.hull_consistency(mask_views, POSES, intrinsics(views.shape[1]))
    return result


def control_tiles(folders: list[Path], options: argparse.Namespace) -> list[Image.Image] | None:
    """The objects' true depth or normals as the ControlNet sees them, RGB tiles; None without a ControlNet."""
    return [Image.open(path / f"{options.condition}.webp") for path in folders] if options.controlnet else None


def generate(pipe, folders: list[Path], size: tuple[int, int], options: argparse.Namespace) -> np.ndarray:
    """Tiles of shape (samples, N, *size, 3) for the inputs of N objects."""
    tiles = []
    jobs = [(sample, i) for sample in range(options.samples) for i in range(len(folders))]
    for start in tqdm(range(0, len(jobs), options.batch_size), unit="batch"):
        batch = jobs[start : start + options.batch_size]
        result = pipe(
            [Image.open(folders[i] / "input.webp") for _, i in batch],
            **tile_size(pipe),
            control_image=control_tiles([folders[i] for _, i in batch], options),
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=[torch.Generator().manual_seed(i + 1000 * sample) for sample, i in batch],
        )
        tiles += [
            np.asarray(tile.resize(size[::-1], Image.Resampling.BOX), np.float32) / 255 for tile in result.images
        ]
    return np.stack(tiles).reshape(options.samples, len(folders), *size, 3)


def read_predictions(folder: Path, objects: list[Path], size: tuple[int, int]) -> np.ndarray:
    """Tiles of shape (1, N, *size, 3): `NAME.png`, or `NAME/tile.png` as `generate.py` writes them.

    Raises:
        ValueError: if one is missing or is no tile of 3 x 2 square views.
    """
    tiles = []
    for path in objects:
        found = [p for p in (folder / f"{path.name}.png", folder / path.name / "tile.png") if p.is_file()]
        if not found:
            raise ValueError(f"`--predictions` {folder} has neither {path.name}.png nor {path.name}/tile.png.")
        tile = load_pictures(Image.open(found[0]), str(found[0]))[0]
        if 2 * tile.height != 3 * tile.width:
            raise ValueError(f"{found[0]} is {tile.width} x {tile.height} pixels, not 3 rows of 2 square views.")
        tiles.append(np.asarray(tile.resize(size[::-1], Image.Resampling.BOX), np.float32) / 255)
    return np.stack(tiles)[None]


def one_step(pipe, folders: list[Path], options: argparse.Namespace) -> dict:
    """[`training.train.one_step_psnr`] of the objects."""
    samples = [
        {
            "index": i,
            "image": load_pictures(Image.open(path / "input.webp"), "input")[0],
            "tile": torch.from_numpy(read(path / "views.webp")).permute(2, 0, 1) * 2 - 1,
        }
        for i, path in enumerate(folders)
    ]
    for sample, tile in zip(samples, control_tiles(folders, options) or []):
        sample["control"] = torch.from_numpy(np.array(tile)).permute(2, 0, 1) / 127.5 - 1
    ramp = torch.tensor(pipe.config.ramping_coefficients)
    model = Conditions(pipe.unet, pipe.vision_encoder, ramp, pipe.controlnet).to(pipe.device)
    encoder = Encoder(pipe, pipe.device, cache_latents=False)
    return one_step_psnr(pipe, model, DDPMScheduler.from_config(pipe.scheduler.config), encoder, samples)


def markdown(title: str, table: dict[str, dict]) -> str:
    """A table with a row for each system."""
    columns = list(next(iter(table.values())))
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{row[c]:.3f}' for c in columns)} |" for name, row in table.items()]
    return "\n".join(lines) + "\n"


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Score a checkpoint on held-out objects.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", default=str(ROOT), help="folder or Hub name")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--controlnet", help="folder or Hub name of a ControlNet, which sees the objects' true shapes")
    what.add_argument(
        "--predictions", type=Path, help="folder of tiles of any system, scored in place of a checkpoint"
    )
    add("--condition", default="depth", choices=("depth", "normals"), help="what the ControlNet sees")
    add("--heldout", type=Path, default=FOLDER, help="objects, of evaluation.heldout")
    add("--output", type=Path, default=Path("out/evaluation"), help="folder of the results, which are replaced")
    add("--steps", type=int, default=28)
    add("--guidance", type=float, default=4.0)
    add("--samples", type=int, default=1, help="a picture; their scores are averaged")
    add("--clip", help="folder or Hub name of a CLIP model, to measure CLIP similarity too")
    add("--limit", type=int, help="score only the first N objects of each group")
    add("--batch_size", type=int, default=8)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    """The command line."""
    o = parse_options(argv)
    groups = {}
    for path in sorted(path.parent for path in o.heldout.glob("*/views.webp")):
        groups.setdefault(group_of(path.name), []).append(path)
    if not groups:
        raise SystemExit(f"`--heldout` {o.heldout} has no objects: make them with `python -m evaluation.heldout`.")
    groups = {name: members[: o.limit] for name, members in groups.items()}
    everything = [path for members in groups.values() for path in members]
    if o.controlnet and not all((path / f"{o.condition}.webp").exists() for path in everything):
        raise SystemExit(
            f"`--heldout` {o.heldout} has no {o.condition}.webp of every object: make them with `python -m"
            " evaluation.heldout`."
        )
    truths = np.stack([read(path / "views.webp") for path in everything])
    masks = np.stack([np.asarray(Image.open(path / "views.webp"))[..., 3] > 127 for path in everything])
    size = truths.shape[1:3]
    clip = metrics.ClipSimilarity(o.clip, o.device) if o.clip else None
    results = {}
    if o.predictions:
        try:
            ours = read_predictions(o.predictions, everything, size)
        except ValueError as error:
            raise SystemExit(str(error)) from error
    else:
        pipe = load_pipeline(o.checkpoint, o.device, "float32")
        if not np.allclose(pipe.camera_poses(), POSES, atol=1e-3):
            raise SystemExit(f"{o.checkpoint} has other cameras than the held-out views, which are those of v1.2.")
        if o.controlnet:
            pipe.add_controlnet(ControlNetModel.from_pretrained(o.controlnet).to(o.device))
        pipe.set_progress_bar_config(disable=True)
        ours = generate(pipe, everything, size, o)

    inputs = np.stack([read(path / "input.webp") for path in everything])
    systems = {
        "predictions" if o.predictions else "this checkpoint": ours,
        "copy of the input": np.tile(inputs, (1, 3, 2, 1))[None],
        "nearest training object": np.stack([read(path / "nearest.webp") for path in everything])[None],
        "mean training tile": np.broadcast_to(read(o.heldout / "mean.webp"), truths.shape)[None],
        "true views": truths[None],
    }
    text = []
    with tqdm(total=len(everything) * len(systems), unit="object") as bar:
        for group, members in groups.items():
            table = {}
            for name, samples in systems.items():
                rows = []
                for path in members:
                    i = everything.index(path)
                    rows += [score(tiles[i], truths[i], masks[i], clip) for tiles in samples]
                    bar.update()
                table[name] = {column: float(np.mean([row[column] for row in rows])) for column in rows[0]}
            results[group] = table
            text.append(markdown(f"{group} ({len(members)})", table))
            if not o.predictions:
                step = results[group]["one step"] = one_step(pipe, members, o)
                text.append(
                    f"One step from t = 999: {step['psnr_t999_with']:.2f} dB with the condition,"
                    f" {step['psnr_t999_without']:.2f} dB without.\n"
                )
    print("\n".join(text))
    o.output.mkdir(parents=True, exist_ok=True)
    (o.output / "results.md").write_text("\n".join(text))
    (o.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    gap = np.ones((inputs.shape[1], 8, 3))
    rows = [
        np.concatenate([a, *split_views(b[None])[0], gap, *split_views(c[None])[0]], axis=1)
        for a, b, c in zip(inputs, ours[0], truths)
    ]
    Image.fromarray(np.round(np.concatenate(rows) * 255).astype(np.uint8)).save(o.output / "views.webp", quality=90)


if __name__ == "__main__":
    main()
