"""Assembles the untrained mini pipeline: stock classes at small size around a trained VAE.

    python -m training.mini --vae out/vae/vae --output out/mini

The other options are for ablations (`training/ablations.sh`): each changes the starting pipeline, and so everything
that is trained and sampled from it. With `--checkpoint` in place of `--vae` they change a trained pipeline.

    python -m training.mini --checkpoint . --controlnet --output out/control

makes a small ControlNet for that checkpoint instead, for `training.train_controlnet --controlnet`.
"""

import json
import math
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from pipeline import CAMERAS, COLUMNS, IMAGE_MEAN, IMAGE_STD, ROWS, Zero123PlusPipeline
from zero123plus.loading import find, load_components
from zero123plus.options import Parser, add_cameras_option, command, number

VIEW_SIZE = 128
REFERENCE_SIZE = 192  # the picture is seen finer than the views are made
CLIP_SIZE = 64
TOKENS = 16
WIDTH = 256  # of the text states, and so of the CLIP image embedding
# What a call uses that names neither. Low guidance suits a small model. On 24 toys that are neither trained on nor
# evaluated its tiles are as good after 8 steps as after 16 (PSNR 18.48 and 18.40, LPIPS 0.318 and 0.315).
DEFAULT_STEPS, DEFAULT_GUIDANCE = 8, 2.0

# The linear schedule of the paper: more steps at high noise than Stable Diffusion's scaled-linear one (section 2.1).
SCHEDULE = {
    "beta_schedule": "linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
}


