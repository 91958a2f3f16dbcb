"""Assembles the untrained mini pipeline: stock classes at small size around a trained VAE.

    python -m training.mini --vae out/vae/vae --output out/mini

The options are those of the paper's ablations (`training/ablations.sh`): they change the start, and with it all that
is trained and sampled from it. With `--checkpoint` in place of `--vae` they change one that is trained.

    python -m training.mini --checkpoint . --controlnet --output out/control

makes a small ControlNet for that checkpoint instead, for `training.train_controlnet --controlnet`.
"""

import argparse
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

from pipeline import COLUMNS, ROWS, Zero123PlusPipeline

VIEW_SIZE = 64
TOKENS = 16
WIDTH = 128  # of the text states, and so of the CLIP image embedding

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


def build_pipeline(vae: AutoencoderKL, channels: tuple[int, ...] = (96, 192)) -> Zero123PlusPipeline:
    """The mini pipeline around `vae`; every other component has random weights from torch's global generator.

    Args:
        vae: an untrained or trained one of `training.train_vae`.
        channels: of the UNet's levels, multiples of 32.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    tokenizer = build_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=[ROWS * VIEW_SIZE // factor, COLUMNS * VIEW_SIZE // factor],
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        layers_per_block=1,
        attention_head_dim=[width // 32 for width in channels],  # the number of heads, as Stable Diffusion 2 names it
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
        use_linear_projection=True,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=WIDTH,
    )
    clip_size = {"height": vision.image_size, "width": vision.image_size}
    view_size = {"height": VIEW_SIZE, "width": VIEW_SIZE}
    return Zero123PlusPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=EulerAncestralDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"),
        vision_encoder=CLIPVisionModelWithProjection(vision).eval(),
        feature_extractor_clip=CLIPImageProcessor(
            size={"shortest_edge": vision.image_size}, crop_size=clip_size, do_convert_rgb=True
        ),
        feature_extractor_vae=CLIPImageProcessor(
            size={"shortest_edge": VIEW_SIZE},
            crop_size=view_size,
            resample=2,
            image_mean=[0.5] * 3,
            image_std=[0.8] * 3,
            do_convert_rgb=True,
        ),
    )


def build_controlnet(pipe: Zero123PlusPipeline) -> ControlNetModel:
    """A ControlNet for the mini, less than half of the usual size: the UNet's encoder without its attention.

    It begins with the UNet's weights where both have the same layers.
    What a ControlNet sees acts where it lies, so that convolutions do, and the repository has room for two.

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
    # PyTorch's usual weights shrink what it sees at each of these layers: nearly nothing would arrive, and a short
    # training not find it. These are twice those that keep a signal's size, for SiLU halves small ones.
    embedding = controlnet.controlnet_cond_embedding
    for layer in (embedding.conv_in, *embedding.blocks):
        torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
        layer.weight.data *= 2
        torch.nn.init.zeros_(layer.bias)
    return controlnet


@torch.no_grad()
def scale_reference(vae: AutoencoderKL, factor: float):
    """Makes raw latents, as which the reference is shown, `factor` times as large; scaled latents stay what they are.

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


def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Assemble the untrained mini pipeline.")
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--vae", type=Path, help="folder of the VAE from training.train_vae; the rest is random")
    start.add_argument("--checkpoint", help="folder of a mini pipeline to start from")
    parser.add_argument("--output", type=Path, required=True, help="new folder of the pipeline")
    parser.add_argument("--beta_schedule", choices=("linear", "scaled_linear"), default="linear")
    parser.add_argument("--reference_scale", type=float, default=5.0, help="of the reference's latents")
    parser.add_argument("--without", choices=("reference", "clip"), help="blank what reference attention or CLIP sees")
    parser.add_argument("--controlnet", action="store_true", help="make a ControlNet for the checkpoint instead")
    options = parser.parse_args(argv)
    if options.controlnet and not options.checkpoint:
        parser.error("`--controlnet` starts from a trained UNet: give `--checkpoint` in place of `--vae`.")
    if options.output.exists():
        raise SystemExit(f"{options.output} exists: choose a new folder.")
    torch.manual_seed(0)
    if options.checkpoint:
        pipe = Zero123PlusPipeline.from_pretrained(options.checkpoint, trust_remote_code=True)
    else:
        pipe = build_pipeline(AutoencoderKL.from_pretrained(options.vae))
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
