"""Pipelines before any training: of any size with random weights, and Stable Diffusion 2 with a vision tower."""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from pipeline import IMAGE_MEAN, IMAGE_STD, Zero123PlusPipeline

# The linear schedule of the paper: more steps at high noise than Stable Diffusion's scaled-linear one (section 2.1).
SCHEDULE = {
    "beta_schedule": "linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
}


@dataclass(frozen=True)
class Size:
    """The size of a pipeline.

    Args:
        tile: height and width in pixels.
        picture: pixels of the reference picture's edge.
        width: of the text states, and so of the CLIP image embedding.
        unet, vae, text, vision: what their configurations have beside that and the stock values.
        clip_resample: PIL's number of the filter that resizes pictures for the vision encoder; 3 is bicubic.
        settings: of the pipeline, such as `default_num_inference_steps`.
    """

    tile: tuple[int, int]
    picture: int
    width: int
    unet: dict
    vae: dict
    text: dict
    vision: dict
    clip_resample: int = 3
    settings: dict = field(default_factory=dict)


def attention_levels(down: str, up: str) -> dict:
    """Block types of a UNet, by the initials of the down and up levels: C with attention, D and U without."""
    types = {"C": ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), "D": ("DownBlock2D",), "U": ("UpBlock2D",)}
    return {
        "down_block_types": tuple(types[level][0] for level in down),
        "up_block_types": tuple(types[level][-1] for level in up),
    }


def vae_levels(channels: tuple[int, ...], layers: int, groups: int) -> dict:
    """The configuration of a VAE whose factor is 2 to the number of levels less one."""
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "scaling_factor": 0.18215,
    }


def clip_layers(layers: int, heads: int, **more) -> dict:
    """The configuration of a text encoder or a vision tower of CLIP."""
    return {"num_hidden_layers": layers, "num_attention_heads": heads, **more}


# The size of the public checkpoints: the reference has 64 x 64 latents, the tile 120 x 80
FULL = Size(
    tile=(960, 640),
    picture=512,
    width=1024,
    unet={"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": [5, 10, 20, 20]}
    | attention_levels("CCCD", "UCCC"),
    vae=vae_levels((128, 256, 512, 512), layers=2, groups=32),
    text=clip_layers(23, 16, max_position_embeddings=77),
    vision=clip_layers(32, 16, hidden_size=1280, intermediate_size=5120, image_size=224, patch_size=14),
)
# In the same proportions, for a CPU: 32 x 32 and 60 x 40
SMALL = Size(
    tile=(480, 320),
    picture=256,
    width=128,
    unet={"block_out_channels": (64, 128, 256), "attention_head_dim": [1, 2, 4]} | attention_levels("CCD", "UCC"),
    vae=vae_levels((16, 32, 64, 64), layers=2, groups=16),
    text=clip_layers(4, 4, max_position_embeddings=77),
    vision=clip_layers(4, 4, hidden_size=128, intermediate_size=512, image_size=112, patch_size=14),
)


def build_tokenizer(tokens: int) -> CLIPTokenizer:
    """A tokenizer of single characters, which pads to so many tokens. It takes any prompt and needs no download."""
    characters = [chr(code) for code in range(33, 127)]
    words = characters + [character + "</w>" for character in characters] + ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:  # from files, as every version of transformers takes it
        Path(folder, "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=tokens)


def square_processor(edge: int, **options) -> CLIPImageProcessor:
    """A preprocessing that gives squares of `edge` pixels."""
    crop = {"height": edge, "width": edge}
    return CLIPImageProcessor(size={"shortest_edge": edge}, crop_size=crop, do_convert_rgb=True, **options)


def reference_processor(edge: int) -> CLIPImageProcessor:
    """The preprocessing of reference pictures: squares of `edge` pixels, bilinear, scaled as the tile is."""
    return square_processor(edge, resample=2, image_mean=[IMAGE_MEAN] * 3, image_std=[IMAGE_STD] * 3)


def build(
    size: Size,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    vae: AutoencoderKL | None = None,
) -> Zero123PlusPipeline:
    """A pipeline with random weights of torch's global generator, which are made on the device.

    Args:
        size: such as `FULL`.
        device: "meta" makes weights without data.
        dtype: of the weights.
        vae: in place of one with random weights.
    """
    tokenizer = build_tokenizer(size.text["max_position_embeddings"])
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {"vocab_size": 49408, "intermediate_size": 4 * size.width, "hidden_act": "gelu", **ids, **size.text}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            vae = AutoencoderKL(**size.vae) if vae is None else vae
            factor, latents = 2 ** (len(vae.config.block_out_channels) - 1), vae.config.latent_channels
            unet = UNet2DConditionModel(
                sample_size=[edge // factor for edge in size.tile],
                in_channels=latents,
                out_channels=latents,
                cross_attention_dim=size.width,
                use_linear_projection=True,
                **size.unet,
            )
            text_encoder = CLIPTextModel(CLIPTextConfig(hidden_size=size.width, **text))
            vision = CLIPVisionConfig(projection_dim=size.width, **{"hidden_act": "gelu", **size.vision})
            vision_encoder = CLIPVisionModelWithProjection(vision)
    finally:
        torch.set_default_dtype(before)
    pipe = Zero123PlusPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=EulerAncestralDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"),
        vision_encoder=vision_encoder.eval(),
        feature_extractor_clip=square_processor(size.vision["image_size"], resample=size.clip_resample),
        feature_extractor_vae=reference_processor(size.picture),
        cameras="v1.2",
        **size.settings,
    )
    return pipe.to(device)


def assemble(checkpoint: str | Path, vision_encoder: str) -> Zero123PlusPipeline:
    """Zero123++ before any training: Stable Diffusion 2 (v) with a CLIP vision tower beside it, whose projection is as
    wide as the prompt's states.

    Raises:
        ValueError: if either is of another kind.
    """
    options = {"dtype": torch.float32, "use_safetensors": True}
    parts = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None, **options)
    kind = parts.scheduler.config.prediction_type
    if kind != "v_prediction":
        raise ValueError(
            f"{checkpoint} predicts {kind!r}, but Zero123++ starts from v-prediction: give"
            " stabilityai/stable-diffusion-2."
        )
    tower = CLIPVisionModelWithProjection.from_pretrained(vision_encoder, **options)
    width = parts.unet.config.cross_attention_dim
    if tower.config.projection_dim != width:
        raise ValueError(
            f"`--vision-encoder` {vision_encoder} projects to {tower.config.projection_dim} channels, but the prompt's"
            f" states have {width}: give the tower that matches, for Stable Diffusion 2 CLIP ViT-H/14."
        )
    return Zero123PlusPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=EulerAncestralDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"),
        vision_encoder=tower,
        feature_extractor_clip=CLIPImageProcessor.from_pretrained(vision_encoder),
        feature_extractor_vae=reference_processor(512),
    )
