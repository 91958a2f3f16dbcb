"""Scores a checkpoint, or the views that any system made, and the baselines on held-out objects.

    python -m evaluation.evaluate
    python -m evaluation.evaluate --checkpoint sudo-ai/zero123plus-v1.2 --clip openai/clip-vit-large-patch14
    python -m evaluation.evaluate --controlnet controlnet --condition depth --normals controlnet_normals
    python -m evaluation.evaluate --predictions DIR
    python -m evaluation.evaluate --save_tiles DIR
    python -m evaluation.evaluate --check

Protocol: one input view an object, `--samples` samples of it (seed: place in the list + 1000 x sample), views of the
size of the true ones (128 pixels in `evaluation/toys`; others are resampled by area) on grey 127, cameras of the
held-out views around an object whose bounding sphere has radius 0.5. "tile" scores the six views tiled as one picture,
as the paper does; "view" is the mean over single views. The mask is the object's (`pictures.foreground`); saturation
is relative to the truth's; consistency is `metrics.hull_consistency`, which needs no truth; "one step" is the PSNR of
the tile predicted in one step from t = 999. A ControlNet has a row of its own, in which it sees the true depth or
normals. `--normals` names a ControlNet that makes normals of views, of which `zero123plus.mattes` makes mattes: a row
has the mask IoU of the mattes of the true views. `--save_tiles` generates alone, on a machine with a GPU and without
the packages that score, and `--predictions` scores these tiles elsewhere. The standard error of the mean over objects
is behind each mean. Writes `results.json` (with the scores of each object), `results.md` and `views.webp` (rows of
input, generated and true views). `--check` exits with 1 where a bar of `evaluation.bars` is missed; without
`--checkpoint` it measures the ControlNets of this repository too.
"""

import argparse
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from pipeline import Cameras, load_pictures, split_views
from training.data import write_whole
from training.loss import Denoiser, Zero123PlusLoss
from zero123plus import loading
from zero123plus.mattes import cut_out
from zero123plus.options import add_checkpoint_options, command, count, load_from_options, scale
from zero123plus.pictures import foreground

from . import bars, metrics
from .heldout import FOLDER, SHOWN, cameras_of, group_of


def read(path: Path) -> np.ndarray:
    """A picture on grey, float32 of shape (H, W, 3) in [0, 1]."""
    with Image.open(path) as picture:
        return np.asarray(load_pictures(picture, str(path))[0], np.float32) / 255


def score(
    tile: np.ndarray,
    truth: np.ndarray,
    mask: np.ndarray,
    cameras: Cameras,
    clip: metrics.ClipSimilarity | None = None,
) -> dict:
    """All measures of one object.

    Args:
        tile: shape (H, W, 3).
        truth: likewise.
        mask: true mask, shape (H, W).
        cameras: of the views.
        clip: to measure CLIP similarity too.
    """
    views, true_views = split_views(tile[None])[0], split_views(truth[None])[0]
    masks, true_masks = foreground(views), split_views(mask[None, ..., None])[0][..., 0]
    result = {"tile PSNR": metrics.psnr(tile, truth), "tile SSIM": metrics.ssim(tile, truth)}
    result["tile LPIPS"] = metrics.lpips(tile, truth)
    if clip:
        result["tile CLIP"] = clip(tile, truth)
    for name, measure in (("PSNR", metrics.psnr), ("SSIM", metrics.ssim)):
        result[f"view {name}"] = float(np.mean([measure(a, b) for a, b in zip(views, true_views)]))
    result["view LPIPS"] = metrics.lpips(np.stack(views), np.stack(true_views))
    if clip:
        result["view CLIP"] = clip(np.stack(views), np.stack(true_views))
    result["mask IoU"] = metrics.mask_iou(masks, true_masks)
    result["saturation"] = metrics.saturation(tile, mask) / max(metrics.saturation(truth, mask), 1e-6)
    result["consistency"] = metrics.hull_consistency(masks, cameras.poses(), cameras.intrinsics(*views.shape[1:3]))
    return result


def control_tiles(folders: list[Path], condition: str | None) -> list[Image.Image] | None:
    """The objects' true depth or normals as a ControlNet sees them, RGB tiles; None without a condition."""
    return [Image.open(path / f"{condition}.webp") for path in folders] if condition else None


