"""Measures the time of a tile and the share of each part of the model, beside another pipeline.

    python -m evaluation.benchmark --device cpu
    python -m evaluation.benchmark --dtypes float16 --steps 28 75 --batches 1 4 8 --modes eager compiled
    python -m evaluation.benchmark --baseline PATH/pipeline.py                  # of sudo-ai/zero123plus-pipeline, say

The weights are random, because speed does not depend on them. On a GPU the sizes are those of the public checkpoints:
a UNet of 865,910,724 parameters, tiles of 960 x 640, pictures of 512 x 512. On a CPU everything is smaller in the same
proportions. Both pipelines have the same weights and are timed by turns, so that other work of the machine slows both
alike; the ratio is that of the medians. The baseline runs eagerly, as it is published. A batch is N tiles of one
picture; a baseline that cannot make several in a call, as the published pipeline, makes them one after another. The
difference is that of one tile's latents, for which both are given the same noise. Writes `--output` (JSON) and prints
a table.
"""

import json
import platform
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from tqdm import tqdm

from pipeline import Zero123PlusPipeline
from training.untrained import FULL, SMALL, Size, build
from zero123plus.files import write_file
from zero123plus.loading import choose_device
from zero123plus.options import DTYPES, Parser, command, count

from . import plain
from .baseline import SharedNoise, load_baseline

PARTS = ("reference pass", "denoising pass", "VAE", "encoders", "scheduler and rest")


def compile_pipeline(pipe: Zero123PlusPipeline, **options):
    """Prepares a pipeline as docs/speed.md recommends: channels last, compiled UNet and VAE decoder.

    Args:
        pipe: the pipeline, on the device that it is to run on.
        options: more for `torch.compile`.
    """
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, **options)
    pipe.vae.decoder = torch.compile(pipe.vae.decoder, fullgraph=True, **options)


def synchronize(device: torch.device):
    """Waits until the device has done its work."""
    torch.get_device_module(device).synchronize()


@contextmanager
def stopwatch(pipe: Zero123PlusPipeline) -> Iterator[Counter]:
    """Measures the seconds that a call spends in each of `PARTS` except the last. It waits for the device before and
    after each part.
    """
    seconds, started = Counter(), {}

    def part(module, kwargs):
        if module is pipe.unet:
            writes = kwargs["cross_attention_kwargs"]["reference_mode"] == "write"
            return "reference pass" if writes else "denoising pass"
        return "VAE" if module in (pipe.vae.encoder, pipe.vae.decoder) else "encoders"

    def start(module, args, kwargs):
        synchronize(pipe.device)
        started[module] = time.perf_counter()

    def stop(module, args, kwargs, result):
        synchronize(pipe.device)
        seconds[part(module, kwargs)] += time.perf_counter() - started[module]

    modules = (pipe.unet, pipe.vae.encoder, pipe.vae.decoder, pipe.text_encoder, pipe.vision_encoder)
    handles = [module.register_forward_pre_hook(start, with_kwargs=True) for module in modules]
    handles += [module.register_forward_hook(stop, with_kwargs=True) for module in modules]
    yield seconds
    for handle in handles:
        handle.remove()


