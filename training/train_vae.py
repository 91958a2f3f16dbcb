"""Trains the small VAE of the mini checkpoint, from scratch or on from where it was.

    python -m training.train_vae --data data/train --output out/vae --minutes 30

Full-size training starts from the VAE of Stable Diffusion instead. The loss weighs the object above the background
and colour above brightness: without that, a short training ends in grey reconstructions. The run ends with a gate,
saturation of reconstructions at least 0.9 of the truth's, which a UNet must not be trained without.
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

from pipeline import scale_image

from .data import ViewDataset

CONFIG = {
    "block_out_channels": (16, 32, 64, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "sample_size": 64,
    "scaling_factor": 0.18215,
}
# Raw latents of Stable Diffusion's VAE have this deviation, the inverse of its scaling factor: "5x" reference
# attention relies on it.
LATENT_STD = 1 / CONFIG["scaling_factor"]
# While it is trained, latents get noise of this share of their deviation, and the trained VAE has this one as its
# constant. A learned variance starts at 1 and would drown the latents for longer than a short training lasts.
NOISE = 0.03
MAGNITUDE_WEIGHT = 1e-4
SATURATION_GATE = 0.9


def chroma(pixels: torch.Tensor) -> torch.Tensor:
    """Colour without brightness: each channel's distance to the mean of the channels, shape (B, 3, H, W) as given."""
    return pixels - pixels.mean(1, keepdim=True)


def loss_function(reconstruction, pixels, alpha, latents) -> torch.Tensor:
    """L1 of colour and of chroma, the object weighted 4 to 1, and a little for the latents' magnitude."""
    weight = 1 + 3 * alpha
    error = (reconstruction - pixels).abs() + 3 * (chroma(reconstruction) - chroma(pixels)).abs()
    return (weight * error).mean() / weight.mean() + MAGNITUDE_WEIGHT * latents.square().mean()


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pixels: torch.Tensor):
    """Folds each latent channel's mean and deviation over `pixels` into the (post-)quant convolutions.

    Afterwards raw latents have mean 0 and deviation `LATENT_STD`, the posterior the constant deviation `NOISE` of
    that, and reconstructions are what they were.
    """
    latents = vae.encode(pixels).latent_dist.mean
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    gain, channels = LATENT_STD / std, len(mean)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight /= gain[None, :, None, None]
    encode.weight[:channels] *= gain[:, None, None, None]
    encode.bias[:channels] = (encode.bias[:channels] - mean) * gain
    encode.weight[channels:] = 0  # the other half is the logarithm of the variance
    encode.bias[channels:] = 2 * math.log(NOISE * LATENT_STD)


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


def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the mini checkpoint's VAE.")
    parser.add_argument("--data", type=Path, required=True, help="folder of rendered shards")
    parser.add_argument("--output", type=Path, required=True, help="folder of the VAE; an interrupted run continues")
    parser.add_argument("--minutes", type=float, default=30, help="of training in this run (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="views a step (default: %(default)s)")
    parser.add_argument(
        "--learning_rate", type=float, default=1e-3, help="at the start; falls to a tenth (default: %(default)s)"
    )
    parser.add_argument(
        "--mixed_precision", default="no", choices=("no", "bf16"), help="autocast (default: %(default)s)"
    )
    options = parser.parse_args(argv)

    set_seed(0)
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    dataset = ViewDataset(options.data)
    vae = AutoencoderKL(**CONFIG)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    loader = torch.utils.data.DataLoader(dataset, options.batch_size, shuffle=True, drop_last=True)
    vae, optimizer, loader = accelerator.prepare(vae, optimizer, loader)
    step, spent = 0, 0.0
    if (options.output / "state").exists():
        accelerator.load_state(options.output / "state")
        progress = json.loads((options.output / "state" / "progress.json").read_text())
        step, spent = progress["step"], progress["seconds"]

    check = torch.utils.data.default_collate(
        [dataset[i] for i in range(0, len(dataset), max(1, len(dataset) // 64))][:64]
    )
    check = {name: value.to(accelerator.device) for name, value in check.items()}
    start = saved = time.time()
    total = 60 * options.minutes
    with tqdm(desc="VAE", unit="step", initial=step) as bar:
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
                    latents = accelerator.unwrap_model(vae).encode(pixels).latent_dist.mean
                    noise = NOISE * latents.detach().std() * torch.randn_like(latents)
                    reconstruction = accelerator.unwrap_model(vae).decode(latents + noise).sample
                loss = loss_function(reconstruction.float(), pixels, batch["alpha"], latents.float())
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(vae.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                bar.update()
                if step % 100 == 0:
                    print(json.dumps({"step": step, "loss": round(loss.item(), 4), **measure(vae, check)}), flush=True)
                if time.time() - saved > 300:
                    saved = time.time()
                    save(accelerator, options.output, step=step, seconds=spent + saved - start)
    save(accelerator, options.output, step=step, seconds=spent + time.time() - start)

    vae = accelerator.unwrap_model(vae)
    normalise_latents(vae, scale_image(check["pixels"]))
    result = measure(vae, check)
    vae.save_pretrained(options.output / "vae")
    passed = result["saturation"] >= SATURATION_GATE
    print(json.dumps({"step": step, "seconds": round(spent + time.time() - start), **result, "gate": passed}))
    if not passed:
        raise SystemExit(
            f"The reconstructions have {result['saturation']:.2f} of the truth's saturation, below the gate of"
            f" {SATURATION_GATE}: train on."
        )


if __name__ == "__main__":
    main()
