# Copyright 2026 The Zero123++ pipeline contributors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Zero123++ (https://arxiv.org/abs/2310.15110): six consistent views of an object from one picture of it.

This file is a `diffusers` custom pipeline and needs no other file of its repository: diffusers cannot load the files
that a pipeline imports where the repository's name has a dot, as those of the public checkpoints have. It adds to
stock components what is specific to Zero123++: the scaling of the target space, the cameras, scaled reference
attention, and the mixing of the CLIP image embedding into the prompt.
"""

import contextlib
import copy
import functools
import inspect
import io
import itertools
import json
import math
import numbers
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageOps
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, ControlNetModel, DiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.models.unets import unet_2d_condition
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.schedulers import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput, logging, replace_example_docstring, scale_lora_layers, unscale_lora_layers
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

try:
    from diffusers.models.attention_dispatch import dispatch_attention_fn
except ImportError:  # diffusers before 0.35 has one attention backend

    def dispatch_attention_fn(query, key, value, attn_mask=None, backend=None):
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask).transpose(1, 2)


logger = logging.get_logger(__name__)

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers import DiffusionPipeline, EulerAncestralDiscreteScheduler
        >>> from PIL import Image

        >>> pipe = DiffusionPipeline.from_pretrained(
        ...     "sudo-ai/zero123plus-v1.2",
        ...     custom_pipeline="path/to/this/repository",
        ...     trust_remote_code=True,
        ...     dtype=torch.float16,
        ... ).to("cuda")
        >>> pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(
        ...     pipe.scheduler.config, timestep_spacing="trailing"
        ... )
        >>> result = pipe(Image.open("object.png"), num_inference_steps=28, generator=torch.Generator().manual_seed(0))
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

# What the references of many steps may take of memory, if a call does not say it. With the first a whole tile of the
# public checkpoints fits a card of 12 GB; the second is for pipelines that are offloaded to save memory.
REFERENCE_BYTES, OFFLOADED_REFERENCE_BYTES = 6 * 2**30, 2**30
# A pass that writes takes about 1.5 times the memory of what it writes (65 MiB beside 44 of keys and values a sample)
REFERENCE_PASS_FACTOR = 2.5

# The tile that is denoised is scaled and shifted so that its latents are centred and have about unit variance. The
# constants are those of the published pipeline and belong to its weights.
IMAGE_MEAN, IMAGE_STD = 0.5, 0.8  # of the processor of reference pictures
IMAGE_SCALE = IMAGE_MEAN / IMAGE_STD  # the tile, in [-1, 1], is scaled alike
LATENT_SHIFT = 0.22
LATENT_SCALE = 0.75

# The schedulers whose results agree with Euler's, all of diffusers' `KarrasDiffusionSchedulers`, and LCM's for few
# steps, which places its time steps itself. Left out are DPMSolverSDEScheduler, which draws its noise from a generator
# of its own, and EDMEulerScheduler, whose model input is scaled for networks of another kind.
SCHEDULERS = {
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
}


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
    2.4 of the paper).

    Args:
        prompt_embeds: encoded prompt T of shape (B, L, D).
        image_embeds: CLIP image embedding I of shape (B, D).
        ramp: weights w of shape (L,).

    Returns:
        Shape (B, L, D).
    """
    return prompt_embeds + ramp[:, None] * image_embeds[:, None]


@dataclass
class Guidance:
    """Classifier-free guidance during a part of the steps.

    Args:
        scale: weight of the difference between the conditional and the negative prediction. Up to 1 there is no
            guidance.
        rescale: share of the rescaled prediction (equation 16 of arXiv 2305.08891), in [0, 1].
        start: share of the steps after which guidance begins (arXiv 2404.07724).
        end: share of the steps after which guidance ends.
    """

    scale: float
    rescale: float = 0.0
    start: float = 0.0
    end: float = 1.0

    def is_active(self, progress: float) -> bool:
        """Whether a step is guided when the share `progress` of the steps is done."""
        return self.scale > 1 and self.start <= progress < self.end

    def __call__(self, prediction: torch.Tensor) -> torch.Tensor:
        """Guides a prediction of shape (2 B, ...), the negative half first; returns shape (B, ...)."""
        negative, positive = prediction.chunk(2)
        guided = negative + self.scale * (positive - negative)
        return rescale_noise_cfg(guided, positive, self.rescale) if self.rescale > 0 else guided


# ---- Schedulers ----


def check_scheduler(scheduler, num_inference_steps: int):
    """Checks that a scheduler is one of `SCHEDULERS`.

    Raises:
        ValueError: if it is another, is configured for flow matching, or needs more steps.
    """
    name = type(scheduler).__name__
    remedy = (
        "set another, such as `pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config,"
        " timestep_spacing='trailing')`"
    )
    if not SCHEDULERS & {base.__name__ for base in type(scheduler).__mro__}:
        raise ValueError(
            f"The scheduler is a {name}, which does not work with Zero123++ ({sorted(SCHEDULERS)}): {remedy}."
        )
    if scheduler.config.get("use_flow_sigmas") or scheduler.config.get("prediction_type") == "flow_prediction":
        raise ValueError(f"The {name} is configured for flow matching, which Zero123++ is not trained for: {remedy}.")
    if name == "PNDMScheduler" and num_inference_steps < 4:
        raise ValueError(
            f"`num_inference_steps` is {num_inference_steps}, but PNDMScheduler needs at least 4: give more, or"
            f" {remedy}."
        )


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
        scheduler: with its time steps set.
    """
    count = len(scheduler.timesteps)
    if not hasattr(scheduler, "sigmas"):  # DDIM, DDPM, PNDM
        signal = scheduler.alphas_cumprod[scheduler.timesteps]
        return ((1 - signal) / signal).sqrt()
    levels = scheduler.sigmas[:count].clone()
    if hasattr(scheduler, "sigmas_interpol"):  # KDPM2's second evaluation of each step lies between two levels
        first = 0 if hasattr(scheduler, "sigmas_down") else 1  # where the ancestral one and the other have them
        levels[1::2] = scheduler.sigmas_interpol[first : count - 1 + first : 2]
    return levels


def noise_to_levels(latents: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Brings clean latents x to the noise levels s of model inputs: (x + s n) / sqrt(s^2 + 1), which has the variance
    that every scheduler gives its model input.

    Args:
        latents: shape (B, C, h, w).
        noise: unit noise n, shape (T, B, C, h, w).
        levels: shape (T,).

    Returns:
        Shape (T, B, C, h, w), of the dtype of the latents.
    """
    levels = levels.to(latents.device, torch.float32)[:, None, None, None, None]
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

    @classmethod
    def named(cls, preset: str, source: str | Path) -> "Cameras":
        """The cameras of a key of `CAMERAS`.

        Args:
            preset: as read from a file or an option.
            source: what names it, for the message.

        Raises:
            ValueError: if there is no such preset.
        """
        if preset not in list(CAMERAS):  # a list, because what a file says may not be hashable
            raise ValueError(
                f"{source} says that it has the cameras {preset!r}, but there are only {', '.join(CAMERAS)}."
            )
        return CAMERAS[preset]

    @staticmethod
    def preset_of(name: str | Path) -> str | None:
        """The key in `CAMERAS` of a public checkpoint or ControlNet (zero123plus-v1.1, controlnet-zp11-depth-v1), by
        its Hub name, a folder of its name or the Hub's cache; None for another. Folders above it say nothing.
        """
        path = Path(name)
        path = path.resolve() if path.is_dir() else path
        last = path.parts[-3].split("--")[-1] if path.parts[-2:-1] == ("snapshots",) else path.name
        pattern = r"(?:zero123plus[-_]v?|controlnet-zp)(1[._]?[12])(?:-(?:depth|normal-gen)-v1)?"
        found = re.fullmatch(pattern, last.lower())
        return f"v1.{found[1][-1]}" if found else None

    @classmethod
    def from_config(cls, config: dict, assumed: str | None = None) -> "Cameras | None":
        """The cameras that a pipeline's configuration says, in `view_*` or by the name that it was loaded from.

        Args:
            config: of a pipeline.
            assumed: the key of `CAMERAS` that fills in what the configuration does not tell; without one the result is
                then None.
        """
        given = [config.get(f"view_{name}") for name in ("azimuths", "elevations", "fov")]
        preset = cls.preset_of(str(config.get("_name_or_path"))) or assumed
        if preset is None and None in given[1:]:
            return None
        default = CAMERAS[preset or "v1.2"]
        azimuths, elevations, fov = given
        return cls(
            tuple(azimuths or default.azimuths),
            tuple(elevations or default.elevations),
            default.fov if fov is None else fov,
        )

    @property
    def radius(self) -> float:
        """The distance at which a sphere of radius `RADIUS` just fills a view in the plane of its centre."""
        return RADIUS / math.tan(math.radians(self.fov) / 2)

    def agree(self, other: "Cameras") -> bool:
        """Whether others are the same within a hundredth of a degree, to which model cards round."""
        pairs = zip((*self.azimuths, *self.elevations, self.fov), (*other.azimuths, *other.elevations, other.fov))
        return all(abs(a - b) < 0.01 for a, b in pairs)

    def poses(self, radius: float | None = None) -> np.ndarray:
        """Camera-to-world matrices of the cameras, which look at the origin.

        Args:
            radius: distance from the origin, by default `self.radius`.

        Returns:
            Shape (N, 4, 4). OpenGL convention: the camera's +X is right, +Y up, and it looks along -Z.

        Raises:
            ValueError: if the radius is not positive and finite.
        """
        radius = self.radius if radius is None else radius
        if not 0 < radius < math.inf:
            raise ValueError(f"`radius` is {radius}, but must be positive and finite.")
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
        if min(height, width) < 1:
            raise ValueError(f"`height` and `width` are {height} and {width}, but must be at least 1 pixel.")
        focal = height / 2 / math.tan(math.radians(self.fov) / 2)
        return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


