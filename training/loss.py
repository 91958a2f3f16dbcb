"""What one training step computes: noising, condition dropout, prediction and weighting (section 2.5 of the paper).

The trainer, its validation and the one-step measure of the evaluation all use [`Zero123PlusLoss`].
"""

from statistics import fmean

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from diffusers.utils.torch_utils import randn_tensor

from pipeline import (
    AZIMUTH_STEP,
    ReferenceCache,
    Zero123PlusPipeline,
    mix_image_embeds,
    scale_latents,
    unscale_image,
    unscale_latents,
)

from .encode import Encoder, sample_moments

VALIDATION_TIMESTEPS = (100, 300, 500, 700, 850, 999)


class NamedReferences(ReferenceCache):
    """Keys and values by the layers' names: gradient checkpointing runs layers again, in another order."""

    def __init__(self, pictures: int = 1):
        self.entries, self.pictures = {}, pictures

    def write(self, layer: str, key: torch.Tensor, value: torch.Tensor):
        """Stores a layer's key and value."""
        self.entries[layer] = key, value

    def read(self, layer: str, batch_size: int, is_text: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns a layer's key and value, which are of the same batch."""
        return tuple(self.join(states, is_text) for states in self.entries[layer])


class Denoiser(torch.nn.Module):
    """Everything that is trained, as one module: the UNet, the ramp, the vision encoder, and a ControlNet where there
    is one.
    """

    def __init__(self, unet, vision_encoder, ramp: torch.Tensor, controlnet=None):
        super().__init__()
        self.unet, self.vision_encoder, self.controlnet = unet, vision_encoder, controlnet
        self.ramp = torch.nn.Parameter(ramp)

    @classmethod
    def of(cls, pipe: Zero123PlusPipeline) -> "Denoiser":
        """Takes the components of a pipeline."""
        ramp = torch.tensor(pipe.config.ramping_coefficients)
        return cls(pipe.unet, pipe.vision_encoder, ramp, pipe.controlnet)

    def forward(
        self,
        noisy_tile: torch.Tensor,
        noisy_reference: torch.Tensor,
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor,
        clip_pixels: torch.Tensor,
        keep: torch.Tensor,
        control: torch.Tensor | None = None,
        reference_text: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predicts v of noisy tiles, shape (B, C, 3 h, 2 w).

        Args:
            noisy_tile: shape (B, C, 3 h, 2 w).
            noisy_reference: R of each object, shape (B R, C, h', w'), at the same time steps.
            timesteps: shape (B,).
            prompt_embeds: shape (1, L, D).
            clip_pixels: shape (B, 3, H, W).
            keep: shape (B,), 1 with and 0 without the condition.
            control: what the ControlNet sees, in [-1, 1], shape (B, 3, H, W).
            reference_text: what the references have in place of `prompt_embeds`, shape (B R, L, D).
        """
        image_embeds = self.vision_encoder(clip_pixels).image_embeds * keep[:, None]
        prompt_embeds = reference_embeds = mix_image_embeds(prompt_embeds, image_embeds, self.ramp)
        pictures = len(noisy_reference) // len(noisy_tile)
        if reference_text is not None:
            image_embeds = image_embeds.repeat_interleave(pictures, 0)
            reference_embeds = mix_image_embeds(reference_text, image_embeds, self.ramp)
        cache = NamedReferences(pictures)
        write, read = ({"reference": cache, "reference_mode": mode} for mode in ("write", "read"))
        reference_timesteps = timesteps.repeat_interleave(pictures)
        self.unet(noisy_reference, reference_timesteps, reference_embeds, cross_attention_kwargs=write)
        residuals = {}
        if self.controlnet is not None:
            down, mid = self.controlnet(noisy_tile, timesteps, prompt_embeds, control, return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return self.unet(noisy_tile, timesteps, prompt_embeds, cross_attention_kwargs=read, **residuals).sample


def draw_timesteps(
    generators: torch.Generator | list[torch.Generator], count: int, num_timesteps: int, dropout: float
):
    """Draws each sample's time step, and 1 or 0, with or without the condition; both of shape (count,). There is a
    generator for each sample, or one for all.
    """
    each, shape = (generators, (1,)) if isinstance(generators, list) else ([generators], (count,))
    timesteps = [torch.randint(0, num_timesteps, shape, generator=one, device=one.device) for one in each]
    keep = [torch.rand(shape, generator=one, device=one.device) >= dropout for one in each]
    return torch.cat(timesteps), torch.cat(keep).float()


def min_snr_weight(scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Weight of each sample's v-loss, shape (B,): min(snr, gamma) / (snr + 1) (arXiv 2303.09556), or 1 for gamma
    0.
    """
    if not gamma:
        return torch.ones_like(timesteps, dtype=torch.float32)
    snr = compute_snr(scheduler, timesteps)
    return snr.clamp(max=gamma) / (snr + 1)


class Zero123PlusLoss:
    """The v-prediction loss of tiles under their reference picture.

    Args:
        pipe: whose frozen components encode the samples.
        device: to compute on.
        snr_gamma: of min-SNR weighting; 0 weights all time steps alike.
        condition_dropout: share of samples without the condition, for classifier-free guidance.
    """

    def __init__(
        self, pipe: Zero123PlusPipeline, device: torch.device, snr_gamma: float = 0.0, condition_dropout: float = 0.0
    ):
        self.encoder = Encoder(pipe, device)
        self.vae, self.device, self.pictures = pipe.vae, device, pipe.config.pictures
        self.snr_gamma, self.condition_dropout = snr_gamma, condition_dropout
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)

    def __call__(self, model: torch.nn.Module, batch: dict) -> torch.Tensor:
        """The loss of a batch, without dimensions.

        All that is drawn for a sample follows from its `seed`. On CUDA all that is drawn for a batch follows from the
        first sample's `seed`, and it is drawn there: a generator for each sample takes longer than a step of a small
        model.
        """
        encoded, seeds = self.encoder(batch), batch["seed"]
        if torch.device(self.device).type == "cuda":
            generators = torch.Generator(self.device).manual_seed(seeds[0])
        else:
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        num_timesteps = self.scheduler.config.num_train_timesteps
        timesteps, keep = draw_timesteps(generators, len(seeds), num_timesteps, self.condition_dropout)
        timesteps, keep = timesteps.to(self.device), keep.to(self.device)
        v, target, _ = self.predict(model, encoded, timesteps, keep, generators)
        error = (v - target).square().mean((1, 2, 3))
        return (error * min_snr_weight(self.scheduler, timesteps, self.snr_gamma)).mean()

    def predict(self, model: torch.nn.Module, encoded: dict, timesteps, keep, generators):
        """Noises tiles and references that [`Encoder`] encoded to the same time steps, shape (B,), and predicts v,
        with the condition where `keep`, shape (B,), is 1. There is a generator for each sample, or one for all.

        Returns:
            Predicted v, true v and the noisy tile, all float32 of shape (B, C, 3 h, 2 w).
        """
        tile = scale_latents(sample_moments(encoded["tile"], generators) * self.vae.config.scaling_factor)
        # Without the condition the reference is an empty picture, sampled like any other, as in the pipeline
        pictures = len(encoded["reference"]) // len(tile)
        each = [one for one in generators for _ in range(pictures)] if isinstance(generators, list) else generators
        kept = keep.repeat_interleave(pictures)[:, None, None, None] > 0
        moments = torch.where(kept, encoded["reference"], self.encoder.negative)
        reference = sample_moments(moments, each)  # stays raw, which is its factor of about 5
        noise = randn_tensor(tile.shape, generator=generators, device=tile.device)
        reference_noise = randn_tensor(reference.shape, generator=each, device=tile.device)
        noisy_tile = self.scheduler.add_noise(tile, noise, timesteps)
        noisy_reference = self.scheduler.add_noise(reference, reference_noise, timesteps.repeat_interleave(pictures))
        given = self.encoder.prompt_embeds, encoded["clip_pixels"], keep
        more = encoded.get("control"), encoded.get("reference_text")
        v = model(noisy_tile, noisy_reference, timesteps, *given, *more)
        return v.float(), self.scheduler.get_velocity(tile, noise, timesteps), noisy_tile

    @torch.no_grad()
    def validate(self, model: torch.nn.Module, samples: dict, batch_size: int = 8) -> dict:
        """Measures a batch of held-out samples, `batch_size` at a time; the same noise is drawn every time.

        Returns:
            `validation_loss`, the mean v-loss of `VALIDATION_TIMESTEPS`, with the condition; and the PSNR in dB of the
            tile that is predicted in one step from pure noise (t = 999), `psnr_t999_with` and `psnr_t999_without` the
            condition. Their difference tells whether the condition works, long before samples look like anything. A
            model of several pictures has each also for N = 2, 3, ... of them, evenly around the object, as NAME_N.
        """
        found = self.measure(model, samples, batch_size)
        for count in range(2, self.pictures + 1) if "others" in samples else ():
            azimuths = [[360 // count * i for i in range(1, count)]] * len(samples["tile"])
            others = samples["others"][:, [azimuth // AZIMUTH_STEP - 1 for azimuth in azimuths[0]]]
            measured = self.measure(model, {**samples, "others": others, "azimuths": azimuths}, batch_size)
            found |= {f"{name}_{count}": value for name, value in measured.items()}
        return found

    def measure(self, model: torch.nn.Module, samples: dict, batch_size: int) -> dict:
        """[`validate`] of the pictures that the samples have."""

        def predict(encoded: dict, indices: range, t: int, keep: float):
            generators = [torch.Generator().manual_seed(1000 * i + t) for i in indices]
            timesteps, keep = (torch.full((len(indices),), value, device=self.device) for value in (t, keep))
            return self.predict(model, encoded, timesteps, keep, generators)

        losses, psnr = [], {"with": [], "without": []}
        alpha = self.scheduler.alphas_cumprod[999].to(self.device)
        for start in range(0, len(samples["tile"]), batch_size):
            batch = {name: value[start : start + batch_size] for name, value in samples.items()}
            encoded, truth = self.encoder(batch), batch["tile"].cpu() / 127.5 - 1
            indices = range(start, start + len(truth))
            for t, keep in [*((t, 1.0) for t in VALIDATION_TIMESTEPS), (999, 0.0)]:
                v, target, noisy = predict(encoded, indices, t, keep)
                if keep:
                    losses += (v - target).square().mean((1, 2, 3)).tolist()
                if t == 999:
                    latents = unscale_latents(alpha.sqrt() * noisy - (1 - alpha).sqrt() * v)
                    latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
                    pixels = unscale_image(self.vae.decode(latents).sample).float().cpu().clamp(-1, 1)
                    error = (pixels - truth).square().mean((1, 2, 3)) / 4
                    psnr["with" if keep else "without"] += (-10 * torch.log10(error)).tolist()
        means = {f"psnr_t999_{name}": round(fmean(values), 3) for name, values in psnr.items()}
        return {"validation_loss": round(fmean(losses), 4), **means}
