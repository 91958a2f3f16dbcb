"""Trains Zero123++ on shards of `training.render`.

    accelerate launch -m training.train --phase 1 --checkpoint stabilityai/stable-diffusion-2 --data D --output out/1
    accelerate launch -m training.train --phase 2 --checkpoint out/1 --data D --output out/2
    accelerate launch -m training.train --phase scratch --checkpoint out/mini --data D --output out/3

Phases 1 and 2 are the paper's (section 2.5); `scratch` trains small models from random weights. Every option given
overrides the phase's. `OUTPUT/checkpoint-STEP` is a folder that `from_pretrained` loads, with EMA weights and the
trained ramp, and what the same command continues from.
"""

import argparse
import contextlib
import copy
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from diffusers import (
    ControlNetModel,
    DDPMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from diffusers.utils import convert_state_dict_to_diffusers, is_bitsandbytes_available
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import create_repo, upload_folder
from peft import LoraConfig
from PIL import Image
from torch.distributed.fsdp import FSDPModule
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from pipeline import (
    ReferenceCache,
    Zero123PlusPipeline,
    mix_image_embeds,
    preprocess,
    scale_image,
    scale_latents,
    split_views,
    unscale_image,
    unscale_latents,
)

from .data import CONDITIONS, Stream, TileDataset
from .mini import SCHEDULE

PHASES = {
    "1": {
        "train": "attention",
        "learning_rate": 7e-5,
        "image_sizes": (128, 512),
        "lr_scheduler": "cosine",
        "warmup_steps": 1000,
        "steps": 50_000,
        "batch_size": 256,
        "snr_gamma": 5.0,
    },
    "2": {
        "train": "unet",
        "learning_rate": 5e-6,
        "image_sizes": (128, 512),
        "lr_scheduler": "constant_with_warmup",
        "warmup_steps": 2000,
        "steps": 50_000,
        "batch_size": 256,
        "snr_gamma": 5.0,
    },
    "scratch": {
        "train": "unet+vision",
        "learning_rate": 5e-4,
        "image_sizes": None,
        "lr_scheduler": "cosine",
        "warmup_steps": 100,
        "steps": 20_000,
        "batch_size": 32,
        "snr_gamma": 0.0,  # from random weights min-SNR starves high noise, where shape and colour are decided
    },
    # The paper gives no figures for its ControlNets: diffusers' usual rate, the rest as in phase 2
    "controlnet": {
        "train": "controlnet",
        "learning_rate": 1e-5,
        "image_sizes": (128, 512),
        "lr_scheduler": "constant_with_warmup",
        "warmup_steps": 500,
        "steps": 50_000,
        "batch_size": 256,
        "snr_gamma": 5.0,
    },
}


LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


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
    """All that is trained, in one module: the UNet, the ramp, the vision encoder, and a ControlNet where there is
    one."""

    def __init__(self, unet, vision_encoder, ramp, controlnet=None):
        super().__init__()
        self.unet, self.vision_encoder, self.controlnet = unet, vision_encoder, controlnet
        self.ramp = torch.nn.Parameter(ramp)

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
        """Returns `tile` and `reference`, moments (mean and deviation) of shape (B, 2 C, ...), `clip_pixels`, and
        `control`, shape (B, 3, H, W) in [-1, 1], of samples that have it.
        """
        missing = [sample for sample in samples if self.cache is None or sample["index"] not in self.cache]
        fresh = {}
        if missing:
            images = [sample["image"] for sample in missing]
            tiles = torch.stack([sample["tile"] for sample in missing])
            encoded = zip(
                self.moments(scale_image(tiles)),
                self.moments(preprocess(self.pipe.feature_extractor_vae, images)),
                preprocess(self.pipe.feature_extractor_clip, images),
            )
            fresh = {sample["index"]: entry for sample, entry in zip(missing, encoded)}
        if self.cache is not None:
            self.cache.update(fresh)
            fresh = self.cache
        parts = [torch.stack(part) for part in zip(*(fresh[sample["index"]] for sample in samples))]
        encoded = dict(zip(("tile", "reference", "clip_pixels"), parts))
        if "control" in samples[0]:
            encoded["control"] = torch.stack([sample["control"] for sample in samples])
        return {name: value.to(self.device) for name, value in encoded.items()}

    def moments(self, pixels):
        posterior = self.pipe.vae.encode(pixels.to(self.device, self.pipe.vae.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float()


def draw(generators: list[torch.Generator], num_timesteps: int, condition_dropout: float):
    """Time step and 1 or 0, with or without the condition, of each sample; both of shape (B,)."""
    timesteps = torch.cat([torch.randint(0, num_timesteps, (1,), generator=generator) for generator in generators])
    keep = torch.cat([torch.rand(1, generator=generator) for generator in generators]) >= condition_dropout
    return timesteps, keep.float()


def sample_moments(moments: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """Draws latents from moments of shape (B, 2 C, h, w), each with its own generator."""
    mean, std = moments.chunk(2, dim=1)
    return mean + std * randn_tensor(mean.shape, generator=generators, device=mean.device)


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
        v = model(
            noisy, local, t, encoder.prompt_embeds, encoded["clip_pixels"], keep.to(tile), encoded.get("control")
        )
        latents = unscale_latents(alpha.sqrt() * noisy - (1 - alpha).sqrt() * v) / pipe.vae.config.scaling_factor
        pixels = unscale_image(pipe.vae.decode(latents.to(pipe.vae.dtype)).sample).float().cpu().clamp(-1, 1)
        error = (pixels - truth).square().mean((1, 2, 3)) / 4
        result[f"psnr_t999_{name}"] = round(-10 * torch.log10(error).mean().item(), 3)
    return result


def assemble(checkpoint: str, vision_encoder: str) -> Zero123PlusPipeline:
    """Zero123++ before any training: Stable Diffusion 2 (v) with a CLIP vision tower beside it.

    Args:
        checkpoint: folder or Hub name of Stable Diffusion 2.
        vision_encoder: folder or Hub name of the tower; its projection is as wide as the prompt's states.

    Raises:
        ValueError: if either is of another kind.
    """
    parts = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    kind = parts.scheduler.config.prediction_type
    if kind != "v_prediction":
        raise ValueError(
            f"{checkpoint} predicts {kind!r}, but Zero123++ starts from v-prediction: give"
            " stabilityai/stable-diffusion-2."
        )
    tower = CLIPVisionModelWithProjection.from_pretrained(vision_encoder)
    width = parts.unet.config.cross_attention_dim
    if tower.config.projection_dim != width:
        raise ValueError(
            f"`--vision_encoder` {vision_encoder} projects to {tower.config.projection_dim} channels, but the prompt's"
            f" states have {width}: give the tower that matches, for Stable Diffusion 2 CLIP ViT-H/14."
        )
    return Zero123PlusPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=EulerAncestralDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"),
        vision_encoder=tower,
        feature_extractor_clip=CLIPImageProcessor.from_pretrained(vision_encoder),
        feature_extractor_vae=CLIPImageProcessor(
            size={"shortest_edge": 512},
            crop_size={"height": 512, "width": 512},
            resample=2,
            image_mean=[0.5] * 3,
            image_std=[0.8] * 3,
        ),
    )


def load(checkpoint: str, vision_encoder: str) -> Zero123PlusPipeline:
    """The pipeline to start from: of a run (its newest checkpoint), of Stable Diffusion 2, or of Zero123++."""
    checkpoint = str(newest(checkpoint))
    if DiffusionPipeline.load_config(checkpoint)["_class_name"] == "StableDiffusionPipeline":
        return assemble(checkpoint, vision_encoder)
    return Zero123PlusPipeline.from_pretrained(checkpoint, trust_remote_code=True)


def checkpoints(output: Path) -> list[Path]:
    """The folders `checkpoint-STEP` of a run, oldest first. They appear by a rename: all are complete."""
    found = [path for path in Path(output).glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def newest(folder: Path) -> Path:
    """The newest checkpoint of a run's folder, or else the folder itself."""
    return (checkpoints(folder) or [folder])[-1]


def with_weights(module: torch.nn.Module, weights: dict[str, torch.Tensor], name: str) -> torch.nn.Module:
    """A module like `module` with those of `weights` whose names begin with `name`; what trains is not touched."""
    with torch.device("meta"):
        diffusers_kind = hasattr(module, "from_config")
        fresh = type(module).from_config(module.config) if diffusers_kind else type(module)(module.config)
    part = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
    fresh.load_state_dict(part, assign=True, strict=False)  # strict: buffers like position_ids are not saved
    return fresh


def write_weights(pipe: Zero123PlusPipeline, weights: dict[str, torch.Tensor], folder: Path):
    """Writes what was trained: a ControlNet, LoRA layers, or the whole pipeline.

    Args:
        pipe: that the training began with.
        weights: of a [`Conditions`].
        folder: to write into.
    """
    if pipe.controlnet is not None:
        with_weights(pipe.controlnet, weights, "controlnet").save_pretrained(folder)
    elif getattr(pipe.unet, "peft_config", None):
        layers = {
            name.removeprefix("unet.").replace(".default.", "."): value
            for name, value in weights.items()
            if "lora_" in name
        }
        pipe.save_lora_weights(folder, unet_lora_layers=convert_state_dict_to_diffusers(layers))
    else:
        parts = {name: with_weights(getattr(pipe, name), weights, name) for name in ("unet", "vision_encoder")}
        cameras = {name: pipe.config[name] for name in ("view_azimuths", "view_elevations", "view_fov")}
        ramp = weights["ramp"].tolist()
        Zero123PlusPipeline(**{**pipe.components, **parts}, **cameras, ramping_coefficients=ramp).save_pretrained(
            folder
        )


@contextlib.contextmanager
def gathered(model: torch.nn.Module):
    """With FSDP, gathers the weights, so that a part of the model can be called by itself."""
    sharded = isinstance(model, FSDPModule)
    if sharded:
        model.unshard()
    yield
    if sharded:
        model.reshard()


def ema_rank(accelerator: Accelerator) -> int:
    """The process whose EMA this one has: its own with FSDP, where each has a share of the parameters, else the
    first's."""
    return accelerator.process_index if accelerator.distributed_type == DistributedType.FSDP else 0


def save(accelerator: Accelerator, output: Path, pipe, model, ema: EMAModel, step: int, keep: int):
    """Writes `checkpoint-STEP`, which appears whole or not at all, and removes all but the newest `keep`."""
    partial, target = output / "checkpoint.partial", output / f"checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(partial / "state")
    if accelerator.process_index == ema_rank(accelerator):
        torch.save(ema.state_dict(), partial / "state" / f"ema-{ema_rank(accelerator)}.pt")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ema.store(parameters)
    ema.copy_to(parameters)
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        write_weights(pipe, weights, partial)
        partial.rename(target)
        for old in checkpoints(output)[:-keep]:
            shutil.rmtree(old)
    ema.restore(parameters)
    accelerator.wait_for_everyone()


def open_log(path: Path, step: int):
    """Opens the log of a run that continues after `step`, without the lines that were written beyond it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines += [line] if json.loads(line)["step"] <= step else []
        except json.JSONDecodeError:  # killed while writing
            pass
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(f"{line}\n" for line in lines))
    fresh.rename(path)
    return open(path, "a", buffering=1)


def validation_tiles(pipe: Zero123PlusPipeline, samples: list[dict]) -> Image.Image:
    """A picture with a row for each sample: the input, the six generated views, and the six true ones, side by side."""
    height, width = samples[0]["tile"].shape[1:]
    generators = [torch.Generator().manual_seed(i) for i in range(len(samples))]
    pipe.set_progress_bar_config(disable=True)
    images = [sample["image"] for sample in samples]
    control = torch.stack([sample["control"] for sample in samples]) / 2 + 0.5 if "control" in samples[0] else None
    ours = pipe(
        images, control_image=control, height=height, width=width, generator=generators, output_type="np"
    ).images
    truth = torch.stack([sample["tile"] for sample in samples]).permute(0, 2, 3, 1).cpu().numpy() / 2 + 0.5
    size = height // 3
    rows = [
        np.concatenate([np.asarray(image.resize((size, size))) / 255, *a, np.ones((size, 4, 3)), *b], axis=1)
        for image, a, b in zip(images, split_views(ours), split_views(truth))
    ]
    return Image.fromarray(np.round(np.concatenate(rows) * 255).astype(np.uint8))


@torch.no_grad()
def describe(pipe, model: Conditions, parameters: list, o: argparse.Namespace, tile: torch.Size) -> str:
    """What a run would train: parameters, FLOPs a step, and memory, counted on tensors without data."""
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
    half = 1 if o.mixed_precision == "no" else 0.5
    fixed = 4 * total + (4 + 4 + (2 if o.adam_8bit else 8)) * trained
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


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; the phase fills in what is not given."""
    parser = argparse.ArgumentParser(
        description="Train Zero123++.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--phase", choices=PHASES, required=True, help="; ".join(f"{k}: {v}" for k, v in PHASES.items()))
    add(
        "--checkpoint",
        required=True,
        help="to start from: folder or Hub name of Zero123++ or Stable Diffusion 2, or a run",
    )
    add("--vision_encoder", default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", help="beside Stable Diffusion 2")
    add("--data", type=Path, required=True, help="folder of rendered shards")
    add("--validation", type=Path, help="shards of held-out objects; the first training objects if missing")
    add("--output", type=Path, required=True, help="folder of the run; an interrupted run continues")
    add("--train", choices=("attention", "unet", "unet+vision", "controlnet"), help="what is trained")
    add("--condition", choices=CONDITIONS, default="depth", help="what a ControlNet sees; of rgb it makes normals")
    add("--controlnet", help="ControlNet to start from; a copy of the UNet's encoder if missing")
    add("--lora_rank", type=int, default=0, help="train LoRA layers of the attention instead")
    add("--learning_rate", type=float, help="peak")
    add("--lr_scheduler", help="a name that diffusers.optimization.get_scheduler knows")
    add("--warmup_steps", type=int)
    add("--steps", type=int, help="in all")
    add(
        "--image_sizes",
        type=int,
        nargs=2,
        help="the condition picture is resized at random to an edge between these; 0 0: it stays as it is",
    )
    add("--snr_gamma", type=float, help="of min-SNR weighting; 0 switches it off")
    add("--batch_size", type=int, help="tiles a step, of all processes")
    add("--micro_batch_size", type=int, default=8, help="tiles at a time and process; the rest is accumulated")
    add("--gradient_checkpointing", action="store_true")
    add("--mixed_precision", default="no", choices=("no", "bf16", "fp16"))
    add("--adam_8bit", action="store_true", help="with the package bitsandbytes")
    add("--max_grad_norm", type=float, default=1.0)
    add("--condition_dropout", type=float, default=0.1, help="share of samples without condition")
    add("--ema_decay", type=float, default=0.999)
    add("--cache_latents", action="store_true", help="read and encode each sample once; for data that fits the memory")
    add("--workers", type=int, default=0, help="processes that read data")
    add("--minutes", type=float, default=math.inf, help="stop this run, saved, after so long")
    add("--save_minutes", type=float, default=10, help="between two checkpoints")
    add("--keep", type=int, default=2, help="newest checkpoints")
    add("--validation_steps", type=int, default=1000, help="between two one-step predictions and validation tiles")
    add("--report_to", default="tensorboard", choices=("tensorboard", "wandb", "none"))
    add("--push_to_hub", metavar="NAME", help="upload the last checkpoint to this repository")
    add("--seed", type=int, default=0)
    add("--dry_run", "--dry-run", action="store_true", help="print what would be trained, and stop")
    o = parser.parse_args(argv)
    for name, value in PHASES[o.phase].items():
        if getattr(o, name) is None:
            setattr(o, name, value)
    if o.image_sizes and not any(o.image_sizes):
        o.image_sizes = None
    return o


def main(argv: list[str] | None = None):
    """The command line."""
    o = parse_options(argv)
    if o.cache_latents and o.image_sizes:
        raise SystemExit(
            "`--cache_latents` encodes a picture once, `--image_sizes` makes it new every time: drop one."
        )
    if o.lora_rank and o.train == "controlnet":
        raise SystemExit(f"`--lora_rank` is {o.lora_rank}, but a ControlNet is trained whole: leave it out.")
    if o.adam_8bit and not is_bitsandbytes_available():
        raise SystemExit("`--adam_8bit` needs the package bitsandbytes: `pip install bitsandbytes`, or leave it out.")
    set_seed(o.seed)
    condition = o.condition if o.train == "controlnet" else None
    dataset = TileDataset(o.data, keep=o.cache_latents, condition=condition)
    validation = TileDataset(o.validation, condition=condition) if o.validation else dataset
    first = Stream(dataset, o.seed, 0, 1)[0]["tile"]
    accelerator = Accelerator(
        mixed_precision=o.mixed_precision,
        log_with=None if o.report_to == "none" else o.report_to,
        project_dir=o.output,
    )
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    if plugin and (plugin.fsdp_version != 2 or plugin.auto_wrap_policy is not None):
        # Layers wrapped one by one give their weights back too early: the keys and values that the reference pass
        # writes have gradients when the tile's pass through the layer is over
        raise SystemExit(
            f"FSDP is of version {plugin.fsdp_version} with the wrap policy"
            f" {getattr(plugin.auto_wrap_policy, '__name__', 'NO_WRAP')}, but reference attention needs version 2 with the"
            " model as one: --fsdp_version 2 --fsdp_auto_wrap_policy NO_WRAP."
        )
    share = o.micro_batch_size * accelerator.num_processes
    if o.batch_size % share:
        raise SystemExit(
            f"`--batch_size` {o.batch_size} is no multiple of {share}, which {accelerator.num_processes} processes of"
            f" `--micro_batch_size` {o.micro_batch_size} do at a time."
        )
    accelerator.gradient_accumulation_steps = o.batch_size // share

    # What trains, and what is frozen
    pipe = load(o.checkpoint, o.vision_encoder)
    pipe.check_size(*first.shape[1:])
    pipe.vae.to(accelerator.device), pipe.text_encoder.to(accelerator.device)
    pipe.controlnet = None
    if condition:
        pipe.add_controlnet(ControlNetModel.from_pretrained(o.controlnet) if o.controlnet else None)
    ramp = torch.tensor(pipe.config.ramping_coefficients)
    model = Conditions(pipe.unet, pipe.vision_encoder, ramp, pipe.controlnet)
    for module in (pipe.vae, pipe.text_encoder, model):
        module.requires_grad_(False)
    if o.lora_rank:
        pipe.unet.add_adapter(LoraConfig(r=o.lora_rank, lora_alpha=o.lora_rank, target_modules=LORA_TARGETS))
    elif condition:
        pipe.controlnet.requires_grad_(True)
    else:
        for parameter in trainable_parameters(pipe.unet, o.train).values():
            parameter.requires_grad_(True)
        model.ramp.requires_grad_(True)
        pipe.vision_encoder.requires_grad_(o.train == "unet+vision")
    if o.gradient_checkpointing:
        for module in filter(None, (pipe.unet, pipe.controlnet)):
            module.enable_gradient_checkpointing()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if o.dry_run:
        accelerator.print(describe(pipe, model, parameters, o, first.shape))
        return
    if o.adam_8bit:
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        from torch.optim import AdamW
    optimizer = AdamW(parameters, lr=o.learning_rate, weight_decay=1e-2)
    # Not prepared: accelerate would step it once for each process
    lr_scheduler = get_scheduler(
        o.lr_scheduler, optimizer, num_warmup_steps=o.warmup_steps, num_training_steps=o.steps
    )
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ema = EMAModel(parameters, decay=o.ema_decay, use_ema_warmup=False)
    accelerator.register_for_checkpointing(lr_scheduler)
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    encoder = Encoder(pipe, accelerator.device, o.cache_latents)

    # Continue from the newest checkpoint
    step, done = 0, checkpoints(o.output)
    if done:
        step = int(done[-1].name[11:])
        accelerator.load_state(done[-1] / "state")
        averages = done[-1] / "state" / f"ema-{ema_rank(accelerator)}.pt"
        ema.load_state_dict(torch.load(averages, map_location=accelerator.device, weights_only=True))
    stream = Stream(dataset, o.seed, step * o.batch_size, o.steps * o.batch_size, o.image_sizes)
    loader = torch.utils.data.DataLoader(
        stream, o.micro_batch_size, num_workers=o.workers, collate_fn=list, drop_last=True
    )
    loader = accelerator.prepare(loader)
    log = open_log(o.output / "log.jsonl", step) if accelerator.is_main_process else None
    accelerator.init_trackers("zero123plus", {k: str(v) for k, v in vars(o).items()})
    check = [validation[i] for i in range(0, len(validation), max(1, len(validation) // 16))][:16]
    start = saved = time.time()
    bar = tqdm(total=o.steps, initial=step, unit="step", disable=not accelerator.is_main_process)
    total = skipped = 0
    for samples in loader:
        with accelerator.accumulate(model):
            # 1. All that is random follows from the samples' seeds
            generators = [torch.Generator().manual_seed(sample["seed"]) for sample in samples]
            timesteps, keep = draw(generators, noise_scheduler.config.num_train_timesteps, o.condition_dropout)
            timesteps, keep = timesteps.to(accelerator.device), keep.to(accelerator.device)

            # 2. Clean latents; the reference stays raw, which is its factor of about 5
            encoded = encoder(samples)
            tile = scale_latents(sample_moments(encoded["tile"], generators) * pipe.vae.config.scaling_factor)
            reference = sample_moments(encoded["reference"], generators)
            reference = torch.where(keep[:, None, None, None] > 0, reference, encoder.negative)

            # 3. Noise: tile and reference at the same time step
            noise, reference_noise = (
                randn_tensor(x.shape, generator=generators, device=x.device) for x in (tile, reference)
            )
            noisy_tile = noise_scheduler.add_noise(tile, noise, timesteps)
            noisy_reference = noise_scheduler.add_noise(reference, reference_noise, timesteps)

            # 4. Predict v and step
            v = model(
                noisy_tile,
                noisy_reference,
                timesteps,
                encoder.prompt_embeds,
                encoded["clip_pixels"],
                keep,
                encoded.get("control"),
            )
            error = (v.float() - noise_scheduler.get_velocity(tile, noise, timesteps)).square().mean((1, 2, 3))
            loss = (error * min_snr_weight(noise_scheduler, timesteps, o.snr_gamma)).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, o.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.detach() / accelerator.gradient_accumulation_steps
        skipped += sum(sample["skipped"] for sample in samples)
        if not accelerator.sync_gradients:
            continue
        lr_scheduler.step()
        ema.step(parameters)
        step += 1
        bar.update()
        record = {"step": step, "loss": accelerator.reduce(total, "mean").item(), "lr": lr_scheduler.get_last_lr()[0]}
        total = 0
        if skipped:
            record["skipped"] = skipped
        if step % o.validation_steps == 0:  # in all processes: with FSDP each has a part of the weights
            bare = accelerator.unwrap_model(model).eval()
            record |= one_step_psnr(pipe, bare, noise_scheduler, encoder, check)
            with gathered(bare):
                tiles = validation_tiles(pipe, check[:4])
            bare.train()
            if accelerator.is_main_process:
                folder = o.output / "validation"
                folder.mkdir(parents=True, exist_ok=True)
                tiles.save(folder / f"{step:06d}.webp", quality=90)
        if log:
            log.write(json.dumps(record) + "\n")
        accelerator.log(record, step)
        done = step >= o.steps or time.time() - start > 60 * o.minutes
        if done or time.time() - saved > 60 * o.save_minutes:
            save(accelerator, o.output, pipe, model, ema, step, o.keep)
            saved = time.time()
        if done:
            break
    bar.close()
    accelerator.end_training()
    if o.push_to_hub and accelerator.is_main_process:
        repository = create_repo(o.push_to_hub, exist_ok=True).repo_id
        upload_folder(repo_id=repository, folder_path=newest(o.output), ignore_patterns="state/*")


if __name__ == "__main__":
    main()
