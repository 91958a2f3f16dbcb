"""The optimizers of `training.train`: AdamW and Muon."""

from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler
from transformers.optimization import get_wsd_schedule

from zero123plus.loading import cpu_has_bfloat16

ADAM_BETAS = (0.9, 0.99)  # of Muon's AdamW part


def is_matrix(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether Muon updates a parameter: all weight matrices and convolutions but those at the model's ends."""
    ends = ("conv_in", "conv_out", "embeddings", "time_embed.weight")
    return parameter.ndim >= 2 and not any(part in name for part in ends)


def build_optimizer(name: str, named: dict[str, torch.nn.Parameter], learning_rate: float, num_processes: int):
    """Makes an optimizer.

    Args:
        name: "adamw" or "muon" (of the package pytorch-optimizer; Jordan 2024, with the update scaled as in arXiv
            2502.16982). Muon has AdamW at half its rate for vectors and for the ends of the model. With several
            processes each updates a share of the matrices and sends them to the others.
        named: the parameters, by name.
        learning_rate: peak, of Muon's or AdamW's updates.
        num_processes: that each hold all parameters.

    Raises:
        ValueError: if the package is missing.
    """
    if name == "adamw":
        return torch.optim.AdamW(named.values(), lr=learning_rate, weight_decay=1e-2)
    try:
        from pytorch_optimizer import DistributedMuon, Muon
        from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5
    except ImportError as error:
        raise ValueError(
            "`--optimizer muon` needs the package pytorch-optimizer: `pip install pytorch-optimizer`, or leave it out."
        ) from error

    kind = DistributedMuon if num_processes > 1 else Muon

    class Optimizer(kind):
        @staticmethod
        def _orthogonalize(group, updates):
            if updates[0].is_cuda or cpu_has_bfloat16():
                return kind._orthogonalize(group, updates)
            # The package computes in bfloat16, whatever the processor
            return [zero_power_via_newton_schulz_5(update.flatten(1), dtype=torch.float32) for update in updates]

    shapes, vectors = {}, []
    for key, parameter in named.items():
        (shapes.setdefault(parameter.shape, []) if is_matrix(key, parameter) else vectors).append(parameter)
    # Matrices of one shape a group: processes send each other matrices of equal shape at a time
    groups = [
        {"params": matrices, "lr": learning_rate, "weight_decay": 1e-2, "use_muon": True, "use_adjusted_lr": True}
        for matrices in shapes.values()
    ]
    adam = {"lr": learning_rate / 2, "betas": ADAM_BETAS, "weight_decay": 1e-2, "use_muon": False}
    groups += [{"params": vectors, **adam}] if vectors else []
    return Optimizer(groups)


def build_schedule(
    name: str, optimizer, warmup_steps: int, steps: int, decay_steps: int, time_left: Callable[[], float]
):
    """Makes a learning-rate schedule.

    Args:
        name: "decay", which is constant after the warm-up and falls linearly to 0 in the last `decay_steps` of
            `steps`; "timed", which falls likewise in that share of a time limit; or one of diffusers' by name.
        optimizer: whose rates it sets.
        warmup_steps: in which the rate rises from 0.
        steps: in all.
        decay_steps: of "decay" and "timed".
        time_left: the share of the time limit that is left, for "timed".
    """
    if name == "decay":
        return get_wsd_schedule(optimizer, warmup_steps, decay_steps, num_training_steps=steps, decay_type="linear")
    if name == "timed":
        share = decay_steps / steps

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / (warmup_steps + 1), max(0.0, time_left()) / share)

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)
