"""Trains Zero123++ on shards of `training.render`.

    accelerate launch -m training.train --preset phase1 --checkpoint CHECKPOINT --data data/train --output out/1
    accelerate launch -m training.train --preset phase2 --checkpoint out/1/pipeline --data data/train --output out/2
    accelerate launch -m training.train --preset scratch --checkpoint out/mini --data data/train --output out/scratch

The presets `phase1` and `phase2` are the paper's (section 2.5); `scratch` trains small models from random weights.
Every option given overrides its preset. `OUTPUT/pipeline` is what `from_pretrained` loads, with EMA weights and the
trained ramp; `OUTPUT/state` is what the same command continues from.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from tqdm import tqdm

from pipeline import (
    ReferenceCache,
    Zero123PlusPipeline,
    mix_image_embeds,
    preprocess,
    scale_image,
    scale_latents,
    unscale_image,
    unscale_latents,
)

from .data import TileDataset

PRESETS = {
    "phase1": {
        "train": "attention",
        "learning_rate": 7e-5,
        "lr_scheduler": "cosine",
        "warmup_steps": 1000,
        "steps": 50_000,
        "snr_gamma": 5.0,
    },
    "phase2": {
        "train": "unet",
        "learning_rate": 5e-6,
        "lr_scheduler": "constant_with_warmup",
        "warmup_steps": 2000,
        "steps": 50_000,
        "snr_gamma": 5.0,
    },
    "scratch": {
        "train": "unet+vision",
        "learning_rate": 5e-4,
        "lr_scheduler": "cosine",
        "warmup_steps": 100,
        "steps": 20_000,
        "snr_gamma": 0.0,  # from random weights min-SNR starves high noise, where shape and colour are decided
    },
}


def trainable_parameters(unet: torch.nn.Module, train: str) -> dict[str, torch.nn.Parameter]:
    """The UNet's parameters to train, by name.

    Args:
        unet: the UNet.
        train: "attention" for phase 1 of the paper, self-attention and the K and V matrices of cross-attention; else
            all.
    """
    if train != "attention":
        return dict(unet.named_parameters())
    parts = (".attn1.", ".attn2.to_k.", ".attn2.to_v.")
    return {name: value for name, value in unet.named_parameters() if any(part in name for part in parts)}


def min_snr_weight(scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Weight of each sample's v-loss, shape (B,): min(snr, gamma) / (snr + 1) (arXiv 2303.09556), or 1 for gamma
    0.
    """
    if not gamma:
        return torch.ones_like(timesteps, dtype=torch.float32)
    snr = compute_snr(scheduler, timesteps)
    return snr.clamp(max=gamma) / (snr + 1)


class Conditions(torch.nn.Module):
    """All that is trained, in one module: the UNet, the ramp and, from scratch, the vision encoder."""

    def __init__(self, unet, vision_encoder, ramp):
        super().__init__()
        self.unet, self.vision_encoder = unet, vision_encoder
        self.ramp = torch.nn.Parameter(ramp)

    def forward(self, noisy_tile, noisy_reference, timesteps, prompt_embeds, clip_pixels, keep):
        """Predicts v of noisy tiles, shape (B, C, 3 h, 2 w).

        Args:
            noisy_tile: shape (B, C, 3 h, 2 w).
            noisy_reference: shape (B, C, h', w'), at the same time steps.
            timesteps: shape (B,).
            prompt_embeds: shape (1, L, D).
            clip_pixels: shape (B, 3, H, W).
            keep: shape (B,), 1 with and 0 without the condition.
        """
        image_embeds = self.vision_encoder(clip_pixels).image_embeds * keep[:, None]
        prompt_embeds = mix_image_embeds(prompt_embeds, image_embeds, self.ramp)
        cache = ReferenceCache()
        write, read = ({"reference": cache, "reference_mode": mode} for mode in ("write", "read"))
        self.unet(noisy_reference, timesteps, prompt_embeds, cross_attention_kwargs=write)
        return self.unet(noisy_tile, timesteps, prompt_embeds, cross_attention_kwargs=read).sample


