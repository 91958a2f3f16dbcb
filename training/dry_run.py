"""What a training run would cost, counted without data."""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from .loss import Denoiser


@torch.no_grad()
def describe(pipe, model: Denoiser, parameters: list, o, precision: str, tile: torch.Size, student: dict) -> str:
    """Describes what a run would train: parameters, FLOPs a step and their memory, counted on tensors without data.

    Args:
        precision: of accelerate, such as "bf16".
        tile: height and width.
        student: `num_inference_steps` of a student, and `teacher_steps` and `teacher_guidance` of the path whose end
            it learns; empty for other phases.
    """
    factor, channels = pipe.vae_scale_factor, pipe.unet.config.in_channels
    crop = pipe.feature_extractor_vae.crop_size
    clip = pipe.vision_encoder.config.image_size
    length, width = pipe.text_encoder.config.max_position_embeddings, pipe.text_encoder.config.hidden_size
    n, pictures = o.micro_batch_size, min(2, o.pictures)  # of several two, which is the mean
    twin = copy.deepcopy(model).to("meta")
    arguments = [
        torch.empty(shape, device="meta")
        for shape in (
            (n, channels, tile[-2] // factor, tile[-1] // factor),
            (pictures * n, channels, crop["height"] // factor, crop["width"] // factor),
            (n,),
            (1, length, width),
            (n, 3, clip, clip),
            (n,),
            (n, 3, *tile[-2:]),
            *([(pictures * n, length, width)] if pictures > 1 else []),
        )
    ]
    counts = []  # FLOPs after the UNet's pass of the reference, and after that of the tile
    with FlopCounterMode(display=False) as flops:
        hook = twin.unet.register_forward_hook(lambda *_: counts.append(flops.get_total_flops()))
        twin(*arguments)
    hook.remove()
    reference, forward = counts
    with torch.enable_grad(), FlopCounterMode(display=False) as flops:
        twin(*arguments).sum().backward()
    trained, total = sum(p.numel() for p in parameters), sum(p.numel() for p in model.parameters())
    compute, teacher = flops.get_total_flops(), 0
    if student:  # which holds a copy of its teacher
        steps, guided = student["num_inference_steps"], student["teacher_guidance"] > 1
        # The negative side's reference is one for a whole batch, and is left out
        compute = steps * compute + student["teacher_steps"] * (forward + guided * (forward - reference))
        teacher = total - trained if o.lora_rank else total
    half = 1 if precision == "no" else 0.5
    moments = 4 if o.optimizer == "muon" else 8  # bytes a parameter
    fixed = 4 * (total + half * teacher) + (4 + 4 + moments) * trained
    return "\n".join(
        (
            f"trains        {trained:,} of {total:,} parameters ({o.train}"
            + (f", LoRA of rank {o.lora_rank})" if o.lora_rank else ")"),
            f"steps         {o.steps:,} of {o.batch_size} tiles, {o.micro_batch_size} at a time",
            f"compute       {compute / n * o.batch_size / 1e12:.4g} TFLOP a step",
            f"memory        {fixed / 2**30:.3g} GiB of weights, gradients, EMA and optimizer, per process, beside the"
            " activations",
        )
    )
