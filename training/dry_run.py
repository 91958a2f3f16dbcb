"""What a training run would cost, counted without data."""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from .loss import Denoiser


@torch.no_grad()
def describe(pipe, model: Denoiser, parameters: list, o, precision: str, tile: torch.Size) -> str:
    """Describes what a run would train: parameters, FLOPs a step and memory, counted on tensors without data.

    Args:
        pipe: the pipeline.
        model: what computes.
        parameters: what trains.
        o: the run's [`train.Options`].
        precision: of accelerate, such as "bf16".
        tile: shape of a tile, (3, H, W).
    """
    factor, channels = pipe.vae_scale_factor, pipe.unet.config.in_channels
    crop = pipe.feature_extractor_vae.crop_size
    clip = pipe.vision_encoder.config.image_size
    length, width = pipe.text_encoder.config.max_position_embeddings, pipe.text_encoder.config.hidden_size
    n = o.micro_batch_size
    twin = copy.deepcopy(model).to("meta")
    arguments = [
        torch.empty(shape, device="meta")
        for shape in (
            (n, channels, tile[-2] // factor, tile[-1] // factor),
            (n, channels, crop["height"] // factor, crop["width"] // factor),
            (n,),
            (1, length, width),
            (n, 3, clip, clip),
            (n,),
            (n, 3, *tile[-2:]),
        )
    ]
    saved = {}  # by storage; kept alive, so that none is used twice

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.enable_grad(), FlopCounterMode(display=False) as flops:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            twin(*arguments).sum().backward()
    weights = {parameter.untyped_storage()._cdata for parameter in twin.parameters()}
    activations = sum(t.numel() * t.element_size() for key, t in saved.items() if key not in weights)
    trained, total = sum(p.numel() for p in parameters), sum(p.numel() for p in model.parameters())
    half = 1 if precision == "no" else 0.5
    fixed = 4 * total + (4 + 4 + (2 if o.optimizer == "adamw-8bit" else 4 if o.optimizer == "muon" else 8)) * trained
    return "\n".join(
        (
            f"trains        {trained:,} of {total:,} parameters ({o.train}"
            + (f", LoRA of rank {o.lora_rank})" if o.lora_rank else ")"),
            f"steps         {o.steps:,} of {o.batch_size} tiles, {o.micro_batch_size} at a time",
            f"compute       {flops.get_total_flops() / n * o.batch_size / 1e12:.4g} TFLOP a step",
            f"memory        {fixed / 2**30:.3g} GiB of weights, gradients, EMA and optimizer, and about"
            f" {half * activations / 2**30:.3g} GiB of activations without checkpointing, per process",
        )
    )