class Encoder:
    """Encodes samples with the frozen parts of a pipeline; what does not change is computed once and kept."""

    def __init__(self, pipe: Zero123PlusPipeline, device: torch.device, cache_latents: bool):
        self.pipe, self.device, self.cache = pipe, device, {} if cache_latents else None
        self.prompt_embeds = pipe.encode_prompt([""], device)
        pixels = preprocess(
            pipe.feature_extractor_vae, [pipe.image_processor.numpy_to_pil(torch.zeros(8, 8, 3).numpy())[0]]
        )
        self.negative = pipe.vae.encode(torch.zeros_like(pixels).to(device, pipe.vae.dtype)).latent_dist.mean.float()

    @torch.no_grad()
    def __call__(self, samples: list[dict]) -> dict:
        """Returns `tile` and `reference`, moments (mean and deviation) of shape (B, 2 C, ...), and `clip_pixels`."""
        todo = [sample for sample in samples if self.cache is None or sample["index"] not in self.cache]
        fresh = {}
        if todo:
            images = [sample["image"] for sample in todo]
            tiles = torch.stack([sample["tile"] for sample in todo])
            encoded = zip(
                self.moments(scale_image(tiles)),
                self.moments(preprocess(self.pipe.feature_extractor_vae, images)),
                preprocess(self.pipe.feature_extractor_clip, images),
            )
            fresh = {sample["index"]: entry for sample, entry in zip(todo, encoded)}
        if self.cache is not None:
            self.cache.update(fresh)
            fresh = self.cache
        parts = zip(*(fresh[sample["index"]] for sample in samples))
        return dict(zip(("tile", "reference", "clip_pixels"), (torch.stack(part).to(self.device) for part in parts)))

    def moments(self, pixels):
        posterior = self.pipe.vae.encode(pixels.to(self.device, self.pipe.vae.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float()


def sample_moments(moments: torch.Tensor) -> torch.Tensor:
    """Draws latents from moments of shape (B, 2 C, h, w)."""
    mean, std = moments.chunk(2, dim=1)
    return mean + std * torch.randn_like(std)


@torch.no_grad()
def one_step_psnr(pipe, model, scheduler, encoder, samples: list[dict]) -> dict:
    """PSNR in dB of the tile predicted in one step from pure noise (t = 999), with and without the condition.

    The difference tells whether the condition works, long before samples look like anything.
    """
    encoded = encoder(samples)
    tile = scale_latents(encoded["tile"].chunk(2, dim=1)[0] * pipe.vae.config.scaling_factor)
    reference = encoded["reference"].chunk(2, dim=1)[0]
    generator = torch.Generator().manual_seed(0)
    noise, reference_noise = (torch.randn(x.shape, generator=generator).to(x) for x in (tile, reference))
    t = torch.full((len(samples),), 999, device=tile.device)
    alpha = scheduler.alphas_cumprod[999].to(tile)
    noisy = scheduler.add_noise(tile, noise, t)
    truth = torch.stack([sample["tile"] for sample in samples])
    result = {}
    for name, keep in (("with", torch.ones(len(samples))), ("without", torch.zeros(len(samples)))):
        local = torch.where(keep[:, None, None, None].to(reference) > 0, reference, encoder.negative)
        local = scheduler.add_noise(local, reference_noise, t)
        v = model(noisy, local, t, encoder.prompt_embeds, encoded["clip_pixels"], keep.to(tile))
        latents = unscale_latents(alpha.sqrt() * noisy - (1 - alpha).sqrt() * v) / pipe.vae.config.scaling_factor
        pixels = unscale_image(pipe.vae.decode(latents.to(pipe.vae.dtype)).sample).float().cpu().clamp(-1, 1)
        error = (pixels - truth).square().mean((1, 2, 3)) / 4
        result[f"psnr_t999_{name}"] = round(-10 * torch.log10(error).mean().item(), 3)
    return result


def replace_folder(fresh: Path, target: Path):
    """Puts a complete folder in the place of another, which is there until then."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def save(accelerator, output: Path, pipe, model, ema: EMAModel, step: int):
    """Saves the state to continue from, then the pipeline with EMA weights."""
    accelerator.save_state(output / "state.new")
    torch.save(ema.state_dict(), output / "state.new" / "ema.pt")
    (output / "state.new" / "progress.json").write_text(json.dumps({"step": step}))
    replace_folder(output / "state.new", output / "state")
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    pipe.register_to_config(ramping_coefficients=model.ramp.tolist())
    pipe.save_pretrained(output / "pipeline.new")
    ema.restore(model.parameters())
    replace_folder(output / "pipeline.new", output / "pipeline")


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; the preset fills in what is not given."""
    parser = argparse.ArgumentParser(
        description="Train Zero123++.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--preset", choices=PRESETS, required=True, help="; ".join(f"{k}: {v}" for k, v in PRESETS.items())
    )
    parser.add_argument("--checkpoint", required=True, help="pipeline to start from: a folder or a Hub name")
    parser.add_argument("--data", type=Path, required=True, help="folder of rendered shards")
    parser.add_argument(
        "--validation", type=Path, help="folder of shards of held-out objects; the first training objects if missing"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; an interrupted run continues")
    parser.add_argument("--train", choices=("attention", "unet", "unet+vision"), help="what is trained")
    parser.add_argument("--learning_rate", type=float, help="peak")
    parser.add_argument("--lr_scheduler", help="a name that diffusers.optimization.get_scheduler knows")
    parser.add_argument("--warmup_steps", type=int)
    parser.add_argument("--steps", type=int, help="in all")
    parser.add_argument("--snr_gamma", type=float, help="of min-SNR weighting; 0 switches it off")
    parser.add_argument("--batch_size", type=int, default=32, help="tiles a step and process")
    parser.add_argument("--gradient_accumulation", type=int, default=1)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--mixed_precision", default="no", choices=("no", "bf16", "fp16"))
    parser.add_argument("--condition_dropout", type=float, default=0.1, help="share of samples without condition")
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument(
        "--cache_latents", action="store_true", help="encode each sample once; for data that fits the memory"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop this run, saved, after so long")
    parser.add_argument("--save_minutes", type=float, default=10, help="between two checkpoints")
    parser.add_argument("--validation_steps", type=int, default=100, help="between two one-step predictions")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    for name, value in PRESETS[options.preset].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(argv: list[str] | None = None):
    """The command line."""
    o = parse_options(argv)
    set_seed(o.seed)
    dataset = TileDataset(o.data)
    validation = TileDataset(o.validation) if o.validation else dataset
    accelerator = Accelerator(mixed_precision=o.mixed_precision, gradient_accumulation_steps=o.gradient_accumulation)
    pipe = Zero123PlusPipeline.from_pretrained(o.checkpoint, trust_remote_code=True)
    pipe.vae.to(accelerator.device), pipe.text_encoder.to(accelerator.device)

    # What trains, and what is frozen
    model = Conditions(pipe.unet, pipe.vision_encoder, torch.tensor(pipe.config.ramping_coefficients))
    for module in (pipe.vae, pipe.text_encoder, model):
        module.requires_grad_(False)
    for parameter in trainable_parameters(pipe.unet, o.train).values():
        parameter.requires_grad_(True)
    model.ramp.requires_grad_(True)
    pipe.vision_encoder.requires_grad_(o.train == "unet+vision")
    if o.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=o.learning_rate, weight_decay=1e-2)
    lr_scheduler = get_scheduler(
        o.lr_scheduler, optimizer, num_warmup_steps=o.warmup_steps, num_training_steps=o.steps
    )
    loader = torch.utils.data.DataLoader(dataset, o.batch_size, shuffle=True, drop_last=True, collate_fn=list)
    model, optimizer, loader, lr_scheduler = accelerator.prepare(model, optimizer, loader, lr_scheduler)
    bare = accelerator.unwrap_model(model)
    ema = EMAModel(bare.parameters(), decay=o.ema_decay, use_ema_warmup=False)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    encoder = Encoder(pipe, accelerator.device, o.cache_latents)
    step = 0
    if (o.output / "state").exists():
        accelerator.load_state(o.output / "state")
        ema.load_state_dict(torch.load(o.output / "state" / "ema.pt", weights_only=True))
        step = json.loads((o.output / "state" / "progress.json").read_text())["step"]
        set_seed(o.seed + step)
    o.output.mkdir(parents=True, exist_ok=True)
    log = open(o.output / "log.jsonl", "a", buffering=1)
    start = saved = time.time()
    check = [validation[i] for i in range(0, len(validation), max(1, len(validation) // 16))][:16]

    bar = tqdm(total=o.steps, initial=step, unit="step", disable=not accelerator.is_main_process)
    done = step >= o.steps
    while not done:
        for samples in loader:
            with accelerator.accumulate(model):
                # 1. Clean latents; the reference stays raw, which is its factor of about 5
                encoded = encoder(samples)
                tile = scale_latents(sample_moments(encoded["tile"]) * pipe.vae.config.scaling_factor)
                reference = sample_moments(encoded["reference"])
                keep = (torch.rand(len(samples), device=tile.device) >= o.condition_dropout).to(tile)
                reference = torch.where(keep[:, None, None, None] > 0, reference, encoder.negative)

                # 2. Noise: tile and reference at the same time step
                timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(samples),), device=tile.device)
                noise = torch.randn_like(tile)
                noisy_tile = scheduler.add_noise(tile, noise, timesteps)
                noisy_reference = scheduler.add_noise(reference, torch.randn_like(reference), timesteps)

                # 3. Predict v and step
                v = model(noisy_tile, noisy_reference, timesteps, encoder.prompt_embeds, encoded["clip_pixels"], keep)
                error = F.mse_loss(v.float(), scheduler.get_velocity(tile, noise, timesteps), reduction="none").mean(
                    (1, 2, 3)
                )
                loss = (error * min_snr_weight(scheduler, timesteps, o.snr_gamma)).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            ema.step(bare.parameters())
            bar.update()
            record = {"step": step, "loss": round(loss.item(), 5), "seconds": round(time.time() - start, 1)}
            if step % o.validation_steps == 0:
                bare.eval()
                record |= one_step_psnr(pipe, bare, scheduler, encoder, check)
                bare.train()
            log.write(json.dumps(record) + "\n")
            done = step >= o.steps or time.time() - start > 60 * o.minutes
            if accelerator.is_main_process and (done or time.time() - saved > 60 * o.save_minutes):
                save(accelerator, o.output, pipe, bare, ema, step)
                saved = time.time()
            if done:
                break
    bar.close()


if __name__ == "__main__":
    main()
