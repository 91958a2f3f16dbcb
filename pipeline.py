# Copyright 2026 The Zero123++ pipeline contributors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Zero123++ (https://arxiv.org/abs/2310.15110): six consistent views of an object from one picture of it.

This file is a `diffusers` custom pipeline and needs no other file of its repository: diffusers cannot load the files
that a pipeline imports where the repository's name has a dot, as those of the public checkpoints have. It adds to
stock components what is specific to Zero123++: the scaling of the target space, the cameras, scaled reference
attention, and the mixing of the CLIP image embedding into the prompt.
"""

import copy
import functools
import inspect
import io
import itertools
import json
import math
import numbers
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageOps
import torch
import transformers
from diffusers import AutoencoderKL, ControlNetModel, DiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.unets import unet_2d_condition
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.schedulers import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput, logging, replace_example_docstring, scale_lora_layers, unscale_lora_layers
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

logger = logging.get_logger(__name__)

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers import DiffusionPipeline
        >>> from PIL import Image

        >>> options = {"custom_pipeline": "path/to/this/repository", "trust_remote_code": True, "dtype": torch.float16}
        >>> pipe = DiffusionPipeline.from_pretrained("sudo-ai/zero123plus-v1.2", **options).to("cuda")
        >>> result = pipe(Image.open("object.png"), generator=torch.Generator().manual_seed(0))
        >>> result.images[0].save("tile.png")
        >>> poses = pipe.camera_poses()  # of result.views[0]
        ```
"""

# ---- Constants and scaling ----

ROWS, COLUMNS = 3, 2  # views in a tile, in row-major order
TILE = 960, 640  # height and width in pixels of the public checkpoints' tile
HALF = torch.float16, torch.bfloat16
GREY = 127  # background of the training data, which transparency is composited on
MAX_EDGE = 16_384  # pixels; the longest side of a picture that is accepted
BACKGROUND_TOLERANCE = 16  # of 255; how far a background may be from its colour, and from `GREY` without a warning
PLAIN_SHARE = 0.9  # of a border that has one colour, from which the background counts as plain
ENCODED_EDGE = 1024  # pixels; a picture that must be padded is first shrunk to this: the encoders see less than that

# References that one pass writes at most. At the public checkpoints' size in float16 their keys and values take 1.5 GB
# and the pass about as much again. Larger passes would hardly save launches.
MAX_REFERENCES = 32

AZIMUTH_STEP = 30  # degrees; what the azimuths of further pictures of an object are rounded to

# The tile that is denoised is scaled and shifted so that its latents are centred and have about unit variance. The
# constants are those of the published pipeline and belong to its weights.
IMAGE_MEAN, IMAGE_STD = 0.5, 0.8  # of the processor of reference pictures
IMAGE_SCALE = IMAGE_MEAN / IMAGE_STD  # the tile, in [-1, 1], is scaled alike
LATENT_SHIFT = 0.22
LATENT_SCALE = 0.75

# The schedulers whose results agree with Euler's, and LCM's for few steps. DPMSolverSDEScheduler draws its noise from
# a generator of its own, and EDMEulerScheduler scales the model input for networks of another kind.
SCHEDULERS = {scheduler.name for scheduler in KarrasDiffusionSchedulers} | {"LCMScheduler"}
SCHEDULERS -= {"DPMSolverSDEScheduler", "EDMEulerScheduler"}


def scale_image(image: torch.Tensor) -> torch.Tensor:
    """Scales pixels in [-1, 1], of any shape, to what the VAE encodes."""
    return image * IMAGE_SCALE


def unscale_image(image: torch.Tensor) -> torch.Tensor:
    """Inverts [`scale_image`]."""
    return image / IMAGE_SCALE


def scale_latents(latents: torch.Tensor) -> torch.Tensor:
    """Brings latents times `vae.config.scaling_factor`, of any shape, to the space that the UNet denoises."""
    return (latents - LATENT_SHIFT) * LATENT_SCALE


def unscale_latents(latents: torch.Tensor) -> torch.Tensor:
    """Inverts [`scale_latents`]."""
    return latents / LATENT_SCALE + LATENT_SHIFT


def mix_image_embeds(prompt_embeds: torch.Tensor, image_embeds: torch.Tensor, ramp: torch.Tensor) -> torch.Tensor:
    """Adds the global condition to the prompt: token i becomes T_i + w_i * I (FlexDiffuse's linear guidance, section
    2.4 of the paper), with T of shape (B, L, D), the CLIP embedding I of shape (B, D) and the ramp w of shape (L,).
    """
    return prompt_embeds + ramp[:, None] * image_embeds[:, None]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance during a part of the steps.

    Args:
        rescale: share of the rescaled prediction (equation 16 of arXiv 2305.08891), in [0, 1].
        start: share of the steps after which guidance begins (arXiv 2404.07724).
        end: share of the steps after which guidance ends.
    """

    rescale: float = 0.0
    start: float = 0.0
    end: float = 1.0

    def is_active(self, progress: float) -> bool:
        """Whether a step is guided when the share `progress` of the steps is done."""
        return self.start <= progress < self.end

    def __call__(self, prediction: torch.Tensor, scale: float) -> torch.Tensor:
        """Guides a prediction of shape (2 B, ...), the negative half first; returns shape (B, ...)."""
        negative, positive = prediction.chunk(2)
        guided = negative + scale * (positive - negative)
        return rescale_noise_cfg(guided, positive, self.rescale) if self.rescale > 0 else guided


def check_number(name: str, value, least: float = -math.inf, most: float = math.inf, whole: bool = False):
    """Raises ValueError if an argument is no finite number in [least, most], or not whole where it must be."""
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind) or not (math.isfinite(value) and least <= value <= most):
        what = "whole number" if whole else "finite number"
        raise ValueError(f"`{name}` is {value!r}, but must be a {what} in [{least:g}, {most:g}].")


def check_interval(name: str, start, end):
    """Raises ValueError if `NAME_start` and `NAME_end` are no shares of the steps that rise."""
    check_number(f"{name}_start", start, 0, 1)
    check_number(f"{name}_end", end, 0, 1)
    if start >= end:
        raise ValueError(f"`{name}_start` is {start}, but must be below `{name}_end`, which is {end}.")


# ---- Schedulers ----


def check_scheduler(scheduler):
    """Raises ValueError if a scheduler is not one of `SCHEDULERS`, or is configured for flow matching."""
    name = type(scheduler).__name__
    remedy = "set another, such as `EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)`"
    if not SCHEDULERS & {base.__name__ for base in type(scheduler).__mro__}:
        raise ValueError(f"The scheduler is a {name}, but must be of {sorted(SCHEDULERS)}: {remedy}.")
    if scheduler.config.get("use_flow_sigmas") or scheduler.config.get("prediction_type") == "flow_prediction":
        raise ValueError(f"The {name} is configured for flow matching, which Zero123++ is not trained for: {remedy}.")


def copy_scheduler(scheduler, num_inference_steps: int):
    """Copies a scheduler for one call, with its time steps set.

    A call works on a copy so that threads can share the pipeline. The copy never clips or thresholds: these options
    are made for pixels, are on by default in some schedulers, and flatten latents.
    """
    scheduler = copy.deepcopy(scheduler)
    clipping = {name: False for name in ("clip_sample", "thresholding") if scheduler.config.get(name)}
    scheduler.register_to_config(**clipping)
    scheduler.set_timesteps(num_inference_steps, device="cpu")  # where its sigmas are: no step waits for a GPU
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else each step looks its index up, and the host waits for the device
    return scheduler


def noise_levels(scheduler) -> torch.Tensor:
    """The ratio of noise to signal, sigma / alpha, of the model input at each evaluation of a call, shape (T,).

    Args:
        scheduler: with its time steps set. Those of some solvers lie between two whole ones.
    """
    signal = scheduler.alphas_cumprod.clamp(min=2**-24)  # which is 0 at the last time step with zero terminal SNR
    levels = ((1 - signal) / signal).sqrt().log()
    return torch.from_numpy(np.interp(scheduler.timesteps, np.arange(len(levels)), levels)).exp()


def noise_to_levels(latents: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Brings clean latents x, shape (...), by unit noise n, shape (T, ...), to levels s, shape (T,):
    (x + s n) / sqrt(s^2 + 1), which has the variance that every scheduler gives its model input.
    """
    levels = levels.to(latents.device, torch.float32).view(-1, *[1] * latents.ndim)
    return ((latents.float() + levels * noise.float()) / (levels.square() + 1).sqrt()).to(latents.dtype)


# ---- Cameras ----


