"""Scores a checkpoint, or the views that any system made, and the baselines on held-out objects.

    python -m evaluation.evaluate
    python -m evaluation.evaluate --checkpoint sudo-ai/zero123plus-v1.2 --heldout evaluation/groups/mine
    python -m evaluation.evaluate --controlnet controlnet --condition depth --normals controlnet_normals
    python -m evaluation.evaluate --predictions DIR

Protocol: one input view an object, `--samples` samples of it (seed: place in the list + 1000 x sample), views of the
size of the true ones (others are resampled by area) on grey 127, cameras of the held-out views around an object whose
bounding sphere has radius 0.5. The six views are scored tiled as one picture, as in the paper. The mask is the
object's (`pictures.foreground`); "back" is of the views at 150 and 210 degrees; saturation is relative to the
truth's; consistency is `metrics.hull_consistency`, which needs no truth; "one step" is the PSNR of the tile predicted
in one step from t = 999. With `--also 180` a row is of two pictures of each object. A ControlNet has a row of
its own, in which it sees the true depth or normals. `--normals` names a ControlNet that makes normals of views, of
which `zero123plus.mattes` makes mattes: a row has the mask IoU of the mattes of the true views. `--student` names a
LoRA that needs few steps (`training.student`), which is compared with the checkpoint: "denoising" is the processor
time of the UNet in seconds a tile, "diversity" the root mean square of what two seeds differ by, and `student.webp`
has six objects in three rows each: the checkpoint's views, its student's, and its student's in one step.
`--predictions` scores tiles that were made elsewhere. Each folder of `--heldout` is a group with a table of its own;
behind each mean over its objects is the standard error. Writes `results.json` (with the scores of each object),
`results.md` and `views.webp` (rows of input, generated and true views).
"""

import argparse
import io
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from pipeline import COLUMNS, ROWS, Cameras, Zero123PlusPipeline, load_pictures, split_views
from training.data import channels_first, collate
from training.loss import Denoiser, Zero123PlusLoss
from zero123plus import loading
from zero123plus.files import write_file
from zero123plus.mattes import view_without_background
from zero123plus.options import Parser, add_checkpoint_options, command, count, parse_checkpoint, scale
from zero123plus.pictures import foreground

from . import metrics
from .heldout import ALSO, GROUPS, SHOWN, cameras_of

OURS, COPY, MATTES = "this checkpoint", "copy of the input", "mattes of the true views"
STUDENT, STUDENT_STEP, ONE_STEP = "its student", "its student, 1 step", "this checkpoint, 1 step"
BACK = slice(2, 4)  # the views at 150 and 210 degrees
BASELINES = (COPY, "nearest training object", "mean training tile")


def controlled(condition: str) -> str:
    """The name of the system that sees the true depth or normals besides the picture."""
    return f"with the true {condition}"


def several(azimuths: tuple[int, ...]) -> str:
    """The name of the system that sees further pictures of the object."""
    return f"with {', '.join(map(str, azimuths))} too"