def generate(
    pipe, folders: list[Path], size: tuple[int, int], options: argparse.Namespace, condition: str | None = None
) -> np.ndarray:
    """Tiles of shape (samples, N, *size, 3) for the inputs of N objects."""
    tiles = []
    jobs = [(sample, i) for sample in range(options.samples) for i in range(len(folders))]
    for start in tqdm(range(0, len(jobs), options.batch_size), unit="batch"):
        batch = jobs[start : start + options.batch_size]
        result = pipe(
            [Image.open(folders[i] / "input.webp") for _, i in batch],
            control_image=control_tiles([folders[i] for _, i in batch], condition),
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=[torch.Generator().manual_seed(i + 1000 * sample) for sample, i in batch],
        )
        tiles += [
            np.asarray(tile.resize(size[::-1], Image.Resampling.BOX), np.float32) / 255 for tile in result.images
        ]
    return np.stack(tiles).reshape(options.samples, len(folders), *size, 3)


def matte_iou(pipe, folders: list[Path], steps: int | None, batch_size: int) -> dict[Path, float]:
    """By object, the mask IoU of the mattes of its true views, which are made of the normals that the ControlNet makes
    of these views.
    """
    found = {}
    for start in tqdm(range(0, len(folders), batch_size), "mattes", unit="batch"):
        batch = folders[start : start + batch_size]
        tiles = [load_pictures(Image.open(path / "views.webp"), "views")[0] for path in batch]
        normals = pipe(
            [Image.open(path / "input.webp") for path in batch],
            control_image=tiles,
            num_inference_steps=steps,
            guidance_scale=1.0,
            generator=[torch.Generator().manual_seed(0) for _ in batch],
        ).images
        for path, tile, normal in zip(batch, tiles, normals):
            mask = np.asarray(Image.open(path / "views.webp"))[..., 3:]
            parts = zip(split_views([tile])[0], split_views([normal.resize(tile.size)])[0])
            ours = [cut_out(np.asarray(view), np.asarray(shown))[..., 3] > 127 for view, shown in parts]
            found[path] = metrics.mask_iou(np.stack(ours), split_views(mask[None])[0, ..., 0] > 127)
    return found


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


def one_step(pipe, folders: list[Path], batch_size: int, condition: str | None = None) -> dict:
    """The one-step prediction of objects ([`training.loss.Zero123PlusLoss.validate`]), `batch_size` at a time, as
    columns of the table: PSNR in dB, and the v-loss.
    """
    samples = [
        {
            "image": load_pictures(Image.open(path / "input.webp"), "input")[0],
            "tile": torch.from_numpy(read(path / "views.webp")).permute(2, 0, 1) * 2 - 1,
        }
        for path in folders
    ]
    for sample, tile in zip(samples, control_tiles(folders, condition) or []):
        sample["control"] = torch.from_numpy(np.array(tile)).permute(2, 0, 1) / 127.5 - 1
    loss = Zero123PlusLoss(pipe, pipe.device)
    measured = loss.validate(Denoiser.of(pipe).to(pipe.device), samples, batch_size)
    with_, without = measured["psnr_t999_with"], measured["psnr_t999_without"]
    return {
        "one step": with_,
        "one step without": without,
        "one step gain": with_ - without,
        "v-loss": measured["validation_loss"],
    }


def markdown(
    title: str, table: dict[str, dict], errors: dict[str, dict] | None = None, mark: float | None = None
) -> str:
    """A table with a row for each system; a dash where a system has no such measure.

    Args:
        title: of the first column.
        table: by system, its means.
        errors: by system, their standard errors.
        mark: what is more than so many standard errors from 0 is in bold type.
    """
    columns = list(dict.fromkeys(column for row in table.values() for column in row))

    def cell(name: str, column: str) -> str:
        if column not in table[name]:
            return "-"
        value, error = table[name][column], (errors or {}).get(name, {}).get(column)
        text = f"{value:.3f}" + (f" ± {error:.3f}" if error else "")
        return f"**{text}**" if mark and error and abs(value) > mark * error else text

    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cell(name, column) for column in columns)} |" for name in table]
    return "\n".join(lines) + "\n"


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Score a checkpoint on held-out objects.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add_checkpoint_options(add)
    add("--controlnet", help="folder or Hub name of a ControlNet, which sees the objects' true shapes")
    add("--condition", default="depth", choices=SHOWN, help="what the ControlNet sees")
    add("--normals", help="folder or Hub name of a ControlNet that makes normals, to score mattes")
    add("--predictions", type=Path, help="folder of tiles of any system, scored in place of a checkpoint")
    add(
        "--save_tiles", type=Path, help="new folder, into which the tiles are written as NAME.png without scoring them"
    )
    add("--heldout", type=Path, default=FOLDER, help="objects, of evaluation.heldout")
    add("--output", type=Path, default=Path("out/evaluation"), help="folder of the results, which are replaced")
    add("--steps", type=count, help="denoising steps; the checkpoint's if missing")
    add("--guidance", type=scale, help="guidance scale; the checkpoint's if missing")
    add("--check", action="store_true", help="exit with 1 where a bar of evaluation.bars is missed")
    add("--samples", type=count, default=1, help="a picture; their scores are averaged")
    add("--clip", help="folder or Hub name of a CLIP model, to measure CLIP similarity too")
    add("--limit", type=count, help="score only the first N objects of each group")
    add("--batch_size", type=count, default=4, help="tiles at a time; more are faster on a GPU")
    o = parser.parse_args(argv)
    if o.predictions and (o.controlnet or o.normals):
        name = "--controlnet" if o.controlnet else "--normals"
        parser.error(f"`{name}` changes nothing about the pictures of `--predictions`: leave one of them out.")
    if o.predictions and o.check:
        parser.error("`--check` checks the bars of a checkpoint, and `--predictions` is none: leave one of them out.")
    if o.predictions and o.save_tiles:
        parser.error("`--save_tiles` makes tiles, and `--predictions` scores tiles that are there: leave one out.")
    if o.check and not (o.checkpoint or o.predictions):
        o.controlnet = o.controlnet or loading.ROOT / "controlnet"
        o.normals = o.normals or loading.ROOT / "controlnet_normals"
    return o