def build_tokenizer() -> CLIPTokenizer:
    """A tokenizer of single characters: the mini checkpoint is trained without prompts, but must take any."""
    characters = [chr(code) for code in range(33, 127)]
    tokens = characters + [character + "</w>" for character in characters] + ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:  # from files, as every version of transformers takes it
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def build_unet(vae: AutoencoderKL, channels, attention, width: int, view_size: int) -> UNet2DConditionModel:
    """The UNet of [`build_pipeline`]. It begins as the identity of its skip connections: the last layer of every
    branch has zero weights.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    unet = UNet2DConditionModel(
        sample_size=[ROWS * view_size // factor, COLUMNS * view_size // factor],
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)),
        layers_per_block=1,
        attention_head_dim=[count // 32 for count in channels],  # the number of heads, as Stable Diffusion 2 names it
        cross_attention_dim=width,
        norm_num_groups=16,
        use_linear_projection=True,
    )
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out")) or name == "conv_out":
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return unet


def reference_processor(edge: int) -> CLIPImageProcessor:
    """The preprocessing of reference pictures: squares of `edge` pixels, scaled as the tile is."""
    return CLIPImageProcessor(**edges(edge), resample=2, image_mean=[IMAGE_MEAN] * 3, image_std=[IMAGE_STD] * 3)


def edges(size: int) -> dict:
    """What makes an image processor give squares of `size` pixels."""
    return {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}, "do_convert_rgb": True}


def build_pipeline(
    vae: AutoencoderKL,
    channels: tuple[int, ...] = (128, 160, 160),
    attention: tuple[bool, ...] = (True, True, True),
    width: int = WIDTH,
    view_size: int = VIEW_SIZE,
    reference_size: int = REFERENCE_SIZE,
    clip_size: int = CLIP_SIZE,
) -> Zero123PlusPipeline:
    """The mini pipeline around `vae`; every other component has random weights from torch's global generator.

    Args:
        vae: an untrained or trained one of `training.train_vae`.
        channels: of the UNet's levels, multiples of 32.
        attention: which levels have attention.
        width: of the text states, and so of the CLIP image embedding.
        view_size: pixels of a view's edge.
        reference_size: pixels of the reference picture's edge.
        clip_size: pixels of the edge that the vision tower sees.
    """
    tokenizer = build_tokenizer()
    unet = build_unet(vae, channels, attention, width, view_size)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=4,
        num_attention_heads=width // 32,
        image_size=clip_size,
        patch_size=clip_size // 4,
        projection_dim=width,
    )

    return Zero123PlusPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=EulerAncestralDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"),
        vision_encoder=CLIPVisionModelWithProjection(vision).eval(),
        # Box filtering (resample 4): a large picture keeps its colours at this size
        feature_extractor_clip=CLIPImageProcessor(**edges(clip_size), resample=4),
        feature_extractor_vae=reference_processor(reference_size),
        view_azimuths=CAMERAS["v1.2"].azimuths,
        view_elevations=CAMERAS["v1.2"].elevations,
        view_fov=CAMERAS["v1.2"].fov,
        default_num_inference_steps=DEFAULT_STEPS,
        default_guidance_scale=DEFAULT_GUIDANCE,
    )


def build_controlnet(pipe: Zero123PlusPipeline) -> ControlNetModel:
    """A ControlNet for the mini, less than half of the usual size: the UNet's encoder without its attention.

    It begins with the UNet's weights where both have the same layers. The condition is aligned with the tile, so that
    convolutions suffice, and without attention two ControlNets fit into the repository.

    Args:
        pipe: whose UNet is controlled.

    Returns:
        A ControlNet without effect yet, for control tiles of shape (B, 3, H, W) in [-1, 1].
    """
    config = pipe.unet.config
    controlnet = ControlNetModel(
        in_channels=config.in_channels,
        block_out_channels=config.block_out_channels,
        down_block_types=("DownBlock2D",) * len(config.block_out_channels),
        mid_block_type="UNetMidBlock2D",
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        cross_attention_dim=config.cross_attention_dim,
        conditioning_embedding_out_channels=(16, 32) + (96,) * (len(pipe.vae.config.block_out_channels) - 2),
    )
    controlnet.load_state_dict(pipe.unet.state_dict(), strict=False)
    # With PyTorch's usual weights each of these layers shrinks its input, so that nearly nothing of the condition
    # arrives and a short training does not find it. These weights are twice those that keep the size of a signal,
    # because SiLU halves small values.
    embedding = controlnet.controlnet_cond_embedding
    for layer in (embedding.conv_in, *embedding.blocks):
        torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
        layer.weight.data *= 2
        torch.nn.init.zeros_(layer.bias)
    return controlnet


@torch.no_grad()
def scale_reference(vae: AutoencoderKL, factor: float):
    """Makes raw latents, which the reference is given as, `factor` times as large. Scaled latents stay the same.

    Args:
        vae: changed in place.
        factor: 1 leaves the deviation of about 5.5 (5 times that of scaled latents, section 2.2 of the paper).
    """
    channels = vae.config.latent_channels
    vae.quant_conv.weight[:channels] *= factor
    vae.quant_conv.bias[:channels] *= factor
    vae.quant_conv.bias[channels:] += 2 * math.log(factor)  # logarithm of the variance
    vae.post_quant_conv.weight /= factor
    vae.register_to_config(scaling_factor=vae.config.scaling_factor / factor)


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = Parser("Assemble the untrained mini pipeline.")
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--vae", type=Path, help="folder or run of training.train_vae; the rest is random")
    start.add_argument("--checkpoint", help="folder of a mini pipeline to start from")
    add_cameras_option(parser.add_argument)
    parser.add_argument("--output", type=Path, required=True, help="new folder of the pipeline")
    parser.add_argument("--beta-schedule", choices=("linear", "scaled_linear"), default="linear")
    parser.add_argument("--reference-scale", type=number(float, 1e-3), default=5.0, help="of the reference's latents")
    parser.add_argument("--without", choices=("reference", "clip"), help="blank what reference attention or CLIP sees")
    parser.add_argument("--controlnet", action="store_true", help="make a ControlNet for the checkpoint instead")
    options = parser.parse_args(argv)
    if options.controlnet and not options.checkpoint:
        parser.error("`--controlnet` starts from a trained UNet: give `--checkpoint` in place of `--vae`.")
    if options.output.exists():
        raise ValueError(f"`--output` {options.output} exists: choose a new folder.")
    torch.manual_seed(0)
    if options.checkpoint:
        pipe = load_components(find(options.checkpoint), torch.float32, cameras=options.cameras)
    else:
        pipe = build_pipeline(AutoencoderKL.from_pretrained(find(options.vae)))
    if options.controlnet:
        build_controlnet(pipe).save_pretrained(options.output)
        return
    pipe.scheduler.register_to_config(beta_schedule=options.beta_schedule)
    if options.reference_scale != 5:
        scale_reference(pipe.vae, options.reference_scale / 5)
    if options.without:
        extractor = pipe.feature_extractor_vae if options.without == "reference" else pipe.feature_extractor_clip
        extractor.image_std = [1e6] * 3  # every picture is the same
    pipe.save_pretrained(options.output)


if __name__ == "__main__":
    main()
