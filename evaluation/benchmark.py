"""Measures the time of a tile, the share of each part of the model, and how close that comes to the hardware's rate,
and compares it with another pipeline.

    python -m evaluation.benchmark --device cpu
    python -m evaluation.benchmark --dtypes float16 --steps 28 75 --batches 1 4 8 --modes eager compiled
    python -m evaluation.benchmark --baseline PATH/pipeline.py                  # of sudo-ai/zero123plus-pipeline, say
    python -m evaluation.benchmark --training --data data/train --checkpoint .

The weights are random, because speed does not depend on them. On a GPU the sizes are those of the public checkpoints:
a UNet of 865,910,724 parameters, tiles of 960 x 640, pictures of 512 x 512. On a CPU everything is smaller in the same
proportions. Both pipelines have the same weights and are timed by turns, so that other work of the machine slows both
alike; the ratio is that of the medians. The baseline runs eagerly, as it is published. A batch is N tiles of one
picture; a baseline that cannot make several in a call, as the published pipeline, makes them one after another. The
difference is that of one tile's latents, for which both are given the same noise. Writes `--output` (JSON) and prints
a table. `--training` times steps of `training.train` beside the bare model's instead.
"""

import argparse
import copy
import importlib.util
import inspect
import json
import platform
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from pipeline import CAMERAS, ReferenceCache, Zero123PlusPipeline, install_reference_attention
from training.data import write_whole
from training.mini import SCHEDULE, build_tokenizer
from zero123plus.loading import DTYPES, ROOT, choose_device, cpu_has_bfloat16
from zero123plus.options import command, count

from . import plain, training_speed

# `FULL` is the size of the public checkpoints: the reference has 64 x 64 latents, the tile 120 x 80. `SMALL` has the
# same proportions, 32 x 32 and 60 x 40, for a CPU.
FULL = {
    "tile": (960, 640),
    "picture": 512,
    "unet": (320, 640, 1280, 1280),
    "heads": [5, 10, 20, 20],
    "layers": 2,
    "vae": (128, 256, 512, 512),
    "width": 1024,
    "text": (23, 16, 77),
    "vision": (32, 16, 1280, 5120, 224, 14),
}
SMALL = {
    "tile": (480, 320),
    "picture": 256,
    "unet": (64, 128, 256),
    "heads": [1, 2, 4],
    "layers": 2,
    "vae": (16, 32, 64, 64),
    "width": 128,
    "text": (4, 4, 77),
    "vision": (4, 4, 128, 512, 112, 14),
}
PARTS = ("reference pass", "denoising pass", "VAE", "encoders", "scheduler and rest")


def build(size: dict, device: str, dtype: torch.dtype) -> Zero123PlusPipeline:
    """A pipeline of the given size, `FULL` or `SMALL`, with random weights that are made on the device."""
    levels = len(size["unet"])
    text_layers, text_heads, tokens = size["text"]
    vision_layers, vision_heads, hidden, intermediate, clip_size, patch = size["vision"]
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = tokens  # the published pipeline pads to it
    attention = ["CrossAttnDownBlock2D"] * (levels - 1), ["CrossAttnUpBlock2D"] * (levels - 1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            unet = UNet2DConditionModel(
                sample_size=[edge // 8 for edge in size["tile"]],
                block_out_channels=size["unet"],
                down_block_types=(*attention[0], "DownBlock2D"),
                up_block_types=("UpBlock2D", *attention[1]),
                layers_per_block=size["layers"],
                attention_head_dim=size["heads"],
                cross_attention_dim=size["width"],
                use_linear_projection=True,
            )
            vae = AutoencoderKL(
                block_out_channels=size["vae"],
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                norm_num_groups=min(32, size["vae"][0]),
                scaling_factor=0.18215,
            )
            text = CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=49408,
                    hidden_size=size["width"],
                    intermediate_size=4 * size["width"],
                    num_hidden_layers=text_layers,
                    num_attention_heads=text_heads,
                    max_position_embeddings=tokens,
                    hidden_act="gelu",
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            )
            vision = CLIPVisionModelWithProjection(
                CLIPVisionConfig(
                    hidden_size=hidden,
                    intermediate_size=intermediate,
                    num_hidden_layers=vision_layers,
                    num_attention_heads=vision_heads,
                    image_size=clip_size,
                    patch_size=patch,
                    projection_dim=size["width"],
                    hidden_act="gelu",
                )
            )
    finally:
        torch.set_default_dtype(before)
    clip_edges, edges = (
        {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
        for edge in (clip_size, size["picture"])
    )
    pipe = Zero123PlusPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=EulerAncestralDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"),
        vision_encoder=vision,
        feature_extractor_clip=CLIPImageProcessor(**clip_edges),
        feature_extractor_vae=CLIPImageProcessor(**edges, resample=2, image_mean=[0.5] * 3, image_std=[0.8] * 3),
        ramping_coefficients=[i / tokens for i in range(1, tokens + 1)],
        view_elevations=CAMERAS["v1.2"].elevations,
        view_fov=CAMERAS["v1.2"].fov,
    )
    for module in (unet, vae, text, vision):
        module.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@contextmanager
def torchvision_stand_in() -> Iterator[None]:
    """Lets a baseline import torchvision where that is missing. The published pipeline uses three of its transforms,
    which are made on import and applied to depth pictures only; no picture of the benchmark has depth.
    """
    if importlib.util.find_spec("torchvision"):
        yield
        return
    module = ModuleType("torchvision")
    module.transforms = SimpleNamespace(**dict.fromkeys(("Compose", "ToTensor", "Normalize"), lambda *args: None))
    sys.modules["torchvision"] = module
    try:
        yield
    finally:
        del sys.modules["torchvision"]


class SharedNoise(TorchFunctionMode):
    """Gives pipelines the same noise, in whatever order they draw it for a tile: each sample that is drawn is the next
    of the tile's noise, or of the positive or the negative reference's.

    Args:
        tile: shape (C, h, w) of the tile's latents; everything else that is drawn is a reference's.
        generator: that the pipeline is called with. What is drawn from another is the negative reference's. The
            published pipeline draws from none: a positive sample, a negative one, and then both together, the negative
            one first.
    """

    def __init__(self, tile: tuple[int, int, int], generator: torch.Generator):
        super().__init__()
        self.tile, self.generator, self.drawn = tile, generator, Counter()
        names = ("tile", "positive", "negative")
        self.sources = {name: torch.Generator().manual_seed(i) for i, name in enumerate(names)}

    def names(self, shape: torch.Size, generator: torch.Generator | None) -> list[str]:
        """Which noise the samples of a draw are."""
        if shape[1:] == self.tile:
            return ["tile"] * shape[0]
        if generator is None:
            if shape[0] == 2:
                return ["negative", "positive"]
            return ["negative" if self.drawn["positive"] else "positive"]
        return ["positive" if generator is self.generator else "negative"] * shape[0]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.randn, torch.randn_like) and result.ndim == 4:
            for i, name in enumerate(self.names(result.shape, (kwargs or {}).get("generator"))):
                self.drawn[name] += 1
                result[i] = torch.empty(result.shape[1:]).normal_(generator=self.sources[name])
        return result