@dataclass(frozen=True)
class Cameras:
    """The cameras of the six views of a tile.

    Args:
        azimuths: degrees around world +Z, relative to the input view, which is on +X, and counted towards +Y.
        elevations: degrees above the XY plane, within (-90, 90).
        fov: vertical field of view in degrees.
    """

    azimuths: tuple[float, ...]
    elevations: tuple[float, ...]
    fov: float

    @property
    def radius(self) -> float:
        """The distance at which a sphere of radius `RADIUS` just fills a view in the plane of its centre."""
        return RADIUS / math.tan(math.radians(self.fov) / 2)

    def poses(self, radius: float | None = None) -> np.ndarray:
        """Camera-to-world matrices of the cameras, which look at the origin.

        Args:
            radius: distance from the origin, positive and by default `self.radius`.

        Returns:
            Shape (N, 4, 4). OpenGL convention: the camera's +X is right, +Y up, and it looks along -Z.
        """
        radius = self.radius if radius is None else radius
        check_number("radius", radius, 1e-9)
        azimuth, elevation = np.radians(self.azimuths), np.radians(self.elevations)
        zero, one = np.zeros_like(azimuth), np.ones_like(azimuth)
        right = np.stack([-np.sin(azimuth), np.cos(azimuth), zero], axis=-1)
        back = np.stack(
            [np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)], axis=-1
        )
        up = np.cross(back, right)
        matrix = np.stack([right, up, back, radius * back], axis=-1)  # (N, 3, 4)
        return np.concatenate([matrix, np.stack([zero, zero, zero, one], axis=-1)[:, None]], axis=1)

    def intrinsics(self, height: int, width: int) -> np.ndarray:
        """Pinhole intrinsics of a view of `height` x `width` pixels, shape (3, 3), in pixels. The principal point is
        the centre.

        Raises:
            ValueError: if the view has no pixels.
        """
        check_number("height", height, 1)
        check_number("width", width, 1)
        focal = height / 2 / math.tan(math.radians(self.fov) / 2)
        return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


RADIUS = 0.5  # of the sphere that the object fills, around the world's origin; +Z is up
AZIMUTHS = (30.0, 90.0, 150.0, 210.0, 270.0, 330.0)  # degrees
# By version of the public checkpoints (their model cards). A checkpoint's configuration names its entry. The table is
# saved with the checkpoint: whoever trains other cameras adds a line.
CAMERAS = {
    "v1.1": Cameras(AZIMUTHS, (30.0, -20.0) * 3, math.degrees(2 * math.atan(16 / 35))),
    "v1.2": Cameras(AZIMUTHS, (20.0, -10.0) * 3, 30.0),
}


def check_cameras(preset, source: str | Path):
    """Raises ValueError if what `source` says of its cameras is neither None nor a key of `CAMERAS`."""
    if preset not in [None, *CAMERAS]:  # a list, because what a file says may not be hashable
        raise ValueError(f"{source} is or has the cameras {preset!r}, but there are only {', '.join(CAMERAS)}.")


def preset_of(name: str | Path) -> str | None:
    """The key in `CAMERAS` of a public checkpoint or ControlNet (zero123plus-v1.1, controlnet-zp11-depth-v1), by its
    Hub name, a folder of its name or the Hub's cache; None for another. Folders above it say nothing.
    """
    path = Path(name)
    path = path.resolve() if path.is_dir() else path
    last = path.parts[-3].split("--")[-1] if path.parts[-2:-1] == ("snapshots",) else path.name
    pattern = r"(?:zero123plus[-_]v?|controlnet-zp)(1[._]?[12])(?:-(?:depth|normal-gen)-v1)?"
    found = re.fullmatch(pattern, last.lower())
    return f"v1.{found[1][-1]}" if found else None


# ---- Reference attention ----


class ReferenceEntry:
    """The keys and values of one attention layer, each of shape (B, N, heads, head_dim), and the `next` layer's."""

    def __init__(self, key: torch.Tensor | None = None, value: torch.Tensor | None = None):
        self.key, self.value, self.next = key, value, None


