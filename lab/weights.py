"""What was done to the shipped weights beside training: their start, their mean, and a LoRA of a lower rank.

    python -m lab.weights --vae out/vae --output out/start                            # the untrained checkpoint
    python -m lab.weights --checkpoint out/unet --average . --share 0.5 --vae out/vae --output out/mean
    python -m lab.weights --checkpoint . --controlnet --output out/control            # a small ControlNet to train
    python -m lab.weights --lora out/student --rank 10 --output out/student-10

`training.publish` then puts the new folder into the repository.
"""

import json
from pathlib import Path

import safetensors.torch
import torch
from diffusers import AutoencoderKL, ControlNetModel
from torch.nn import functional as F

from pipeline import Zero123PlusPipeline
from training.checkpoints import load_start
from training.untrained import Size, attention_levels, build, clip_layers
from zero123plus.files import new_folder
from zero123plus.loading import LORA_FILE, RUN_FILE, find_lora, resolve_checkpoint, run_record
from zero123plus.options import Parser, command, count, share

from .vae import CONFIG

# Views of 128 pixels. The picture is seen finer than the views are made. Eight steps and low guidance suit so small a
# model: on 24 toys that are neither trained on nor evaluated its tiles are as good after 8 steps as after 16 (PSNR
# 18.48 and 18.40, LPIPS 0.318 and 0.315).
MINI = Size(
    tile=(384, 256),
    picture=192,
    width=256,
    unet={
        "block_out_channels": (128, 160, 160),
        "attention_head_dim": [4, 5, 5],
        "layers_per_block": 1,
        "norm_num_groups": 16,
        **attention_levels("CCC", "CCC"),
    },
    vae=CONFIG,
    text=clip_layers(2, 4, vocab_size=190, intermediate_size=512, max_position_embeddings=16, hidden_act="quick_gelu"),
    vision=clip_layers(
        4, 8, hidden_size=256, intermediate_size=1024, image_size=64, patch_size=16, hidden_act="quick_gelu"
    ),
    clip_resample=4,  # box filtering: a large picture keeps its colours at this size
    settings={"default_num_inference_steps": 8, "default_guidance_scale": 2.0},
)


def build_start(vae: AutoencoderKL) -> Zero123PlusPipeline:
    """The untrained mini. Its UNet begins as the identity of its skip connections: the last layer of every branch has
    zero weights.
    """
    pipe = build(MINI, vae=vae)
    for name, module in pipe.unet.named_modules():
        if name.endswith(("conv2", "proj_out")) or name == "conv_out":
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return pipe