def load_baseline(path: Path, pipe: Zero123PlusPipeline) -> DiffusionPipeline:
    """The pipeline of a file with the components of `pipe`. UNet, VAE and scheduler are copied, because the baseline
    or compiling may change them.

    Raises:
        ValueError: if the file has no `DiffusionPipeline` of its own, or more than one.
    """
    spec = importlib.util.spec_from_file_location("baseline", path)
    module = importlib.util.module_from_spec(spec)
    try:
        with torchvision_stand_in():
            spec.loader.exec_module(module)
    except ImportError as error:
        raise ValueError(f"`--baseline` {path} needs a package: pip install {error.name}.") from error
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, DiffusionPipeline) and value.__module__ == "baseline"
    ]
    if len(found) != 1:
        raise ValueError(f"`--baseline` {path} has {len(found)} pipelines, but must have one.")
    own = {name: copy.deepcopy(pipe.components[name]) for name in ("unet", "vae", "scheduler")}
    parts = pipe.components | own | {"ramping_coefficients": pipe.config.ramping_coefficients, "safety_checker": None}
    accepted = inspect.signature(found[0].__init__).parameters
    baseline = found[0](**{name: part for name, part in parts.items() if name in accepted})
    baseline.set_progress_bar_config(disable=True)
    return baseline.to(pipe.device)


def compile_pipeline(pipe: Zero123PlusPipeline, **options):
    """Prepares a pipeline as docs/speed.md recommends: channels last, fused projections, compiled UNet and VAE
    decoder.

    Args:
        pipe: the pipeline, on the device that it is to run on.
        options: more for `torch.compile`.
    """
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    pipe.unet.fuse_qkv_projections()
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