RADIUS = 0.5  # of the sphere that the object fills, around the world's origin; +Z is up
AZIMUTHS = (30.0, 90.0, 150.0, 210.0, 270.0, 330.0)  # degrees
# By version of the public checkpoints (their model cards)
CAMERAS = {
    "v1.1": Cameras(AZIMUTHS, (30.0, -20.0) * 3, math.degrees(2 * math.atan(16 / 35))),
    "v1.2": Cameras(AZIMUTHS, (20.0, -10.0) * 3, 30.0),
}


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
    """

    def __init__(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]] = ()):
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
        """Stores the key and value of the layer that runs."""
        self.place.next = ReferenceEntry(key, value)
        self.place = self.place.next

    def read(self, layer: str, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the key and value of the layer that runs for a batch of `batch_size`.

        There may be fewer entries than that. Under classifier-free guidance the first entry, the negative reference,
        is then repeated for the whole negative half, so that (1 + B) entries serve 2 B samples.

        Raises:
            RuntimeError: if the layer was not written.
        """
        self.place = self.place.next
        if self.place is None:
            raise RuntimeError("No reference was written for this layer: call the UNet with reference_mode='write'.")
        key, value = self.place.key, self.place.value
        missing = batch_size - key.shape[0]
        if missing:
            key, value = (torch.cat([entry[:1].expand(missing, -1, -1, -1), entry]) for entry in (key, value))
        return key, value

    def part(self, samples: slice) -> "ReferenceCache":
        """A cache of some of the samples, which shares their memory."""
        return ReferenceCache((key[samples], value[samples]) for key, value in self)


class References:
    """The references of all steps of a call. A reference depends on its step's noise level and noise, but not on the
    tile, so that one pass writes the keys and values of many steps. On a GPU this saves most of the time of one tile,
    in which the host launches small kernels.

    Args:
        noisy: references of each step, the negative ones first, shape (T, M + B, C, h, w).
        timesteps: of the steps, shape (T,).
        num_negatives: M; steps without guidance leave these out.
        interval: steps for which a reference is used.
        is_guided: whether a step, by its number, is guided.
        max_steps: steps of a pass, from the number of samples a step.
    """

    def __init__(self, noisy, timesteps, num_negatives: int, interval: int, is_guided: Callable, max_steps: Callable):
        self.noisy, self.timesteps, self.num_negatives, self.interval = noisy, timesteps, num_negatives, interval
        self.is_guided, self.max_steps = is_guided, max_steps
        self.current, self.ahead = None, {}  # the cache that is read, and those of steps to come
        self.guided, self.count = None, 0  # of the passes that wrote them: whether guided, and how many steps

    def rewrite(self):
        """Drops what was written, because the text has changed."""
        self.guided, self.ahead = None, {}

    def at(self, step: int, write: Callable[[torch.Tensor, torch.Tensor], ReferenceCache]) -> ReferenceCache:
        """The reference that a step reads.

        Args:
            step: its number. Steps are asked for in their order.
            write: runs a pass; takes references of shape (K N, C, h, w) and time steps of shape (K N,), of K steps of
                N samples.
        """
        guided = self.is_guided(step)
        if guided != self.guided or (step % self.interval == 0 and step not in self.ahead):
            left = [step, *(i for i in range(step + 1, len(self.timesteps)) if i % self.interval == 0)]
            left = list(itertools.takewhile(lambda i: self.is_guided(i) == guided, left))
            noisy = self.noisy[:, 0 if guided else self.num_negatives :]
            samples = noisy.shape[1]
            if guided != self.guided:  # passes of one size, because each size is compiled by itself
                self.count = math.ceil(len(left) / math.ceil(len(left) / self.max_steps(samples)))
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
        fused: whether to project with the joint matrices that `unet.fuse_qkv_projections()` made.

    When called, it takes besides the arguments of every attention processor of diffusers:
        reference ([`ReferenceCache`], optional): passed to the UNet in `cross_attention_kwargs`.
        reference_mode: "write" or "read". It is an argument rather than a state of the cache, so that gradient
            checkpointing recomputes a layer in the mode that it ran in.
    """

    _attention_backend = None  # written by `set_attention_backend`

    def __init__(self, layer: str, fused: bool = False):
        self.layer, self.fused = layer, fused

    def project(self, attn, hidden_states: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the query of `hidden_states`, and the key and value of `context`, each of shape (B, N, C)."""
        if not self.fused:
            return attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        if context is hidden_states:
            return attn.to_qkv(hidden_states).chunk(3, dim=-1)
        return attn.to_q(hidden_states), *attn.to_kv(context).chunk(2, dim=-1)

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
            key, value = reference.read(self.layer, batch_size)
        else:
            query, key, value = (
                states.unflatten(-1, (attn.heads, -1)) for states in self.project(attn, hidden_states, context)
            )
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
STOCK_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0")