class ReferenceCache:
    """Keys and values of the reference picture and of the text, by attention layer. A reference pass writes them, and
    any number of passes read them, in the order in which the layers run.

    This is a plain object rather than a dictionary, because offloading hooks rebuild dictionaries among the arguments
    of a module, and what is written to the copy would be lost. It is a chain, because layers then share compiled code:
    names, or places in a list, would be compiled once for each layer.

    Args:
        pairs: keys and values of the layers.
        pictures: R, the references of each object, which lie one after another.
    """

    def __init__(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]] = (), pictures: int = 1):
        self.pictures = pictures
        self.start = self.place = ReferenceEntry()  # an empty one in front of the first
        for key, value in pairs:
            self.write("", key, value)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        entry = self.start.next
        while entry is not None:
            yield entry.key, entry.value
            entry = entry.next

    def rewound(self) -> "ReferenceCache":
        """Itself, at the first layer. To be called before each pass that reads."""
        self.place = self.start
        return self

    def write(self, layer: str, key: torch.Tensor, value: torch.Tensor):
        """Stores the key and value of the layer that runs. A chain does not need its name; other caches may."""
        self.place.next = ReferenceEntry(key, value)
        self.place = self.place.next

    def join(self, states: torch.Tensor, is_text: bool) -> torch.Tensor:
        """Puts the keys or values of an object's R references, (B R, N, ...), side by side: (B, R N, ...). Of texts it
        takes the first reference's, which is the tile's: (B, N, ...).
        """
        states = states.unflatten(0, (-1, self.pictures))
        return states[:, 0] if is_text else states.flatten(1, 2)

    def read(self, layer: str, batch_size: int, is_text: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the key and value of the layer that runs for a batch of `batch_size` objects.

        There may be fewer entries than that. Under classifier-free guidance the first entry, the negative reference,
        is then repeated for the whole negative half, so that (1 + B) entries serve 2 B samples.

        Raises:
            RuntimeError: if the layer was not written.
        """
        self.place = self.place.next
        if self.place is None:
            raise RuntimeError("No reference was written for this layer: call the UNet with reference_mode='write'.")
        key, value = self.join(self.place.key, is_text), self.join(self.place.value, is_text)
        missing = batch_size - key.shape[0]
        if missing:
            key, value = (torch.cat([entry[:1].expand(missing, -1, -1, -1), entry]) for entry in (key, value))
        return key, value

    def part(self, samples: slice) -> "ReferenceCache":
        """A cache of some of the samples, which shares their memory."""
        return ReferenceCache(((key[samples], value[samples]) for key, value in self), self.pictures)


class References:
    """The references of all steps of a call. A reference depends on its step's noise level and noise, but not on the
    tile, so that one pass writes the keys and values of many steps. On a GPU this saves most of the time of one tile,
    in which the host launches small kernels.

    Args:
        noisy: references of each step, the negative ones first, shape (T, M + B, R, C, h, w).
        timesteps: of the steps, shape (T,).
        num_negatives: M; steps without guidance leave these out.
        interval: steps for which a reference is used.
        is_guided: whether a step, by its number, is guided.
    """

    def __init__(self, noisy, timesteps, num_negatives: int, interval: int, is_guided: Callable):
        self.noisy, self.timesteps, self.num_negatives = noisy, timesteps, num_negatives
        self.interval, self.is_guided = interval, is_guided
        self.current, self.ahead = None, {}  # the cache that is read, and those of steps to come
        self.guided, self.count = None, 0  # of the passes that wrote them: whether guided, and how many steps

    def at(self, step: int, write: Callable[[torch.Tensor, torch.Tensor], ReferenceCache]) -> ReferenceCache:
        """The reference that a step reads. Steps are asked for in their order. `write` runs a pass, and takes
        references of shape (K N R, C, h, w) and time steps of shape (K N R,), of K steps of N objects.
        """
        guided = self.is_guided(step)
        if guided != self.guided or (step % self.interval == 0 and step not in self.ahead):
            left = [step, *(i for i in range(step + 1, len(self.timesteps)) if i % self.interval == 0)]
            left = list(itertools.takewhile(lambda i: self.is_guided(i) == guided, left))
            noisy = self.noisy[:, 0 if guided else self.num_negatives :].flatten(1, 2)
            samples = noisy.shape[1]
            if guided != self.guided:  # passes of one size, because each size is compiled by itself
                most = max(1, MAX_REFERENCES // samples)
                self.count = math.ceil(len(left) / math.ceil(len(left) / most))
            chosen = (left + left[-1:] * self.count)[: self.count]
            self.current, self.ahead, self.guided = None, {}, guided  # frees their memory
            cache = write(noisy[chosen].flatten(0, 1), self.timesteps[chosen].repeat_interleave(samples))
            parts = [cache.part(slice(n * samples, (n + 1) * samples)) for n in range(self.count)]
            self.ahead = dict(zip(chosen, parts))
        self.current = self.ahead.pop(step, self.current)
        return self.current


class ReferenceAttnProcessor:
    """Scaled dot-product attention in which self-attention also attends to a reference picture (section 2.2 of the
    paper).

    In mode "write" a layer stores its keys and values in the cache. In mode "read" self-attention appends the stored
    keys and values to its own, and cross-attention uses the stored ones, because the text is the same in both passes.
    Without a cache the processor computes plain attention.

    Args:
        layer: the layer's name.

    When called, it takes besides the arguments of every attention processor of diffusers:
        reference ([`ReferenceCache`], optional): passed to the UNet in `cross_attention_kwargs`.
        reference_mode: "write" or "read". It is an argument rather than a state of the cache, so that gradient
            checkpointing recomputes a layer in the mode that it ran in.
    """

    _attention_backend = None  # written by `set_attention_backend`

    def __init__(self, layer: str):
        self.layer = layer

    def __call__(
        self,
        attn,
        hidden_states: torch.Tensor,  # (B, N, C)
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        reference: ReferenceCache | None = None,
        reference_mode: str | None = None,
    ) -> torch.Tensor:
        is_self_attention = encoder_hidden_states is None
        context = hidden_states if is_self_attention else encoder_hidden_states
        batch_size, length = context.shape[:2]
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, length, batch_size)
            attention_mask = attention_mask.view(batch_size, attn.heads, -1, attention_mask.shape[-1])
        if reference is not None and reference_mode not in ("write", "read"):
            raise ValueError(f"`reference_mode` is {reference_mode!r}, but must be 'write' or 'read'.")
        reads = reference is not None and reference_mode == "read"

        # (B, N, C) -> (B, N, heads, head_dim)
        if reads and not is_self_attention:
            query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
            key, value = reference.read(self.layer, batch_size, is_text=True)
        else:
            projected = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
            query, key, value = (states.unflatten(-1, (attn.heads, -1)) for states in projected)
            if reads:
                reference_key, reference_value = reference.read(self.layer, batch_size)
                key, value = torch.cat([key, reference_key], dim=1), torch.cat([value, reference_value], dim=1)
            elif reference is not None:
                reference.write(self.layer, key, value)

        out = dispatch_attention_fn(query, key, value, attn_mask=attention_mask, backend=self._attention_backend)
        out = out.flatten(2, 3).to(query.dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


# `unet.set_default_attn_processor()` refuses processors that are not in this tuple
unet_2d_condition.CROSS_ATTENTION_PROCESSORS += (ReferenceAttnProcessor,)

# The processors that diffusers installs by itself. Any other is the user's choice and is never replaced.
STOCK_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")


def install_reference_attention(unet: UNet2DConditionModel):
    """Makes sure that every self-attention layer of `unet` can attend to a reference.

    Stock processors are replaced, on cross-attention too, where ours reuse the text's keys and values. Processors
    that take `reference` and `reference_mode`, ours or the user's, are kept.

    Raises:
        ValueError: if a self-attention layer has another processor, which would ignore the reference.
    """
    processors = unet.attn_processors
    for name, processor in processors.items():
        if "reference" in inspect.signature(processor.__call__).parameters:
            continue
        if type(processor).__name__ in STOCK_PROCESSORS:
            processors[name] = ReferenceAttnProcessor(name.removesuffix(".processor"))
        elif name.endswith("attn1.processor"):
            raise ValueError(
                f"The attention processor of {name} is {type(processor).__name__}, which ignores the reference"
                " picture. Undo what set it (fused projections `pipe.unet.unfuse_qkv_projections()`, sliced or"
                " memory-efficient attention `pipe.unet.set_attn_processor(AttnProcessor2_0())`), or let its __call__"
                " take `reference` and `reference_mode` as ReferenceAttnProcessor does."
            )
    if any(processors[name] is not processor for name, processor in unet.attn_processors.items()):
        unet.set_attn_processor(processors)


# ---- Pictures in, views out ----


@dataclass
class Zero123PlusPipelineOutput(BaseOutput):
    """What a call returns.

    Args:
        images: the tiles, each 3 rows by 2 columns of views: a list of B pictures ("pil"), an array of shape (B, H,
            W, 3) in [0, 1] ("np"), a tensor of shape (B, 3, H, W) in [0, 1] ("pt"), or latents of shape (B, C, H / f,
            W / f) in the VAE's space ("latent"): `vae.decode(latents / vae.config.scaling_factor)`, then
            [`unscale_image`], gives the tile.
        views: for each tile its six views in the order of `camera_poses()`: a list of B lists of six pictures ("pil"),
            or shape (B, 6, H / 3, W / 2, 3) ("np") or (B, 6, 3, H / 3, W / 2) ("pt"). `None` for latents.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    views: list[list[PIL.Image.Image]] | np.ndarray | torch.Tensor | None


def split_views(tiles):
    """Splits tiles into views, as described for [`Zero123PlusPipelineOutput`]."""
    if isinstance(tiles, list):
        w, h = tiles[0].width // COLUMNS, tiles[0].height // ROWS
        boxes = [(c * w, r * h, (c + 1) * w, (r + 1) * h) for r in range(ROWS) for c in range(COLUMNS)]
        return [[tile.crop(box) for box in boxes] for tile in tiles]
    if isinstance(tiles, np.ndarray):
        b, h, w, c = tiles.shape
        views = tiles.reshape(b, ROWS, h // ROWS, COLUMNS, w // COLUMNS, c).transpose(0, 1, 3, 2, 4, 5)
        return views.reshape(b, ROWS * COLUMNS, h // ROWS, w // COLUMNS, c)
    return tiles.unflatten(3, (COLUMNS, -1)).unflatten(2, (ROWS, -1)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def load_pictures(pictures, argument: str) -> list[PIL.Image.Image]:
    """Turns every accepted kind of picture into a list of RGB pictures, transparency composited on grey.

    Args:
        pictures: one PIL picture of any mode, an array of shape (H, W, 3 or 4) or a tensor of shape (3 or 4, H, W),
            uint8 or float in [0, 1], a batch of either, or a list of these.
        argument: the name to use in messages.

    Raises:
        TypeError: if it is none of these.
        ValueError: if there is no picture, or one is empty, unreadable, out of range or has a wrong number of
            channels.
    """
    if isinstance(pictures, (list, tuple)):
        if not pictures:
            raise ValueError(f"`{argument}` is an empty list: give at least one picture.")
        return [picture for item in pictures for picture in load_pictures(item, argument)]
    if isinstance(pictures, PIL.Image.Image):
        return [_load_pil(pictures, argument)]
    if isinstance(pictures, torch.Tensor):
        pictures = (pictures.float() if pictures.is_floating_point() else pictures).detach().cpu().numpy()
        pictures = np.moveaxis(pictures, -3, -1) if pictures.ndim > 2 else pictures
    elif not isinstance(pictures, np.ndarray):
        raise TypeError(
            f"`{argument}` is a {type(pictures).__name__}, but must be a PIL picture, a numpy array, a torch tensor or"
            " a list of these."
        )
    if pictures.ndim not in (3, 4) or pictures.shape[-1] not in (3, 4) or 0 in pictures.shape:
        raise ValueError(
            f"`{argument}` has the shape {pictures.shape} (channels last), but must be an array of shape (H, W, 3 or"
            " 4), a tensor of shape (3 or 4, H, W), or a batch of either."
        )
    if pictures.dtype != np.uint8:
        low, high = pictures.min(), pictures.max()
        if not (np.issubdtype(pictures.dtype, np.floating) and low >= 0 and high <= 1):  # also catches NaN
            raise ValueError(
                f"`{argument}` has values of {pictures.dtype} from {low:.4g} to {high:.4g}, but must have uint8, or"
                " floats in [0, 1]: divide by 255, or map from [-1, 1], and remove NaN."
            )
        pictures = np.round(pictures * 255).astype(np.uint8)
    return [_load_pil(PIL.Image.fromarray(item), argument) for item in pictures.reshape(-1, *pictures.shape[-3:])]


def to_srgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Converts a picture with a colour profile to sRGB. A profile that cannot be read or applied counts as none."""
    profile = picture.info.get("icc_profile")
    colours = picture.convert({"LA": "L", "P": "RGB", "PA": "RGB", "RGBA": "RGB"}.get(picture.mode, picture.mode))
    if not profile or colours.mode not in ("L", "RGB", "CMYK"):
        return picture
    try:
        source, srgb = PIL.ImageCms.ImageCmsProfile(io.BytesIO(profile)), PIL.ImageCms.createProfile("sRGB")
        colours = PIL.ImageCms.profileToProfile(colours, source, srgb, outputMode="RGB")
    except (PIL.ImageCms.PyCMSError, OSError, ValueError):
        return picture
    if "A" in picture.getbands() or "transparency" in picture.info:
        colours.putalpha(picture.convert("RGBA").getchannel("A"))
    return colours


def to_8_bits(picture: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """Brings grey pictures of 16 or 32 bits, in [0, 65535], or of floats, in [0, 1], to 8 bits; others stay.

    Raises:
        ValueError: if a value is out of range; it begins with `name`.
    """
    if not (picture.mode.startswith("I") or picture.mode == "F"):
        return picture
    values = np.asarray(picture).astype(np.float32)
    full = 1.0 if picture.mode == "F" else 65535.0  # PIL opens 16-bit files as "I" or "I;16"
    if not (values.min() >= 0 and values.max() <= full):
        found = f"of mode {picture.mode!r} with values from {values.min():.4g} to {values.max():.4g}"
        raise ValueError(f"{name} is a picture {found}, but they must be in [0, {full:.0f}].")
    return PIL.Image.fromarray(np.round(values * (255 / full)).astype(np.uint8))


def border_of(pixels: np.ndarray, tolerance: float = BACKGROUND_TOLERANCE) -> tuple[np.ndarray, float]:
    """The median colour of a picture's border, shape (3,), and the share of the border that is like it.

    Args:
        pixels: of shape (H, W, 3), in [0, 255].
        tolerance: of 255, within which two colours are alike.
    """
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]]).astype(np.float32)
    colour = np.median(border, axis=0)
    return colour, float((np.abs(border - colour).max(-1) < tolerance).mean())


def is_grey(colour: np.ndarray) -> bool:
    """Whether a colour of shape (3,), in [0, 255], is that of the training data's background."""
    return bool(np.abs(colour - GREY).max() <= BACKGROUND_TOLERANCE)


def _load_pil(picture: PIL.Image.Image, argument: str) -> PIL.Image.Image:
    if 0 in picture.size:
        raise ValueError(f"`{argument}` is a picture of size {picture.size}: it has no pixels.")
    if max(picture.size) > MAX_EDGE:
        raise ValueError(
            f"`{argument}` is a picture of {picture.width} x {picture.height} pixels, but its longest side may have at"
            f" most {MAX_EDGE}: shrink it first."
        )
    try:
        picture = PIL.ImageOps.exif_transpose(picture)
        picture.load()
        picture = to_srgb(picture)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"`{argument}` cannot be read ({error}): the file is damaged or incomplete.") from error
    picture = to_8_bits(picture, f"`{argument}`")
    if picture.mode == "La":  # PIL converts premultiplied grey to LA alone
        picture = picture.convert("LA")
    if "A" in picture.getbands() or picture.mode == "RGBa" or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        background = PIL.Image.new("RGBA", picture.size, (GREY, GREY, GREY, 255))
        picture = PIL.Image.alpha_composite(background, picture)
    return picture.convert("RGB")


def pad_to_square(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Centres an RGB picture on a grey square, whose edge has at most `ENCODED_EDGE` pixels."""
    if picture.width == picture.height:
        return picture
    longest = max(picture.size)
    edge = min(longest, ENCODED_EDGE)
    if edge < longest:
        size = [max(1, round(side * edge / longest)) for side in picture.size]
        picture = picture.resize(size, PIL.Image.Resampling.BICUBIC)
    square = PIL.Image.new("RGB", (edge, edge), (GREY,) * 3)
    square.paste(picture, (round((edge - picture.width) / 2), round((edge - picture.height) / 2)))
    return square


def preprocess(processor: CLIPImageProcessor, pictures: list[PIL.Image.Image]) -> torch.Tensor:
    """Applies an image processor in its PIL implementation and returns pixels of shape (B, 3, H, W).

    Since transformers 5 the same class computes with torchvision where that is installed, and its resizing differs by
    up to 3e-2.
    """
    if hasattr(transformers, "CLIPImageProcessorPil"):
        processor = transformers.CLIPImageProcessorPil.from_dict(processor.to_dict())
    return processor(images=pictures, return_tensors="pt").pixel_values


# ---- The pipeline ----


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether `torch.compile(module)` or `module.compile()` compiled it."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


class Zero123PlusPipeline(DiffusionPipeline, StableDiffusionMixin, StableDiffusionLoraLoaderMixin):
    """Turns one picture of an object into six consistent views of it, a tile of 3 rows and 2 columns.

    Args:
        vae, text_encoder, tokenizer, vision_encoder: of Stable Diffusion, and CLIP's for the global condition.
        unet: a stock UNet. Reference attention is installed as attention processors, which compute plain attention in
            other pipelines.
        scheduler: one of `SCHEDULERS`; its `timestep_spacing` should be "trailing".
        feature_extractor_clip, feature_extractor_vae: preprocessing of vision encoder and reference (mean 0.5, std
            0.8).
        safety_checker: must be None; public checkpoints list it as null.
        controlnet: optional; it sees a control tile (depth, or the RGB tile to make normals of).
        ramping_coefficients: weight of the CLIP embedding for each prompt token; i / L for i = 1..L by default.
        cameras: a key of `CAMERAS`; by default that of the public checkpoint whose name the checkpoint has, and
            otherwise, with a warning, "v1.2".
        default_num_inference_steps, default_guidance_scale, controlnet_conditioning_scale: of a call that names none.
        pictures: of one object that a call takes at most; several need a LoRA of `training.train --phase pictures`.

    To make a pipeline of another's components, pass `**pipe.parameters` beside `**pipe.components`.

    Raises:
        ValueError: if `ramping_coefficients` are not one per token, `cameras` is no key of `CAMERAS`, or a safety
            checker is given.
    """

    model_cpu_offload_seq = "text_encoder->vision_encoder->unet->vae"
    _optional_components = ["safety_checker", "controlnet"]
    _callback_tensor_inputs = ["latents"]
    # `save_pretrained` writes this file beside the components. The text is read when the class is made, because the
    # module that diffusers imports it from holds another pipeline's file, and names, once another one is loaded.
    _source = Path(__file__).read_text(encoding="utf-8")

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        vision_encoder: CLIPVisionModelWithProjection,
        feature_extractor_clip: CLIPImageProcessor,
        feature_extractor_vae: CLIPImageProcessor,
        safety_checker: None = None,
        controlnet: ControlNetModel | None = None,
        ramping_coefficients: list[float] | None = None,
        cameras: str | None = None,
        default_num_inference_steps: int = 28,
        default_guidance_scale: float = 4.0,
        controlnet_conditioning_scale: float = 1.0,
        pictures: int = 1,
    ):
        super().__init__()
        # `DiffusionPipeline.from_pipe` passes what the configuration has in place of these two components
        safety_checker, controlnet = (None if one == (None, None) else one for one in (safety_checker, controlnet))
        if safety_checker is not None:
            raise ValueError("`safety_checker` is given, but this pipeline has none: pass None.")
        if isinstance(controlnet, tuple):
            raise ValueError(f"`controlnet` is {controlnet}, but must be a model: pass `controlnet=pipe.controlnet`.")
        check_cameras(cameras, "`cameras`")
        if text_encoder is not None:  # a pipeline without it takes `prompt_embeds`
            length = text_encoder.config.max_position_embeddings
            if ramping_coefficients is None:
                logger.warning(
                    "`ramping_coefficients` are not given, and i / L is taken: to make a pipeline of another's"
                    " components, pass `**pipe.parameters` too."
                )
                ramping_coefficients = [i / length for i in range(1, length + 1)]
            if len(ramping_coefficients) != length:
                raise ValueError(f"`ramping_coefficients` has {len(ramping_coefficients)} values for {length} tokens.")
        # Without a dtype transformers loads encoders in half precision where their configuration says so, and
        # diffusers loads the rest in float32
        for encoder in (text_encoder, vision_encoder):
            if None not in (unet, encoder) and unet.dtype == torch.float32 and encoder.dtype in HALF:
                encoder.float()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            vision_encoder=vision_encoder,
            feature_extractor_clip=feature_extractor_clip,
            feature_extractor_vae=feature_extractor_vae,
            safety_checker=safety_checker,
            controlnet=controlnet,
        )
        self.register_to_config(
            ramping_coefficients=ramping_coefficients and list(ramping_coefficients),
            cameras=cameras,
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
            controlnet_conditioning_scale=controlnet_conditioning_scale,
            pictures=pictures,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._unloaded = None  # the settings that return when a LoRA is unloaded
        self.warned = set()  # "cameras", "background", "slicing": what one warning was enough for
        # Of the last call, under the names that diffusers' callbacks use. A thread takes a `copy.copy(pipe)`
        self._guidance_scale, self._num_timesteps, self._interrupt = default_guidance_scale, 0, False
        self._cross_attention_kwargs, self._running_scheduler = None, None
        if unet is not None:
            install_reference_attention(unet)

    @classmethod
    def load_config(cls, *args, **kwargs):
        """Reads a checkpoint's configuration as that of this class. A checkpoint that names a pipeline.py of its own
        (`"_class_name": ["pipeline", ...]`) is loaded by this class all the same, and its file is not run.
        """
        config = super().load_config(*args, **kwargs)
        for part in config if isinstance(config, tuple) else (config,):
            if isinstance(part, dict) and isinstance(part.get("_class_name"), list):
                part["_class_name"] = part["_class_name"][-1]
        return config

    def to_json_string(self) -> str:
        """The configuration as it is saved. It names the class's file too: a saved folder loads by itself."""
        config = json.loads(super().to_json_string()) | {"_class_name": ["pipeline", type(self).__name__]}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def warn_once(self, topic: str, message: str):
        """Warns, unless this pipeline has warned of the topic before."""
        if topic not in self.warned:
            logger.warning(message)
        self.warned.add(topic)

    def enable_attention_slicing(self, slice_size: str | int | None = "auto"):
        """Does nothing: attention by torch takes no memory that slices would save, and slices ignore the reference."""
        self.warn_once("slicing", "Attention slicing is not needed, because attention takes little memory: ignored.")

    def disable_attention_slicing(self):
        """Does nothing, as [`enable_attention_slicing`]."""

    def save_pretrained(self, save_directory, **kwargs):
        """Saves as every diffusers pipeline does, with pipeline.py beside the components, so that the folder is its
        own `custom_pipeline`. Cameras that its name tells are written too.

        Raises:
            ValueError: if a LoRA is loaded, which is no part of the components' weights.
        """
        if any(hasattr(self.components[name], "peft_config") for name in ("unet", "text_encoder")):
            raise ValueError(
                "A LoRA is loaded, which `save_pretrained` would not save so that it can be loaded: call"
                " `pipe.fuse_lora()` first to save what is computed, and `pipe.unload_lora_weights()` in any case."
            )
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pipeline.py").write_text(self._source, encoding="utf-8")
        self.register_to_config(cameras=self.camera_preset)
        super().save_pretrained(save_directory, **kwargs)

    # LoRA

    def lora_settings(self, record: dict, source: str) -> tuple[dict, SchedulerMixin]:
        """What a `run.json` says of the use of its weights (`cameras`, `num_inference_steps`, `guidance_scale`,
        `scheduler`, `pictures`), as configuration and scheduler.

        Raises:
            ValueError: if one is wrong, or the cameras are others than the checkpoint's; it begins with `source`.
        """
        cameras, scheduler = record.get("cameras"), self.scheduler
        check_cameras(cameras, source)
        if None not in (self.camera_preset, cameras) and cameras != self.camera_preset:
            raise ValueError(
                f"{source} has the cameras of {cameras}, but the checkpoint says that it has those of"
                f" {self.camera_preset}: use both with the same."
            )
        if "scheduler" in record:
            if record["scheduler"] not in sorted(SCHEDULERS):  # not hashed: it may be of any type
                wanted = f"but must have one of {sorted(SCHEDULERS)}"
                raise ValueError(f"{source} has the scheduler {record['scheduler']!r}, {wanted}.")
            scheduler = getattr(diffusers, record["scheduler"])
            scheduler = scheduler.from_config(self.scheduler.config, timestep_spacing="trailing")
        settings = {"cameras": cameras} if cameras else {}
        for name, prefix in (("num_inference_steps", "default_"), ("guidance_scale", "default_"), ("pictures", "")):
            if name in record:
                check_number(f"{name} of {source}", record[name], 1, whole=name != "guidance_scale")
                settings[prefix + name] = record[name]
        return settings, scheduler

    def take_settings(self, settings: tuple[dict, SchedulerMixin]):
        """Takes what [`lora_settings`] returned."""
        self.register_to_config(**settings[0])
        self.scheduler = settings[1]

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict, adapter_name: str | None = None, **kwargs):
        """Loads a LoRA as every diffusers pipeline does, and until it is unloaded takes the settings in a `run.json`
        beside it, such as the steps, guidance scale and scheduler of a student.
        """
        source, settings = pretrained_model_name_or_path_or_dict, None
        path = Path("" if isinstance(source, dict) else source, kwargs.get("subfolder") or "", "run.json")
        if path.is_file() and not isinstance(source, dict):
            settings = self.lora_settings(json.loads(path.read_text()), str(path))
        super().load_lora_weights(source, adapter_name, **kwargs)
        if settings:
            self._unloaded = self._unloaded or ({name: self.config[name] for name in settings[0]}, self.scheduler)
            self.take_settings(settings)

    def fuse_lora(self, *args, **kwargs):
        """Fuses LoRAs as every diffusers pipeline does. Their settings stay then."""
        super().fuse_lora(*args, **kwargs)
        self._unloaded = None

    def unload_lora_weights(self):
        """Unloads LoRAs as every diffusers pipeline does, with the settings of those that are not fused."""
        super().unload_lora_weights()
        if self._unloaded:
            self.take_settings(self._unloaded)
        self._unloaded = None

    def add_controlnet(
        self, controlnet: ControlNetModel | None = None, conditioning_scale: float = 1.0
    ) -> ControlNetModel:
        """Sets and returns the ControlNet, in place of any other, as the published pipeline does, in the dtype and on
        the device of the UNet.

        Args:
            controlnet: a copy of the UNet's encoder, to be trained, by default.
            conditioning_scale: used by a call whose `controlnet_conditioning_scale` is None.
        """
        if controlnet is None:
            # As many strides of 2 as the VAE has: Stable Diffusion's widths, and more of the last for a larger factor
            widths = (16, 32, 96) + (256,) * (len(self.vae.config.block_out_channels) - 3)
            controlnet = ControlNetModel.from_unet(self.unet, conditioning_embedding_out_channels=widths)
        if self.unet.device.type != "meta":  # where sequential offloading keeps the weights elsewhere
            controlnet.to(self.unet.device, self.unet.dtype)
        self.register_modules(controlnet=controlnet)
        self.register_to_config(controlnet_conditioning_scale=conditioning_scale)
        return controlnet

    # Cameras

    @property
    def camera_preset(self) -> str | None:
        """The key of `CAMERAS` that the checkpoint's configuration or its name says; None where neither does."""
        return self.config.cameras or preset_of(str(self.config.get("_name_or_path")))

    @property
    def cameras(self) -> Cameras:
        """The cameras of the six views. One warning says when nothing tells them and those of v1.2 are assumed."""
        if self.camera_preset is None:
            self.warn_once(
                "cameras",
                "The checkpoint does not say its cameras, and those of v1.2 are assumed. For v1.1 pass"
                " `cameras='v1.1'` to `from_pretrained`, or `--cameras v1.1` to a command.",
            )
        return CAMERAS[self.camera_preset or "v1.2"]

    def camera_poses(self, radius: float | None = None) -> np.ndarray:
        """Camera-to-world matrices of the six views, shape (6, 4, 4): see [`Cameras.poses`]. The object is at the
        origin, and the input view at azimuth 0, on +X (its elevation is unknown).
        """
        return self.cameras.poses(radius)

    def camera_intrinsics(self, height: int, width: int) -> np.ndarray:
        """Pinhole intrinsics of one view of `height` x `width` pixels, shape (3, 3), in pixels."""
        return self.cameras.intrinsics(height, width)

    # The state of the last call

    @property
    def guidance_scale(self) -> float:
        """The guidance scale. A callback may set `pipe._guidance_scale`, but not in a call that begins unguided."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call is guided at all."""
        return self._guidance_scale > 1

    @property
    def running_scheduler(self) -> SchedulerMixin | None:
        """The call's own copy of the scheduler. In a callback it stands at the next step."""
        return self._running_scheduler

    @property
    def num_timesteps(self) -> int:
        """The number of evaluations; some solvers take more than one a step."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the call is to stop denoising. A callback sets `pipe._interrupt = True`."""
        return self._interrupt

    # Checks

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the tile that the checkpoint was trained at: its UNet's sample size where
        that is a tile's, else `TILE`.
        """
        size = self.unet.config.sample_size
        if isinstance(size, int) or size is None:
            return TILE
        return size[0] * self.vae_scale_factor, size[1] * self.vae_scale_factor

    def check_size(self, height: int, width: int):
        """Raises ValueError if a tile's views do not fit the VAE, or its latents not every level of the UNet."""
        levels = 2 ** (len(self.unet.config.block_out_channels) - 1)
        for name, value, views in (("height", height, ROWS), ("width", width, COLUMNS)):
            step = math.lcm(views * self.vae_scale_factor, self.vae_scale_factor * levels)
            check_number(name, value, step, whole=True)
            if value % step:
                near = value // step * step
                raise ValueError(f"`{name}` is {value}, but must be a multiple of {step}: {near} or {near + step}.")

    def check_inputs(
        self, batch_size, shape, prompts, embeds, generator, latents, control_image, control_scales, output_type
    ):
        """Checks what torch would accept in silence, or refuse in words that help nobody.

        Args:
            shape: of the latents, (B * N, C, h, w).
            prompts, embeds: the positive and the negative one of each.
            control_scales: one for all ControlNets, or one each.

        Raises:
            TypeError, ValueError: naming the argument, its value and what to do.
        """
        dim, length = self.unet.config.cross_attention_dim, len(self.config.ramping_coefficients or ())
        for name, text, encoded, most in zip(("prompt", "negative_prompt"), prompts, embeds, (batch_size, 1)):
            each = name == "prompt" and isinstance(text, list) and len(text) == batch_size
            if not (each or isinstance(text, (str, type(None)))):
                raise ValueError(f"`{name}` is {text!r}, but must be a text{', or a list of one each' * (most > 1)}.")
            if encoded is None and self.text_encoder is None:
                raise ValueError(f"`{name}_embeds` is missing, and the pipeline has no text encoder: give it.")
            if encoded is not None and text:
                raise ValueError(f"`{name}` and `{name}_embeds` are both given: give one.")
            wanted = {(n, length or encoded.shape[1], dim) for n in (1, most)} if encoded is not None else ()
            if encoded is not None and tuple(encoded.shape) not in wanted:
                raise ValueError(f"`{name}_embeds` has shape {tuple(encoded.shape)}, but must have one of {wanted}.")
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` has shape {tuple(latents.shape)}, but must have {shape}.")
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"`generator` has {len(generator)} entries for {shape[0]} tiles: give one, or one each.")
        for item in generator if isinstance(generator, list) else [generator]:
            if not isinstance(item, (torch.Generator, type(None))):
                raise TypeError(f"`generator` is or has {item!r}: give torch.Generator().manual_seed(...).")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}, but must be 'pil', 'np', 'pt' or 'latent'.")
        if (control_image is None) != (self.controlnet is None):
            remedy = "`pipe.add_controlnet(...)`, `pipe.controlnet = None`"
            raise ValueError(f"`control_image` and a ControlNet go together: give both, or neither ({remedy}).")
        nets = getattr(self.controlnet, "nets", None)  # of a MultiControlNetModel
        if nets is not None and not (isinstance(control_image, list) and len(control_image) == len(nets)):
            raise ValueError(f"`control_image` must be a list of {len(nets)}, one for each ControlNet.")
        if len(control_scales) not in (1, len(nets or [0])):
            raise ValueError(f"`controlnet_conditioning_scale` is {control_scales}: give one, or one a ControlNet.")
        for net in (nets or [self.controlnet]) if control_image is not None else ():
            factor = 2 ** (len(net.config.conditioning_embedding_out_channels) - 1)
            if factor != self.vae_scale_factor:
                raise ValueError(
                    f"The ControlNet shrinks `control_image` by {factor}, but the VAE by {self.vae_scale_factor}: make"
                    " one for this checkpoint with `pipe.add_controlnet()`."
                )

    def load_objects(self, image, azimuths) -> tuple[list[PIL.Image.Image], list[int]]:
        """Reads R pictures of each object, one at each of `azimuths`.

        Returns:
            The pictures, one object's after another's, and their azimuths, rounded to `AZIMUTH_STEP`. Both are in the
            order of azimuths, so that what is drawn for a picture does not depend on its place in a list.

        Raises:
            ValueError: naming the argument and the remedy.
        """
        nested = isinstance(image, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in image)
        if azimuths is None and not nested:
            return load_pictures(image, "image"), [0]
        example = "`pipe([[front, back]], image_azimuths=[0, 180])`"
        if not nested or not isinstance(azimuths, (list, tuple)):
            raise ValueError(f"`image` as a list of lists and `image_azimuths` as a list go together: {example}.")
        for azimuth in azimuths:
            check_number("image_azimuths", azimuth)
        rounded = [round(azimuth / AZIMUTH_STEP) * AZIMUTH_STEP % 360 for azimuth in azimuths]
        if rounded[:1] != [0] or len(set(rounded)) < len(rounded):
            raise ValueError(f"`image_azimuths` is {azimuths}, but must be 0 and others, in steps of {AZIMUTH_STEP}.")
        objects = [load_pictures(item, "image") for item in image]
        if any(len(pictures) != len(rounded) for pictures in objects):
            raise ValueError(f"`image` needs a picture of each object for each of {azimuths}: {example}.")
        if len(rounded) > (self.config.pictures if self.text_encoder is not None else 1):
            most = f"the weights take {self.config.pictures}, and several need the text encoder"
            raise ValueError(f"`image` has {len(rounded)} pictures of an object, but {most}: load a LoRA for it.")
        order = sorted(range(len(rounded)), key=rounded.__getitem__)
        return [pictures[i] for pictures in objects for i in order], sorted(rounded)

    def check_background(self, pictures: list[PIL.Image.Image]):
        """Warns, once, of an RGB picture that does not stand on the grey of the training data.

        Raises:
            ValueError: if one is that grey everywhere, as one that is transparent everywhere becomes.
        """
        for picture in pictures:
            if picture.getextrema() == ((GREY, GREY),) * 3:
                raise ValueError("`image` is transparent, or the background's grey, everywhere: it has no object.")
            colour, alike = border_of(np.asarray(picture))
            if alike < 0.5 or not is_grey(colour):
                what = "has many colours" if alike < PLAIN_SHARE else f"has the colour {colour.astype(int).tolist()}"
                self.warn_once(
                    "background",
                    f"The border of `image` {what}, but Zero123++ expects the object alone, on transparency or grey"
                    f" {GREY}: cut it out, with rembg or `zero123plus.pictures.prepare(picture)`. Open what is cut out"
                    " by `PIL.Image.open`, because `diffusers.utils.load_image` makes its transparency black.",
                )

    # Encoding and preparing

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = False,
        negative_prompt: str | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encodes prompts to the text encoder's last hidden states. No image embedding is mixed in.

        Args:
            prompt: one string or B; tokens beyond L are cut off.
            num_images_per_prompt: N, how often each prompt is repeated.
            do_classifier_free_guidance: whether to encode the negative prompt too.
            negative_prompt: empty by default.
            prompt_embeds, negative_prompt_embeds: in place of the prompts.
            lora_scale: strength of the text encoder's LoRA layers, 1 by default.

        Returns:
            Shape (B * N, L, D), and shape (1, L, D) or, without classifier-free guidance, None.
        """

        def encode(texts: list[str]) -> torch.Tensor:
            length = self.text_encoder.config.max_position_embeddings
            options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
            return self.text_encoder(self.tokenizer(texts, **options).input_ids.to(device))[0]

        if lora_scale is not None and self.text_encoder is not None:
            scale_lora_layers(self.text_encoder, lora_scale)
        if prompt_embeds is None:
            prompt_embeds = encode(prompt if isinstance(prompt, list) else [prompt or ""])
        if not do_classifier_free_guidance:
            negative_prompt_embeds = None
        elif negative_prompt_embeds is None:
            negative_prompt_embeds = encode([negative_prompt or ""])
        if lora_scale is not None and self.text_encoder is not None:
            unscale_lora_layers(self.text_encoder, lora_scale)
        dtype = prompt_embeds.dtype if self.unet is None else self.unet.dtype
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype)
        return prompt_embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, 0), negative_prompt_embeds

    def encode_image(self, pictures: list[PIL.Image.Image], device: torch.device) -> torch.Tensor:
        """CLIP embeddings of square RGB pictures, shape (B, D)."""
        pixels = preprocess(self.feature_extractor_clip, pictures)
        return self.vision_encoder(pixels.to(device, self.vision_encoder.dtype)).image_embeds.to(self.unet.dtype)

    def prepare_reference_latents(self, pixels: torch.Tensor, num_images: int, device, generator) -> torch.Tensor:
        """Samples the VAE's latents, N of each, of pixels that `feature_extractor_vae` made, shape (B, R, 3, H, W).

        The latents, shape (B * N, R, C, H / f, W / f), are raw: not multiplied by `vae.config.scaling_factor`, and so
        about 5 times larger than those that the UNet denoises: the "5x" of scaled reference attention (section 2.2).
        """
        posterior = self.vae.encode(pixels.flatten(0, 1).to(device, self.vae.dtype)).latent_dist
        moments = (moment.unflatten(0, pixels.shape[:2]) for moment in (posterior.mean, posterior.std))
        mean, std = (moment.repeat_interleave(num_images, 0) for moment in moments)
        latents = mean + std * randn_tensor(mean.shape, generator=generator, device=device, dtype=mean.dtype)
        return latents.to(self.unet.dtype)

    def draw_noise(self, shape: tuple[int, ...], device: torch.device, generator) -> torch.Tensor:
        """Draws unit noise in the UNet's dtype."""
        return randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)

    def draw_reference_noise(self, steps: int, shape: tuple[int, ...], device: torch.device, generator):
        """Draws the noise of the references of all steps at once, shape (steps, *shape). With a list of generators
        each sample has what it would have alone.
        """
        if not isinstance(generator, list):
            return self.draw_noise((steps, *shape), device, generator)
        return torch.stack([self.draw_noise((steps, *shape[1:]), device, one) for one in generator], dim=1)

    def prepare_latents(self, shape, scheduler, device, generator, latents: torch.Tensor | None) -> torch.Tensor:
        """Returns initial noise of `shape` (B, C, h, w), or `latents`, times the scheduler's initial sigma."""
        if latents is None:
            latents = self.draw_noise(shape, device, generator)
        return latents.to(device, self.unet.dtype) * scheduler.init_noise_sigma

    def prepare_control_image(self, control_image, batch_size: int, num_images: int, height: int, width: int, device):
        """Brings control tiles to pixels in [-1, 1] of shape (B * num_images, 3, H, W). One tile serves a whole batch.
        A warning says when the background of a tile is not the grey that ControlNets are trained with.
        """
        tiles = load_pictures(control_image, "control_image")
        if len(tiles) not in (1, batch_size):
            raise ValueError(
                f"`control_image` has {len(tiles)} tiles for {batch_size} pictures: give one, or one each."
            )
        for tile in tiles:
            if tile.width * height != tile.height * width:
                ratio = f"the aspect ratio of the tile, {width} x {height}"
                raise ValueError(f"`control_image` is {tile.width} x {tile.height}, but must have {ratio}.")
        corners = [np.asarray(view)[np.ix_([0, -1], [0, -1])] for views in split_views(tiles) for view in views]
        colour = np.median(corners, axis=(0, 1, 2))
        if not is_grey(colour):
            logger.warning(
                f"The views of `control_image` have corners of the colour {colour.round().astype(int).tolist()}, but"
                f" ControlNets expect a background that is transparent or grey {GREY}, and depth that is black at the"
                " nearest point: see `zero123plus.pictures.depth_tile`."
            )
        pixels = self.image_processor.preprocess(tiles, height=height, width=width)
        pixels = pixels.repeat(batch_size // len(tiles), 1, 1, 1).repeat_interleave(num_images, 0)
        return pixels.to(device, self.controlnet.dtype)

    # The steps of the loop

    def write_reference(self, sample: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor) -> ReferenceCache:
        """Runs noisy references of K steps, shape (K B R, C, h', w'), through the UNet, which writes their keys and
        values. Their time steps have the shape (K B R,), and the text states of one step (B, R, L, D).
        """
        pictures, embeds = embeds.shape[1], embeds.flatten(0, 1)
        cache = ReferenceCache(pictures=pictures)
        kwargs = {**(self._cross_attention_kwargs or {}), "reference": cache, "reference_mode": "write"}
        torch.compiler.cudagraph_mark_step_begin()
        text = embeds.repeat(len(t) // len(embeds), 1, 1)
        self.unet(sample, t, text, cross_attention_kwargs=kwargs, return_dict=False)
        if is_compiled(self.unet):  # whose CUDA graphs would overwrite what they gave
            cache = ReferenceCache(((key.clone(), value.clone()) for key, value in cache), pictures)
        return cache

    def predict(
        self, cache: ReferenceCache, sample: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor, residuals: dict
    ) -> torch.Tensor:
        """Predicts the tile's noise or velocity, shape (B, C, h, w), while attending to the reference in the cache."""
        kwargs = {**(self._cross_attention_kwargs or {}), "reference": cache.rewound(), "reference_mode": "read"}
        options = {"cross_attention_kwargs": kwargs, "return_dict": False, **residuals}
        torch.compiler.cudagraph_mark_step_begin()
        prediction = self.unet(sample, t, encoder_hidden_states=embeds, **options)[0]
        return prediction.clone() if is_compiled(self.unet) else prediction

    def control(self, sample: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor, tiles: list, scales: list) -> dict:
        """Runs the ControlNet and returns what it adds to the UNet, as the UNet's arguments. Both halves of a guided
        batch see the same tiles.
        """
        tiles = [pixels.repeat(len(sample) // len(pixels), 1, 1, 1) for pixels in tiles]
        given = (tiles, scales) if hasattr(self.controlnet, "nets") else (tiles[0], scales[0])
        down, mid = self.controlnet(sample, t, embeds, *given, return_dict=False)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image,
        prompt: str | list[str] | None = "",
        negative_prompt: str | None = None,
        control_image=None,
        depth_image=None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        reference_interval: int = 1,
        controlnet_conditioning_scale: float | list[float] | None = None,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        image_azimuths: list[float] | None = None,
    ):
        """Makes six views of the object in each picture.

        Args:
            image: B pictures: PIL in any mode, arrays of shape (H, W, 3 or 4), uint8 or float in [0, 1], tensors of
                shape (3 or 4, H, W) in [0, 1], a batch or a list of these. Transparency is composited on grey, and
                pictures that are not square are padded with grey.
            prompt: one for all pictures, or one each. The public checkpoints are trained without prompts.
            negative_prompt: empty by default.
            control_image: a tile for all pictures, or one each, for the ControlNet; of the types of `image`. For
                a MultiControlNetModel a list of these, one for each ControlNet.
            depth_image: the published pipeline's name of `control_image`.
            height, width: of the tile, in pixels; the checkpoint's own by default. Another size gives a warning.
            num_inference_steps: the checkpoint's `default_num_inference_steps` by default. Faces want 75 to 100.
            guidance_scale: the checkpoint's `default_guidance_scale` by default. Up to 1 there is no guidance.
            guidance_rescale, guidance_start, guidance_end: see [`Guidance`]. Steps without guidance cost half.
            reference_interval: recompute the reference keys and values every N steps; 1 is exact, larger is
                approximate.
            controlnet_conditioning_scale: one, or one for each ControlNet; that of `add_controlnet` by default.
            control_guidance_start, control_guidance_end: shares of the steps between which the ControlNet acts.
            num_images_per_prompt: N tiles for each picture.
            eta: of DDIM (arXiv 2010.02502); other schedulers ignore it.
            generator: source of all randomness. With a list of B * N generators every tile is what it would be alone.
            latents: initial noise of unit variance, shape (B * N, C, height / f, width / f).
            prompt_embeds: instead of `prompt`: shape (1 or B, L, D), text only; the image embedding is added.
            negative_prompt_embeds: instead of `negative_prompt`: shape (1, L, D).
            cross_attention_kwargs: passed on to the attention processors; "scale" is the strength of LoRA.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: whether to return an object; else the tuple (images, views).
            callback_on_step_end: called as callback(pipe, step, timestep, tensors) after every step. It may return
                other `latents`, set `pipe._guidance_scale`, and end the loop by `pipe._interrupt = True`.
            callback_on_step_end_tensor_inputs: of the tensors that the callback is given; "latents" is the only one.
            image_azimuths: of several pictures of each object, `image` being lists such as [[front, back], ...]:
                degrees relative to the first picture, counted as the views' azimuths are, such as [0, 180].

        Examples:

        Returns:
            [`Zero123PlusPipelineOutput`]: `images`, the tiles, and `views`, each tile's six views.

        Raises:
            TypeError: if an argument has a wrong type.
            ValueError: if an argument has a wrong value, or the result is not finite.
        """
        # 1. Read and check the arguments. What is not given comes from the checkpoint
        if control_image is not None and depth_image is not None:
            raise ValueError("`control_image` and `depth_image` are two names of one argument: give one.")
        control_image = depth_image if control_image is None else control_image
        height = self.default_size[0] if height is None else height
        width = self.default_size[1] if width is None else width
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        if controlnet_conditioning_scale is None:
            controlnet_conditioning_scale = self.config.controlnet_conditioning_scale
        control_scales = np.atleast_1d(controlnet_conditioning_scale).tolist()
        pictures, azimuths = self.load_objects(image, image_azimuths)
        self.check_background(pictures)
        pictures = [pad_to_square(picture) for picture in pictures]
        num_pictures = len(azimuths)  # R, of each object
        batch_size = len(pictures) // num_pictures
        self.check_size(height, width)
        check_number("num_inference_steps", num_inference_steps, 1, whole=True)
        check_number("num_images_per_prompt", num_images_per_prompt, 1, whole=True)
        check_number("reference_interval", reference_interval, 1, whole=True)
        check_number("guidance_scale", guidance_scale)
        check_number("guidance_rescale", guidance_rescale, 0, 1)
        check_interval("guidance", guidance_start, guidance_end)
        check_interval("control_guidance", control_guidance_start, control_guidance_end)
        check_number("eta", eta, 0, 1)
        for number in control_scales:
            check_number("controlnet_conditioning_scale", number)
        num_tiles, factor = batch_size * num_images_per_prompt, self.vae_scale_factor
        shape = num_tiles, self.unet.config.in_channels, height // factor, width // factor
        self.check_inputs(
            batch_size=batch_size,
            shape=shape,
            prompts=(prompt, negative_prompt),
            embeds=(prompt_embeds, negative_prompt_embeds),
            generator=generator,
            latents=latents,
            control_image=control_image,
            control_scales=control_scales,
            output_type=output_type,
        )
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"`callback_on_step_end_tensor_inputs` names {unknown}, but can name `latents` alone.")
        check_scheduler(self.scheduler)
        install_reference_attention(self.unet)
        if (height, width) != self.default_size:
            logger.warning(
                f"The tile has {height} x {width} pixels (height x width), but the checkpoint was trained at"
                f" {self.default_size[0]} x {self.default_size[1]}: views of another size are usually wrong."
            )
        if self.scheduler.config.get("timestep_spacing", "trailing") != "trailing":
            logger.warning(
                "The scheduler's timestep_spacing is not 'trailing', which Zero123++ is used with: pipe.scheduler ="
                " type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing='trailing')"
            )
        device = self._execution_device
        scheduler = copy_scheduler(self.scheduler, num_inference_steps)
        num_steps = len(scheduler.timesteps)
        guidance = Guidance(guidance_rescale, guidance_start, guidance_end)
        self._guidance_scale, self._num_timesteps, self._interrupt = guidance_scale, num_steps, False
        self._cross_attention_kwargs, self._running_scheduler = cross_attention_kwargs, scheduler
        num_negatives = int(guidance_scale > 1)  # one object without a picture serves all tiles

        def is_guided(step: int) -> bool:
            return bool(num_negatives) and self.do_classifier_free_guidance and guidance.is_active(step / num_steps)

        # 2. Encode the prompts and mix in the global condition; the negative prompt stays plain
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            device,
            do_classifier_free_guidance=num_negatives > 0,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
        )
        length = prompt_embeds.shape[1]
        ramp = self.config.ramping_coefficients or [i / length for i in range(1, length + 1)]
        ramp = torch.tensor(ramp, device=device, dtype=self.unet.dtype)
        image_embeds = self.encode_image(pictures[::num_pictures], device)
        image_embeds = image_embeds.repeat_interleave(num_images_per_prompt, 0)
        prompt_embeds = prompt_embeds.repeat_interleave(num_tiles // len(prompt_embeds), 0)
        embeds = mix_image_embeds(prompt_embeds, image_embeds, ramp)  # (B * N, L, D)
        if num_negatives:
            embeds = torch.cat([negative_prompt_embeds, embeds])
            image_embeds = torch.cat([torch.zeros_like(image_embeds[:1]), image_embeds])
        # The first picture has the tile's text, and further ones their azimuth in its place
        others = [self.encode_prompt(str(azimuth), device)[0] for azimuth in azimuths[1:]]
        others = [mix_image_embeds(other, image_embeds, ramp) for other in others]
        embeds = torch.stack([embeds, *others], dim=1)  # (M + B * N, R, L, D)

        # 3. Encode the local condition. The negative reference is an empty picture and the same for every tile, and
        # so is its noise: it comes from a seed of its own, so that one pass serves a batch whose tiles must each be
        # what they would be alone
        pixels = preprocess(self.feature_extractor_vae, pictures).unflatten(0, (-1, num_pictures))
        reference_latents = self.prepare_reference_latents(pixels, num_images_per_prompt, device, generator)
        if num_negatives:
            negative_generator = torch.Generator().manual_seed(0)
            negative = self.prepare_reference_latents(torch.zeros_like(pixels[:1]), 1, device, negative_generator)
            reference_latents = torch.cat([negative, reference_latents])

        # 4. Prepare the initial noise and the control tiles
        latents = self.prepare_latents(shape, scheduler, device, generator, latents)
        accepted = inspect.signature(scheduler.step).parameters
        step_kwargs = {name: value for name, value in {"generator": generator, "eta": eta}.items() if name in accepted}
        if control_image is not None:
            several = hasattr(self.controlnet, "nets")
            control_tiles = [
                self.prepare_control_image(tiles, batch_size, num_images_per_prompt, height, width, device)
                for tiles in (control_image if several else [control_image])
            ]
            control_scales = control_scales * (len(control_tiles) // len(control_scales))

        # 5. Denoise. The references of all steps are drawn and noised before, so that nothing in the loop waits
        noise = self.draw_reference_noise(num_steps, (num_tiles, *reference_latents.shape[1:]), device, generator)
        if num_negatives:
            negative_noise = self.draw_noise((num_steps, 1, *reference_latents.shape[1:]), device, negative_generator)
            noise = torch.cat([negative_noise, noise], dim=1)
        # Floats, because integers would be another variant of a compiled UNet
        timesteps = scheduler.timesteps.to(device, torch.float32)
        noisy = noise_to_levels(reference_latents, noise, noise_levels(scheduler))  # (T, M + B * N, R, C, h', w')
        references = References(noisy, timesteps, num_negatives, reference_interval, is_guided)
        with self.progress_bar(total=num_steps) as progress_bar:
            for i, t in enumerate(scheduler.timesteps):
                if self.interrupt:
                    continue

                # 5.1 The reference of this step, which a pass for many steps writes
                guided = is_guided(i)
                text = embeds[0 if guided else num_negatives :]
                cache = references.at(i, functools.partial(self.write_reference, embeds=text))

                # 5.2 The tile attends to them
                model_input = scheduler.scale_model_input(latents.repeat(2 if guided else 1, 1, 1, 1), t)
                # The negative text is repeated for the whole negative half: (B * N or 2 B * N, L, D)
                text = torch.cat([text[:1, 0].expand(len(model_input) - len(text), -1, -1), text[:, 0]])
                residuals = {}
                if control_image is not None and control_guidance_start <= i / num_steps < control_guidance_end:
                    residuals = self.control(model_input, timesteps[i], text, control_tiles, control_scales)
                prediction = self.predict(cache, model_input, timesteps[i], text, residuals)

                # 5.3 Guide and step
                prediction = guidance(prediction, self.guidance_scale) if guided else prediction
                latents = scheduler.step(prediction, t, latents, **step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    returned = callback_on_step_end(self, i, t, {"latents": latents})
                    latents = (returned or {}).get("latents", latents)
                progress_bar.update()

        # 6. Decode. What is not finite would become black pictures
        latents = result = unscale_latents(latents)
        if output_type != "latent":
            latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
            result = unscale_image(self.vae.decode(latents, return_dict=False)[0])
        if not torch.isfinite(result).all():
            raise ValueError(
                f"The result is not finite: the UNet in {self.unet.dtype} or the VAE in {self.vae.dtype} overflowed,"
                " or a callback or LoRA broke the latents. Load the pipeline with dtype=torch.bfloat16 or"
                " torch.float32."
            )
        images, views = result, None
        if output_type != "latent":
            images = self.image_processor.postprocess(result, output_type=output_type)
            views = split_views(images)
        self.maybe_free_model_hooks()
        return Zero123PlusPipelineOutput(images=images, views=views) if return_dict else (images, views)