def count_flops(pipe: Zero123PlusPipeline, size: dict, batch: int, steps: int) -> float:
    """Floating-point operations of a guided call, in UNet and VAE decoder, counted on tensors without data."""
    meta = torch.device("meta")
    unet = UNet2DConditionModel.from_config(pipe.unet.config).to(meta)
    decoder = AutoencoderKL.from_config(pipe.vae.config).to(meta)
    install_reference_attention(unet)
    factor, tokens = pipe.vae_scale_factor, size["text"][2]
    height, width = (edge // factor for edge in size["tile"])
    cache, reference = ReferenceCache(), size["picture"] // factor
    text, time_step = torch.empty(2 * batch, tokens, size["width"], device=meta), torch.zeros((), device=meta)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as step:
            for mode, n, shape in (("write", 1 + batch, (reference, reference)), ("read", 2 * batch, (height, width))):
                kwargs = {"reference": cache, "reference_mode": mode}
                unet(torch.empty(n, 4, *shape, device=meta), time_step, text[:n], cross_attention_kwargs=kwargs)
        with FlopCounterMode(display=False) as decoding:
            decoder.decode(torch.empty(batch, 4, height, width, device=meta))
    return steps * step.get_total_flops() + decoding.get_total_flops()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured floating-point operations a second of a large matrix product, the best of five."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def timed(call, device: torch.device) -> tuple[float, torch.Tensor]:
    """Seconds and result of a call."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - start, result


def measure(pipe, baseline, size: dict, batch: int, steps: int, repeats: int) -> dict:
    """Times one setting. The first call of each pipeline is not counted, because it compiles and selects kernels."""
    device = pipe.device
    picture = np.random.default_rng(0).integers(0, 256, (size["picture"], size["picture"], 3), dtype=np.uint8)

    @torch.no_grad()
    def tiles(which, steps, count, generator):
        options = {"height": size["tile"][0], "width": size["tile"][1], "num_images_per_prompt": count}
        options |= {"generator": generator, "output_type": "latent", "guidance_scale": 4.0}
        result = which(Image.fromarray(picture), num_inference_steps=steps, **options)
        return result if isinstance(result, torch.Tensor) else result.images

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
        with SharedNoise((4, *(edge // pipe.vae_scale_factor for edge in size["tile"])), generator):
            return tiles(which, steps, 1, generator).float().cpu()

    keeping = copy.copy(pipe)
    keeping.keep_negative_reference()
    systems = {"ours": pipe} | ({"baseline": baseline} if baseline else {})
    eager = not hasattr(pipe.unet, "_orig_mod")  # else new shapes and noise would mean minutes of more compiling
    if eager:
        systems["keeping"] = keeping
    several = batch > 1 and bool(baseline) and at_once(baseline)
    seconds, memory = defaultdict(list), {}
    for which in systems.values():
        call(which, steps if which is keeping else min(steps, 2))
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
    flops = count_flops(pipe, size, batch, steps)
    result = {
        "seconds a tile": ours / batch,
        "tiles a second": batch / ours,
        "GiB beside weights": memory.get("ours"),
        "TFLOP a tile": flops / batch / 1e12,
        "share of matmul rate": flops / ours / matmul_rate(device, pipe.unet.dtype),
        **{part: parts[part] / whole for part in PARTS},
    }
    if eager:
        result["time with kept negative reference"] = statistics.median(seconds["keeping"]) / ours
    if baseline:
        result["baseline seconds a tile"] = statistics.median(seconds["baseline"]) / batch
        result["baseline GiB beside weights"] = memory.get("baseline")
        result["time to baseline's"] = ours / statistics.median(seconds["baseline"])
    if baseline and eager:
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


def report(rows: list[dict], o: argparse.Namespace, **more):
    """Prints the results and writes them, and `more` about how they were measured."""
    machine = describe(o.device)
    print(f"{'; '.join([machine, *(f'{name}: {value}' for name, value in more.items())])}\n\n{table(rows)}")
    o.output.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, **more, "results": rows}
    write_whole(o.output, (json.dumps(record, indent=2) + "\n").encode())


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Time the pipeline.")
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--dtypes", nargs="+", choices=DTYPES, help="default: float16; float32 on a CPU")
    add("--modes", nargs="+", choices=("eager", "compiled"), default=["eager"], help="default: eager")
    add("--batches", nargs="+", type=count, help="default: 1 4; 32 for --training")
    add("--steps", nargs="+", type=count, help="default: 28; 4 on a CPU")
    add("--repeats", type=count, default=3, help="timed calls, of which the median is reported (default: %(default)s)")
    add("--size", choices=("full", "small"), help="default: full; small on a CPU")
    add("--baseline", type=Path, default=Path(plain.__file__), help="file of a pipeline to time beside it")
    add("--output", type=Path, default=Path("out/benchmark.json"), help="file of the results, which is replaced")
    add("--training", action="store_true", help="time training.train beside the bare model instead")
    add("--data", type=Path, help="folder of shards, for --training")
    add("--checkpoint", default=str(ROOT), help="what --training trains (default: the one in this repository)")
    o = parser.parse_args(argv)
    o.device = choose_device(o.device)
    on_cpu = torch.device(o.device).type == "cpu"
    if o.training:
        if o.data is None:
            parser.error("--training needs --data, a folder of shards of training.render")
        precision = "bf16" if not on_cpu or cpu_has_bfloat16() else "no"
        rows = [
            {"batch": batch, "precision": precision}
            | training_speed.measure(o.checkpoint, o.data, batch, precision, o.steps[0] if o.steps else 8, o.repeats)
            for batch in o.batches or [32]
        ]
        return report(rows, o)
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
            pipe = build(size, o.device, dtype)
            baseline = load_baseline(o.baseline, pipe)
            if mode == "compiled":
                compile_pipeline(pipe)
            made = dtype, mode
        setting = {"dtype": str(dtype).removeprefix("torch."), "mode": mode, "batch": batch, "steps": steps}
        rows.append(setting | measure(pipe, baseline, size, batch, steps, o.repeats))
    report(rows, o)


if __name__ == "__main__":
    main()