def read_on_grey(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """A picture on grey, float32 of shape (H, W, 3) in [0, 1]; brought to a height and width by area if they are
    given.
    """
    with Image.open(path) as picture:
        picture = load_pictures(picture, str(path))[0]
    picture = picture.resize(size[::-1], Image.Resampling.BOX) if size else picture
    return np.asarray(picture, np.float32) / 255


def score(tile: np.ndarray, truth: np.ndarray, mask: np.ndarray, cameras: Cameras) -> dict:
    """All measures of one object: of a tile and the true one, shape (H, W, 3), and the true mask, shape (H, W)."""
    views = split_views(tile[None])[0]
    masks, true_masks = foreground(views), split_views(mask[None, ..., None])[0][..., 0]
    result = {"tile PSNR": metrics.psnr(tile, truth), "tile SSIM": metrics.ssim(tile, truth)}
    result["tile LPIPS"] = metrics.lpips(tile, truth)
    result["mask IoU"] = metrics.mask_iou(masks, true_masks)
    result["back PSNR"] = metrics.psnr(views[BACK], split_views(truth[None])[0][BACK])
    result["saturation"] = metrics.saturation(tile, mask) / max(metrics.saturation(truth, mask), 1e-6)
    result["consistency"] = metrics.hull_consistency(masks, cameras.poses(), cameras.intrinsics(*views.shape[1:3]))
    return result


def control_tiles(folders: list[Path], condition: str | None) -> list[Image.Image] | None:
    """The objects' true depth or normals as a ControlNet sees them, RGB tiles; None without a condition."""
    return [Image.open(path / f"{condition}.webp") for path in folders] if condition else None


@dataclass(frozen=True)
class Sampling:
    """How a checkpoint's tiles are made, so many samples of each picture. `also` are the azimuths of further pictures.
    What is None is the checkpoint's.
    """

    steps: int | None = None
    guidance: float | None = None
    samples: int = 1
    batch_size: int = 4
    also: tuple[int, ...] = ()


def generate(
    pipe, folders: list[Path], size: tuple[int, int], sampling: Sampling, condition: str | None = None
) -> np.ndarray:
    """Tiles of shape (samples, N, *size, 3) for the inputs of N objects."""
    tiles = []
    jobs = [(sample, i) for sample in range(sampling.samples) for i in range(len(folders))]
    for start in tqdm(range(0, len(jobs), sampling.batch_size), unit="batch"):
        batch = jobs[start : start + sampling.batch_size]
        pictures = [Image.open(folders[i] / "input.webp") for _, i in batch]
        if sampling.also:
            pictures = [
                [picture, *(Image.open(folders[i] / f"input_{azimuth}.webp") for azimuth in sampling.also)]
                for picture, (_, i) in zip(pictures, batch)
            ]
        result = pipe(
            pictures,
            image_azimuths=[0, *sampling.also] if sampling.also else None,
            control_image=control_tiles([folders[i] for _, i in batch], condition),
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            generator=[torch.Generator().manual_seed(i + 1000 * sample) for sample, i in batch],
        )
        tiles += [
            np.asarray(tile.resize(size[::-1], Image.Resampling.BOX), np.float32) / 255 for tile in result.images
        ]
    return np.stack(tiles).reshape(sampling.samples, len(folders), *size, 3)


def matte_iou(pipe, folders: list[Path], sampling: Sampling) -> dict[Path, float]:
    """By object, the mask IoU of the mattes of its true views, which are made of the normals that the ControlNet makes
    of these views.
    """
    found = {}
    for start in tqdm(range(0, len(folders), sampling.batch_size), "mattes", unit="batch"):
        batch = folders[start : start + sampling.batch_size]
        tiles = [load_pictures(Image.open(path / "views.webp"), "views")[0] for path in batch]
        normals = pipe(
            [Image.open(path / "input.webp") for path in batch],
            control_image=tiles,
            num_inference_steps=sampling.steps,
            guidance_scale=1.0,
            generator=[torch.Generator().manual_seed(0) for _ in batch],
        ).images
        for path, tile, normal in zip(batch, tiles, normals):
            mask = np.asarray(Image.open(path / "views.webp"))[..., 3:]
            parts = zip(split_views([tile])[0], split_views([normal.resize(tile.size)])[0])
            ours = [
                view_without_background(np.asarray(view), np.asarray(shown))[..., 3] > 127 for view, shown in parts
            ]
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


def diversity_and_time(pipe, folders: list[Path], sampling: Sampling) -> dict:
    """What two seeds of a checkpoint's tiles differ by, and its UNet's processor time a tile, as columns of the table.
    The time is that of the median batch, because other programs can lengthen one.
    """
    begun, seconds = [], []
    hooks = [
        pipe.unet.register_forward_pre_hook(lambda *_: begun.append(time.process_time())),
        pipe.unet.register_forward_hook(lambda *_: seconds.append(time.process_time() - begun[-1])),
    ]
    tiles = generate(pipe, folders, pipe.default_size, replace(sampling, samples=2))
    for hook in hooks:
        hook.remove()
    difference = float(np.sqrt(np.square(tiles[0] - tiles[1]).mean()))
    count = 2 * len(folders)
    sizes = [min(sampling.batch_size, count - start) for start in range(0, count, sampling.batch_size)]
    batches = np.reshape(seconds, (len(sizes), -1)).sum(1) / sizes
    return {"diversity": difference, "denoising": float(np.median(batches))}


def one_step(pipe, folders: list[Path], batch_size: int, condition: str | None = None) -> dict:
    """The one-step prediction of objects ([`training.loss.Zero123PlusLoss.validate`]), `batch_size` at a time, as
    columns of the table: PSNR in dB, and the v-loss.
    """
    pictures = {
        name: load_pictures([Image.open(path / f"{file}.webp") for path in folders], name)
        for name, file in {"image": "input", "tile": "views", "control": condition}.items()
        if file
    }
    sizes = {name: min(picture.size for picture in some) for name, some in pictures.items()}
    samples = [
        {
            name: channels_first(np.asarray(some[i].resize(sizes[name], Image.Resampling.BOX)))
            for name, some in pictures.items()
        }
        for i in range(len(folders))
    ]
    loss = Zero123PlusLoss(pipe, pipe.device)
    measured = loss.validate(Denoiser.of(pipe).to(pipe.device), collate(samples), batch_size)
    with_, without = measured["psnr_t999_with"], measured["psnr_t999_without"]
    return {
        "one step": with_,
        "one step without": without,
        "one step gain": with_ - without,
        "v-loss": measured["validation_loss"],
    }


def markdown(title: str, table: dict[str, dict], errors: dict[str, dict]) -> str:
    """A table, whose first column has a title, of means and standard errors by system; a dash where one has no such
    measure.
    """
    columns = list(dict.fromkeys(column for row in table.values() for column in row))

    def cell(name: str, column: str) -> str:
        if column not in table[name]:
            return "-"
        error = errors.get(name, {}).get(column)
        return f"{table[name][column]:.3f}" + (f" ± {error:.3f}" if error else "")

    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cell(name, column) for column in columns)} |" for name in table]
    return "\n".join(lines) + "\n"


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser("Score a checkpoint on held-out objects.")
    add = parser.add_argument
    add_checkpoint_options(add)
    add("--controlnet", help="folder or Hub name of a ControlNet, which sees the objects' true shapes")
    add("--condition", default="depth", choices=SHOWN, help="what the ControlNet sees")
    add("--normals", help="folder or Hub name of a ControlNet that makes normals, to score mattes")
    add("--student", help="folder or Hub name of a LoRA of few steps, compared with the checkpoint")
    add(
        "--also",
        type=int,
        nargs="+",
        choices=ALSO,
        default=[],
        help="azimuths of further pictures of each object, with a LoRA for several; scored beside one picture",
    )
    add("--predictions", type=Path, help="folder of tiles of any system, scored in place of a checkpoint")
    add("--heldout", type=Path, nargs="+", default=GROUPS, help="groups of objects, of evaluation.heldout")
    add("--output", type=Path, default=Path("out/evaluation"), help="folder of the results, which are replaced")
    add("--steps", type=count, help="denoising steps; the checkpoint's if missing")
    add("--guidance", type=scale, help="guidance scale; the checkpoint's if missing")
    add("--samples", type=count, default=1, help="tiles of each picture, whose scores are averaged")
    add("--limit", type=count, help="score only N objects of each group, evenly spread over it")
    add("--batch-size", type=count, default=4, help="tiles at a time; more are faster on a GPU")
    o = parser.parse_args(argv)
    if o.predictions and (o.controlnet or o.normals or o.student):
        name = "--controlnet" if o.controlnet else "--normals" if o.normals else "--student"
        parser.error(f"`{name}` changes nothing about the pictures of `--predictions`: leave one of them out.")
    return o