def install_reference_attention(unet: UNet2DConditionModel):
    """Makes sure that every self-attention layer of `unet` can attend to a reference.

    Stock processors are replaced, on cross-attention too, where ours reuse the text's keys and values. Processors
    that take `reference` and `reference_mode`, ours or the user's, are kept.

    Raises:
        ValueError: if a self-attention layer has another processor, which would ignore the reference, or if fused
            projections would ignore a LoRA.
    """
    processors = unet.attn_processors
    for name, processor in processors.items():
        if "reference" in inspect.signature(processor.__call__).parameters:
            continue
        if type(processor).__name__ in STOCK_PROCESSORS:
            fused = type(processor).__name__ == "FusedAttnProcessor2_0"
            processors[name] = ReferenceAttnProcessor(name.removesuffix(".processor"), fused)
        elif name.endswith("attn1.processor"):
            raise ValueError(
                f"The attention processor of {name} is {type(processor).__name__}, which ignores the reference"
                " picture. Undo what set it (for sliced or memory-efficient attention"
                " `pipe.unet.set_attn_processor(AttnProcessor2_0())`), or let its __call__ take `reference` and"
                " `reference_mode` as ReferenceAttnProcessor does."
            )
    if any(processors[name] is not processor for name, processor in unet.attn_processors.items()):
        unet.set_attn_processor(processors)
    for processor in processors.values():
        if getattr(processor, "fused", False) and hasattr(unet.get_submodule(processor.layer).to_q, "base_layer"):
            raise ValueError(
                f"{processor.layer} has a LoRA that its fused projections ignore: call"
                " `pipe.unet.unfuse_qkv_projections()`, or `pipe.fuse_lora()` and `pipe.unload_lora_weights()` before"
                " `pipe.unet.fuse_qkv_projections()`."
            )


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
        pictures: one PIL picture of any mode, an array of shape (H, W, 3 or 4), uint8 or float in [0, 1], a tensor of
            shape (3 or 4, H, W) in [0, 1], a batch of either, or a list of these.
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
        if pictures.ndim not in (3, 4) or pictures.shape[-3] not in (3, 4):
            shape = tuple(pictures.shape)
            raise ValueError(
                f"`{argument}` is a tensor of shape {shape}, but must be (3 or 4, H, W) or a batch of that."
            )
        if not pictures.is_floating_point():
            raise ValueError(
                f"`{argument}` is a tensor of {pictures.dtype}, but must be of floats in [0, 1]: divide by 255."
            )
        pictures = pictures.detach().movedim(-3, -1).float().cpu().numpy()
    elif not isinstance(pictures, np.ndarray):
        raise TypeError(
            f"`{argument}` is a {type(pictures).__name__}, but must be a PIL picture, a numpy array, a torch tensor or"
            " a list of these."
        )
    if pictures.ndim == 4:
        if not len(pictures):
            raise ValueError(f"`{argument}` is a batch of no pictures: give at least one.")
        return [picture for item in pictures for picture in load_pictures(item, argument)]
    if pictures.ndim != 3 or pictures.shape[-1] not in (3, 4):
        raise ValueError(
            f"`{argument}` is an array of shape {pictures.shape}, but must be (H, W, 3 or 4) or a batch of that."
        )
    if 0 in pictures.shape:
        raise ValueError(f"`{argument}` has shape {pictures.shape}: a picture without pixels.")
    if pictures.dtype != np.uint8:
        if not np.issubdtype(pictures.dtype, np.floating):
            raise ValueError(f"`{argument}` is an array of {pictures.dtype}, but must be uint8 or float in [0, 1].")
        if not (pictures.min() >= 0 and pictures.max() <= 1):  # also catches NaN
            raise ValueError(
                f"`{argument}` has values from {pictures.min():.4g} to {pictures.max():.4g}, but floats must be in"
                " [0, 1]: divide by 255, or map from [-1, 1], and remove NaN."
            )
        pictures = np.round(pictures * 255).astype(np.uint8)
    return [_load_pil(PIL.Image.fromarray(pictures), argument)]


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
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture).astype(np.float32)
        full = 1.0 if picture.mode == "F" else 65535.0  # PIL opens 16-bit files as "I" or "I;16"
        if not (values.min() >= 0 and values.max() <= full):
            raise ValueError(
                f"`{argument}` is a picture of mode {picture.mode!r} with values from {values.min():.4g} to"
                f" {values.max():.4g}, but they must be in [0, {full:.0f}]."
            )
        picture = PIL.Image.fromarray(np.round(values * (255 / full)).astype(np.uint8))
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


@dataclass
class _Call:
    """What the properties of the pipeline say about one call."""

    guidance: Guidance = field(default_factory=lambda: Guidance(1.0))
    scheduler: SchedulerMixin | None = None
    num_timesteps: int = 0
    cross_attention_kwargs: dict | None = None
    interrupt: bool = False
    running: bool = False
    may_guide: bool = True


def embed_control_tiles(controlnet: torch.nn.Module, tiles: list) -> tuple[torch.nn.Module, list]:
    """Embeds a control tile once for all steps of a call. [`ControlNetModel`] embeds it in every step, which at the
    mini's size is most of its work (docs/speed.md).

    Args:
        controlnet: of the pipeline.
        tiles: control tiles of shape (B, 3, H, W), one for each ControlNet.

    Returns:
        A copy of the ControlNet, which shares its weights and takes embedded tiles, and the tile embedded, of shape
        (B, C, h, w) with the channels of the UNet's first level. Because it is a copy, threads can share the original.
        Several ControlNets, one that an offloading hook wraps or that is compiled, and one that takes BGR are returned
        as they are, with their tiles: a copy would not do what they do.
    """
    wrapped = "forward" in vars(controlnet) or is_compiled(controlnet)
    if wrapped or type(controlnet) is not ControlNetModel:
        return controlnet, tiles
    if controlnet.config.controlnet_conditioning_channel_order != "rgb":
        return controlnet, tiles
    embedded = copy.copy(controlnet)
    embedded._modules = {**controlnet._modules, "controlnet_cond_embedding": torch.nn.Identity()}
    return embedded, [controlnet.controlnet_cond_embedding(pixels) for pixels in tiles]


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether `torch.compile(module)` or `module.compile()` compiled it."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def is_whole(number) -> bool:
    """Whether something is a whole number, of Python or of numpy."""
    return isinstance(number, numbers.Integral) and not isinstance(number, bool)


def is_finite(number) -> bool:
    """Whether something is a finite number, of whatever type."""
    try:
        return math.isfinite(number)
    except TypeError:
        return False


