"""A callback that shows views while they form."""

from collections.abc import Callable

import PIL.Image
import torch

from pipeline import preprocess, unscale_image, unscale_latents

SMALL_VAE = 20_000_000  # parameters up to which decoding costs next to nothing


class Preview:
    """A `callback_on_step_end` that passes the first tile, in its present state, to `show`.

    A small VAE decodes it. A large VAE would take too long, and the linear map from latents to colours that fits best
    on the input picture is used instead. It costs a matrix product a step and gives a picture of the latents' size.

    Args:
        pipe: the pipeline.
        picture: its input, RGB.
        show: a function that is called with the number of steps done and an RGB picture.
    """

    @torch.no_grad()
    def __init__(self, pipe, picture: PIL.Image.Image, show: Callable[[int, PIL.Image.Image], None]):
        self.show, self.colours = show, None
        if sum(parameter.numel() for parameter in pipe.vae.parameters()) > SMALL_VAE:
            pixels = preprocess(pipe.feature_extractor_vae, [picture]).to(pipe._execution_device, pipe.vae.dtype)
            latents = pipe.vae.encode(pixels).latent_dist.mean[0].float()  # (C, h, w)
            seen = torch.nn.functional.adaptive_avg_pool2d(pixels[0].float(), latents.shape[1:])
            self.colours = torch.linalg.lstsq(
                with_one(latents).T.cpu(), seen.flatten(1).T.cpu()
            ).solution  # (C + 1, 3)

    @torch.no_grad()
    def __call__(self, pipe, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        # At the variance that the next pass sees, which is that of clean latents in the end
        latents = pipe.running_scheduler.scale_model_input(tensors["latents"][:1].float(), timestep)
        latents = unscale_latents(latents) / pipe.vae.config.scaling_factor
        if self.colours is None:
            pixels = pipe.vae.decode(latents.to(pipe.vae.dtype)).sample[0].float()
        else:
            pixels = (self.colours.T @ with_one(latents[0]).cpu()).unflatten(1, latents.shape[2:])
        pixels = (unscale_image(pixels).clamp(-1, 1) + 1) * 127.5
        self.show(step + 1, PIL.Image.fromarray(pixels.permute(1, 2, 0).round().byte().cpu().numpy()))
        return {}


def with_one(latents: torch.Tensor) -> torch.Tensor:
    """Flattens latents of shape (C, h, w) to columns and adds a row of ones for the offset: (C + 1, h w)."""
    return torch.cat([latents, torch.ones_like(latents[:1])]).flatten(1)