def mean_and_error(rows: list[dict]) -> tuple[dict, dict]:
    """Means of measures over objects, and their standard errors."""
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    means = {name: float(values.mean()) for name, values in columns.items()}
    errors = {
        name: float(values.std(ddof=1) / len(values) ** 0.5) for name, values in columns.items() if len(rows) > 1
    }
    return means, errors


def find_objects(heldout: list[Path], condition: str | None, limit: int | None) -> dict[str, list[Path]]:
    """The folders of the held-out objects, by the name of their group. With a limit only so many of each group, evenly
    spread over it.

    Raises:
        ValueError: if there are none, or they lack the condition that a ControlNet is to see.
    """
    groups = {}
    for folder in heldout:
        paths = sorted(path.parent for path in folder.glob("*/views.webp"))
        if not paths:
            raise ValueError(f"`--heldout` {folder} has no objects: make them with `python -m evaluation.heldout`.")
        groups[folder.name] = paths
    for name, members in groups.items() if limit is not None else ():
        step = max(1, len(members) // max(1, limit))
        groups[name] = members[step // 2 :: step][:limit]
    everything = [path for members in groups.values() for path in members]
    for path in everything if condition else ():
        if not (path / f"{condition}.webp").exists():
            raise ValueError(
                f"`--heldout` {path.parent} has no {condition}.webp of every object: make them with `python -m"
                " evaluation.heldout`."
            )
    return groups


def measure_checkpoint(
    pipe: Zero123PlusPipeline,
    groups: dict[str, list[Path]],
    size: tuple[int, int],
    sampling: Sampling,
    controlnets: dict[str, str | Path],
    normals: str | Path | None,
    student: str | Path | None,
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, dict]], dict[Path, dict]]:
    """Generates what is to be scored, tiles of `size`, height and width in pixels. ControlNets, by what they see, a
    ControlNet that makes normals, and a student are measured beside the pipeline alone.

    Returns:
        By system, its tiles, shape (samples, N, *size, 3); by group and system, the one-step measures of all objects
        together; and by object, the mask IoU of its mattes.
    """
    everything = [path for members in groups.values() for path in members]
    tiles, steps, mattes = {}, {group: {} for group in groups}, {}
    if normals:
        loading.load_controlnet(pipe, normals)
        mattes = matte_iou(pipe, everything, sampling)
        pipe.controlnet = None
    for condition, controlnet in {None: None, **controlnets}.items():
        name = controlled(condition) if condition else OURS
        if controlnet:
            loading.load_controlnet(pipe, controlnet)
        tiles[name] = generate(pipe, everything, size, sampling, condition)
        for group, members in groups.items():
            steps[group][name] = one_step(pipe, members, sampling.batch_size, condition)
    pipe.controlnet = None
    if sampling.also:
        tiles[several(sampling.also)] = tiles.pop(OURS)
        tiles[OURS] = generate(pipe, everything, size, replace(sampling, also=()))
    if student:
        tiles[ONE_STEP] = generate(pipe, everything, size, replace(sampling, steps=1))
        for group, members in groups.items():
            steps[group][OURS] |= diversity_and_time(pipe, members[:8], sampling)
        loading.add_lora(pipe, student)
        sampling = replace(sampling, steps=None, guidance=None)  # the student's own
        tiles[STUDENT] = generate(pipe, everything, size, sampling)
        tiles[STUDENT_STEP] = generate(pipe, everything, size, replace(sampling, steps=1))
        for group, members in groups.items():
            steps[group][STUDENT] = diversity_and_time(pipe, members[:8], sampling)
    return tiles, steps, mattes


