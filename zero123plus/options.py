"""What the command lines share: the numbers that options take, the options of a checkpoint, and errors in one line."""

import argparse
import functools
import math
import sys
from collections.abc import Callable

from pipeline import CAMERAS, Zero123PlusPipeline

from . import loading

DTYPE_HELP = "float16 on cuda, bfloat16 on a CPU with AVX512_BF16 or AMX, else float32, if missing"
DEVICE_HELP = "cuda, mps or cpu; the first of these that is there, if missing"


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], float]:
    """A `type` of argparse: a number of `kind` (int or float) from `least` to `most`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            what = "whole number" if kind is int else "number"
            within = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is no {what} {within}")
        return value

    return read


count = number(int, 1)
share = number(float, 0, 1)
ratio = number(float, 0.01, 1)  # of an object's side to the picture's
scale = number(float, -1000, 1000)  # of guidance, a LoRA or a ControlNet
seed = number(int, -(2**63), 2**64 - 1)  # what `torch.Generator.manual_seed` takes


def one_line(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def command(main: Callable) -> Callable:
    """Decorates the function of a command line: an error that its input causes ends it with one line."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None):
        try:
            return main(argv)
        except (ImportError, OSError, ValueError) as error:
            raise SystemExit(one_line(error)) from error

    return run


def add_cameras_option(add):
    """Adds `--cameras` to a command; `add` is `parser.add_argument`."""
    add("--cameras", choices=CAMERAS, help="for a checkpoint that does not say its own")


def add_checkpoint_options(add):
    """Adds the options of [`loading.load_pipeline`] to a command; `add` is `parser.add_argument`."""
    add("--checkpoint", help="folder, training run or Hub name; the one in this repository if missing")
    add_cameras_option(add)
    add("--lora", help="folder, training run or Hub name of a LoRA for the UNet")
    add("--lora-scale", "--lora_scale", type=scale, default=1.0, help="strength of the LoRA")
    add("--pickle", action="store_true", help="also read weights stored with pickle, which can run code")
    add("--device", help=DEVICE_HELP)


def load_from_options(options: argparse.Namespace, dtype: str | None = None) -> Zero123PlusPipeline:
    """[`loading.load_pipeline`] with the options that [`add_checkpoint_options`] adds. Says device and dtype."""
    device = loading.choose_device(options.device)
    print(loading.describe(device, dtype), file=sys.stderr)
    return loading.load_pipeline(
        options.checkpoint,
        device,
        dtype,
        options.cameras,
        options.lora,
        options.lora_scale,
        options.pickle,
    )
