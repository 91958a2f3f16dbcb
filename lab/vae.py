"""Makes the small VAE of the mini checkpoint: a closed-form encoder, and a decoder that is trained.

    python -m lab.vae --data data/train --output out/vae --minutes 30

Full-size training uses the VAE of Stable Diffusion instead. The encoder is a principal component analysis
(`initialise_encoder`). `OUTPUT/checkpoint-0` holds it within a minute, and it does not change any more, so that the
UNet can be trained at the same time as the decoder. The decoder learns from latents with random noise of up to
`MAX_NOISE` of each component's deviation, so that the UNet's imperfect latents still become clean pictures.
`--perceptual` adds LPIPS to its loss, for sharp pictures on clean backgrounds. Run, log, schedule and launch are those
of `training.train`; a checkpoint is a folder that `AutoencoderKL.from_pretrained` loads.
The run ends with an error if the reconstructions have less than 0.9 of the true saturation.
"""

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from pipeline import LATENT_SCALE, LATENT_SHIFT, scale_image, unscale_image
from training.checkpoints import Run, with_weights
from training.data import Stream, channels_first, on_grey
from training.optimizers import build_schedule
from training.perceptual import Lpips
from training.shards import load_objects
from zero123plus.loading import resolve_checkpoint
from zero123plus.options import Parser, command, count, positive