def mean_and_error(rows: list[dict]) -> tuple[dict, dict]:
    """Means of measures over objects, and their standard errors."""
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    means = {name: float(values.mean()) for name, values in columns.items()}
    errors = {
        name: float(values.std(ddof=1) / len(values) ** 0.5) for name, values in columns.items() if len(rows) > 1
    }
    return means, errors


def find_objects(o: argparse.Namespace) -> dict[str, list[Path]]:
    """The folders of the held-out objects, by group.

    Raises:
        ValueError: if there are none, or they lack what the ControlNet is to see.
    """
    groups = {}
    for path in sorted(path.parent for path in o.heldout.glob("*/views.webp")):
        groups.setdefault(group_of(path.name), []).append(path)
    groups = {name: members[: o.limit] for name, members in groups.items()}
    if not groups:
        raise ValueError(f"`--heldout` {o.heldout} has no objects: make them with `python -m evaluation.heldout`.")
    everything = [path for members in groups.values() for path in members]
    if o.controlnet and not all((path / f"{o.condition}.webp").exists() for path in everything):
        raise ValueError(
            f"`--heldout` {o.heldout} has no {o.condition}.webp of every object: make them with `python -m"
            " evaluation.heldout`."
        )
    return groups


def measure_checkpoint(
    o: argparse.Namespace, groups: dict[str, list[Path]], cameras: Cameras, size: tuple[int, int]
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, dict]], dict[Path, dict]]:
    """Generates what is to be scored.

    Returns:
        By system, its tiles, shape (samples, N, *size, 3); by group and system, the one-step measures of all objects
        together; and by object, the mask IoU of its mattes, if `--normals` asks for them.
    """
    everything = [path for members in groups.values() for path in members]
    pipe = load_from_options(o, "float32")
    if not loading.same_cameras(pipe.cameras, cameras):
        raise ValueError(f"The checkpoint has the cameras {pipe.cameras}, but the held-out views {cameras}.")
    pipe.set_progress_bar_config(disable=True)
    tiles, steps, mattes = {}, {group: {} for group in groups}, {}
    if o.normals:
        loading.load_controlnet(pipe, o.normals)
        mattes = matte_iou(pipe, everything, o.steps, o.batch_size)
        pipe.controlnet = None

    def measure(name: str, condition: str | None):
        tiles[name] = generate(pipe, everything, size, o, condition)
        for group, members in groups.items():
            steps[group][name] = one_step(pipe, members, o.batch_size, condition)

    measure(bars.OURS, None)
    if o.controlnet:
        loading.load_controlnet(pipe, o.controlnet)
        measure(bars.controlled(o.condition), o.condition)
    return tiles, steps, mattes


def save_tiles(o: argparse.Namespace, objects: list[Path]):
    """Generates tiles into a folder that appears whole.

    Raises:
        ValueError: if the folder exists.
    """
    if o.save_tiles.exists():
        raise ValueError(f"`--save_tiles` {o.save_tiles} exists: choose a new folder.")
    pipe = load_from_options(o, "float32")
    pipe.set_progress_bar_config(disable=True)
    if o.controlnet:
        loading.load_controlnet(pipe, o.controlnet)
    tiles = generate(pipe, objects, pipe.default_size, o, o.condition if o.controlnet else None)[0]
    o.save_tiles.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=o.save_tiles.parent) as folder:
        partial = Path(folder, "tiles")
        partial.mkdir()
        for path, tile in zip(objects, tiles):
            Image.fromarray(np.round(tile * 255).astype(np.uint8)).save(partial / f"{path.name}.png")
        partial.rename(o.save_tiles)


