"""What the command lines share: the numbers that options take, the options of a checkpoint, and errors in one line."""

import argparse
import copy
import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

ROOT = Path(__file__).resolve().parent.parent  # of this repository, which is the checkpoint that ships with it
# What options can be, here because the modules of these things take seconds to import, which --help need not wait for
CAMERAS = ("v1.1", "v1.2")  # of `pipeline.CAMERAS`
DTYPES = ("float32", "float16", "bfloat16")
EXPORTS = ("nerfstudio", "colmap", "glb")  # of `exports.EXPORTS`
SCALE = 4  # of larger views
NUM_FACES = 20_000  # of a mesh, about
DEPTH_SCALE = (
    3.0  # of the depth ControlNet that ships, with which it shows the mesh: chosen by looking at three meshes
)
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
whole = number(int, 0)
positive = number(float, 0)
share = number(float, 0, 1)
ratio = number(float, 0.01, 1)  # of an object's side to the picture's
scale = number(float, -1000, 1000)  # of guidance, a LoRA or a ControlNet
seed = number(int, -(2**63), 2**64 - 1)  # what `torch.Generator.manual_seed` takes


def source(text: str) -> str:
    """A `type` of argparse: a file or folder that is there, a pattern or a URL."""
    if not ("::" in text or "://" in text or set(text) & set("*?[") or Path(text).exists()):
        raise argparse.ArgumentTypeError(f"{text!r} is not there")
    return text


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:  # of two spellings the one with hyphens
        shown = copy.copy(action)
        shown.option_strings = [name for name in action.option_strings if "_" not in name]
        return super()._format_action_invocation(shown)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return "" if action.const is True else super()._format_args(action, default_metavar)


class Parser(argparse.ArgumentParser):
    """The parser of every command. It takes `--some_option` for `--some-option`, which the help shows."""

    def __init__(self, description: str):
        super().__init__(prog=program(), description=description, formatter_class=Help)

    def parse_known_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None):
        known = []
        for argument in sys.argv[1:] if args is None else args:
            name, equals, value = argument.partition("=")
            option = name.replace("_", "-")
            known.append(option + equals + value if option in self._option_string_actions else argument)
        return super().parse_known_args(known, namespace)


def program() -> str:
    """The name of the command that runs: generate.py, or python -m training.train."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {module.name.removesuffix('.__main__')}" if module else Path(sys.argv[0]).name


def one_line(error: BaseException, most: int = 10_000) -> str:
    """An error in one line, of its first sentences where it is longer than `most` characters."""
    line = " ".join(str(error).split()) or type(error).__name__
    if len(line) <= most:
        return line
    return line[: line.rfind(". ", 0, most) + 1] or line[: line.rfind(" ", 0, most)] + " ..."


def command(main: Callable) -> Callable:
    """Decorates the function of a command line: an error that its input causes ends it with one line and status 2."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None):
        try:
            return main(argv)
        except (ImportError, OSError, ValueError, SafetensorError) as error:  # the last on a full disk
            print(f"{program()}: {one_line(error)}", file=sys.stderr)
            ended = SystemExit(one_line(error))
            ended.code = 2
            raise ended from error

    return run


def add_cameras_option(add):
    """Adds `--cameras` to a command; `add` is `parser.add_argument`."""
    add("--cameras", choices=CAMERAS, help="cameras of a checkpoint that does not say its own")


def add_checkpoint_options(add):
    """Adds the options of a [`loading.Checkpoint`] to a command; `add` is `parser.add_argument`."""
    add("--checkpoint", help="folder, training run or Hub name; the one in this repository if missing")
    add_cameras_option(add)
    add("--revision", help="branch, tag or commit of a checkpoint on the Hub")
    add("--lora", help="folder, training run or Hub name of a LoRA for the UNet")
    add("--lora-scale", type=scale, default=1.0, help="strength of the LoRA")
    add("--pickle", action="store_true", help="also read weights stored with pickle, which can run code")
    add("--device", help=DEVICE_HELP)


def parse_checkpoint(options: argparse.Namespace, dtype: str | None = None):
    """The `loading.Checkpoint` that the options of [`add_checkpoint_options`] name.

    Raises:
        ValueError: if its device is not there.
    """
    from . import loading

    given = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(loading.Checkpoint)}
    device = loading.choose_device(options.device)
    return loading.Checkpoint(**{**given, "name": options.checkpoint, "device": device, "dtype": dtype})


def load_from_options(options: argparse.Namespace, dtype: str | None = None):
    """Loads the checkpoint of [`parse_checkpoint`]. Says device and dtype."""
    checkpoint = parse_checkpoint(options, dtype)
    print(checkpoint.describe(), file=sys.stderr)
    return checkpoint.load()
