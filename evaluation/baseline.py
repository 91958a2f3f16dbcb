"""Another pipeline to compare with: one of a file, such as the published one, with the same components and noise."""

import copy
import importlib.util
import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from diffusers import DiffusionPipeline
from torch.overrides import TorchFunctionMode

from pipeline import Zero123PlusPipeline


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
        if function in (torch.randn, torch.randn_like) and result.ndim >= 4:  # samples, or those of each step
            samples = result.flatten(0, -4)
            for i, name in enumerate(self.names(samples.shape, (kwargs or {}).get("generator"))):
                self.drawn[name] += 1
                samples[i] = torch.empty(samples.shape[1:]).normal_(generator=self.sources[name])
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
