"""Encodes training samples with the frozen parts of a pipeline, by shortcuts where these give the same."""

import copy

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import CLIPImageProcessor

from pipeline import AZIMUTH_STEP, Zero123PlusPipeline, scale_image


@torch.no_grad()
def encoder_matrix(vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The VAE's encoder where it is a matrix applied to separate blocks of pixels, as the shipped checkpoint's is: the
    matrix, shape (2 C, 3 f f), and its offset, shape (2 C). It is about 50 times as fast, and differs by less than a
    tenth of the posterior's deviation. None for any other VAE.

    It is found on the CPU, because the closed-form encoder's last norm passes the signal beside constants 20 times as
    large, for which a GPU's convolutions in TF32 are too coarse.
    """
    vae, factor = copy.deepcopy(vae).to("cpu", torch.float32), 2 ** (len(vae.config.block_out_channels) - 1)

    def encode(pixels):
        return vae.encode(pixels).latent_dist.parameters

    generator = torch.Generator().manual_seed(0)
    pixels = scale_image(torch.rand(2, 3, 2 * factor, 3 * factor, generator=generator) * 2 - 1)
    expected, offset = encode(pixels), encode(torch.zeros(1, 3, factor, factor)).flatten()
    tolerance = 5e-3 * expected.std()
    # The middle of two pictures has the middle of their latents: this tells most VAEs apart before the long way
    if (encode(pixels.mean(0, keepdim=True)) - expected.mean(0)).abs().max() > tolerance:
        return None
    columns = encode(torch.eye(3 * factor**2).unflatten(1, (3, factor, factor))).flatten(1) - offset
    matrix = columns.T.contiguous()
    return (matrix, offset) if (encode_blocks(pixels, matrix, offset) - expected).abs().max() < tolerance else None


def encode_blocks(pixels: torch.Tensor, matrix: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Applies what [`encoder_matrix`] found to pixels of shape (B, 3, H, W): shape (B, 2 C, H / f, W / f)."""
    factor = round((matrix.shape[1] / 3) ** 0.5)
    blocks = torch.nn.functional.pixel_unshuffle(pixels, factor)
    return torch.einsum("cd,bdhw->bchw", matrix, blocks) + offset[:, None, None]


# How torch resizes as Pillow does with each `resample` of an image processor that this project's checkpoints use
RESIZING = {
    Image.Resampling.BILINEAR: {"mode": "bilinear", "antialias": True},
    Image.Resampling.BICUBIC: {"mode": "bicubic", "antialias": True},
    Image.Resampling.BOX: {"mode": "area"},
}


def preprocess_batch(extractor: CLIPImageProcessor, images: torch.Tensor) -> torch.Tensor:
    """[`pipeline.preprocess`] of square pictures of shape (B, 3, I, I) in [0, 1], where they are: (B, 3, H, W). It
    differs from Pillow by its rounding to whole levels, and, where boxes have no whole factor, by their borders.
    """
    size = extractor.crop_size["height"]
    if extractor.crop_size["width"] != size or extractor.size.get("shortest_edge") != size:
        raise ValueError(f"The image processor does not make a square of a square: {extractor.to_json_string()}")
    resized = torch.nn.functional.interpolate(images, size=(size, size), **RESIZING[extractor.resample])
    mean, std = (
        torch.tensor(values, device=images.device)[:, None, None]
        for values in (extractor.image_mean, extractor.image_std)
    )
    return (resized.clamp(0, 1) - mean) / std


def resize_each(extractor: CLIPImageProcessor, images: torch.Tensor, sizes: list[int] | None) -> torch.Tensor:
    """[`preprocess_batch`] of pictures of which each is first resized to its own edge, if `sizes` are given."""
    if sizes is None:
        return preprocess_batch(extractor, images)
    options = RESIZING[Image.Resampling.BICUBIC]
    small = (torch.nn.functional.interpolate(x[None], size=(n, n), **options) for x, n in zip(images, sizes))
    return torch.cat([preprocess_batch(extractor, image.clamp(0, 1)) for image in small])


class Encoder:
    """Encodes samples with the frozen parts of a pipeline. `prompt_embeds`, shape (1, L, D), are those of the empty
    prompt, `azimuth_embeds`, shape (12, L, D), those of the texts of further pictures at 0 (the empty prompt), 30, ...
    330 degrees, and `negative`, shape (1, 2 C, h', w'), the moments of the empty reference picture.
    """

    def __init__(self, pipe: Zero123PlusPipeline, device: torch.device):
        self.pipe, self.device = pipe, device
        matrix = encoder_matrix(pipe.vae)
        self.matrix = matrix and tuple(part.to(device) for part in matrix)
        with torch.no_grad():
            self.prompt_embeds, _ = pipe.encode_prompt("", device)
            texts = [str(azimuth) for azimuth in range(AZIMUTH_STEP, 360, AZIMUTH_STEP)]
            self.azimuth_embeds = torch.cat([self.prompt_embeds, pipe.encode_prompt(texts, device)[0]])
            size = pipe.feature_extractor_vae.crop_size
            self.negative = self.moments(torch.zeros(1, 3, size["height"], size["width"]))

    @torch.no_grad()
    def __call__(self, batch: dict) -> dict:
        """Encodes a batch of [`data.collate`]. Returns `tile` and `reference`, moments (mean and deviation) of shape
        (B, 2 C, ...) and, with R pictures of each object, (B * R, 2 C, ...); `reference_text`, shape (B * R, L, D),
        for R > 1; `clip_pixels`, of the first picture; and `control`, shape (B, 3, H, W) in [-1, 1], where there is
        one.
        """
        images, sizes = batch["image"].to(self.device) / 255, batch.get("image_size")
        references, reference_sizes, more = images, sizes, {}
        if any(batch.get("azimuths", ())):
            references = torch.cat([images[:, None], batch["others"].to(self.device) / 255], 1)
            pictures, references = references.shape[1], references.flatten(0, 1)
            reference_sizes = sizes and [size for size in sizes for _ in range(pictures)]
            places = [[0, *(azimuth // AZIMUTH_STEP for azimuth in others)] for others in batch["azimuths"]]
            more["reference_text"] = self.azimuth_embeds[sum(places, [])]
        tiles = {name: batch[name].to(self.device) / 127.5 - 1 for name in ("tile", "control") if name in batch}
        return {
            **tiles,
            **more,
            "tile": self.moments(scale_image(tiles["tile"])),
            "reference": self.moments(resize_each(self.pipe.feature_extractor_vae, references, reference_sizes)),
            "clip_pixels": resize_each(self.pipe.feature_extractor_clip, images, sizes),
        }

    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """Mean and deviation of the latents of pixels of shape (B, 3, H, W): shape (B, 2 C, H / f, W / f)."""
        if self.matrix:
            posterior = DiagonalGaussianDistribution(encode_blocks(pixels.to(self.device), *self.matrix))
        else:
            posterior = self.pipe.vae.encode(pixels.to(self.device, self.pipe.vae.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float()


def sample_moments(moments: torch.Tensor, generators: torch.Generator | list[torch.Generator]) -> torch.Tensor:
    """Draws latents from moments of shape (B, 2 C, h, w), with one generator for all or each with its own."""
    mean, std = moments.chunk(2, dim=1)
    return mean + std * randn_tensor(mean.shape, generator=generators, device=mean.device)
