"""What faster settings cost: each one's error to the exact result, its quality, and the time it saves.

    python -m evaluation.approximations --limit 2

Quality is that of a checkpoint on held-out objects, measured on the tile as `evaluation.evaluate` does; "to exact"
compares with the tiles of the first row, from the same seeds. A solver that draws other noise gives other tiles, which
are not worse for that: judge those by their distance to the truth. Time is that of the model of
`evaluation.benchmark`, random weights in the proportions of the public checkpoints, because the mini's pictures are so
small that its reference costs next to nothing. bfloat16 is left out on a processor without it. Writes `--output`
(JSON) and prints a table.
"""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from tqdm import tqdm

from zero123plus import loading
from zero123plus.options import DTYPES, Parser, add_checkpoint_options, command, load_from_options, number, scale

from . import benchmark, metrics
from .evaluate import find_objects, read
from .heldout import FOLDERS

ANCESTRAL = EulerAncestralDiscreteScheduler
SETTINGS = {
    "exact: Euler ancestral, 28 steps": (ANCESTRAL, 28, {}),
    "reference every 2 steps": (ANCESTRAL, 28, {"reference_interval": 2}),
    "reference every 4 steps": (ANCESTRAL, 28, {"reference_interval": 4}),
    "guidance in the first 3/4": (ANCESTRAL, 28, {"guidance_end": 0.75}),
    "guidance in the first half": (ANCESTRAL, 28, {"guidance_end": 0.5}),
    "guidance in the second half": (ANCESTRAL, 28, {"guidance_start": 0.5}),
    "Euler ancestral, 14 steps": (ANCESTRAL, 14, {}),
    "Euler ancestral, 8 steps": (ANCESTRAL, 8, {}),
    "Euler ancestral, 4 steps": (ANCESTRAL, 4, {}),
    "Euler ancestral, 2 steps": (ANCESTRAL, 2, {}),
    "DPM++ 2M, 28 steps": (DPMSolverMultistepScheduler, 28, {}),
    "DPM++ 2M, 14 steps": (DPMSolverMultistepScheduler, 14, {}),
    "DPM++ 2M, 8 steps": (DPMSolverMultistepScheduler, 8, {}),
    "LCM, 4 steps": (LCMScheduler, 4, {}),
    "UniPC, 14 steps": (UniPCMultistepScheduler, 14, {}),
    "UniPC, 8 steps": (UniPCMultistepScheduler, 8, {}),
    "bfloat16": (ANCESTRAL, 28, {"dtype": torch.bfloat16}),
    "fast": (ANCESTRAL, 8, {"reference_interval": 2, "guidance_end": 0.75}),
}


def call(pipe, setting: tuple, pictures: list, **options):
    """Runs a setting of `SETTINGS` with a seed for each picture."""
    scheduler, steps, more = setting
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    seeds = [torch.Generator().manual_seed(i) for i in range(len(pictures))]
    more = dict(more)
    more.pop("dtype", None)
    return pipe(pictures, num_inference_steps=steps, generator=seeds, **more, **options).images


def in_dtype(pipe, setting: tuple):
    """The pipeline, or a copy of it in the dtype that a setting names."""
    dtype = setting[2].get("dtype")
    return copy.deepcopy(pipe).to(dtype) if dtype else pipe


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = Parser("Compare faster settings with the exact one.")
    add = parser.add_argument
    add_checkpoint_options(add)
    add("--limit", type=number(int, 0), default=2, help="held-out objects of each group, 0: time alone")
    add("--settings", nargs="+", default=[""], help="only those whose names begin so, beside the first")
    add("--guidance", type=scale, help="scale of classifier-free guidance (default: the checkpoint's)")
    dtype = "float16" if torch.cuda.is_available() else "float32"
    add("--dtype", choices=DTYPES, default=dtype, help="of what is timed")
    add(
        "--repeats",
        type=number(int, 0),
        default=1,
        help="of the timing; the shortest counts, 0: none",
    )
    add("--output", type=Path, default=Path("out/approximations.json"), help="file of the results, which is replaced")
    o = parser.parse_args(argv)
    if not o.limit and not o.repeats:
        parser.error("`--limit 0` times alone and `--repeats 0` times nothing: leave one of them out.")
    objects = sum(find_objects(FOLDERS, None, o.limit).values(), [])
    truths = [read(path / "views.webp") for path in objects]
    pictures = [Image.open(path / "input.webp") for path in objects]
    o.device = loading.choose_device(o.device)
    if objects:
        pipe = load_from_options(o, "float32")
        pipe.set_progress_bar_config(disable=True)
    if o.repeats:
        size = benchmark.SMALL if torch.device(o.device).type == "cpu" else benchmark.FULL
        model = benchmark.build(size, o.device, getattr(torch, o.dtype))
        grey = Image.new("RGB", (size["picture"],) * 2, (127,) * 3)
        shape = {"height": size["tile"][0], "width": size["tile"][1]}

    rows, exact = [], None
    emulated = torch.device(o.device).type == "cpu" and not loading.cpu_has_bfloat16()  # which takes minutes a tile
    chosen = {
        name: setting
        for name, setting in SETTINGS.items()
        if name.startswith(("exact", *o.settings)) and not (emulated and "dtype" in setting[2])
    }
    for name, setting in tqdm(chosen.items(), unit="setting"):
        row = {"setting": name}
        if o.repeats:
            run = partial(call, in_dtype(model, setting), setting, [grey], **shape, output_type="latent")
            seconds = min(benchmark.timed(run, model.device)[0] for _ in range(o.repeats))
            row |= {"seconds": seconds, "time": seconds / rows[0]["seconds"] if rows else 1.0}
        if not objects:
            rows.append(row)
            continue
        tiles = call(in_dtype(pipe, setting), setting, pictures, guidance_scale=o.guidance, output_type="np")
        exact = tiles if exact is None else exact
        for to, others in (("exact", exact), ("truth", truths)):
            row[f"PSNR to {to}"] = float(np.mean([metrics.psnr(*pair) for pair in zip(tiles, others)]))
            row[f"LPIPS to {to}"] = float(np.mean([metrics.lpips(*pair) for pair in zip(tiles, others)]))
        rows.append(row)
    benchmark.report(rows, o.device, o.output, objects=len(objects))


if __name__ == "__main__":
    main()
