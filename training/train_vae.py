"""Makes the small VAE of the mini checkpoint: a closed-form encoder, and a decoder that is trained.

    python -m training.train_vae --data data/train --output out/vae --minutes 30

Full-size training uses the VAE of Stable Diffusion instead. The encoder is a principal component analysis
(`initialise_encoder`). `OUTPUT/vae` holds it within a minute, and it does not change any more, so that the UNet can be
trained at the same time as the decoder. The decoder learns from latents with random noise of up to `MAX_NOISE` of each
component's deviation, so that the UNet's imperfect latents still become clean pictures. The run ends with an error if
the reconstructions have less than 0.9 of the true saturation.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from tqdm import tqdm

from pipeline import LATENT_SCALE, LATENT_SHIFT, scale_image
from zero123plus.options import command, count, number

from .data import ViewDataset
from .publish import replace

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


def chroma(pixels: torch.Tensor) -> torch.Tensor:
    """Colour without brightness: each channel's distance to the mean of the channels, shape (B, 3, H, W) as given."""
    return pixels - pixels.mean(1, keepdim=True)


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
    rows = (blocks * weight.sqrt()).transpose(0, 1).flatten(1)
    return torch.linalg.eigh(rows @ rows.T).eigenvectors.flip(1).T[:count]


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


def noisy_latents(posterior, max_noise: float) -> torch.Tensor:
    """The posterior's mean with noise whose level is drawn for each picture, up to `max_noise` of each component's
    deviation; shape (B, C, h, w).
    """
    level = max_noise * torch.rand(len(posterior.mean), 1, 1, 1, device=posterior.mean.device)
    return posterior.mean + level * (posterior.std / NOISE) * torch.randn_like(posterior.mean)


@torch.no_grad()
def measure(vae: AutoencoderKL, batch: dict) -> dict:
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


def save(accelerator: Accelerator, output: Path, **progress):
    """Writes the training state beside the last one and then takes its place."""
    fresh, old = output / "state.new", output / "state.old"
    shutil.rmtree(fresh, ignore_errors=True)
    accelerator.save_state(fresh)
    (fresh / "progress.json").write_text(json.dumps(progress))
    if (output / "state").exists():
        shutil.rmtree(old, ignore_errors=True)
        (output / "state").rename(old)
    fresh.rename(output / "state")


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the mini checkpoint's VAE.")
    parser.add_argument("--data", type=Path, required=True, help="folder of rendered shards")
    parser.add_argument("--validation", type=Path, help="the same, held out, to measure on (default: --data)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the VAE; an interrupted run continues")
    parser.add_argument(
        "--minutes", type=number(float, 0), default=30, help="of training in this run (default: %(default)s)"
    )
    parser.add_argument("--batch_size", type=count, default=16, help="views a step (default: %(default)s)")
    parser.add_argument(
        "--learning_rate",
        type=number(float, 0),
        default=2e-3,
        help="at the start; falls to a tenth (default: %(default)s)",
    )
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), help="what `accelerate launch` says if missing")
    parser.add_argument(
        "--max_noise",
        type=number(float, 0),
        default=MAX_NOISE,
        help="noise in the latents that the decoder learns from, as a share of their deviation (default: %(default)s)",
    )
    parser.add_argument(
        "--gate",
        type=number(float, 0),
        default=SATURATION_GATE,
        help="saturation, relative to the truth's, below which this fails (default: %(default)s)",
    )
    options = parser.parse_args(argv)

    set_seed(0)
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    dataset = ViewDataset(options.data)
    if len(dataset) < options.batch_size:
        raise ValueError(
            f"`--batch_size` is {options.batch_size}, but `--data` {options.data} has only {len(dataset)} views, plain"
            " and mirrored: render more objects, or give fewer views a step."
        )
    vae = AutoencoderKL(**CONFIG)
    if not (options.output / "vae").exists():
        views = sample_views(dataset, 512)
        initialise_encoder(vae, scale_image(views["pixels"]), views["alpha"])
        vae.save_pretrained(options.output / "vae")
    vae.load_state_dict(AutoencoderKL.from_pretrained(options.output / "vae").state_dict())
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=options.learning_rate, betas=(0.9, 0.99))
    loader = torch.utils.data.DataLoader(dataset, options.batch_size, shuffle=True, drop_last=True)
    vae, optimizer, loader = accelerator.prepare(vae, optimizer, loader)
    bare = accelerator.unwrap_model(vae)
    step, spent = 0, 0.0
    # The old one is alone there if the run ended while it was being replaced
    states = [path for name in ("state", "state.old") if (path := options.output / name).exists()]
    if states:
        accelerator.load_state(states[0])
        progress = json.loads((states[0] / "progress.json").read_text())
        step, spent = progress["step"], progress["seconds"]

    check = sample_views(ViewDataset(options.validation) if options.validation else dataset, 64)
    check = {name: value.to(accelerator.device) for name, value in check.items()}
    start = saved = time.time()
    total = 60 * options.minutes
    with tqdm(desc="VAE decoder", unit="step", initial=step) as bar:
        while time.time() - start < total:
            for batch in loader:
                if time.time() - start >= total:
                    break
                for group in optimizer.param_groups:
                    group["lr"] = (
                        options.learning_rate * max(0.1, 1 - (time.time() - start) / total) * min(1, (step + 1) / 100)
                    )
                pixels = scale_image(batch["pixels"])
                with accelerator.autocast():
                    with torch.no_grad():
                        latents = noisy_latents(bare.encode(pixels).latent_dist, options.max_noise)
                    reconstruction = bare.decode(latents).sample
                loss = loss_function(reconstruction.float(), pixels, batch["alpha"])
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(vae.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                bar.update()
                if step % 100 == 0:
                    record = {"step": step, "loss": round(loss.item(), 4), **measure(bare, check)}
                    print(json.dumps(record), flush=True)
                if time.time() - saved > 300:
                    saved = time.time()
                    save(accelerator, options.output, step=step, seconds=spent + saved - start)
    save(accelerator, options.output, step=step, seconds=spent + time.time() - start)

    result = measure(bare, check)
    bare.save_pretrained(options.output / "vae.new")
    replace(options.output / "vae.new", options.output / "vae")
    passed = result["saturation"] >= options.gate
    print(json.dumps({"step": step, "seconds": round(spent + time.time() - start), **result, "gate": passed}))
    if not passed:
        raise ValueError(
            f"The reconstructions have {result['saturation']:.2f} of the truth's saturation, below the gate of"
            f" {options.gate}: train on."
        )


if __name__ == "__main__":
    main()