def evaluate(o: argparse.Namespace) -> bool:
    """Scores as the options say, and returns whether all bars are met."""
    groups, cameras = find_objects(o), cameras_of(o.heldout)
    everything = [path for members in groups.values() for path in members]
    if o.save_tiles:
        save_tiles(o, everything)
        return True
    truths = np.stack([read(path / "views.webp") for path in everything])
    masks = np.stack([np.asarray(Image.open(path / "views.webp"))[..., 3] > 127 for path in everything])
    size = truths.shape[1:3]
    clip = metrics.ClipSimilarity(o.clip, loading.choose_device(o.device)) if o.clip else None
    if o.predictions:
        tiles, steps, mattes = {"predictions": read_predictions(o.predictions, everything, size)}, {}, {}
    else:
        tiles, steps, mattes = measure_checkpoint(o, groups, cameras, size)
    inputs = np.stack([read(path / "input.webp").astype(np.float32) for path in everything])
    systems = tiles | {
        "copy of the input": np.tile(inputs, (1, 3, 2, 1))[None],
        "nearest training object": np.stack([read(path / "nearest.webp") for path in everything])[None],
        "mean training tile": np.broadcast_to(read(o.heldout / "mean.webp"), truths.shape)[None],
        "true views": truths[None],
    }
    jobs = [(name, path) for name in systems for path in everything]

    def score_job(job: tuple[str, Path]) -> dict:
        name, path = job
        i = everything.index(path)
        return mean_and_error([score(tile[i], truths[i], masks[i], cameras, clip) for tile in systems[name]])[0]

    # The first alone, because it loads and computes what the others share
    with ThreadPoolExecutor(4) as pool, tqdm(total=len(jobs), unit="object") as bar:
        rows = {jobs[0]: score_job(jobs[0])}
        bar.update()
        for job, row in zip(jobs[1:], pool.map(score_job, jobs[1:])):
            rows[job] = row
            bar.update()
    scores = {  # of each object, by group and system
        group: {name: {path.name: rows[name, path] for path in members} for name in systems}
        for group, members in groups.items()
    }
    if mattes:
        for group, members in groups.items():
            scores[group][bars.MATTES] = {path.name: {"mask IoU": mattes[path]} for path in members}
    results, errors = {}, {}
    for group, table in scores.items():
        both = {name: mean_and_error(list(rows.values())) for name, rows in table.items()}
        results[group] = {name: means | steps.get(group, {}).get(name, {}) for name, (means, _) in both.items()}
        errors[group] = {name: error for name, (_, error) in both.items()}
    text = [markdown(f"{name} ({len(groups[name])})", table, errors[name]) for name, table in results.items()]
    passed = True
    if not o.predictions:
        lines, passed = bars.report(results)
        text.append("\n".join(lines) + "\n")
    print("\n".join(text))
    o.output.mkdir(parents=True, exist_ok=True)
    write_whole(o.output / "results.md", "\n".join(text).encode())
    first = next(iter(tiles))
    record = {
        group: {**table, "standard errors": errors[group], "objects": scores[group][first]}
        for group, table in results.items()
    }
    write_whole(o.output / "results.json", (json.dumps(record, indent=2) + "\n").encode())
    draw(inputs, tiles[first][0], truths).save(o.output / "views.webp", quality=90)
    return passed


def draw(inputs: np.ndarray, tiles: np.ndarray, truths: np.ndarray) -> Image.Image:
    """A picture with a row for each object: input, generated views, true views."""
    height = split_views(tiles[:1]).shape[2]
    gap = np.ones((height, 8, 3))
    rows = []
    for image, ours, truth in zip(inputs, tiles, truths):
        image = Image.fromarray(np.round(image * 255).astype(np.uint8)).resize((height, height), Image.Resampling.BOX)
        views, true_views = split_views(ours[None])[0], split_views(truth[None])[0]
        rows.append(np.concatenate([np.asarray(image) / 255, *views, gap, *true_views], axis=1))
    return Image.fromarray(np.round(np.concatenate(rows) * 255).astype(np.uint8))


@command
def main(argv: list[str] | None = None):
    """The command line."""
    o = parse_options(argv)
    passed = evaluate(o)
    if o.check and not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