def update(tensors: dict[str, torch.Tensor], returned: dict | None) -> bool:
    """Puts what a callback returned in the place of the loop's tensors, and ignores what the loop does not have.

    Args:
        tensors: of the loop, by name; changed in place.
        returned: by the callback.

    Returns:
        Whether the text changed, so that its keys and values must be written again.

    Raises:
        ValueError: if a tensor has another shape than the one that it replaces.
    """
    changed = {name: value for name, value in (returned or {}).items() if value is not tensors.get(name, value)}
    # `SDCFGCutoffCallback` returns the last of the embeddings, which is the conditional one elsewhere. Here all are
    if len(changed.get("prompt_embeds", ())) < len(tensors["prompt_embeds"]):
        changed.pop("prompt_embeds", None)
    for name, value in changed.items():
        if value.shape != tensors[name].shape:
            raise ValueError(
                f"The callback returned `{name}` of shape {tuple(value.shape)}, but it must keep the shape"
                f" {tuple(tensors[name].shape)}."
            )
    tensors |= changed
    return bool({"prompt_embeds", "negative_prompt_embeds"} & set(changed))


class Zero123PlusPipeline(DiffusionPipeline, StableDiffusionMixin, StableDiffusionLoraLoaderMixin):
    """Turns one picture of an object into six consistent views of it, a tile of 3 rows and 2 columns.

    Args:
        vae: encodes the reference picture and decodes the tile.
        text_encoder: encodes the prompt.
        tokenizer: of the text encoder.
        unet: a stock UNet. Reference attention is installed as attention processors, which compute plain attention in
            other pipelines.
        scheduler: one of `SCHEDULERS`; its `timestep_spacing` should be "trailing".
        vision_encoder: gives the global condition.
        feature_extractor_clip: preprocessing of the vision encoder.
        feature_extractor_vae: preprocessing of the reference picture (mean 0.5, std 0.8).
        safety_checker: must be None; public checkpoints list it as null.
        controlnet: optional; it sees a control tile (depth, or the RGB tile to make normals of).
        ramping_coefficients: weight of the CLIP embedding for each prompt token; i / L for i = 1..L by default.
        view_azimuths: degrees of the six views, relative to the input view.
        view_elevations: degrees of the six views above the horizon.
        view_fov: vertical field of view in degrees. Cameras that are not given are those of the public checkpoint
            whose name the checkpoint has, and otherwise, with a warning, those of v1.2 (see `CAMERAS`).
        default_num_inference_steps: number of steps of a call that names none.
        default_guidance_scale: guidance scale of a call that names none.
        controlnet_conditioning_scale: strength of the ControlNet in a call that names none.

    To make a pipeline of another's components, pass `**pipe.parameters` beside `**pipe.components`.

    Raises:
        ValueError: if `ramping_coefficients` are not one per token, the cameras not six, or a safety checker is given.
    """

    model_cpu_offload_seq = "text_encoder->vision_encoder->unet->vae"
    _optional_components = ["safety_checker", "controlnet"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]
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
        view_azimuths: list[float] | None = None,
        view_elevations: list[float] | None = None,
        view_fov: float | None = None,
        default_num_inference_steps: int = 28,
        default_guidance_scale: float = 4.0,
        controlnet_conditioning_scale: float = 1.0,
    ):
        super().__init__()
        # `DiffusionPipeline.from_pipe` passes what the configuration has in place of these two components
        safety_checker, controlnet = (None if one == (None, None) else one for one in (safety_checker, controlnet))
        if safety_checker is not None:
            raise ValueError("`safety_checker` is given, but this pipeline has none: pass None.")
        if isinstance(controlnet, tuple):
            raise ValueError(f"`controlnet` is {controlnet}, but must be a model: pass `controlnet=pipe.controlnet`.")
        for name, values in (("view_azimuths", view_azimuths), ("view_elevations", view_elevations)):
            if values is not None and len(values) != ROWS * COLUMNS:
                raise ValueError(f"`{name}` has {len(values)} values, but a tile has {ROWS * COLUMNS} views.")
        if text_encoder is not None:  # a pipeline without it takes `prompt_embeds`
            length = text_encoder.config.max_position_embeddings
            if ramping_coefficients is None:
                logger.warning(
                    "`ramping_coefficients` are not given, and i / L is taken. What a checkpoint says of itself is not"
                    " among its components: to make a pipeline of another's, pass `**pipe.parameters` too."
                )
                ramping_coefficients = [i / length for i in range(1, length + 1)]
            if len(ramping_coefficients) != length:
                raise ValueError(
                    f"`ramping_coefficients` has {len(ramping_coefficients)} values, but the text encoder gives"
                    f" {length} tokens: give one per token, or None for i / L."
                )
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
            view_azimuths=view_azimuths and [float(angle) for angle in view_azimuths],
            view_elevations=view_elevations and [float(angle) for angle in view_elevations],
            view_fov=view_fov,
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
            controlnet_conditioning_scale=controlnet_conditioning_scale,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.warned = set()  # "cameras", "background", "slicing": what one warning was enough for
        self._calls = {}  # by thread: the call that runs in it, or ran in it last
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
        own `custom_pipeline`. Cameras that are known are written, whatever the checkpoint was called.

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
        if cameras := Cameras.from_config(self.config):
            self.register_to_config(
                view_azimuths=list(cameras.azimuths),
                view_elevations=list(cameras.elevations),
                view_fov=cameras.fov,
            )
        super().save_pretrained(save_directory, **kwargs)

    def add_controlnet(
        self, controlnet: ControlNetModel | None = None, conditioning_scale: float = 1.0
    ) -> ControlNetModel:
        """Sets the ControlNet, in place of any other, as the published pipeline does. It is brought to the dtype and
        device of the UNet.

        Args:
            controlnet: a copy of the UNet's encoder, to be trained, by default.
            conditioning_scale: used by a call whose `controlnet_conditioning_scale` is None.

        Returns:
            The ControlNet.
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
    def cameras(self) -> Cameras:
        """The cameras of the six views. One warning says when nothing tells them and those of v1.2 are assumed."""
        if Cameras.from_config(self.config) is None:
            self.warn_once(
                "cameras",
                "The checkpoint does not say its cameras, and those of v1.2 are assumed. For v1.1 pass"
                " `view_elevations=[30, -20] * 3, view_fov=49.134` to `from_pretrained`, or `--cameras v1.1` to a"
                " command.",
            )
        return Cameras.from_config(self.config, assumed="v1.2")

    def camera_poses(self, radius: float | None = None) -> np.ndarray:
        """Camera-to-world matrices of the six views, shape (6, 4, 4): see [`Cameras.poses`]. The object is at the
        origin, and the input view at azimuth 0, on +X (its elevation is unknown).
        """
        return self.cameras.poses(radius)

    def camera_intrinsics(self, height: int, width: int) -> np.ndarray:
        """Pinhole intrinsics of one view of `height` x `width` pixels, shape (3, 3), in pixels."""
        return self.cameras.intrinsics(height, width)

    # The state of the call that runs in this thread, under the names that diffusers' callbacks use

    @property
    def _call(self) -> _Call:
        return self._calls.setdefault(threading.get_ident(), _Call())

    @contextlib.contextmanager
    def _running(self, call: _Call):
        call.running = True
        try:
            yield
        finally:
            call.running = False

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the running call. A callback sets `pipe._guidance_scale`."""
        return self._call.guidance.scale

    @guidance_scale.setter
    def _guidance_scale(self, scale: float):
        if scale > 1 and not self._call.may_guide:  # there is no negative side
            raise ValueError(f"A callback set the guidance scale to {scale} in a call that began without guidance.")
        self._call.guidance.scale = scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call is guided at all."""
        return self.guidance_scale > 1

    @property
    def running_scheduler(self) -> SchedulerMixin | None:
        """The running call's own copy of the scheduler. In a callback it stands at the next step."""
        return self._call.scheduler

    @property
    def num_timesteps(self) -> int:
        """The number of evaluations of the running call; some solvers take more than one a step."""
        return self._call.num_timesteps

    @property
    def cross_attention_kwargs(self) -> dict | None:
        """The `cross_attention_kwargs` of the running call."""
        return self._call.cross_attention_kwargs

    @property
    def interrupt(self) -> bool:
        """Whether the running call is to stop denoising. A callback sets `pipe._interrupt = True`."""
        return self._call.interrupt

    @interrupt.setter
    def _interrupt(self, value: bool):
        # In a callback this is the callback's own call; a thread without a call ends all that run
        calls = [self._call] if self._call.running else list(self._calls.values())
        for call in calls:
            call.interrupt = value

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
        """Checks that a tile's views fit the VAE, and its latents every level of the UNet.

        Raises:
            TypeError, ValueError: naming the argument, its value and, for a size that does not fit, the nearest.
        """
        levels = 2 ** (len(self.unet.config.block_out_channels) - 1)
        for name, value, views in (("height", height, ROWS), ("width", width, COLUMNS)):
            step = math.lcm(views * self.vae_scale_factor, self.vae_scale_factor * levels)
            if not is_whole(value):
                raise TypeError(f"`{name}` is {value!r}, but must be a whole number of pixels.")
            if value < step or value % step:
                low = max(step, value // step * step)
                raise ValueError(
                    f"`{name}` is {value}, but must be a multiple of {step}, so that {views} views fit the VAE and the"
                    f" UNet: the nearest are {low} and {low + step}."
                )

    def check_numbers(self, counts: dict, numbers: dict, shares: dict, intervals: dict):
        """Checks the numbers of a call.

        Args:
            counts: by argument, whole numbers of at least 1.
            numbers: by argument, lists of numbers that must be finite.
            shares: by argument, numbers in [0, 1].
            intervals: by argument less its `_start` or `_end`, start and end as shares of the steps.

        Raises:
            ValueError: naming the argument, its value and what it must be.
        """
        for name, value in counts.items():
            if not is_whole(value) or value < 1:
                raise ValueError(f"`{name}` is {value!r}, but must be a whole number of at least 1.")
        for name, values in numbers.items():
            for number in values:
                if not is_finite(number):
                    raise ValueError(f"`{name}` is or has {number!r}, but must be a finite number.")
        for name, number in shares.items():
            if not (is_finite(number) and 0 <= number <= 1):
                raise ValueError(f"`{name}` is {number!r}, but must be a number from 0 to 1.")
        for name, (start, end) in intervals.items():
            if not (is_finite(start) and is_finite(end) and 0 <= start < end <= 1):
                raise ValueError(
                    f"`{name}_start` and `{name}_end` are {start!r} and {end!r}, but must rise within [0, 1]."
                )

    def check_batch(
        self, batch_size: int, prompts: dict, embeds: dict, generator, latents, latents_shape: tuple[int, ...]
    ):
        """Checks that what is given for each picture, or each tile, fits their number.

        Args:
            batch_size: number of pictures.
            prompts: by argument, texts.
            embeds: by argument, encoded texts in place of the prompt of the same order.
            generator: of the call.
            latents: of the call.
            latents_shape: what they must be, (B, C, h, w).

        Raises:
            TypeError, ValueError: naming the argument, its value and what to do.
        """
        dim = self.unet.config.cross_attention_dim
        for (name, text), (name_of_embeds, encoded) in zip(prompts.items(), embeds.items()):
            if not isinstance(text, (str, list, type(None))):
                raise TypeError(f"`{name}` is a {type(text).__name__}, but must be a string or a list of strings.")
            if isinstance(text, list) and len(text) != batch_size:
                raise ValueError(f"`{name}` has {len(text)} entries for {batch_size} pictures: give one, or one each.")
            if encoded is None:
                if self.text_encoder is None:
                    raise ValueError(f"The pipeline has no text encoder: give `{name_of_embeds}`.")
                continue
            if text is not None and (text or name != "prompt"):  # whose default is an empty text
                raise ValueError(f"Both `{name}` and `{name_of_embeds}` are given: give one.")
            length = len(self.config.ramping_coefficients or range(encoded.shape[1]))
            if tuple(encoded.shape) not in ((1, length, dim), (batch_size, length, dim)):
                raise ValueError(
                    f"`{name_of_embeds}` has shape {tuple(encoded.shape)}, but must be (1 or {batch_size}, {length},"
                    f" {dim}) for {batch_size} pictures."
                )
        for item in generator if isinstance(generator, list) else [generator]:
            if not isinstance(item, (torch.Generator, type(None))):
                raise TypeError(
                    f"`generator` is or has {item!r}, but must be of torch.Generator:"
                    " torch.Generator().manual_seed(...)."
                )
        if isinstance(generator, list) and len(generator) != latents_shape[0]:
            raise ValueError(
                f"`generator` has {len(generator)} entries for {latents_shape[0]} tiles: give one, or one each."
            )
        if latents is not None and tuple(latents.shape) != latents_shape:
            raise ValueError(
                f"`latents` has shape {tuple(latents.shape)}, but must be {latents_shape} for these arguments."
            )

    def check_background(self, pictures: list[PIL.Image.Image]):
        """Warns, once, of an RGB picture that does not stand on the grey of the training data."""
        for picture in pictures:
            colour, alike = border_of(np.asarray(picture))
            if alike < 0.5 or not is_grey(colour):
                what = "has many colours" if alike < PLAIN_SHARE else f"has the colour {colour.astype(int).tolist()}"
                self.warn_once(
                    "background",
                    f"The border of `image` {what}, but Zero123++ expects the object alone, on transparency or grey"
                    f" {GREY}. Views of another background are usually wrong. Cut the object out, with rembg or"
                    " `zero123plus.pictures.prepare(picture)`. Open a picture that is cut out with"
                    " `PIL.Image.open(path)`: `diffusers.utils.load_image` makes its transparency black.",
                )

    def check_control(self, control_image, scales: list[float]):
        """Checks that the control tiles and their scales fit the ControlNets.

        Raises:
            ValueError: naming the argument, its value and what to do.
        """
        if (control_image is None) != (self.controlnet is None):
            have, lack = (
                ("ControlNet", "`control_image`") if control_image is None else ("`control_image`", "ControlNet")
            )
            raise ValueError(
                f"There is a {have} but no {lack}: give both, or neither (`pipe.add_controlnet(...)`,"
                " `pipe.controlnet = None`)."
            )
        nets = getattr(self.controlnet, "nets", None)  # of a MultiControlNetModel
        if nets is not None and (not isinstance(control_image, list) or len(control_image) != len(nets)):
            raise ValueError(f"`control_image` must be a list of {len(nets)}, one for each ControlNet.")
        count = 1 if nets is None else len(nets)
        if len(scales) not in (1, count):
            raise ValueError(
                f"`controlnet_conditioning_scale` has {len(scales)} values for {count} ControlNets: give one number"
                " for all, or one each."
            )
        for net in nets or ([] if self.controlnet is None else [self.controlnet]):
            factor = 2 ** (len(net.config.conditioning_embedding_out_channels) - 1)
            if factor != self.vae_scale_factor:
                raise ValueError(
                    f"The ControlNet shrinks `control_image` by {factor}, but the VAE by {self.vae_scale_factor}: make"
                    " one for this checkpoint with `pipe.add_controlnet()`."
                )

    # Encoding and preparing

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = False,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encodes prompts to the text encoder's last hidden states. No image embedding is mixed in.

        Args:
            prompt: one string or B; tokens beyond L are cut off.
            device: to encode on.
            num_images_per_prompt: N, how often each is repeated.
            do_classifier_free_guidance: whether to encode the negative prompts too.
            negative_prompt: one string for all or B; empty by default.
            prompt_embeds: instead of `prompt`, shape (B, L, D).
            negative_prompt_embeds: instead of `negative_prompt`, shape (1 or B, L, D).
            lora_scale: strength of the text encoder's LoRA layers, 1 by default.

        Returns:
            Both of shape (B * N, L, D); the second is None without classifier-free guidance.
        """

        def encode(texts: list[str]) -> torch.Tensor:
            length = self.text_encoder.config.max_position_embeddings
            options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
            return self.text_encoder(self.tokenizer(texts, **options).input_ids.to(device))[0]

        if lora_scale is not None and self.text_encoder is not None:
            scale_lora_layers(self.text_encoder, lora_scale)
        if prompt_embeds is None:
            prompt_embeds = encode(prompt if isinstance(prompt, list) else [prompt or ""])
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negative_prompt_embeds = encode(
                negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""]
            )
        if lora_scale is not None and self.text_encoder is not None:
            unscale_lora_layers(self.text_encoder, lora_scale)

        dtype = prompt_embeds.dtype if self.unet is None else self.unet.dtype
        batch_size = max(len(embeds) for embeds in (prompt_embeds, negative_prompt_embeds) if embeds is not None)

        def repeat(embeds: torch.Tensor) -> torch.Tensor:
            embeds = embeds.to(device, dtype).repeat(batch_size // len(embeds), 1, 1)
            return embeds.repeat_interleave(num_images_per_prompt, 0)

        prompt_embeds = repeat(prompt_embeds)
        negative_prompt_embeds = repeat(negative_prompt_embeds) if do_classifier_free_guidance else None
        return prompt_embeds, negative_prompt_embeds

    def encode_image(self, pictures: list[PIL.Image.Image], device: torch.device) -> torch.Tensor:
        """CLIP embeddings of square RGB pictures, shape (B, D)."""
        pixels = preprocess(self.feature_extractor_clip, pictures)
        return self.vision_encoder(pixels.to(device, self.vision_encoder.dtype)).image_embeds.to(self.unet.dtype)

    def prepare_reference_latents(self, pixels: torch.Tensor, num_images: int, device, generator) -> torch.Tensor:
        """Samples the VAE's latents of reference pictures.

        The latents are raw: they are not multiplied by `vae.config.scaling_factor`, and so are about 5 times larger
        than those that the UNet denoises. This is the "5x" of scaled reference attention (section 2.2 of the paper).

        Args:
            pixels: shape (B, 3, H, W), after `feature_extractor_vae`.
            num_images: how many samples of each.
            device: to encode on.
            generator: source of the samples' noise.

        Returns:
            Shape (B * num_images, C, H / f, W / f).
        """
        posterior = self.vae.encode(pixels.to(device, self.vae.dtype)).latent_dist
        mean, std = (moment.repeat_interleave(num_images, 0) for moment in (posterior.mean, posterior.std))
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

    def max_reference_steps(self, shape: torch.Size, samples: int, max_bytes: int | None) -> int:
        """How many steps' references one pass may write.

        Args:
            shape: of references, (B, C, h, w).
            samples: of a step.
            max_bytes: of keys, values and the pass that writes them; None for the default.
        """
        if max_bytes is None:
            offloaded = any(hasattr(module, "_hf_hook") for module in (self.unet, self.vae))
            max_bytes = OFFLOADED_REFERENCE_BYTES if offloaded else REFERENCE_BYTES
        device = self._execution_device
        if device.type == "cuda":
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            max_bytes = min(max_bytes, (torch.cuda.mem_get_info(device)[0] + unused) // 2)
        levels, values = len(self.unet.config.block_out_channels), 0  # kept of a sample
        for name in self.unet.attn_processors:
            place = re.match(r"(down|up)_blocks\.(\d+)\..*attn1", name)
            if place or "mid_block" in name and "attn1" in name:
                level = (
                    levels - 1 if not place else int(place[2]) if place[1] == "down" else levels - 1 - int(place[2])
                )
                width = self.unet.get_submodule(name.removesuffix(".processor")).inner_dim
                values += 2 * width * math.prod(shape[2:]) // 4**level
        return max(1, int(max_bytes / (samples * REFERENCE_PASS_FACTOR * values * self.unet.dtype.itemsize)))

    def prepare_latents(self, shape, scheduler, device, generator, latents: torch.Tensor | None) -> torch.Tensor:
        """Returns initial noise of `shape` (B, C, h, w), or `latents`, times the scheduler's initial sigma."""
        if latents is None:
            latents = self.draw_noise(shape, device, generator)
        return latents.to(device, self.unet.dtype) * scheduler.init_noise_sigma

    def prepare_control_image(self, control_image, batch_size: int, num_images: int, height: int, width: int, device):
        """Brings control tiles to pixels in [-1, 1] of shape (B * num_images, 3, H, W). One tile serves a whole batch.
        A warning says when the background of a tile is not the grey that ControlNets are trained with.

        Raises:
            ValueError: if the number of tiles or their aspect ratio is wrong.
        """
        tiles = load_pictures(control_image, "control_image")
        if len(tiles) not in (1, batch_size):
            raise ValueError(
                f"`control_image` has {len(tiles)} tiles for {batch_size} pictures: give one, or one each."
            )
        for tile in tiles:
            if tile.width * height != tile.height * width:
                raise ValueError(
                    f"`control_image` is {tile.width} x {tile.height} pixels, but must have the aspect ratio of the"
                    f" tile, {width} x {height}: six views in 3 rows and 2 columns."
                )
        corners = [np.asarray(view)[np.ix_([0, -1], [0, -1])] for views in split_views(tiles) for view in views]
        colour = np.median(corners, axis=(0, 1, 2))
        if np.abs(colour - GREY).max() > BACKGROUND_TOLERANCE:
            logger.warning(
                f"The views of `control_image` have corners of the colour {colour.round().astype(int).tolist()}, but"
                f" ControlNets expect a background that is transparent or grey {GREY}; a depth map is expected to be"
                " black at the nearest point and white at the farthest. `zero123plus.pictures.depth_tile` makes such a"
                " tile from depth maps and masks."
            )
        pixels = self.image_processor.preprocess(tiles, height=height, width=width)
        pixels = pixels.repeat(batch_size // len(tiles), 1, 1, 1).repeat_interleave(num_images, 0)
        return pixels.to(device, self.controlnet.dtype)

    # The steps of the loop

    def write_reference(self, sample: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor) -> ReferenceCache:
        """Runs noisy references of K steps through the UNet, which writes their keys and values.

        Args:
            sample: shape (K B, C, h', w').
            t: their time steps, shape (K B,).
            embeds: text states of one step, shape (B, L, D).
        """
        cache = ReferenceCache()
        kwargs = {**(self.cross_attention_kwargs or {}), "reference": cache, "reference_mode": "write"}
        torch.compiler.cudagraph_mark_step_begin()
        self.unet(
            sample, t, embeds.repeat(len(t) // len(embeds), 1, 1), cross_attention_kwargs=kwargs, return_dict=False
        )
        if is_compiled(self.unet):  # whose CUDA graphs would overwrite what they gave
            cache = ReferenceCache((key.clone(), value.clone()) for key, value in cache)
        return cache

    def predict(
        self, cache: ReferenceCache, sample: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor, residuals: dict
    ) -> torch.Tensor:
        """Predicts the tile's noise or velocity, shape (B, C, h, w), while attending to the reference in the cache."""
        kwargs = {**(self.cross_attention_kwargs or {}), "reference": cache.rewound(), "reference_mode": "read"}
        options = {"cross_attention_kwargs": kwargs, "return_dict": False, **residuals}
        torch.compiler.cudagraph_mark_step_begin()
        prediction = self.unet(sample, t, encoder_hidden_states=embeds, **options)[0]
        return prediction.clone() if is_compiled(self.unet) else prediction

    def control(
        self, controlnet, sample: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor, tiles: list, scale
    ) -> dict:
        """Runs a ControlNet on control tiles, as [`embed_control_tiles`] gives both, and returns what it adds to the
        UNet, as the UNet's arguments. Both halves of a guided batch see the same B or B / 2 tiles.
        """
        tiles = [pixels.repeat(len(sample) // len(pixels), 1, 1, 1) for pixels in tiles]
        down, mid = controlnet(
            sample,
            t,
            encoder_hidden_states=embeds,
            controlnet_cond=tiles if hasattr(controlnet, "nets") else tiles[0],
            conditioning_scale=scale,
            return_dict=False,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image,
        prompt: str | list[str] | None = "",
        negative_prompt: str | list[str] | None = None,
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
        max_reference_bytes: int | None = None,
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
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        **unknown,
    ):
        """Makes six views of the object in each picture.

        Args:
            image: B pictures: PIL in any mode, arrays of shape (H, W, 3 or 4), uint8 or float in [0, 1], tensors of
                shape (3 or 4, H, W) in [0, 1], a batch or a list of these. Transparency is composited on grey, and
                pictures that are not square are padded with grey.
            prompt: one for all pictures, or one each. The public checkpoints are trained without prompts.
            negative_prompt: one for all pictures, or one each; empty by default.
            control_image: a tile for all pictures, or one each, for the ControlNet; of the same kinds as `image`. For
                a MultiControlNetModel a list of these, one for each ControlNet.
            depth_image: the published pipeline's name of `control_image`.
            height: of the tile, in pixels; the checkpoint's own by default. Another size gives a warning.
            width: of the tile, in pixels; the checkpoint's own by default.
            num_inference_steps: denoising steps; the checkpoint's `default_num_inference_steps` by default. Faces
                want 75 to 100.
            guidance_scale: scale of classifier-free guidance; the checkpoint's `default_guidance_scale` by default.
                Values up to 1 mean no guidance.
            guidance_rescale: share of the rescaled guidance of arXiv 2305.08891, in [0, 1].
            guidance_start: share of the steps after which guidance begins (arXiv 2404.07724).
            guidance_end: share of the steps after which guidance ends. Steps without guidance cost about half.
            reference_interval: recompute the reference keys and values every N steps. 1 is exact, larger is
                approximate and faster.
            max_reference_bytes: memory that the references of many steps may take, which are written in one pass: 6
                GiB by default, or 1 GiB if the pipeline is offloaded, and on a GPU at most half of what is free. Less
                means more passes, with the same result.
            controlnet_conditioning_scale: strength of the ControlNet, or a list of them for several; that of
                `add_controlnet` by default.
            control_guidance_start: share of the steps after which the ControlNet begins.
            control_guidance_end: share of the steps after which the ControlNet ends.
            num_images_per_prompt: N tiles for each picture.
            eta: of DDIM (arXiv 2010.02502); other schedulers ignore it.
            generator: source of all randomness. With a list of B * N generators every tile is what it would be alone.
            latents: initial noise of unit variance, shape (B * N, C, height / f, width / f).
            prompt_embeds: instead of `prompt`: shape (1 or B, L, D), text only; the image embedding is added.
            negative_prompt_embeds: instead of `negative_prompt`: shape (1 or B, L, D).
            cross_attention_kwargs: passed on to the attention processors; "scale" is the strength of LoRA.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: whether to return an object; else the tuple (images, views).
            callback_on_step_end: called as callback(pipe, step, timestep, tensors) after every step. The tensors that
                it returns replace those of the loop. It may set `pipe._guidance_scale`, and `pipe._interrupt = True`
                ends this call's loop.
            callback_on_step_end_tensor_inputs: which tensors the callback is given, "latents" by default:
                "latents", "prompt_embeds" (with the image embedding) and "negative_prompt_embeds".

        Examples:

        Returns:
            [`Zero123PlusPipelineOutput`]: `images`, the tiles, and `views`, each tile's six views.

        Raises:
            TypeError: if an argument has a wrong type.
            ValueError: if an argument has a wrong value, or the result is not finite.
        """
        # 1. Check and read the arguments. What is not given comes from the checkpoint
        if unknown:
            new = "`callback_on_step_end`, called as callback(pipe, step, timestep, tensors), replaces `callback` and"
            new = f": {new} `callback_steps`" if unknown.keys() & {"callback", "callback_steps"} else ""
            raise TypeError(f"Zero123PlusPipeline takes no argument {', '.join(map(repr, unknown))}{new}.")
        if control_image is not None and depth_image is not None:
            raise ValueError(
                "Both `control_image` and `depth_image` are given, but they are two names of one argument."
            )
        control_image = depth_image if control_image is None else control_image
        height = self.default_size[0] if height is None else height
        width = self.default_size[1] if width is None else width
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        if callback_on_step_end_tensor_inputs is None:
            callback_on_step_end_tensor_inputs = getattr(callback_on_step_end, "tensor_inputs", ["latents"])
        control_scales = controlnet_conditioning_scale
        if control_scales is None:
            control_scales = self.config.controlnet_conditioning_scale
        control_scales = list(control_scales) if isinstance(control_scales, (list, tuple)) else [control_scales]
        pictures = load_pictures(image, "image")
        self.check_background(pictures)
        pictures = [pad_to_square(picture) for picture in pictures]
        batch_size = len(pictures)
        self.check_size(height, width)
        self.check_numbers(
            counts={
                "num_inference_steps": num_inference_steps,
                "num_images_per_prompt": num_images_per_prompt,
                "reference_interval": reference_interval,
                "max_reference_bytes": 1 if max_reference_bytes is None else max_reference_bytes,
            },
            numbers={"guidance_scale": [guidance_scale], "controlnet_conditioning_scale": control_scales},
            shares={"guidance_rescale": guidance_rescale, "eta": eta},
            intervals={
                "guidance": (guidance_start, guidance_end),
                "control_guidance": (control_guidance_start, control_guidance_end),
            },
        )
        num_tiles = batch_size * num_images_per_prompt
        grid = height // self.vae_scale_factor, width // self.vae_scale_factor
        shape = (num_tiles, self.unet.config.in_channels, *grid)
        self.check_batch(
            batch_size,
            prompts={"prompt": prompt, "negative_prompt": negative_prompt},
            embeds={"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds},
            generator=generator,
            latents=latents,
            latents_shape=shape,
        )
        self.check_control(control_image, control_scales)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}, but must be 'pil', 'np', 'pt' or 'latent'.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` names {sorted(unknown)}, but can name"
                f" {self._callback_tensor_inputs}."
            )
        check_scheduler(self.scheduler, num_inference_steps)
        install_reference_attention(self.unet)
        if (height, width) != self.default_size:
            logger.warning(
                f"The tile has {height} x {width} pixels (height x width), but the checkpoint was trained at"
                f" {self.default_size[0]} x {self.default_size[1]}: views of another size are usually wrong."
            )
        if self.scheduler.config.get("timestep_spacing", "trailing") != "trailing":
            logger.warning(
                f"The scheduler's timestep_spacing is {self.scheduler.config.timestep_spacing!r}, but Zero123++ is"
                " used with 'trailing': pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config,"
                " timestep_spacing='trailing')"
            )
        device = self._execution_device
        scheduler = copy_scheduler(self.scheduler, num_inference_steps)
        num_steps = len(scheduler.timesteps)
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_start, guidance_end)
        call = self._calls[threading.get_ident()] = _Call(guidance, scheduler, num_steps, cross_attention_kwargs)
        may_guide = call.may_guide = guidance.scale > 1

        # 2. Encode the prompts and mix in the global condition; the negative prompt stays plain
        one_negative = not isinstance(negative_prompt, list) and (
            negative_prompt_embeds is None or len(negative_prompt_embeds) == 1
        )
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            device,
            do_classifier_free_guidance=may_guide,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
        )
        length = prompt_embeds.shape[1]
        ramp = self.config.ramping_coefficients or [i / length for i in range(1, length + 1)]
        ramp = torch.tensor(ramp, device=device, dtype=self.unet.dtype)
        image_embeds = self.encode_image(pictures, device).repeat_interleave(num_images_per_prompt, 0)
        prompt_embeds = prompt_embeds.repeat_interleave(num_tiles // len(prompt_embeds), 0)
        prompt_embeds = mix_image_embeds(prompt_embeds, image_embeds, ramp)  # (B * N, L, D)
        if not may_guide:
            negative_prompt_embeds = prompt_embeds[:0]
        elif one_negative:  # its reference is computed once for all tiles
            negative_prompt_embeds = negative_prompt_embeds[:1]
        else:
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, 0)
        num_negatives = len(negative_prompt_embeds)

        # 3. Encode the local condition. The negative reference is an empty picture and the same for every tile, and
        # so is its noise: it comes from a seed of its own, so that one pass serves a batch whose tiles must each be
        # what they would be alone
        pixels = preprocess(self.feature_extractor_vae, pictures)
        reference_latents = self.prepare_reference_latents(pixels, num_images_per_prompt, device, generator)
        if may_guide:
            negative_generator = torch.Generator().manual_seed(0)
            negative = self.prepare_reference_latents(torch.zeros_like(pixels[:1]), 1, device, negative_generator)
            reference_latents = torch.cat([negative.expand(num_negatives, -1, -1, -1), reference_latents])
        # 4. Prepare the initial noise and the control tiles
        latents = self.prepare_latents(shape, scheduler, device, generator, latents)
        accepted = inspect.signature(scheduler.step).parameters
        step_kwargs = {"generator": generator, "eta": eta}
        step_kwargs = {name: value for name, value in step_kwargs.items() if name in accepted}
        if control_image is not None:
            multiple = hasattr(self.controlnet, "nets")
            control_tiles = [
                self.prepare_control_image(tiles, batch_size, num_images_per_prompt, height, width, device)
                for tiles in (control_image if multiple else [control_image])
            ]
            if len(control_scales) == 1:
                control_scales = control_scales * len(control_tiles)
            control_scale = control_scales if multiple else control_scales[0]
            controlnet, control_tiles = embed_control_tiles(self.controlnet, control_tiles)

        # 5. Denoise. The references of all steps are drawn and noised before, so that nothing in the loop waits
        noise = self.draw_reference_noise(num_steps, (num_tiles, *reference_latents.shape[1:]), device, generator)
        if may_guide:
            negative_noise = self.draw_noise((num_steps, 1, *reference_latents.shape[1:]), device, negative_generator)
            noise = torch.cat([negative_noise.expand(-1, num_negatives, -1, -1, -1), noise], dim=1)
        # Floats, because integers would be another variant of a compiled UNet
        timesteps = scheduler.timesteps.to(device, torch.float32)
        references = References(
            noise_to_levels(reference_latents, noise, noise_levels(scheduler)),
            timesteps,
            num_negatives,
            reference_interval,
            is_guided=lambda step: guidance.is_active(step / num_steps),
            max_steps=lambda samples: self.max_reference_steps(reference_latents.shape, samples, max_reference_bytes),
        )
        with self._running(call), self.progress_bar(total=num_steps) as progress_bar:
            for i, t in enumerate(scheduler.timesteps):
                if call.interrupt:
                    continue

                # 5.1 The reference of this step, which a pass for many steps writes
                guided = guidance.is_active(i / num_steps)
                embeds = torch.cat([negative_prompt_embeds, prompt_embeds])[0 if guided else num_negatives :]
                cache = references.at(i, functools.partial(self.write_reference, embeds=embeds))

                # 5.2 The tile attends to them
                model_input = scheduler.scale_model_input(latents.repeat(2 if guided else 1, 1, 1, 1), t)
                missing = len(model_input) - len(embeds)
                text = torch.cat([embeds[:1].expand(missing, -1, -1), embeds])  # (B * N or 2 B * N, L, D)
                residuals = {}
                if control_image is not None and control_guidance_start <= i / num_steps < control_guidance_end:
                    residuals = self.control(controlnet, model_input, timesteps[i], text, control_tiles, control_scale)
                prediction = self.predict(cache, model_input, timesteps[i], text, residuals)

                # 5.3 Guide and step
                prediction = guidance(prediction) if guided else prediction
                latents = scheduler.step(prediction, t, latents, **step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = dict(zip(self._callback_tensor_inputs, (latents, prompt_embeds, negative_prompt_embeds)))
                    given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    if update(tensors, callback_on_step_end(self, i, t, given)):
                        references.rewrite()
                    latents, prompt_embeds, negative_prompt_embeds = tensors.values()
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