CONFIG = {
    "block_out_channels": (16, 32, 64, 128, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 5,
    "up_block_types": ("UpDecoderBlock2D",) * 5,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 32,
    "sample_size": 128,
    "scaling_factor": 0.18215,
}
# Raw latents, before the target space is scaled and shifted, have the mean `LATENT_SHIFT` and the deviation
# 1 / `LATENT_SCALE`, both times this inverse of the scaling factor, so that the scaled latents that the UNet denoises
# have mean 0 and deviation 1. As in Stable Diffusion, raw latents are about 5 times as large as unit noise, which
# scaled reference attention relies on.
RAW = 1 / CONFIG["scaling_factor"]
# The deviation of component k is made (std_k)^POWER. With 0 the fine components would be as loud as the coarse ones,
# and the UNet's training would spend itself on them; with 1 noise would drown fine detail.
POWER = 0.75
# The posterior's constant deviation, as a share of each component's own. A learned one would start at 1 and hide the
# latents for longer than a short training lasts.
NOISE = 0.03
MAX_NOISE = 0.3  # of a component's deviation, in the latents that the decoder learns from
SATURATION_GATE = 0.9
EMA_DECAY = 0.99
SAVE_MINUTES = 5


def chroma(pixels: torch.Tensor) -> torch.Tensor:
    """Colour without brightness: each channel's distance to the mean of the channels, shape (B, 3, H, W)."""
    return pixels - pixels.mean(1, keepdim=True)


class ViewDataset(torch.utils.data.Dataset):
    """Single views: `pixels`, RGB on grey, float32 of shape (3, S, S) in [-1, 1], and `alpha` of shape (1, S, S)."""

    def __init__(self, folder: Path):
        parts = ((item["inputs"], *item["targets"]) for item in load_objects(folder))
        self.views = np.concatenate([views for part in parts for views in part])

    def __len__(self):
        return 2 * len(self.views)

    def __getitem__(self, index: int) -> dict:
        view = self.views[index // 2]
        view = np.ascontiguousarray(view[:, ::-1] if index % 2 else view)
        alpha = torch.from_numpy(view[..., 3]).float()[None] / 255
        return {"pixels": channels_first(on_grey(view)) / 127.5 - 1, "alpha": alpha}


def loss_function(reconstruction: torch.Tensor, pixels: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Squared error of colour and of chroma with the object weighted 4 to 1, and a little absolute error; shapes
    (B, 3, H, W), alpha (B, 1, H, W).

    The error is squared because the minimum of the absolute error is the median, which is grey wherever the colour is
    still uncertain.
    """
    weight = 1 + 3 * alpha
    error = (reconstruction - pixels).square() + 3 * (chroma(reconstruction) - chroma(pixels)).square()
    error = error + 0.02 * (reconstruction - pixels).abs()
    return (weight * error).mean() / weight.mean()


def principal_components(blocks: torch.Tensor, weight: torch.Tensor, count: int) -> torch.Tensor:
    """Finds the `count` leading directions, shape (count, D), of `blocks` (B, D, h, w), weighted by `weight`
    (B, 1, h, w). They are taken about zero rather than about the mean: zero is the background, which then stays zero.
    """
    rows = (blocks * weight.sqrt()).transpose(0, 1).flatten(1).double()
    # Of a matrix of low rank in float32 MKL finds no eigenvectors on some processors
    return torch.linalg.eigh(rows @ rows.T).eigenvectors.flip(1).T[:count].float()


@torch.no_grad()
def initialise_encoder(vae: AutoencoderKL, pixels: torch.Tensor, alpha: torch.Tensor):
    """Makes the encoder the PCA of blocks of 16 x 16 pixels, in closed form, and normalises its latents.

    Each level gathers 2 x 2 neighbours into channels and keeps the leading components: its strided convolution does
    all, and the residual branches are off. The last norm and SiLU are passed by pairs x, -x, for
    silu(x) - silu(-x) = x, beside a constant pair in each group so large that the norm divides by a constant. Colour
    is in the latents from the start, the UNet's training can begin, and only the decoder is learned.

    Args:
        vae: of `CONFIG`'s form.
        pixels: of views, scaled as the VAE takes them, shape (B, 3, H, W).
        alpha: their masks, shape (B, 1, H, W); components count the object 100 times the background.
    """
    encoder, channels = vae.encoder, vae.config.latent_channels
    for name, parameter in encoder.named_parameters():
        if "norm" not in name:
            parameter.zero_()
    encoder.conv_in.weight[range(3), range(3), 1, 1] = 1
    features, weight = pixels, 0.01 + alpha
    for block in encoder.down_blocks[:-1]:
        resnet, conv = block.resnets[0], block.downsamplers[0].conv
        if resnet.conv_shortcut is not None:
            diagonal = range(resnet.in_channels)
            resnet.conv_shortcut.weight[diagonal, diagonal, 0, 0] = 1
        used, last = features.shape[1], block is encoder.down_blocks[-2]
        gathered = torch.nn.functional.pixel_unshuffle(features, 2)  # channel 4 d + 2 row + column
        weight = torch.nn.functional.avg_pool2d(weight, 2)
        basis = principal_components(gathered, weight, channels if last else min(conv.out_channels, gathered.shape[1]))
        features = torch.einsum("cd,bdhw->bchw", basis, gathered)
        kernels = basis.reshape(len(basis), used, 2, 2)
        if not last:
            conv.weight[: len(basis), :used, :2, :2] = kernels

    # Channels of a group of the last norm: x, -x for each of its latents, then the constant pair
    norm, out = encoder.conv_norm_out, encoder.conv_out
    group, share = norm.num_channels // norm.num_groups, channels // norm.num_groups
    large = 20 * features.std((0, 2, 3)).max().item()
    for i in range(channels):
        x = group * (i // share) + 2 * (i % share)
        conv.weight[x, :used, :2, :2], conv.weight[x + 1, :used, :2, :2] = kernels[i], -kernels[i]
        out.weight[i, x, 1, 1], out.weight[i, x + 1, 1, 1] = 1, -1
    conv.bias[group - 2 :: group], conv.bias[group - 1 :: group] = large, -large
    norm.weight.fill_(large * math.sqrt(2 / group))

    # The latents' scale and shift, the posterior's constant deviation, and their inverse in front of the decoder
    vae.quant_conv.weight.zero_()
    vae.quant_conv.bias.zero_()
    diagonal = range(channels)
    vae.quant_conv.weight[diagonal, diagonal, 0, 0] = 1
    latents = vae.encode(pixels).latent_dist.mean
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    flattened = std**POWER
    flattened *= RAW / LATENT_SCALE / flattened.square().mean().sqrt()  # new deviation of each component
    gain = flattened / std
    vae.quant_conv.weight *= gain.repeat(2)[:, None, None, None]
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[:channels] = LATENT_SHIFT * RAW - mean * gain
    vae.quant_conv.bias[channels:] = 2 * (NOISE * flattened).log()  # logarithm of the variance
    vae.post_quant_conv.weight.zero_()
    vae.post_quant_conv.weight[diagonal, diagonal, 0, 0] = 1 / gain
    vae.post_quant_conv.bias.copy_(mean - LATENT_SHIFT * RAW / gain)


def noisy_latents(posterior) -> torch.Tensor:
    """The posterior's mean with noise whose level is drawn for each picture, up to `MAX_NOISE` of each component's
    deviation; shape (B, C, h, w).
    """
    level = MAX_NOISE * torch.rand(len(posterior.mean), 1, 1, 1, device=posterior.mean.device)
    return posterior.mean + level * (posterior.std / NOISE) * torch.randn_like(posterior.mean)


@torch.no_grad()
def reconstruction_quality(vae: AutoencoderKL, batch: dict) -> dict:
    """Saturation of reconstructions relative to the truth's, and PSNR in dB over object and background."""
    pixels, alpha = batch["pixels"], batch["alpha"]
    posterior = vae.encode(scale_image(pixels)).latent_dist
    reconstruction = (vae.decode(posterior.mean).sample / scale_image(torch.ones(()))).clamp(-1, 1)
    error = (reconstruction - pixels).square().mean(1, keepdim=True) / 4

    def psnr(weight):
        return -10 * torch.log10((error * weight).sum() / weight.sum()).item()

    def saturation(x):
        return ((x.amax(1) - x.amin(1)) * alpha[:, 0]).sum()

    ratio = (saturation(reconstruction) / saturation(pixels)).item()
    return {"saturation": ratio, "psnr_object": psnr(alpha), "psnr_background": psnr(1 - alpha)}


def sample_views(dataset: ViewDataset, count: int) -> dict:
    """`count` views evenly spread over `dataset`, or all if there are fewer, as one batch."""
    indices = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
    return torch.utils.data.default_collate([dataset[i] for i in indices])


class Decoder(torch.nn.Module):
    """What is trained, as the module that accelerate wraps."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels of shape (B, 3, H, W) of latents of shape (B, C, h, w)."""
        return self.vae.decode(latents).sample


def train_decoder(o: argparse.Namespace) -> dict:
    """Trains a decoder as the options say, and returns what [`reconstruction_quality`] measures at the end."""
    set_seed(0)
    accelerator = Accelerator(mixed_precision=o.mixed_precision)
    dataset = ViewDataset(o.data)
    if len(dataset) < o.batch_size * accelerator.num_processes:
        raise ValueError(
            f"`--batch-size` is {o.batch_size}, but `--data` {o.data} has only {len(dataset)} views, plain and"
            " mirrored: render more objects, or give fewer views a step."
        )
    run = Run(o.output, accelerator, {"checkpoint": o.checkpoint}, keep=1)
    start = run.newest or (resolve_checkpoint(o.checkpoint) if o.checkpoint else None)
    vae = AutoencoderKL(**CONFIG)
    if start:
        vae = AutoencoderKL.from_pretrained(start)
    else:
        views = sample_views(dataset, 512)
        initialise_encoder(vae, scale_image(views["pixels"]), views["alpha"])
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=o.learning_rate, betas=(0.9, 0.99))
    schedule = build_schedule("timed", optimizer, 100, 1, 1, partial(run.time_left, o.minutes))
    vae.to(accelerator.device)
    distance = Lpips("vgg16").to(accelerator.device, memory_format=torch.channels_last) if o.perceptual else None
    model, optimizer = accelerator.prepare(Decoder(vae), optimizer)
    parameters = list(vae.decoder.parameters())
    ema = EMAModel(parameters, decay=EMA_DECAY)
    step, seen = run.restore(ema, optimizer)

    def write(weights: dict, folder: Path):
        with_weights(vae, weights, "vae").save_pretrained(folder)

    save = partial(run.save, write, model, ema, optimizer)
    if not step:
        save(0, 0)
    check = sample_views(ViewDataset(o.validation) if o.validation else dataset, 64)
    check = {name: value.to(accelerator.device) for name, value in check.items()}
    log = run.open_log(step)
    stream = Stream(dataset, 0, seen, sys.maxsize)
    loader = accelerator.prepare(torch.utils.data.DataLoader(stream, o.batch_size, drop_last=True))
    bar = tqdm(desc="VAE decoder", unit="step", initial=step, disable=not accelerator.is_main_process)
    for batch in loader:
        pixels = scale_image(batch["pixels"])
        with torch.no_grad(), accelerator.autocast():
            latents = noisy_latents(vae.encode(pixels).latent_dist)
        reconstruction = model(latents).float()
        loss = loss_function(reconstruction, pixels, batch["alpha"])
        if distance:
            with accelerator.autocast():
                loss = loss + o.perceptual * distance(unscale_image(reconstruction), batch["pixels"]).float().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.step(parameters)
        step, seen = step + 1, seen + o.batch_size * accelerator.num_processes
        bar.update()
        line = {"step": step, "views": seen, "loss": accelerator.reduce(loss.detach(), "mean")}
        if step % 100 == 0:
            line |= reconstruction_quality(vae, check)
        log.write(line)
        done = run.time_left(o.minutes) < 0
        if run.is_due(SAVE_MINUTES) or done:
            log.flush()
            save(step, seen)
        if done:
            break
    ema.copy_to(parameters)
    return {"step": step, **reconstruction_quality(vae, check)}


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = Parser("Make the mini checkpoint's VAE.")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of rendered shards")
    add("--validation", type=Path, help="folder of held-out shards, to measure on; --data if missing")
    add("--output", type=Path, required=True, help="folder of the run; an interrupted run continues")
    add("--checkpoint", help="VAE to start from, whose encoder stays; a new one if missing")
    add("--minutes", type=positive, default=30.0, help="minutes of this run, in which the rate falls to 0")
    add("--batch-size", type=count, default=16, help="views of a step in each process")
    add("--learning-rate", type=positive, default=2e-3, help="learning rate at the start")
    add("--mixed-precision", choices=("no", "bf16"), help="what `accelerate launch` says if missing")
    add("--perceptual", type=positive, default=0.0, help="weight of LPIPS (VGG-16) in the loss")
    add("--gate", type=positive, default=SATURATION_GATE, help="least saturation, relative to the truth's")
    o = parser.parse_args(argv)
    result = train_decoder(o)
    print(json.dumps({**result, "gate": result["saturation"] >= o.gate}))
    if result["saturation"] < o.gate:
        raise ValueError(
            f"The reconstructions have {result['saturation']:.2f} of the truth's saturation, below `--gate` {o.gate}."
        )


if __name__ == "__main__":
    main()
