# Copyright 2026 The Zero123++ pipeline contributors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Zero123++ (https://arxiv.org/abs/2310.15110): one picture of an object in, six consistent views of it out.

A `diffusers` custom pipeline around stock components. What is its own stands in this one file: the scaling of the
target space, the camera poses, the scaled reference attention and the mixing of the CLIP embedding into the prompt.
"""

import contextlib
import copy
import inspect
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, ControlNetModel, DiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput, logging, replace_example_docstring, scale_lora_layers, unscale_lora_layers
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

try:
    from diffusers.models.attention_dispatch import dispatch_attention_fn
except ImportError:  # diffusers before 0.35 has one backend

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

ROWS, COLUMNS = 3, 2  # of views in a tile, row-major
GREY = 127  # what transparency is composited on, as in the training data

# The tile that is denoised is scaled and shifted so that its latents are centred and of about unit variance. The
# constants are those of the published checkpoints: they belong to the weights.
IMAGE_SCALE = 0.5 / 0.8
LATENT_SHIFT = 0.22
LATENT_SCALE = 0.75


def scale_image(image: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1], any shape, to what the VAE encodes."""
    return image * IMAGE_SCALE


def unscale_image(image: torch.Tensor) -> torch.Tensor:
    """Inverse of [`scale_image`]."""
    return image / IMAGE_SCALE


def scale_latents(latents: torch.Tensor) -> torch.Tensor:
    """Latents times `vae.config.scaling_factor`, any shape, to the space that the UNet denoises."""
    return (latents - LATENT_SHIFT) * LATENT_SCALE


def unscale_latents(latents: torch.Tensor) -> torch.Tensor:
    """Inverse of [`scale_latents`]."""
    return latents / LATENT_SCALE + LATENT_SHIFT


def mix_image_embeds(prompt_embeds: torch.Tensor, image_embeds: torch.Tensor, ramp: torch.Tensor) -> torch.Tensor:
    """Linear guidance of FlexDiffuse: token i of the prompt becomes T_i + w_i * I (section 2.4 of the paper).

    Args:
        prompt_embeds: encoded prompt T of shape (B, L, D).
        image_embeds: CLIP image embedding I of shape (B, D).
        ramp: weights w of shape (L,).

    Returns:
        Shape (B, L, D).
    """
    return prompt_embeds + ramp[:, None] * image_embeds[:, None]


def camera_poses(azimuths, elevations, radius: float) -> np.ndarray:
    """Camera-to-world matrices of cameras that look at the origin.

    Args:
        azimuths: degrees around world +Z, 0 on +X (where the input view is), counted towards +Y.
        elevations: degrees above the XY plane, within (-90, 90).
        radius: distance from the origin.

    Returns:
        Shape (N, 4, 4). OpenGL convention: the camera's +X is right, +Y up, and it looks along -Z. World +Z is up.
    """
    azimuth, elevation = np.radians(azimuths), np.radians(elevations)
    zero, one = np.zeros_like(azimuth), np.ones_like(azimuth)
    right = np.stack([-np.sin(azimuth), np.cos(azimuth), zero], axis=-1)
    back = np.stack(
        [np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)], axis=-1
    )
    up = np.cross(back, right)
    matrix = np.stack([right, up, back, radius * back], axis=-1)  # (N, 3, 4)
    return np.concatenate([matrix, np.stack([zero, zero, zero, one], axis=-1)[:, None]], axis=1)


def camera_intrinsics(fov: float, height: int, width: int) -> np.ndarray:
    """Pinhole intrinsics of a view of `height` x `width` pixels and a vertical field of view of `fov` degrees: shape
    (3, 3), in pixels; the principal point is the centre.
    """
    focal = height / 2 / math.tan(math.radians(fov) / 2)
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