def build_controlnet(pipe: Zero123PlusPipeline) -> ControlNetModel:
    """A ControlNet without effect yet, less than half of the usual size: the UNet's encoder without its attention.

    It begins with the UNet's weights where both have the same layers. The condition is aligned with the tile, so that
    convolutions suffice, and without attention two ControlNets fit into the repository.
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


def same_latents(a: AutoencoderKL, b: AutoencoderKL) -> bool:
    """Whether two VAEs encode alike, up to half precision."""
    ours, theirs = (vae.encoder.state_dict() | vae.quant_conv.state_dict() for vae in (a, b))
    same = {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    return same and all(torch.allclose(ours[key], theirs[key], 0.01, 1e-3) for key in ours)


def average(pipe: Zero123PlusPipeline, other: Zero123PlusPipeline, share: float):
    """Moves what was trained of a pipeline, UNet, vision encoder and ramp, to the mean of its weights and another's of
    the same latents, which has `share` in it (arXiv 2109.01903, section 3).
    """
    if not same_latents(pipe.vae, other.vae):
        raise ValueError("`--average` has another VAE encoder: average checkpoints of the same latents.")
    for name in ("unet", "vision_encoder"):
        ours, theirs = getattr(pipe, name).state_dict(), getattr(other, name).state_dict()
        if {key: value.shape for key, value in ours.items()} != {key: value.shape for key, value in theirs.items()}:
            raise ValueError(f"`--average` has another {name}: average checkpoints with the same layers.")
        for key in (key for key, value in ours.items() if value.is_floating_point()):
            ours[key].lerp_(theirs[key], share)
    ramps = (torch.tensor(p.config.ramping_coefficients) for p in (pipe, other))
    pipe.register_to_config(ramping_coefficients=torch.lerp(*ramps, share).tolist())


def reduce_rank(down: torch.Tensor, up: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation of a layer's LoRA, `up` times `down`, by one of a lower rank in the Frobenius norm,
    scaled so that this norm stays: without, the LoRA would do a little less of everything.
    """
    # The singular values of up @ down are those of the small product of the triangular factors
    (q_up, r_up), (q_down, r_down) = map(torch.linalg.qr, (up.flatten(1).double(), down.flatten(1).double().T))
    u, values, v = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    root = (values[:rank] * values.norm() / values[:rank].norm().clamp(min=1e-12)).sqrt()
    # A layer of fewer channels is filled up with zeros: diffusers scales layers of other ranks differently
    factors = (F.pad(q * root, (0, rank - len(root))) for q in (q_down @ v[:rank].T, q_up @ u[:, :rank]))
    left, right = factors
    return left.T.reshape(rank, *down.shape[1:]), right.reshape(-1, rank, *up.shape[2:])


def write_lora(source: Path, weight_name: str, rank: int, folder: Path):
    """Writes a LoRA of a lower rank with its record."""
    layers = safetensors.torch.load_file(source / weight_name)
    pairs = {key: key.replace(".lora_A.", ".lora_B.") for key in layers if ".lora_A." in key}
    if layers.keys() != {*pairs, *pairs.values()} or any(len(layers[key]) < rank for key in pairs):
        raise ValueError(f"`--rank` is {rank}, but {source} has no pairs lora_A and lora_B of at least that rank.")
    reduced = {k: v for names in pairs.items() for k, v in zip(names, reduce_rank(*map(layers.get, names), rank))}
    safetensors.torch.save_file(
        {key: value.float().contiguous() for key, value in reduced.items()}, folder / LORA_FILE
    )
    (folder / RUN_FILE).write_text(json.dumps(run_record(source), indent=2) + "\n")


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = Parser("Make a checkpoint, ControlNet or LoRA of other weights.")
    add = parser.add_argument
    add("--checkpoint", help="folder or run to start from; an untrained one if missing")
    add("--vae", help="folder or run of lab.vae, whose VAE it gets")
    add("--average", help="checkpoint whose weights are averaged with those of --checkpoint")
    add("--share", type=share, default=0.5, help="share of --average in the mean")
    add("--controlnet", action="store_true", help="make a small ControlNet for --checkpoint instead")
    add("--lora", help="LoRA that is reduced instead")
    add("--rank", type=count, default=10, help="rank of the reduced LoRA")
    add("--output", type=Path, required=True, help="new folder")
    o = parser.parse_args(argv)
    torch.manual_seed(0)
    if o.lora:
        with new_folder(o.output) as folder:
            write_lora(*find_lora(o.lora), o.rank, folder)
        return
    vae = AutoencoderKL.from_pretrained(resolve_checkpoint(o.vae), use_safetensors=True) if o.vae else None
    pipe = load_start(o.checkpoint) if o.checkpoint else build_start(vae)
    if o.average:
        average(pipe, load_start(o.average), o.share)
    if vae is not None:
        if not same_latents(vae, pipe.vae):
            raise ValueError(f"`--vae` {o.vae} has another encoder: train it from the VAE of `--checkpoint`.")
        pipe.vae = vae
    with new_folder(o.output) as folder:
        (build_controlnet(pipe) if o.controlnet else pipe).save_pretrained(folder)


if __name__ == "__main__":
    main()
