"""What one training step computes: noising, condition dropout, prediction and weighting (section 2.5 of the paper).

The trainer, its validation and the one-step measure of the evaluation all use [`Zero123PlusLoss`].
"""

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_snr
from diffusers.utils.torch_utils import randn_tensor

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

VALIDATION_TIMESTEPS = (100, 300, 500, 700, 850, 999)


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

    def forward(self, noisy_tile, noisy_reference, timesteps, prompt_embeds, clip_pixels, keep, control=None):
        """Predicts v of noisy tiles, shape (B, C, 3 h, 2 w).

        Args:
            noisy_tile: shape (B, C, 3 h, 2 w).
            noisy_reference: shape (B, C, h', w'), at the same time steps.
            timesteps: shape (B,).
            prompt_embeds: shape (1, L, D).
            clip_pixels: shape (B, 3, H, W).
            keep: shape (B,), 1 with and 0 without the condition.
            control: what the ControlNet sees, in [-1, 1], shape (B, 3, H, W).
        """
        image_embeds = self.vision_encoder(clip_pixels).image_embeds * keep[:, None]
        prompt_embeds = mix_image_embeds(prompt_embeds, image_embeds, self.ramp)
        cache = ReferenceCache()
        write, read = ({"reference": cache, "reference_mode": mode} for mode in ("write", "read"))
        self.unet(noisy_reference, timesteps, prompt_embeds, cross_attention_kwargs=write)
        residuals = {}
        if self.controlnet is not None:
            down, mid = self.controlnet(noisy_tile, timesteps, prompt_embeds, control, return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return self.unet(noisy_tile, timesteps, prompt_embeds, cross_attention_kwargs=read, **residuals).sample


@torch.no_grad()
def encoder_matrix(vae: AutoencoderKL) -> torch.nn.Conv2d | None:
    """One convolution in place of the VAE's encoder where that is a matrix applied to separate blocks, as the mini's
    is (`train_vae.initialise_encoder`). It is about 50 times as fast, and differs by less than a tenth of the
    posterior's deviation. None for any other VAE.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)

    def encode(pixels):
        return vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.parameters.float()

    generator = torch.Generator().manual_seed(0)
    pixels = scale_image(torch.rand(2, 3, 2 * factor, 3 * factor, generator=generator) * 2 - 1)
    expected, offset = encode(pixels), encode(torch.zeros(1, 3, factor, factor))
    tolerance = 5e-3 * expected.std()
    # The middle of two pictures has the middle of their latents: this tells most VAEs apart before the long way
    if (encode(pixels.mean(0, keepdim=True)) - expected.mean(0)).abs().max() > tolerance:
        return None
    columns = encode(torch.eye(3 * factor**2).unflatten(1, (3, factor, factor))) - offset
    matrix = torch.nn.Conv2d(3, offset.shape[1], factor, factor, device=vae.device, dtype=vae.dtype)
    matrix.weight.copy_(columns.flatten(1).T.unflatten(1, (3, factor, factor)))
    matrix.bias.copy_(offset.flatten())
    found = matrix(pixels.to(vae.device, vae.dtype)).float()
    return matrix if (found - expected).abs().max() < tolerance else None


class Encoder:
    """Encodes samples with the frozen parts of a pipeline.

    Args:
        pipe: the pipeline.
        device: to encode on.
    """

    def __init__(self, pipe: Zero123PlusPipeline, device: torch.device):
        self.pipe, self.device = pipe, device
        self.matrix = encoder_matrix(pipe.vae)
        with torch.no_grad():
            self.prompt_embeds, _ = pipe.encode_prompt("", device)
            size = pipe.feature_extractor_vae.crop_size
            empty = torch.zeros(1, 3, size["height"], size["width"], device=device, dtype=pipe.vae.dtype)
            self.negative = pipe.vae.encode(empty).latent_dist.mean.float()

    @torch.no_grad()
    def __call__(self, samples: list[dict]) -> dict:
        """Returns `tile` and `reference`, moments (mean and deviation) of shape (B, 2 C, ...), `clip_pixels`, and
        `control`, shape (B, 3, H, W) in [-1, 1], of samples that have it. Samples get `encoded`, and those that have
        it are not encoded again.
        """
        missing = [sample for sample in samples if "encoded" not in sample]
        if missing:
            images = [sample["image"] for sample in missing]
            tiles = torch.stack([sample["tile"] for sample in missing])
            fresh = zip(
                self.moments(scale_image(tiles)),
                self.moments(preprocess(self.pipe.feature_extractor_vae, images)),
                preprocess(self.pipe.feature_extractor_clip, images),
            )
            for sample, parts in zip(missing, fresh):
                sample["encoded"] = dict(zip(("tile", "reference", "clip_pixels"), parts))
        encoded = {
            name: torch.stack([sample["encoded"][name] for sample in samples])
            for name in ("tile", "reference", "clip_pixels")
        }
        if "control" in samples[0]:
            encoded["control"] = torch.stack([sample["control"] for sample in samples])
        return {name: value.to(self.device, torch.float32) for name, value in encoded.items()}

    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """Mean and deviation of the latents of pixels of shape (B, 3, H, W): shape (B, 2 C, H / f, W / f)."""
        pixels = pixels.to(self.device, self.pipe.vae.dtype)
        if self.matrix is None:
            posterior = self.pipe.vae.encode(pixels).latent_dist
        else:
            posterior = DiagonalGaussianDistribution(self.matrix(pixels))
        return torch.cat([posterior.mean, posterior.std], dim=1).float()


def draw(generators: list[torch.Generator], num_timesteps: int, condition_dropout: float):
    """Draws each sample's time step, and 1 or 0, with or without the condition; both of shape (B,)."""
    device = generators[0].device
    timesteps = [torch.randint(0, num_timesteps, (1,), generator=one, device=device) for one in generators]
    keep = torch.cat([torch.rand(1, generator=one, device=device) for one in generators]) >= condition_dropout
    return torch.cat(timesteps), keep.float()


def sample_moments(moments: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """Draws latents from moments of shape (B, 2 C, h, w), each with its own generator."""
    mean, std = moments.chunk(2, dim=1)
    return mean + std * randn_tensor(mean.shape, generator=generators, device=mean.device)


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
        self,
        pipe: Zero123PlusPipeline,
        device: torch.device,
        snr_gamma: float = 0.0,
        condition_dropout: float = 0.0,
    ):
        self.encoder = Encoder(pipe, device)
        self.vae, self.device = pipe.vae, device
        self.snr_gamma, self.condition_dropout = snr_gamma, condition_dropout
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)

    def __call__(self, model: torch.nn.Module, samples: list[dict]) -> torch.Tensor:
        """The loss of a batch, without dimensions. All that is drawn for a sample follows from its `seed`, and on CUDA
        it is drawn there, because a step of a small model takes less time than the noise's way from the CPU.
        """
        source = self.device if torch.device(self.device).type == "cuda" else "cpu"
        generators = [torch.Generator(source).manual_seed(sample["seed"]) for sample in samples]
        timesteps, keep = draw(generators, self.scheduler.config.num_train_timesteps, self.condition_dropout)
        timesteps = timesteps.to(self.device)
        v, target, _ = self.predict(model, self.encoder(samples), timesteps, keep.to(self.device), generators)
        error = (v - target).square().mean((1, 2, 3))
        return (error * min_snr_weight(self.scheduler, timesteps, self.snr_gamma)).mean()

    def predict(self, model: torch.nn.Module, encoded: dict, timesteps, keep, generators: list[torch.Generator]):
        """Noises tiles and references to the same time steps and predicts v.

        Args:
            model: a [`Denoiser`], or what accelerate made of one.
            encoded: of [`Encoder`].
            timesteps: shape (B,).
            keep: shape (B,), 1 with and 0 without the condition.
            generators: one for each sample.

        Returns:
            Predicted v, true v and the noisy tile, all float32 of shape (B, C, 3 h, 2 w).
        """
        tile = scale_latents(sample_moments(encoded["tile"], generators) * self.vae.config.scaling_factor)
        reference = sample_moments(encoded["reference"], generators)  # stays raw, which is its factor of about 5
        reference = torch.where(keep[:, None, None, None] > 0, reference, self.encoder.negative)
        noise, reference_noise = (
            randn_tensor(x.shape, generator=generators, device=x.device) for x in (tile, reference)
        )
        noisy_tile = self.scheduler.add_noise(tile, noise, timesteps)
        noisy_reference = self.scheduler.add_noise(reference, reference_noise, timesteps)
        prompt_embeds, clip_pixels = self.encoder.prompt_embeds, encoded["clip_pixels"]
        v = model(noisy_tile, noisy_reference, timesteps, prompt_embeds, clip_pixels, keep, encoded.get("control"))
        return v.float(), self.scheduler.get_velocity(tile, noise, timesteps), noisy_tile

    @torch.no_grad()
    def validate(self, model: torch.nn.Module, samples: list[dict]) -> dict:
        """Measures held-out samples; the same noise is drawn every time.

        Returns:
            `validation_loss`, the mean v-loss of `VALIDATION_TIMESTEPS`, with the condition; and the PSNR in dB of the
            tile that is predicted in one step from pure noise (t = 999), `psnr_t999_with` and `psnr_t999_without` the
            condition. Their difference tells whether the condition works, long before samples look like anything.
        """
        encoded, losses = self.encoder(samples), []
        with_condition, without = torch.ones(len(samples)), torch.zeros(len(samples))

        def predict(t: int, keep: torch.Tensor):
            generators = [torch.Generator().manual_seed(1000 * i + t) for i in range(len(samples))]
            timesteps = torch.full((len(samples),), t, device=self.device)
            return self.predict(model, encoded, timesteps, keep.to(self.device), generators)

        for t in VALIDATION_TIMESTEPS:
            v, target, _ = predict(t, with_condition)
            losses.append((v - target).square().mean().item())
        result = {"validation_loss": round(sum(losses) / len(losses), 4)}
        truth = torch.stack([sample["tile"] for sample in samples])
        alpha = self.scheduler.alphas_cumprod[999].to(self.device)
        for name, keep in (("with", with_condition), ("without", without)):
            v, _, noisy = predict(999, keep)
            latents = unscale_latents(alpha.sqrt() * noisy - (1 - alpha).sqrt() * v) / self.vae.config.scaling_factor
            pixels = unscale_image(self.vae.decode(latents.to(self.vae.dtype)).sample).float().cpu().clamp(-1, 1)
            error = (pixels - truth).square().mean((1, 2, 3)) / 4
            result[f"psnr_t999_{name}"] = round(-10 * torch.log10(error).mean().item(), 3)
        return result