def score_systems(
    systems: dict[str, np.ndarray], objects: list[Path], cameras: Cameras
) -> dict[tuple[str, Path], dict]:
    """The measures of each object, by system and object, the mean over samples, given tiles of shape (samples, N, H,
    W, 3) by system and the folders of the N objects.
    """
    jobs = [(name, i) for name in systems for i in range(len(objects))]

    def score_job(job: tuple[str, int]) -> dict:
        name, i = job
        truth = systems["true views"][0, i]
        alpha = Image.open(objects[i] / "views.webp").convert("RGBA").getchannel("A")
        mask = np.asarray(alpha.resize(truth.shape[1::-1], Image.Resampling.BOX)) > 127
        return mean_and_error([score(tile[i], truth, mask, cameras) for tile in systems[name]])[0]

    # The first alone, because it loads and computes what the others share
    with ThreadPoolExecutor(4) as pool, tqdm(total=len(jobs), unit="object") as bar:
        rows = [score_job(jobs[0])]
        bar.update()
        for row in pool.map(score_job, jobs[1:]):
            rows.append(row)
            bar.update()
    return {(name, objects[i]): row for (name, i), row in zip(jobs, rows)}


def summarise(
    groups: dict[str, list[Path]], rows: dict[tuple[str, Path], dict], steps: dict, mattes: dict[Path, float]
) -> tuple[dict, dict, dict]:
    """The table of each group, its standard errors, and the scores of each object, all by group and system, given what
    [`find_objects`], [`score_systems`] and [`measure_checkpoint`] return.
    """
    systems = dict.fromkeys(name for name, _ in rows)
    scores = {
        group: {name: {path.name: rows[name, path] for path in members} for name in systems}
        for group, members in groups.items()
    }
    if mattes:
        for group, members in groups.items():
            scores[group][MATTES] = {path.name: {"mask IoU": mattes[path]} for path in members}
    results, errors = {}, {}
    for group, table in scores.items():
        both = {name: mean_and_error(list(rows.values())) for name, rows in table.items()}
        results[group] = {name: means | steps.get(group, {}).get(name, {}) for name, (means, _) in both.items()}
        errors[group] = {name: error for name, (_, error) in both.items()}
    return results, errors, scores