def timed(call, device: torch.device) -> tuple[float, torch.Tensor]:
    """Seconds and result of a call."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - start, result


@torch.no_grad()
def make_tiles(which, steps: int, count: int, generator, picture: np.ndarray, size: Size) -> torch.Tensor:
    """Guided latents of `count` tiles of a picture by a pipeline, ours or a baseline."""
    options = {"height": size.tile[0], "width": size.tile[1], "num_images_per_prompt": count}
    options |= {"generator": generator, "output_type": "latent", "guidance_scale": 4.0}
    result = which(Image.fromarray(picture), num_inference_steps=steps, **options)
    return result if isinstance(result, torch.Tensor) else result.images


def measure_setting(pipe, baseline, size: Size, batch: int, steps: int, repeats: int) -> dict:
    """Times one setting. The first call of each pipeline is not counted, because it compiles and selects kernels."""
    device = pipe.device
    picture = np.random.default_rng(0).integers(0, 256, (size.picture, size.picture, 3), dtype=np.uint8)

    tiles = partial(make_tiles, picture=picture, size=size)

    def at_once(which):
        """Whether a pipeline makes several tiles in a call."""
        try:
            tiles(which, 1, 2, torch.Generator().manual_seed(0))
        except RuntimeError:  # of shapes that do not fit
            return False
        return True

    @torch.no_grad()
    def call(which, steps):
        parts = [batch] if which is not baseline or batch == 1 or several else [1] * batch
        for part in parts:
            latents = tiles(which, steps, part, torch.Generator().manual_seed(0))
            which.vae.decode((latents / which.vae.config.scaling_factor).to(which.vae.dtype))

    def latents_of_shared_noise(which):
        generator = torch.Generator().manual_seed(0)
        with SharedNoise((4, *(edge // pipe.vae_scale_factor for edge in size.tile)), generator):
            return tiles(which, steps, 1, generator).float().cpu()

    systems = {"ours": pipe} | ({"baseline": baseline} if baseline else {})
    several = batch > 1 and bool(baseline) and at_once(baseline)
    seconds, memory = defaultdict(list), {}
    for which in systems.values():
        call(which, min(steps, 2))
    for _ in range(repeats):
        for name, which in systems.items():
            if device.type == "cuda":
                before = torch.cuda.memory_allocated()  # the weights of all systems, and what is kept
                torch.cuda.reset_peak_memory_stats()
            elapsed, _ = timed(partial(call, which, steps), device)
            seconds[name].append(elapsed)
            if device.type == "cuda":
                memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    ours = statistics.median(seconds["ours"])
    with stopwatch(pipe) as parts:
        whole, _ = timed(partial(call, pipe, steps), device)
    parts["scheduler and rest"] = whole - sum(parts.values())
    result = {
        "seconds a tile": ours / batch,
        "tiles a second": batch / ours,
        "GiB beside weights": memory.get("ours"),
        **{part: parts[part] / whole for part in PARTS},
    }
    if baseline:
        result["baseline seconds a tile"] = statistics.median(seconds["baseline"]) / batch
        result["baseline GiB beside weights"] = memory.get("baseline")
        result["time to baseline's"] = ours / statistics.median(seconds["baseline"])
    if baseline and not hasattr(pipe.unet, "_orig_mod"):  # else new noise would mean minutes of more compiling
        latents, theirs = map(latents_of_shared_noise, (pipe, baseline))
        result["difference"] = ((latents - theirs).norm() / theirs.norm()).item()
    return result


def describe(device: str) -> str:
    """Device and versions, for the head of a table."""
    kind = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    threads = "" if device.startswith("cuda") else f", {torch.get_num_threads()} threads of a CPU"
    return (
        f"{kind}{threads}; torch {torch.__version__}, diffusers {diffusers.__version__},"
        f" transformers {transformers.__version__}; {time.strftime('%Y-%m-%d')}"
    )


def table(rows: list[dict]) -> str:
    """A Markdown table of the results."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns = [column for column in columns if any(row.get(column) is not None for row in rows)]

    def cell(value):
        if value is None:
            return "-"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join(lines + [f"| {' | '.join(cell(row.get(column)) for column in columns)} |" for row in rows])


def report(rows: list[dict], device: str, output: Path):
    """Prints the results and writes them."""
    machine = describe(device)
    print(f"{machine}\n\n{table(rows)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "results": rows}
    write_file(output, (json.dumps(record, indent=2) + "\n").encode())


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = Parser("Time the pipeline.")
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to run on")
    add("--dtypes", nargs="+", choices=DTYPES, help="dtypes to time; float16, or float32 on a CPU, if missing")
    add("--modes", nargs="+", choices=("eager", "compiled"), default=["eager"], help="ways to run")
    add("--batches", nargs="+", type=count, help="tiles in a call; 1 and 4 if missing")
    add("--steps", nargs="+", type=count, help="denoising steps; 28, or 4 on a CPU, if missing")
    add("--repeats", type=count, default=3, help="timed calls, of which the median is reported")
    add("--size", choices=("full", "small"), help="size of the model; full, or small on a CPU, if missing")
    add("--baseline", type=Path, default=Path(plain.__file__), help="file of a pipeline to time beside it")
    add("--output", type=Path, default=Path("out/benchmark.json"), help="file of the results, which is replaced")
    o = parser.parse_args(argv)
    o.device = choose_device(o.device)
    on_cpu = torch.device(o.device).type == "cpu"
    size = {"full": FULL, "small": SMALL}[o.size or ("small" if on_cpu else "full")]
    settings = [
        (getattr(torch, dtype), mode, batch, steps)
        for dtype in o.dtypes or ["float32" if on_cpu else "float16"]
        for mode in o.modes
        for batch in o.batches or [1, 4]
        for steps in o.steps or [4 if on_cpu else 28]
    ]
    rows, made = [], None
    for dtype, mode, batch, steps in tqdm(settings, unit="setting"):
        if made != (dtype, mode):
            pipe = baseline = None  # free the memory for the next pair
            torch.manual_seed(0)
            pipe = build(size, o.device, dtype)
            pipe.set_progress_bar_config(disable=True)
            baseline = load_baseline(o.baseline, pipe)
            if mode == "compiled":
                compile_pipeline(pipe)
            made = dtype, mode
        setting = {"dtype": str(dtype).removeprefix("torch."), "mode": mode, "batch": batch, "steps": steps}
        rows.append(setting | measure_setting(pipe, baseline, size, batch, steps, o.repeats))
    report(rows, o.device, o.output)


if __name__ == "__main__":
    main()
