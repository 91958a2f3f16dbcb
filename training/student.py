"""The loss of a student of few steps, which learns where the guided path of its teacher ends."""

import copy
from collections.abc import Iterator

import torch
from diffusers import DDIMScheduler

from pipeline import Zero123PlusPipeline, load_pictures, preprocess, scale_latents, unscale_image, unscale_latents

from .encode import Encoder
from .perceptual import Lpips

SATURATION = 2.0  # weight of the difference in saturation beside LPIPS, which hardly sees colours fade
EPSILON = 1e-4  # under the root of the loss, whose gradient would be infinite where there is no error


def squared_errors(x0: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """The mean squared error of each step of each sample, shape (K, B), of latents of shape (K, B, C, H, W)."""
    return (x0 - end).square().mean((2, 3, 4))


def latent_loss(errors: torch.Tensor) -> torch.Tensor:
    """The loss of squared errors of shape (K, B), without dimensions."""
    return (errors + EPSILON).sqrt().sum(0).mean()


class StudentLoss:
    """Regression to the end of the teacher's path. All steps of the student are on the way that it takes itself, and
    none is guided. True tiles are not used.

    For each sample the teacher denoises x_T to x0* with guidance (DDIM, no gradient). From x^1 = sigma_1 x_T on, with
    the time steps t_k of the student and v as the model predicts it:

        x0^k = alpha_k x^k - sigma_k v(x^k, t_k)
        e^k = sigma_k x^k + alpha_k v(x^k, t_k)
        x^(k+1) = alpha_(k+1) x0^k + sigma_(k+1) e^k, without gradient
        loss = sum over k of sqrt(mean (x0^k - x0*)^2 + 1e-4)

    The latents' mean alone makes soft and pale pictures where the teacher's ends differ for one input. `perceptual`
    times a distance of pictures is added, between one row of views decoded from the last x0^k and the same row from
    x0*: LPIPS, and twice the difference of their mean saturation, which is the largest channel less the smallest.

    These are steps of diffusers' EulerDiscreteScheduler. Fresh noise e, as Euler ancestral steps draw it, would hide
    x_T from the later steps, which could then learn only the mean of the teacher's ends. The reference of a step has
    the noise that the teacher's step of the nearest time step had.

    Args:
        pipe: whose denoiser learns. Its state now, before any training, is the teacher.
        device: to compute on.
        steps: K of the student.
        teacher_steps: of the teacher's path.
        teacher_guidance: scale of classifier-free guidance on it.
        dtype: of the teacher's UNet, and in which rows are decoded.
        perceptual: weight of the distance of pictures; 0 leaves it out.
    """

    def __init__(
        self,
        pipe: Zero123PlusPipeline,
        device: torch.device,
        steps: int,
        teacher_steps: int,
        teacher_guidance: float,
        dtype: torch.dtype = torch.float32,
        perceptual: float = 0.0,
    ):
        self.device, self.dtype, self.teacher_guidance, self.perceptual = device, dtype, teacher_guidance, perceptual
        self.distance = Lpips("vgg16").to(device, memory_format=torch.channels_last) if perceptual else None
        self.prompt_embeds = Encoder(pipe, device).prompt_embeds
        frozen = {name: copy.deepcopy(getattr(pipe, name)).eval().to(device) for name in ("unet", "vision_encoder")}
        frozen["unet"].to(dtype)
        for module in frozen.values():
            module.requires_grad_(False)
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
        self.teacher = Zero123PlusPipeline(
            **{**pipe.components, **frozen, "controlnet": None, "scheduler": scheduler}, **pipe.parameters
        )
        self.teacher.set_progress_bar_config(disable=True)
        self.teacher.warned.add("background")
        scheduler.set_timesteps(teacher_steps)
        self.teacher_timesteps = scheduler.timesteps
        scheduler.set_timesteps(steps)
        self.timesteps = scheduler.timesteps  # (K,)
        signal = scheduler.alphas_cumprod[self.timesteps]
        self.alphas, self.sigmas = signal.sqrt().tolist(), (1 - signal).sqrt().tolist()

    @torch.no_grad()
    def path(self, pictures: list, generators: list[torch.Generator]) -> tuple[torch.Tensor, ...]:
        """What the teacher makes of B pictures, and from what, as float32. The generators, one each, are left where
        the pipeline would leave them.

        Returns:
            The end of the path and its start, shape (B, C, 3 h, 2 w); reference latents, shape (B, C, h', w'), and
            their noise at each step of the teacher, shape (T, B, C, h', w').
        """
        teacher, steps = self.teacher, len(self.teacher_timesteps)
        states = [generator.get_state() for generator in generators]
        options = {"num_inference_steps": steps, "guidance_scale": self.teacher_guidance, "output_type": "latent"}
        end = scale_latents(teacher(pictures, generator=generators, **options).images)
        for generator, state in zip(generators, states):  # to draw the same once more, in the pipeline's order
            generator.set_state(state)
        pixels = preprocess(teacher.feature_extractor_vae, pictures)
        reference = teacher.prepare_reference_latents(pixels[:, None], 1, self.device, generators)[:, 0]
        start = teacher.draw_noise(end.shape, self.device, generators)
        noise = teacher.draw_reference_noise(steps, reference.shape, self.device, generators)
        return end.float(), start.float(), reference.float(), noise.float()

    def steps(self, model: torch.nn.Module, clip_pixels, start, reference, reference_noise) -> Iterator[torch.Tensor]:
        """Yields the student's x0^k, shape (B, C, 3 h, 2 w), for each of its steps, from CLIP's pixels, shape
        (B, 3, H, W), and what [`path`] returned.
        """
        x, keep = self.sigmas[0] * start, torch.ones(len(start), device=self.device)
        for k, t in enumerate(self.timesteps):
            alpha, sigma = self.alphas[k], self.sigmas[k]
            noise = reference_noise[(self.teacher_timesteps - t).abs().argmin()]
            timesteps = t.to(self.device).expand(len(x))
            v = model(x, alpha * reference + sigma * noise, timesteps, self.prompt_embeds, clip_pixels, keep).float()
            x0 = alpha * x - sigma * v
            yield x0
            if k + 1 < len(self.timesteps):
                own_noise = sigma * x + alpha * v
                x = (self.alphas[k + 1] * x0 + self.sigmas[k + 1] * own_noise).detach()

    def predictions(
        self, model: torch.nn.Module, pictures: torch.Tensor, seeds: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's x0^k for each of its steps, shape (K, B, C, 3 h, 2 w), and the teacher's x0*, of pictures,
        uint8 of shape (B, 3, I, I), and the seeds from which all that is drawn for each follows.
        """
        pictures = load_pictures(pictures, "image")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        end, *drawn = self.path(pictures, generators)
        clip_pixels = preprocess(self.teacher.feature_extractor_clip, pictures).to(self.device)
        return torch.stack(list(self.steps(model, clip_pixels, *drawn))), end

    def decode_row(self, latents: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Decodes one of the three rows of views of each sample, shape (B, 3, H, 2 W)."""
        vae = self.teacher.vae
        latents = unscale_latents(latents).unflatten(2, (3, -1))[torch.arange(len(rows)), :, rows]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return unscale_image(vae.decode(latents / vae.config.scaling_factor).sample)

    def perceptual_distance(self, x0: torch.Tensor, end: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        """The distance between a row of views of each sample, which its seed chooses, shape (B,). `end` gets no
        gradient.
        """
        rows = [seed % 3 for seed in seeds]
        with torch.no_grad():
            target = self.decode_row(end, rows)
        ours = self.decode_row(x0, rows)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            distance = self.distance(ours, target).float()
        saturation, true_saturation = ((row.amax(1) - row.amin(1)).float().mean((1, 2)) for row in (ours, target))
        return distance + SATURATION * (saturation - true_saturation).abs()

    def __call__(self, model: torch.nn.Module, batch: dict) -> torch.Tensor:
        """The loss of a batch of [`data.collate`], without dimensions. All that is drawn for a sample follows from its
        `seed`.
        """
        x0, end = self.predictions(model, batch["image"], batch["seed"])
        loss = latent_loss(squared_errors(x0, end))
        if self.distance:
            loss = loss + self.perceptual * self.perceptual_distance(x0[-1], end, batch["seed"]).mean()
        return loss

    @torch.no_grad()
    def validate(self, model: torch.nn.Module, samples: dict, batch_size: int = 8) -> dict:
        """Measures held-out samples; the same noise is drawn every time.

        Returns:
            `validation_loss`, the loss on latents; and `error_K`, the mean squared error to the teacher's latents
            after each step K, where the latents have about unit variance.
        """
        parts = []
        for start in range(0, len(samples["image"]), batch_size):
            pictures = samples["image"][start : start + batch_size]
            seeds = list(range(start, start + len(pictures)))
            parts.append(squared_errors(*self.predictions(model, pictures, seeds)))
        errors = torch.cat(parts, dim=1)
        loss = latent_loss(errors).item()
        means = {f"error_{k + 1}": round(error.mean().item(), 4) for k, error in enumerate(errors)}
        return {"validation_loss": round(loss, 4), **means}