def comparison_picture(inputs: np.ndarray, tiles: np.ndarray, truths: np.ndarray) -> Image.Image:
    """A picture with a row for each object: input, generated views, true views."""
    height = split_views(tiles[:1]).shape[2]
    gap = np.ones((height, 8, 3))
    rows = []
    for image, ours, truth in zip(inputs, tiles, truths):
        image = Image.fromarray(np.round(image * 255).astype(np.uint8)).resize((height, height), Image.Resampling.BOX)
        views, true_views = split_views(ours[None])[0], split_views(truth[None])[0]
        rows.append(np.concatenate([np.asarray(image) / 255, *views, gap, *true_views], axis=1))
    return Image.fromarray(np.round(np.concatenate(rows) * 255).astype(np.uint8))


def evaluate(o: argparse.Namespace) -> dict:
    """Scores what the options say, and writes and prints the results. Returns the measures by group and system."""
    condition = o.condition if o.controlnet else None
    groups, (cameras, *others) = find_objects(o.heldout, condition, o.limit), map(cameras_of, o.heldout)
    if any(other != cameras for other in others):
        raise ValueError(f"`--heldout` {', '.join(map(str, o.heldout))} have different cameras: score one at a time.")
    everything = [path for members in groups.values() for path in members]
    sampling = Sampling(o.steps, o.guidance, o.samples, o.batch_size, tuple(o.also))
    if not o.predictions:
        checkpoint = parse_checkpoint(o, "float32")
        print(checkpoint.describe(), file=sys.stderr)
        pipe = checkpoint.load()
        if pipe.cameras != cameras:
            raise ValueError(f"The checkpoint has the cameras {pipe.cameras}, but the held-out views {cameras}.")
        pipe.set_progress_bar_config(disable=True)

    # 1. Tiles
    # The size of the smallest, which the others are brought to
    size = min(read_on_grey(path / "views.webp").shape[:2] for path in everything)
    square = size[0] // ROWS, size[1] // COLUMNS
    truths = np.stack([read_on_grey(path / "views.webp", size) for path in everything])
    if o.predictions:
        tiles, steps, mattes = {"predictions": read_predictions(o.predictions, everything, size)}, {}, {}
    else:
        controlnets = {condition: o.controlnet} if condition else {}
        tiles, steps, mattes = measure_checkpoint(pipe, groups, size, sampling, controlnets, o.normals, o.student)
    inputs = np.stack([read_on_grey(path / "input.webp", square) for path in everything])
    systems = tiles | {COPY: np.tile(inputs, (1, ROWS, COLUMNS, 1))[None]}
    baselines = [path / "nearest.webp" for path in everything], [path.parent / "mean.webp" for path in everything]
    for name, paths in zip(BASELINES[1:], baselines):
        if all(path.is_file() for path in paths):  # of objects that were compared with training data
            systems[name] = np.stack([read_on_grey(path, size) for path in paths])[None]
    systems["true views"] = truths[None]

    # 2. Scores
    rows = score_systems(systems, everything, cameras)
    results, errors, scores = summarise(groups, rows, steps, mattes)
    text = [markdown(f"{name} ({len(groups[name])})", table, errors[name]) for name, table in results.items()]
    print("\n".join(text))

    # 3. Results
    o.output.mkdir(parents=True, exist_ok=True)
    write_file(o.output / "results.md", "\n".join(text).encode())
    first = next(iter(tiles))
    record = {
        group: {**table, "standard errors": errors[group], "objects": scores[group][first]}
        for group, table in results.items()
    }
    write_file(o.output / "results.json", (json.dumps(record, indent=2) + "\n").encode())
    pictures = {"views.webp": comparison_picture(inputs, tiles[first][0], truths)}
    if o.student:
        few = range(0, len(everything), -(-len(everything) // 6))
        shown = np.stack([tiles[name][0, i] for i in few for name in (OURS, STUDENT, STUDENT_STEP)])
        repeated = np.repeat(inputs[few], 3, 0), shown, np.repeat(truths[few], 3, 0)
        pictures["student.webp"] = comparison_picture(*repeated)
    for name, picture in pictures.items():
        file = io.BytesIO()
        picture.save(file, "WEBP", quality=90)
        write_file(o.output / name, file.getvalue())
    return results


@command
def main(argv: list[str] | None = None):
    """The command line."""
    evaluate(parse_options(argv))


if __name__ == "__main__":
    main()