class ReferenceCache:
    """Keys and values by attention layer, of the reference picture and of the text: one reference pass writes, any
    number read.

    A plain object on purpose: offloading hooks rebuild dicts and tuples among the arguments, and entries would be
    lost.

    Args:
        last: the self-attention layer that runs last ([`last_self_attention`]), where nobody wants what the reference
            pass itself returns: after it no key or value is left to write, so the layer's attention is left out.
    """

    def __init__(self, last: str | None = None):
        self.last = last
        self.deep = {}  # by mode, what `DeepFeatures.keep` keeps
        self._entries = {}

    def write(self, layer: str, key: torch.Tensor, value: torch.Tensor):
        """Keeps a layer's key and value, each of shape (B, N, heads, head_dim)."""
        self._entries[layer] = key, value

    def read(self, layer: str, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value of a layer for a batch.

        Entries may be fewer than the batch: under classifier-free guidance the first entry, the one negative
        reference, serves the whole negative half, so that (1 + B) entries stand for 2B.

        Raises:
            RuntimeError: if the layer was not written.
        """
        if layer not in self._entries:
            raise RuntimeError(
                f"No reference was written for {layer}: call the UNet with reference_mode='write' first."
            )
        key, value = self._entries[layer]
        missing = batch_size - key.shape[0]
        if missing:
            key, value = (torch.cat([entry[:1].expand(missing, -1, -1, -1), entry]) for entry in (key, value))
        return key, value


class ReferenceAttnProcessor:
    """Scaled dot-product attention whose self-attention also attends to a reference picture (section 2.2 of the
    paper). Cross-attention takes the keys and values of the text from the cache, which are the same in both passes.

    Without `reference` it is plain attention.

    Args:
        layer: the layer's name, the key of its entry in a [`ReferenceCache`].
        fused: whether to project by the joint matrices that `unet.fuse_qkv_projections()` has made.

    When called, besides the arguments of every attention processor of diffusers:
        reference ([`ReferenceCache`], optional): passed to the UNet in `cross_attention_kwargs`.
        reference_mode: "write" keeps this pass's keys and values, "read" appends the kept ones to this pass's own, or
            in cross-attention takes their place: the text must be the same. An argument rather than a state, so that
            gradient checkpointing recomputes a layer in the mode it ran in.
    """

    _attention_backend = None  # what `set_attention_backend` sets
    _parallel_config = None

    def __init__(self, layer: str, fused: bool = False):
        self.layer, self.fused = layer, fused

    def project(self, attn, hidden_states: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query of `hidden_states`, key and value of `context`, each of shape (B, N, C)."""
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
                kept = reference.read(self.layer, batch_size)
                key, value = torch.cat([key, kept[0]], dim=1), torch.cat([value, kept[1]], dim=1)
            elif reference is not None:
                reference.write(self.layer, key, value)
                if self.layer == reference.last:
                    return torch.zeros_like(hidden_states)

        out = dispatch_attention_fn(query, key, value, attn_mask=attention_mask, backend=self._attention_backend)
        out = out.flatten(2, 3).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


# What diffusers installs where the user has chosen nothing; anything else is a choice, and is not silently undone.
STOCK_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0")


def install_reference_attention(unet: UNet2DConditionModel):
    """Makes sure that every self-attention layer of `unet` can attend to a reference.

    Stock processors are replaced, also on cross-attention, where ours do nothing but accept the arguments. Processors
    that take `reference` and `reference_mode` (ours, or the user's own) are kept.

    Raises:
        ValueError: if a self-attention layer has another processor, which would lose the reference without a word,
            or projections that were fused without its LoRA.
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
                f"{processor.layer} has a LoRA that its fused projections do not see: call"
                " `pipe.unet.unfuse_qkv_projections()`, or `pipe.fuse_lora()` and `pipe.unload_lora_weights()` before"
                " `pipe.unet.fuse_qkv_projections()`."
            )


def last_self_attention(unet: UNet2DConditionModel) -> str | None:
    """The name of the self-attention layer that runs last: diffusers registers its blocks in the order down, up,
    mid, and runs them in the order down, mid, up.
    """
    names = [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn1.processor")]
    return next((name for name in reversed(names) if name.startswith("up_blocks")), None)


class DeepFeatures(torch.nn.Module):
    """Stands for all blocks of a UNet but the last resnet and transformer: returns what they returned last, which the
    [`ReferenceCache`] of the call keeps.
    """

    has_cross_attention = True

    def forward(self, hidden_states, temb=None, cross_attention_kwargs=None, **kwargs) -> torch.Tensor:
        """Called as a UNet's middle block; returns features of shape (B, C, h, w), as the last block takes them."""
        return cross_attention_kwargs["reference"].deep[cross_attention_kwargs["reference_mode"]]

    @staticmethod
    def keep(module, args, kwargs, output):
        """A forward hook of the last transformer but one."""
        kwargs = kwargs["cross_attention_kwargs"]
        kwargs["reference"].deep[kwargs["reference_mode"]] = output[0]


def shallow_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A UNet of the same weights that runs the first convolution and the last resnet and transformer alone, on the
    deep features of an earlier step (DeepCache, arXiv 2312.00858, its branch 0).

    Raises:
        ValueError: if the UNet is compiled or offloaded, or has no such layers.
    """
    if "forward" in vars(unet) or not isinstance(unet, UNet2DConditionModel):
        raise ValueError(
            "`deep_cache_interval` is more than 1, but the UNet is compiled or has hooks, which a part of it cannot"
            " have: leave `deep_cache_interval` at 1, or do without torch.compile and offloading."
        )
    last = unet.up_blocks[-1]
    if len(getattr(last, "attentions", ())) < 2:
        raise ValueError(
            f"`deep_cache_interval` is more than 1, but the UNet's last block, {type(last).__name__}, has fewer than"
            " two transformers: leave it at 1."
        )
    shallow, top = copy.copy(unet), copy.copy(last)
    top._modules = {**last._modules, "resnets": last.resnets[-1:], "attentions": last.attentions[-1:]}
    blocks = {
        "down_blocks": torch.nn.ModuleList(),
        "mid_block": DeepFeatures(),
        "up_blocks": torch.nn.ModuleList([top]),
    }
    shallow._modules = {**unet._modules, **blocks}
    return shallow


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


def _load_pil(picture: PIL.Image.Image, argument: str) -> PIL.Image.Image:
    if 0 in picture.size:
        raise ValueError(f"`{argument}` is a picture of size {picture.size}: it has no pixels.")
    try:
        picture = PIL.ImageOps.exif_transpose(picture)
        picture.load()
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
    if "A" in picture.getbands() or picture.mode in ("La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        background = PIL.Image.new("RGBA", picture.size, (GREY, GREY, GREY, 255))
        picture = PIL.Image.alpha_composite(background, picture)
    return picture.convert("RGB")


def pad_to_square(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Centres an RGB picture on a grey square."""
    return (
        PIL.ImageOps.pad(picture, (max(picture.size),) * 2, color=(GREY,) * 3)
        if picture.width != picture.height
        else picture
    )


def preprocess(processor: CLIPImageProcessor, pictures: list[PIL.Image.Image]) -> torch.Tensor:
    """Applies an image processor, always with its PIL implementation, and returns pixels of shape (B, 3, H, W).

    Since transformers 5 the same class computes with torchvision where that is installed, and its resizing differs by
    up to 3e-2.
    """
    if hasattr(transformers, "CLIPImageProcessorPil"):
        processor = transformers.CLIPImageProcessorPil.from_dict(processor.to_dict())
    return processor(images=pictures, return_tensors="pt").pixel_values


def _rescale_guidance(noise_pred, noise_pred_text, guidance_rescale):
    """Equation 16 of arXiv 2305.08891: pulls the guided prediction's deviation back towards the conditional one's."""
    axes = tuple(range(1, noise_pred.ndim))
    rescaled = noise_pred * (noise_pred_text.std(dim=axes, keepdim=True) / noise_pred.std(dim=axes, keepdim=True))
    return guidance_rescale * rescaled + (1 - guidance_rescale) * noise_pred


class Zero123PlusPipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """One picture of an object to six consistent views of it, as a tile of 3 rows and 2 columns.

    Args:
        vae: encodes the reference picture and decodes the tile.
        text_encoder: encodes the prompt.
        tokenizer: of the text encoder.
        unet: a stock UNet; reference attention is installed as attention processors, which do nothing in other
            pipelines.
        scheduler: any scheduler of the Karras family; its `timestep_spacing` should be "trailing".
        vision_encoder: gives the global condition.
        feature_extractor_clip: preprocessing of the vision encoder.
        feature_extractor_vae: preprocessing of the reference picture (mean 0.5, std 0.8).
        safety_checker: public checkpoints list it as null; nothing else is accepted.
        controlnet: optional, sees a control tile (depth, or the RGB tile for normals).
        ramping_coefficients: weight of the CLIP embedding per prompt token; i / L for i = 1..L by default.
        view_azimuths: degrees of the six views, relative to the input view.
        view_elevations: degrees of the six views above the horizon. The defaults are those of v1.2; v1.1 has 30 and
            -20.
        view_fov: vertical field of view in degrees. v1.1 has 49.134.

    Raises:
        ValueError: if `ramping_coefficients` are not one per token, the cameras not six, or a safety checker is given.
    """

    model_cpu_offload_seq = "text_encoder->vision_encoder->unet->vae"
    _optional_components = ["safety_checker", "controlnet"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

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
        view_azimuths: list[float] = (30, 90, 150, 210, 270, 330),
        view_elevations: list[float] = (20, -10, 20, -10, 20, -10),
        view_fov: float = 30.0,
    ):
        super().__init__()
        if safety_checker is not None:
            raise ValueError("`safety_checker` is given, but this pipeline has none: pass None.")
        for name, values in (("view_azimuths", view_azimuths), ("view_elevations", view_elevations)):
            if len(values) != ROWS * COLUMNS:
                raise ValueError(f"`{name}` has {len(values)} values, but a tile has {ROWS * COLUMNS} views.")
        length = text_encoder.config.max_position_embeddings
        if ramping_coefficients is None:
            ramping_coefficients = [i / length for i in range(1, length + 1)]
        if len(ramping_coefficients) != length:
            raise ValueError(
                f"`ramping_coefficients` has {len(ramping_coefficients)} values, but the text encoder gives {length}"
                " tokens: give one per token, or None for i / L."
            )
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
            ramping_coefficients=list(ramping_coefficients),
            view_azimuths=[float(angle) for angle in view_azimuths],
            view_elevations=[float(angle) for angle in view_elevations],
            view_fov=view_fov,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.controlnet_conditioning_scale = 1.0
        self._interrupt = False
        install_reference_attention(unet)

    def save_pretrained(self, save_directory, **kwargs):
        """Saves as every diffusers pipeline does, and pipeline.py beside it: the folder is its own
        `custom_pipeline`.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        source, target = Path(inspect.getsourcefile(type(self))), folder / "pipeline.py"
        if not (target.exists() and target.samefile(source)):
            shutil.copyfile(source, target)
        super().save_pretrained(save_directory, **kwargs)

    def add_controlnet(
        self, controlnet: ControlNetModel | None = None, conditioning_scale: float = 1.0
    ) -> ControlNetModel:
        """Sets the ControlNet, in place of any other, as the published pipeline does.

        Args:
            controlnet: a copy of the UNet's encoder, to be trained, by default.
            conditioning_scale: what a call uses whose `controlnet_conditioning_scale` is None.

        Returns:
            The ControlNet.
        """
        if controlnet is None:
            # As many strides of 2 as the VAE has: Stable Diffusion's widths, and more of the last for a larger factor
            widths = (16, 32, 96) + (256,) * (len(self.vae.config.block_out_channels) - 3)
            controlnet = ControlNetModel.from_unet(self.unet, conditioning_embedding_out_channels=widths)
        self.register_modules(controlnet=controlnet)
        self.controlnet_conditioning_scale = conditioning_scale
        return controlnet

    def camera_poses(self, radius: float | None = None) -> np.ndarray:
        """Camera-to-world matrices of the six views, shape (6, 4, 4).

        OpenGL convention: a camera's +X is right, +Y up, and it looks along -Z. The world's +Z is up, the object is
        at the origin, and the input view is at azimuth 0, on +X (its elevation is unknown).

        Args:
            radius: distance of the cameras; 0.5 / tan(fov / 2) by default, where a sphere of radius 0.5 just fills
                a view in the plane of its centre. That is 1.866 for v1.2.
        """
        if radius is None:
            radius = 0.5 / math.tan(math.radians(self.config.view_fov) / 2)
        if not radius > 0:
            raise ValueError(f"`radius` is {radius}, but must be positive.")
        return camera_poses(self.config.view_azimuths, self.config.view_elevations, radius)

    def camera_intrinsics(self, height: int, width: int) -> np.ndarray:
        """Pinhole intrinsics of one view of `height` x `width` pixels, shape (3, 3), in pixels; the principal point
        is the centre.
        """
        if min(height, width) < 1:
            raise ValueError(f"`height` and `width` are {height} and {width}, but must be at least 1 pixel.")
        return camera_intrinsics(self.config.view_fov, height, width)

    @property
    def interrupt(self) -> bool:
        """Whether the running call is to stop denoising: a callback sets `pipe._interrupt = True`."""
        return self._interrupt

    def check_size(self, height: int, width: int):
        """Checks that a tile's views fit the VAE, and its latents every level of the UNet.

        Raises:
            TypeError, ValueError: naming the argument, its value and, for a size that does not fit, the nearest.
        """
        levels = 2 ** (len(self.unet.config.block_out_channels) - 1)
        for name, value, views in (("height", height, ROWS), ("width", width, COLUMNS)):
            step = math.lcm(views * self.vae_scale_factor, self.vae_scale_factor * levels)
            if not isinstance(value, int):
                raise TypeError(f"`{name}` is {value!r}, but must be a whole number of pixels.")
            if value < step or value % step:
                low = max(step, value // step * step)
                raise ValueError(
                    f"`{name}` is {value}, but must be a multiple of {step}, so that {views} views fit the VAE and the"
                    f" UNet: the nearest are {low} and {low + step}."
                )

    def check_inputs(
        self,
        batch_size: int,
        prompt,
        negative_prompt,
        height: int,
        width: int,
        generator,
        latents,
        prompt_embeds,
        negative_prompt_embeds,
        control_image,
        intervals: dict[str, tuple[float, float]],
        counts: dict[str, int],
        output_type: str,
        callback_on_step_end_tensor_inputs,
    ):
        """Checks the arguments of a call that can be checked before any computing.

        Raises:
            TypeError, ValueError: naming the argument, its value and what to do.
        """
        self.check_size(height, width)
        for name, value in counts.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is {value!r}, but must be a whole number of at least 1.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}, but must be 'pil', 'np', 'pt' or 'latent'.")
        if prompt is not None and prompt_embeds is not None and prompt != "":
            raise ValueError("Both `prompt` and `prompt_embeds` are given: give one.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("Both `negative_prompt` and `negative_prompt_embeds` are given: give one.")

        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if not isinstance(text, (str, list, type(None))):
                raise TypeError(f"`{name}` is a {type(text).__name__}, but must be a string or a list of strings.")
            if isinstance(text, list) and len(text) != batch_size:
                raise ValueError(f"`{name}` has {len(text)} entries for {batch_size} pictures: give one, or one each.")
        length, dim = self.text_encoder.config.max_position_embeddings, self.text_encoder.config.hidden_size
        for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
            if embeds is not None and tuple(embeds.shape) not in ((1, length, dim), (batch_size, length, dim)):
                raise ValueError(
                    f"`{name}` has shape {tuple(embeds.shape)}, but must be (1 or {batch_size}, {length}, {dim}) for"
                    f" {batch_size} pictures."
                )
        total = batch_size * counts["num_images_per_prompt"]
        for item in generator if isinstance(generator, list) else [generator]:
            if not isinstance(item, (torch.Generator, type(None))):
                raise TypeError(
                    f"`generator` is or has {item!r}, but must be of torch.Generator:"
                    " torch.Generator().manual_seed(...)."
                )
        if isinstance(generator, list) and len(generator) != total:
            raise ValueError(f"`generator` has {len(generator)} entries for {total} tiles: give one, or one each.")
        shape = (total, self.unet.config.in_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` has shape {tuple(latents.shape)}, but must be {shape} for these arguments.")
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
        for net in nets or ([] if self.controlnet is None else [self.controlnet]):
            factor = 2 ** (len(net.config.conditioning_embedding_out_channels) - 1)
            if factor != self.vae_scale_factor:
                raise ValueError(
                    f"The ControlNet shrinks `control_image` by {factor}, but the VAE by {self.vae_scale_factor}: make"
                    " one for this checkpoint with `pipe.add_controlnet()`."
                )
        for name, (start, end) in intervals.items():
            if not 0 <= start < end <= 1:
                raise ValueError(
                    f"`{name}_start` and `{name}_end` are {start} and {end}, but must rise within [0, 1]."
                )
        unknown = set(callback_on_step_end_tensor_inputs or ()) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` names {sorted(unknown)}, but can name"
                f" {self._callback_tensor_inputs}."
            )

    def encode_prompt(self, prompt: list[str], device: torch.device, lora_scale: float | None = None) -> torch.Tensor:
        """Encodes prompts to the text encoder's last hidden states, shape (B, L, D). No image embedding is mixed in.

        Args:
            prompt: B strings; what exceeds L tokens is cut off.
            device: where to.
            lora_scale: strength of LoRA layers of the text encoder, 1 by default.
        """
        tokens = self.tokenizer(
            prompt,
            padding="max_length",
            max_length=self.text_encoder.config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        if lora_scale is not None:
            scale_lora_layers(self.text_encoder, lora_scale)
        embeds = self.text_encoder(tokens.input_ids.to(device))[0].to(self.unet.dtype)
        if lora_scale is not None:
            unscale_lora_layers(self.text_encoder, lora_scale)
        return embeds

    def encode_image(self, pictures: list[PIL.Image.Image], device: torch.device) -> torch.Tensor:
        """CLIP embeddings of square RGB pictures, shape (B, D)."""
        pixels = preprocess(self.feature_extractor_clip, pictures)
        return self.vision_encoder(pixels.to(device, self.vision_encoder.dtype)).image_embeds.to(self.unet.dtype)

    def prepare_reference_latents(self, pixels: torch.Tensor, num_images: int, device, generator) -> torch.Tensor:
        """Samples the VAE's latents of reference pictures.

        The latents are raw: that they are not multiplied by `vae.config.scaling_factor`, and so about 5 times larger
        than what the UNet denoises, is the "5x" of scaled reference attention (section 2.2 of the paper).

        Args:
            pixels: shape (B, 3, H, W), after `feature_extractor_vae`.
            num_images: how many samples of each.

        Returns:
            Shape (B * num_images, C, H / f, W / f).
        """
        posterior = self.vae.encode(pixels.to(device, self.vae.dtype)).latent_dist
        mean, std = (moment.repeat_interleave(num_images, 0) for moment in (posterior.mean, posterior.std))
        latents = mean + std * randn_tensor(mean.shape, generator=generator, device=device, dtype=mean.dtype)
        return latents.to(self.unet.dtype)

    def prepare_latents(self, shape, scheduler, device, generator, latents: torch.Tensor | None) -> torch.Tensor:
        """Initial noise of `shape` (B, C, h, w), or the `latents` given, times the scheduler's initial sigma."""
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        return latents.to(device, self.unet.dtype) * scheduler.init_noise_sigma

    def prepare_control_image(self, control_image, batch_size: int, num_images: int, height: int, width: int, device):
        """Control tiles as pixels in [-1, 1] of shape (B * num_images, 3, H, W); one tile serves a whole batch.

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
        pixels = self.image_processor.preprocess(tiles, height=height, width=width)
        pixels = pixels.repeat(batch_size // len(tiles), 1, 1, 1).repeat_interleave(num_images, 0)
        return pixels.to(device, self.controlnet.dtype)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image,
        prompt: str | list[str] | None = "",
        negative_prompt: str | list[str] | None = None,
        control_image=None,
        depth_image=None,
        height: int = 960,
        width: int = 640,
        num_inference_steps: int = 28,
        guidance_scale: float = 4.0,
        guidance_rescale: float = 0.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        reference_interval: int = 1,
        deep_cache_interval: int = 1,
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
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ):
        """Makes six views of the object in each picture.

        Args:
            image: B pictures: PIL in any mode, arrays of shape (H, W, 3 or 4), uint8 or float in [0, 1], tensors of
                shape (3 or 4, H, W) in [0, 1], a batch or a list of these. Transparency is composited on grey; what
                is not square is padded with grey.
            prompt: one for all pictures, or one each. The checkpoints are trained without.
            negative_prompt: one for all pictures, or one each; empty by default.
            control_image: a tile for all pictures, or one each, for the ControlNet; same kinds as `image`. For a
                MultiControlNetModel a list of these, one for each ControlNet.
            depth_image: the published pipeline's name of `control_image`.
            height: of the tile, in pixels.
            width: of the tile, in pixels.
            num_inference_steps: denoising steps; 75 to 100 for faces.
            guidance_scale: of classifier-free guidance; none up to 1.
            guidance_rescale: share of the rescaled guidance of arXiv 2305.08891, in [0, 1].
            guidance_start: share of the steps after which guidance begins (arXiv 2404.07724).
            guidance_end: share of the steps after which guidance ends; steps without cost about half.
            reference_interval: the reference is computed at every so many steps, 1 for all. More is faster and not
                the same.
            deep_cache_interval: the whole UNet is computed at every so many steps, 1 for all; between these its last
                layers alone (arXiv 2312.00858). More is faster and not the same.
            controlnet_conditioning_scale: strength of the ControlNet, or a list of them for several; that of
                `add_controlnet` by default.
            control_guidance_start: share of the steps after which the ControlNet begins.
            control_guidance_end: share of the steps after which the ControlNet ends.
            num_images_per_prompt: N tiles for each picture.
            eta: of DDIM (arXiv 2010.02502); other schedulers have none.
            generator: source of all randomness. A list of B * N gives every tile what it would get alone.
            latents: initial noise of unit variance, shape (B * N, C, height / f, width / f).
            prompt_embeds: instead of `prompt`: shape (1 or B, L, D), text only; the image embedding is added.
            negative_prompt_embeds: instead of `negative_prompt`: shape (1 or B, L, D).
            cross_attention_kwargs: passed on to the attention processors; "scale" is the strength of LoRA.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: whether to return an object; else the tuple (images, views).
            callback_on_step_end: called as callback(pipe, step, timestep, tensors) after every step; tensors that it
                returns replace those of the loop. `pipe._interrupt = True` ends the loop.
            callback_on_step_end_tensor_inputs: which tensors: "latents", "prompt_embeds" (with the image embedding)
                and "negative_prompt_embeds".

        Examples:

        Returns:
            [`Zero123PlusPipelineOutput`]: `images`, the tiles, and `views`, each tile's six views.

        Raises:
            TypeError: if an argument has a wrong type.
            ValueError: if an argument has a wrong value, or the result is not finite.
        """
        # 1. Check and read the arguments
        if control_image is not None and depth_image is not None:
            raise ValueError(
                "Both `control_image` and `depth_image` are given, but they are two names of one argument."
            )
        control_image = depth_image if control_image is None else control_image
        pictures = [pad_to_square(picture) for picture in load_pictures(image, "image")]
        batch_size, num_tiles = len(pictures), len(pictures) * num_images_per_prompt
        self.check_inputs(
            batch_size,
            prompt,
            negative_prompt,
            height,
            width,
            generator,
            latents,
            prompt_embeds,
            negative_prompt_embeds,
            control_image,
            {
                "guidance": (guidance_start, guidance_end),
                "control_guidance": (control_guidance_start, control_guidance_end),
            },
            {
                "num_inference_steps": num_inference_steps,
                "num_images_per_prompt": num_images_per_prompt,
                "reference_interval": reference_interval,
                "deep_cache_interval": deep_cache_interval,
            },
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        install_reference_attention(self.unet)
        last_layer = last_self_attention(self.unet)
        # One call works on its own scheduler and cache: threads can share the pipeline
        scheduler = copy.deepcopy(self.scheduler)
        if scheduler.config.get("timestep_spacing", "trailing") != "trailing":
            logger.warning(
                f"The scheduler's timestep_spacing is {scheduler.config.timestep_spacing!r}, but Zero123++ is used"
                " with 'trailing': pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config,"
                " timestep_spacing='trailing')"
            )
        self._interrupt = False
        device = self._execution_device
        ever_guided = guidance_scale > 1

        # 2. Encode the prompts and mix in the global condition; the negative prompt stays plain
        cross_attention_kwargs = dict(cross_attention_kwargs or {})
        lora_scale = cross_attention_kwargs.get("scale")
        if prompt_embeds is None:
            prompt_embeds = self.encode_prompt(
                [prompt or ""] if not isinstance(prompt, list) else prompt, device, lora_scale
            )
        prompt_embeds = prompt_embeds.to(device, self.unet.dtype).expand(batch_size, -1, -1)
        ramp = torch.tensor(self.config.ramping_coefficients, device=device, dtype=self.unet.dtype)
        prompt_embeds = mix_image_embeds(prompt_embeds, self.encode_image(pictures, device), ramp)
        prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, 0)  # (B * N, L, D)
        if ever_guided:
            if negative_prompt_embeds is None:
                texts = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""]
                negative_prompt_embeds = self.encode_prompt(texts, device, lora_scale)
            negative_prompt_embeds = negative_prompt_embeds.to(device, self.unet.dtype)
            if len(negative_prompt_embeds) > 1:  # one for all stays one: its reference is computed once
                negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, 0)

        # 3. Encode the local condition
        pixels = preprocess(self.feature_extractor_vae, pictures)
        reference_latents = self.prepare_reference_latents(pixels, num_images_per_prompt, device, generator)
        if ever_guided:
            # The negative reference shows nothing and is the same for every tile, so its noise is too: it comes from
            # a seed of its own, which lets one pass serve a batch whose tiles must each be what they would be alone.
            negative_generator = torch.Generator().manual_seed(0)
            negative_latents = self.prepare_reference_latents(
                torch.zeros_like(pixels[:1]), 1, device, negative_generator
            )

        # 4. Prepare time steps, initial noise and control tiles
        scheduler.set_timesteps(num_inference_steps, device=device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # else it looks every time step up, and waits for the device to do so
        shape = (
            num_tiles,
            self.unet.config.in_channels,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )
        latents = self.prepare_latents(shape, scheduler, device, generator, latents)
        step_kwargs = {"generator": generator, "eta": eta}
        accepted = inspect.signature(scheduler.step).parameters
        step_kwargs = {name: value for name, value in step_kwargs.items() if name in accepted}
        if control_image is not None:
            if controlnet_conditioning_scale is None:
                controlnet_conditioning_scale = self.controlnet_conditioning_scale
            multiple = hasattr(self.controlnet, "nets")
            control_image = [
                self.prepare_control_image(tiles, batch_size, num_images_per_prompt, height, width, device)
                for tiles in (control_image if multiple else [control_image])
            ]
            if multiple and not isinstance(controlnet_conditioning_scale, list):
                controlnet_conditioning_scale = [controlnet_conditioning_scale] * len(control_image)

        # 5. Denoise
        num_steps = len(scheduler.timesteps)  # some solvers take more than one evaluation a step
        if ever_guided:  # drawn at once, because every move from the generator's device to another waits for that one
            negative_noise = randn_tensor(
                (num_steps, *negative_latents.shape[1:]),
                generator=negative_generator,
                device=device,
                dtype=self.unet.dtype,
            )
        cache, guided, residuals = None, None, {}
        keeping = contextlib.nullcontext()
        if deep_cache_interval > 1:
            shallow = shallow_unet(self.unet)
            keeping = self.unet.up_blocks[-1].attentions[-2].register_forward_hook(DeepFeatures.keep, with_kwargs=True)
        with self.progress_bar(total=num_steps) as progress_bar, keeping:
            for i, t in enumerate(scheduler.timesteps):
                if self.interrupt:
                    continue
                was_guided, guided = guided, ever_guided and guidance_start <= i / num_steps < guidance_end
                copies = 2 if guided else 1
                changed = guided != was_guided  # what is kept has another batch
                whole = changed or i % deep_cache_interval == 0
                unet = self.unet if whole else shallow

                # 5.1 The reference, brought to the step's noise level, writes its keys and values. Its noise is drawn
                # whether or not it is used, the positive part first: no other noise may depend on that.
                noise = randn_tensor(
                    reference_latents.shape, generator=generator, device=device, dtype=self.unet.dtype
                )
                reference_input, reference_embeds, text_embeds = reference_latents, prompt_embeds, prompt_embeds
                if guided:
                    n = len(negative_prompt_embeds)
                    noise = torch.cat([negative_noise[i : i + 1].expand(n, -1, -1, -1), noise])
                    reference_input = torch.cat([negative_latents.expand(n, -1, -1, -1), reference_latents])
                    reference_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
                    text_embeds = torch.cat([negative_prompt_embeds.expand(num_tiles, -1, -1), prompt_embeds])
                if changed or i % reference_interval == 0:
                    cache = ReferenceCache(last_layer) if whole else cache
                    reference_input = scheduler.add_noise(reference_input, noise, t.reshape(1))
                    write = {**cross_attention_kwargs, "reference": cache, "reference_mode": "write"}
                    unet(
                        scheduler.scale_model_input(reference_input, t),
                        t,
                        encoder_hidden_states=reference_embeds,
                        cross_attention_kwargs=write,
                        return_dict=False,
                    )

                # 5.2 The tile reads them
                model_input = scheduler.scale_model_input(latents.repeat(copies, 1, 1, 1), t)
                if control_image is None or not control_guidance_start <= i / num_steps < control_guidance_end:
                    residuals = {}
                elif whole or not residuals:
                    control = [pixels.repeat(copies, 1, 1, 1) for pixels in control_image]
                    down, mid = self.controlnet(
                        model_input,
                        t,
                        encoder_hidden_states=text_embeds,
                        controlnet_cond=control if multiple else control[0],
                        conditioning_scale=controlnet_conditioning_scale,
                        return_dict=False,
                    )
                    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
                if residuals and not whole:  # the last layers take the first residual alone
                    residuals = {**residuals, "mid_block_additional_residual": 0}
                noise_pred = unet(
                    model_input,
                    t,
                    encoder_hidden_states=text_embeds,
                    cross_attention_kwargs={**cross_attention_kwargs, "reference": cache, "reference_mode": "read"},
                    return_dict=False,
                    **residuals,
                )[0]

                # 5.3 Guide and step
                if guided:
                    negative_pred, positive_pred = noise_pred.chunk(2)
                    noise_pred = negative_pred + guidance_scale * (positive_pred - negative_pred)
                    if guidance_rescale > 0:
                        noise_pred = _rescale_guidance(noise_pred, positive_pred, guidance_rescale)
                latents = scheduler.step(noise_pred, t, latents, **step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, i, t, given) or {}
                    latents, prompt_embeds, negative_prompt_embeds = tensors.values()
                progress_bar.update()

        # 6. Decode
        if not torch.isfinite(latents).all():
            raise ValueError(
                f"The latents are not finite: {self.unet.dtype} overflowed, or a callback or LoRA broke them. Load the"
                " pipeline with dtype=torch.bfloat16 or torch.float32."
            )
        latents = unscale_latents(latents)
        if output_type == "latent":
            images, views = latents, None
        else:
            pixels = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype), return_dict=False)[
                0
            ]
            images = self.image_processor.postprocess(unscale_image(pixels), output_type=output_type)
            views = split_views(images)
        self.maybe_free_model_hooks()
        return Zero123PlusPipelineOutput(images=images, views=views) if return_dict else (images, views)
