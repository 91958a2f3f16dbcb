"""A plain implementation of Zero123++ that computes as the published pipeline does and saves nothing.

The pipeline is tested against it, and `evaluation.benchmark` times the pipeline against it by default. It keeps the
hidden states of the reference rather than their keys and values, so that every layer projects them again together with
the tile's, and it computes the negative reference once for each tile.
"""

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention_processor import AttnProcessor2_0


class HiddenStateReference:
    """An attention processor that stores its layer's hidden states in mode "write" and appends them in mode "read"."""

    def __init__(self, kept: dict):
        self.kept, self.plain, self.mode = kept, AttnProcessor2_0(), None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
            if self.mode == "write":
                self.kept[id(self)] = hidden_states
            else:
                encoder_hidden_states = torch.cat([hidden_states, self.kept[id(self)]], dim=1)
        return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask)


class PlainZero123Plus(DiffusionPipeline):
    """The components of [`pipeline.Zero123PlusPipeline`], with scales and shift written out again, as an oracle."""

    def __init__(
        self,
        vae,
        text_encoder,
        tokenizer,
        unet,
        scheduler,
        vision_encoder,
        feature_extractor_clip,
        feature_extractor_vae,
        ramping_coefficients: list[float],
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            vision_encoder=vision_encoder,
            feature_extractor_clip=feature_extractor_clip,
            feature_extractor_vae=feature_extractor_vae,
        )
        self.register_to_config(ramping_coefficients=ramping_coefficients)

    def encode_prompt(self, text: str) -> torch.Tensor:
        length = self.text_encoder.config.max_position_embeddings
        ids = self.tokenizer([text], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.text_encoder(ids.input_ids.to(self.device))[0]

    @torch.no_grad()
    def __call__(
        self,
        image,
        prompt: str = "",
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 28,
        guidance_scale: float = 4.0,
        height: int = 960,
        width: int = 640,
        generator: torch.Generator | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
    ):
        """Makes N tiles of a square RGB picture and draws the same random numbers as the pipeline, in the same order.
        `latents` is initial noise of unit variance. Returns what the image processor gives for `output_type`, or
        latents in the VAE's space.
        """
        n, device, dtype, unet, scheduler = (
            num_images_per_prompt,
            self.device,
            self.unet.dtype,
            self.unet,
            self.scheduler,
        )
        kept = {}
        unet.set_attn_processor({name: HiddenStateReference(kept) for name in unet.attn_processors})

        def call(mode, *args):
            for processor in unet.attn_processors.values():
                processor.mode = mode
            return unet(*args).sample

        def draw(shape, source):
            return torch.randn(shape, generator=source, dtype=dtype).to(device)

        clip = self.feature_extractor_clip(image, return_tensors="pt").pixel_values.to(device, dtype)
        ramp = torch.tensor(self.config.ramping_coefficients, device=device, dtype=dtype)[:, None]
        positive_states = self.encode_prompt(prompt) + ramp * self.vision_encoder(clip).image_embeds
        states = torch.cat([self.encode_prompt("").repeat(n, 1, 1), positive_states.repeat(n, 1, 1)])

        pixels = self.feature_extractor_vae(image, return_tensors="pt").pixel_values.to(device, dtype)
        negative_source = torch.Generator().manual_seed(0)
        moments = self.vae.encode(pixels).latent_dist, self.vae.encode(torch.zeros_like(pixels)).latent_dist
        mean, std = moments[0].mean.repeat(n, 1, 1, 1), moments[0].std.repeat(n, 1, 1, 1)
        positive = mean + std * draw(mean.shape, generator)
        negative = (moments[1].mean + moments[1].std * draw(mean[:1].shape, negative_source)).repeat(n, 1, 1, 1)
        reference = torch.cat([negative, positive])

        scheduler.set_timesteps(num_inference_steps, device=device)
        shape = (n, unet.config.in_channels, height // self.factor, width // self.factor)
        noise = draw(shape, generator) if latents is None else latents
        latents = noise * scheduler.init_noise_sigma
        steps = len(scheduler.timesteps)
        positive_noise = draw((steps, *positive.shape), generator)
        negative_noise = draw((steps, 1, *positive.shape[1:]), negative_source)
        for i, t in enumerate(self.progress_bar(scheduler.timesteps)):
            noise = torch.cat([negative_noise[i].repeat(n, 1, 1, 1), positive_noise[i]])
            noisy = scheduler.add_noise(reference, noise, t.reshape(1))
            call("write", scheduler.scale_model_input(noisy, t), t, states)
            prediction = call("read", scheduler.scale_model_input(torch.cat([latents] * 2), t), t, states)
            negative_prediction, positive_prediction = prediction.chunk(2)
            prediction = negative_prediction + guidance_scale * (positive_prediction - negative_prediction)
            latents = scheduler.step(prediction, t, latents, generator=generator).prev_sample
        latents = latents / 0.75 + 0.22
        if output_type == "latent":
            return latents
        tiles = self.vae.decode(latents / self.vae.config.scaling_factor).sample / (0.5 / 0.8)
        return VaeImageProcessor(vae_scale_factor=self.factor).postprocess(tiles, output_type=output_type)

    @property
    def factor(self) -> int:
        """Pixels of an edge that one latent stands for."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)
