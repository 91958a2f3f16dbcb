"""Trains Zero123++ on shards of `training.render`.

    accelerate launch -m training.train --phase 1 --checkpoint stabilityai/stable-diffusion-2 --data D --output out/1
    accelerate launch -m training.train --phase 2 --checkpoint out/1 --data D --output out/2
    accelerate launch -m training.train --phase student --checkpoint out/2 --data D --output out/3
    accelerate launch -m training.train --phase controlnet --condition depth --checkpoint out/2 --data D --output out/4
    accelerate launch -m training.train --phase pictures --checkpoint out/2 --data D --output out/5

Phases 1 and 2 are the paper's (section 2.5); `scratch` trains small models from random weights; `student` makes a
model of few steps, without guidance, of one of many (`training.student`); `controlnet` trains a ControlNet of depth or
normals, or the generator of normals, which sees the RGB tile; `pictures` trains a LoRA with which the model takes
several pictures of an object. Every option given overrides the phase's.
`OUTPUT/checkpoint-STEP` is a folder that `from_pretrained` loads, with EMA weights and the trained ramp, and what the
same command continues from.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from diffusers import EulerDiscreteScheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import create_repo, upload_folder
from peft import LoraConfig
from PIL import Image
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from pipeline import AZIMUTH_STEP, CAMERAS, Zero123PlusPipeline, split_views
from zero123plus.loading import checkpoints_of, fingerprint, load_controlnet, set_cameras
from zero123plus.options import Help, command, count, number, positive, program, share, whole

from .checkpoints import Run, gathered, load_start, write_weights
from .data import CONDITIONS, SHARES, PictureDataset, Stream, TileDataset, TilesInMemory, collate
from .dry_run import describe
from .loss import Denoiser, Zero123PlusLoss
from .optimizers import build_optimizer, build_schedule
from .shards import find_shards
from .student import StudentLoss

PAPER = {"image_sizes": (128, 512), "steps": 50_000, "batch_size": 256, "snr_gamma": 5.0}  # section 3
# From random weights min-SNR starves high noise, where shape and colour are decided
WITHOUT_SNR = {"image_sizes": None, "lr_scheduler": "decay", "snr_gamma": 0.0}
LORA = {"train": "unet", "learning_rate": 1e-4, "warmup_steps": 50, "batch_size": 32, **WITHOUT_SNR}
PHASES = {
    "1": {"train": "attention", "learning_rate": 7e-5, "lr_scheduler": "cosine", "warmup_steps": 1000, **PAPER},
    "2": {
        "train": "unet",
        "learning_rate": 5e-6,
        "lr_scheduler": "constant_with_warmup",
        "warmup_steps": 2000,
        **PAPER,
    },
    "scratch": {
        "train": "unet+vision",
        "optimizer": "muon",
        "learning_rate": 2e-3,
        "warmup_steps": 100,
        "steps": 20_000,
        "batch_size": 64,
        **WITHOUT_SNR,
    },
    # Made from 32,000 pictures that are seen once: fresh paths of the teacher do not overfit
    "student": {"lora_rank": 64, "steps": 1_000, **LORA},
    # Learns what further pictures show, and from where
    "pictures": {"lora_rank": 16, "pictures": 4, "steps": 2_000, **LORA},
    # The paper gives no figures for its ControlNets: diffusers' usual rate, the rest as in phase 2
    "controlnet": {
        "train": "controlnet",
        "learning_rate": 1e-5,
        "lr_scheduler": "constant_with_warmup",
        "warmup_steps": 500,
        **PAPER,
    },
}


LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
# Fewer steps, or more pictures, are another map, so that all of the UNet learns: feed-forward, projections,
# convolutions, time embedding
ALL_TARGETS = ["ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv_in", "conv_out", "conv1", "conv2"]
ALL_TARGETS += ["conv_shortcut", "conv", "time_emb_proj", "linear_1", "linear_2", *LORA_TARGETS]


# The options by groups of their help. Annotations such as `count` are functions that read and check the text of an
# option. What is None by default is the phase's.


@dataclass(kw_only=True)
class SourceOptions:
    _argument_group_name = "what is trained, and where it comes from"

    phase: Literal[tuple(PHASES)] = HfArg(
        help="1, 2: the paper's; scratch: a small model; student: few steps; controlnet: a ControlNet;"
        " pictures: several pictures of an object"
    )
    checkpoint: str = HfArg(help="folder, run or Hub name of Zero123++ or Stable Diffusion 2 to start from")
    data: Path = HfArg(help="folder of rendered shards; for a student also of pictures")
    output: Path = HfArg(help="folder of the run; the same command continues an interrupted run")
    validation: Path | None = HfArg(default=None, help="shards of held-out objects; else the first training objects")
    cameras: Literal[tuple(CAMERAS)] | None = HfArg(
        default=None, help="cameras of a checkpoint that does not say its own; else the data's"
    )
    pickle: bool = HfArg(default=False, help="also read weights stored with pickle, which can run code")
    vision_encoder: str = HfArg(
        default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", help="vision tower to put beside Stable Diffusion 2"
    )
    train: Literal["attention", "unet", "unet+vision", "controlnet"] | None = HfArg(
        default=None, help="which weights are trained"
    )
    lora_rank: whole = HfArg(default=None, help="rank of LoRA layers to train instead of the weights; 0: none")
    condition: Literal[tuple(CONDITIONS)] = HfArg(
        default="depth", help="what a ControlNet sees; with rgb it makes normals"
    )
    controlnet: str | None = HfArg(default=None, help="ControlNet to start from; else a copy of the UNet's encoder")
    pictures: number(int, 1, len(SHARES)) = HfArg(
        default=None, help="most pictures of an object that `--phase pictures` learns from"
    )
    student_steps: count = HfArg(default=2, help="steps of a student")
    teacher_steps: count = HfArg(default=None, help="steps of the teacher's path; else the checkpoint's")
    teacher_guidance: positive = HfArg(
        default=None, help="guidance scale of the teacher's path; else the checkpoint's"
    )
    perceptual: positive = HfArg(default=0.0, help="weight of LPIPS (VGG-16) and saturation in a student's loss")


@dataclass(kw_only=True)
class OptimiserOptions:
    _argument_group_name = "optimiser and loss"

    steps: count = HfArg(default=None, help="optimiser steps of the whole run")
    batch_size: count = HfArg(default=None, help="tiles of a step, in all processes together")
    micro_batch_size: count = HfArg(default=8, help="tiles at a time in each process; the rest is accumulated")
    optimizer: Literal["adamw", "muon"] | None = HfArg(default=None, help="adamw if the phase names none")
    learning_rate: positive = HfArg(default=None, help="highest learning rate")
    lr_scheduler: str | None = HfArg(
        default=None, help="'decay', 'timed' (decay over --minutes), or a name of diffusers.optimization.get_scheduler"
    )
    warmup_steps: whole = HfArg(default=None, help="first steps, in which the rate rises from 0")
    decay_steps: whole = HfArg(default=None, help="last steps of 'decay', in which the rate falls to 0; else a fifth")
    snr_gamma: positive = HfArg(default=None, help="gamma of min-SNR weighting; 0: none")
    condition_dropout: share = HfArg(default=0.1, help="share of samples without the condition")
    ema_decay: share = HfArg(default=0.999, help="decay of the averaged weights, which a checkpoint holds")
    max_grad_norm: positive = HfArg(default=1.0, help="norm that gradients are clipped to")
    seed: number(int, 0, 2**32 - 1) = HfArg(default=0, help="seed of the order of samples and of their noise")


@dataclass(kw_only=True)
class MachineOptions:
    _argument_group_name = "data and machine"

    image_sizes: list[int] | None = HfArg(
        default=None, help="two edges in pixels, between which the condition picture is resized at random; 0 0: none"
    )
    in_memory: bool = HfArg(default=False, help="hold all objects decoded in the memory of the device that trains")
    keep_background: bool = HfArg(default=False, help="leave the backgrounds of a student's pictures as they are")
    permute_colours: bool = HfArg(default=False, help="with --in-memory, permute each sample's colours at random")
    workers: whole = HfArg(default=0, help="processes that read data")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = HfArg(default=None, help="else that of accelerate launch")
    gradient_checkpointing: bool = HfArg(default=False, help="compute activations twice, to save memory")
    compile: bool = HfArg(default=False, help="torch.compile the UNet, which takes minutes")


@dataclass(kw_only=True)
class RunOptions:
    _argument_group_name = "the run"

    minutes: positive = HfArg(default=math.inf, help="minutes after which this run saves and stops")
    save_minutes: positive = HfArg(default=10.0, help="minutes between two checkpoints")
    keep: count = HfArg(default=2, help="number of newest checkpoints that stay")
    validation_steps: count = HfArg(default=1000, help="steps between two validations, each with a picture")
    report_to: Literal["tensorboard", "wandb", "none"] = HfArg(default="tensorboard", help="where else the log goes")
    push_to_hub: str | None = HfArg(default=None, help="repository that the last checkpoint is uploaded to")
    dry_run: bool = HfArg(default=False, help="print what would be trained and what it costs, and stop")


@dataclass(kw_only=True)
class Options(SourceOptions, OptimiserOptions, MachineOptions, RunOptions):
    """All options of a run."""


def trainable_parameters(unet: torch.nn.Module, train: str) -> dict[str, torch.nn.Parameter]:
    """The UNet's parameters to train, by name. "attention" is phase 1 of the paper, self-attention and the K and V
    matrices of cross-attention; all else is all.
    """
    if train != "attention":
        return dict(unet.named_parameters())
    parts = (".attn1.", ".attn2.to_k.", ".attn2.to_v.")
    return {name: value for name, value in unet.named_parameters() if any(part in name for part in parts)}


def validation_tiles(pipe: Zero123PlusPipeline, samples: dict) -> Image.Image:
    """A picture with a row for each sample of a batch: the input, the six generated views, and the six true ones.
    Where the model takes several pictures, the views are made of the input and the back.
    """
    images = samples["image"].permute(0, 2, 3, 1).cpu().numpy()
    generators = [torch.Generator().manual_seed(i) for i in range(len(images))]
    pipe.set_progress_bar_config(disable=True)
    height, width = samples["tile"].shape[2:] if "tile" in samples else pipe.default_size
    size = {"height": int(height), "width": int(width)}
    shown = {"image": images}
    if "others" in samples:  # with the back, beside which they are easiest to judge
        backs = samples["others"][:, 180 // AZIMUTH_STEP - 1].permute(0, 2, 3, 1).cpu().numpy()
        shown = {"image": [list(pair) for pair in zip(images, backs)], "image_azimuths": [0, 180]}
    made = pipe(**shown, control_image=samples.get("control"), generator=generators, output_type="np", **size).images
    truth = made[:, :, :0]  # pictures alone have no true views
    if "tile" in samples:
        truth = samples["tile"].permute(0, 2, 3, 1).cpu().numpy() / 255
    size = height // 3
    rows = [
        np.concatenate(
            [np.asarray(Image.fromarray(image).resize((size, size))) / 255, *a, np.ones((size, 4, 3)), *b], axis=1
        )
        for image, a, b in zip(images, split_views(made), split_views(truth))
    ]
    return Image.fromarray(np.round(np.concatenate(rows) * 255).astype(np.uint8))


def readable(dataset: TileDataset, count: int) -> dict:
    """A batch of at most `count` samples, evenly spread over those that can be read."""
    found = []
    for i in range(0, len(dataset), max(1, len(dataset) // count)):
        try:
            found.append(dataset[i])
        except ValueError:  # the trainer's stream warns of these and counts them
            pass
    if not found:
        raise ValueError("No sample can be read: render again.")
    return collate(found[:count])


def validate(
    pipe: Zero123PlusPipeline, model: Denoiser, loss: Zero123PlusLoss | StudentLoss, samples: dict, path: Path | None
):
    """Measures held-out samples ([`Zero123PlusLoss.validate`]), draws tiles of the first four into `path` if there is
    one, and brings the pipeline's ramp up to date.
    """
    was_training = model.training
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # a compiled UNet would be compiled again for these shapes
        record = loss.validate(model, samples)
        with gathered(model):
            pipe.register_to_config(ramping_coefficients=model.ramp.tolist())
            tiles = validation_tiles(pipe, {name: value[:4] for name, value in samples.items()})
    model.train(was_training)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        tiles.save(path, quality=90)
    return record


def parse_options(argv: list[str] | None) -> Options:
    """Reads the command line; the phase fills in what is not given."""
    groups = SourceOptions, OptimiserOptions, MachineOptions, RunOptions
    usage = "python -m training.train --phase PHASE --checkpoint CHECKPOINT --data DATA --output OUTPUT [OPTION ...]"
    parser = HfArgumentParser(
        groups, description="Train Zero123++.", formatter_class=Help, usage=usage, prog=program()
    )
    parts = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    o = Options(**{name: value for part in parts for name, value in vars(part).items()})
    for name, value in {"optimizer": "adamw", "lora_rank": 0, "pictures": 1, **PHASES[o.phase]}.items():
        if getattr(o, name) is None:
            setattr(o, name, value)
    if o.decay_steps is None:
        o.decay_steps = o.steps // 5
    if o.image_sizes and not any(o.image_sizes):
        o.image_sizes = None
    return o


def check_options(o: Options, accelerator: Accelerator):
    """Checks options against each other and against how the run was launched.

    Raises:
        ValueError: naming the option and the remedy.
    """
    if o.image_sizes and not (len(o.image_sizes) == 2 and 1 <= o.image_sizes[0] <= o.image_sizes[1]):
        raise ValueError(f"`--image-sizes` is {o.image_sizes}, but must be two edges in pixels that rise, or 0 0.")
    if o.image_sizes and o.phase == "student":
        raise ValueError("`--image-sizes` is not of a student, which sees what its teacher sees: leave it out.")
    if (o.pictures > 1) != (o.phase == "pictures"):
        raise ValueError(f"`--pictures` is {o.pictures}, but must be 2 to 4 with `--phase pictures`, and else 1.")
    if o.in_memory and o.pictures > 1:
        raise ValueError("`--in-memory` holds one picture of each sample: leave it out with `--phase pictures`.")
    if o.permute_colours and not o.in_memory:
        raise ValueError("`--permute-colours` permutes what lies in memory: give `--in-memory` too.")
    if o.lr_scheduler == "timed" and not math.isfinite(o.minutes):
        raise ValueError("`--lr-scheduler timed` falls with the time left of `--minutes`: give it, or take 'decay'.")
    if o.in_memory and o.phase == "student" and not find_shards(o.data):
        raise ValueError(f"`--in-memory` holds rendered objects, but `--data` {o.data} has no shards: leave it out.")
    if o.perceptual and o.phase != "student":
        raise ValueError(f"`--perceptual` is of a student's loss, but `--phase` is {o.phase}: leave it out.")
    if o.lora_rank and o.train == "controlnet":
        raise ValueError(f"`--lora-rank` is {o.lora_rank}, but a ControlNet is trained whole: leave it out.")
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    if plugin and (plugin.fsdp_version != 2 or plugin.auto_wrap_policy is not None):
        # Layers wrapped one by one give their weights back too early: the keys and values that the reference pass
        # writes have gradients when the tile's pass through the layer is over
        raise ValueError(
            f"FSDP is of version {plugin.fsdp_version} with the wrap policy"
            f" {getattr(plugin.auto_wrap_policy, '__name__', 'NO_WRAP')}, but reference attention needs version 2 with"
            " the model as one: --fsdp_version 2 --fsdp_auto_wrap_policy NO_WRAP."
        )
    share = o.micro_batch_size * accelerator.num_processes
    if o.batch_size % share:
        raise ValueError(
            f"`--batch-size` {o.batch_size} is no multiple of {share}, which {accelerator.num_processes} processes of"
            f" `--micro-batch-size` {o.micro_batch_size} do at a time."
        )


def build_losses(o: Options, pipe: Zero123PlusPipeline, accelerator: Accelerator):
    """The loss that trains, that which validates, and what a run says of a student: its steps, guidance
    scale and scheduler, which its pipeline gets too, and its teacher's steps and guidance scale.
    """
    if o.phase != "student":
        device = accelerator.device
        return Zero123PlusLoss(pipe, device, o.snr_gamma, o.condition_dropout), Zero123PlusLoss(pipe, device), {}
    steps = o.teacher_steps or pipe.config.default_num_inference_steps
    guidance = pipe.config.default_guidance_scale if o.teacher_guidance is None else o.teacher_guidance
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    loss = StudentLoss(pipe, accelerator.device, o.student_steps, steps, guidance, dtype, o.perceptual)
    pipe.register_to_config(default_num_inference_steps=o.student_steps, default_guidance_scale=1.0)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    student = {
        "num_inference_steps": o.student_steps,
        "guidance_scale": 1.0,
        "scheduler": type(pipe.scheduler).__name__,
    }
    return loss, loss, {**student, "teacher_steps": steps, "teacher_guidance": guidance}


def build_model(o: Options, pipe: Zero123PlusPipeline) -> Denoiser:
    """Takes the pipeline's components and sets which parameters train."""
    pipe.controlnet = None
    if o.train == "controlnet":
        if o.controlnet:
            load_controlnet(pipe, o.controlnet)
        else:
            pipe.add_controlnet()
    model = Denoiser.of(pipe)
    for module in (pipe.vae, pipe.text_encoder, model):
        module.requires_grad_(False)
    if o.lora_rank:
        targets = ALL_TARGETS if o.phase in ("student", "pictures") else LORA_TARGETS
        pipe.unet.add_adapter(LoraConfig(r=o.lora_rank, lora_alpha=o.lora_rank, target_modules=targets))
    elif o.train == "controlnet":
        pipe.controlnet.requires_grad_(True)
    else:
        for parameter in trainable_parameters(pipe.unet, o.train).values():
            parameter.requires_grad_(True)
        model.ramp.requires_grad_(True)
        pipe.vision_encoder.requires_grad_(o.train == "unet+vision")
    if o.gradient_checkpointing:
        for module in filter(None, (pipe.unet, pipe.controlnet)):
            module.enable_gradient_checkpointing()
    if o.compile:
        pipe.unet.compile()
    return model


def train(o: Options):
    """Trains as the options say."""
    # 1. Data
    set_seed(o.seed)
    condition = o.condition if o.train == "controlnet" else None
    dataset, validation = (
        PictureDataset(folder, "keep" if o.keep_background else "auto")
        if o.phase == "student" and not find_shards(folder)
        else TileDataset(folder, condition=condition, pictures=o.pictures)
        for folder in (o.data, o.validation or o.data)
    )
    check = readable(validation, 16)
    accelerator = Accelerator(
        mixed_precision=o.mixed_precision,
        log_with=None if o.report_to == "none" else o.report_to,
        project_dir=o.output,
    )
    check_options(o, accelerator)
    if isinstance(dataset, TileDataset):
        accelerator.print(f"{o.data}: {dataset.describe()}")
    if o.push_to_hub and accelerator.is_main_process and not o.dry_run:  # before the work, which would end in vain
        o.push_to_hub = create_repo(o.push_to_hub, exist_ok=True).repo_id
    accelerator.gradient_accumulation_steps = o.batch_size // (o.micro_batch_size * accelerator.num_processes)

    # 2. What trains, and what is frozen
    pipe = load_start(o.checkpoint, o.vision_encoder, o.pickle, o.cameras)
    size = tuple(check["tile"].shape[2:]) if "tile" in check else pipe.default_size  # height and width
    pipe.check_size(*size)
    if dataset.preset:
        set_cameras(pipe, dataset.preset, f"`--data` {o.data}")
    if validation.preset != dataset.preset:
        raise ValueError(
            f"`--validation` {o.validation} has the cameras of {validation.preset}, but `--data` {o.data} those of"
            f" {dataset.preset}."
        )
    pipe.vae.to(accelerator.device), pipe.text_encoder.to(accelerator.device)
    pipe.register_to_config(pictures=o.pictures)
    loss_function, validation_loss, student = build_losses(o, pipe, accelerator)
    model = build_model(o, pipe)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if o.dry_run:
        accelerator.print(describe(pipe, model, list(named.values()), o, accelerator.mixed_precision, size, student))
        return
    record = {"checkpoint": absolute(o.checkpoint), "train": o.train, "lora_rank": o.lora_rank, "condition": condition}
    record |= {"optimizer": o.optimizer, "cameras": dataset.preset or o.cameras, "seed": o.seed, **student}
    record |= {"pictures": o.pictures} if o.pictures > 1 else {}
    record |= {"unet": fingerprint(pipe.unet)} if o.lora_rank else {}
    # With FSDP the parameters are shared out already, and Muon must not share them out once more
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if o.optimizer == "muon" and not sharded:  # each process has the state of its share of the matrices
        record["processes"] = accelerator.num_processes
    run = Run(o.output, accelerator, record, o.keep)
    optimizer = build_optimizer(o.optimizer, named, o.learning_rate, 1 if sharded else accelerator.num_processes)
    time_left = partial(run.time_left, o.minutes)
    # Not prepared: accelerate would step it once for each process
    lr_scheduler = build_schedule(o.lr_scheduler, optimizer, o.warmup_steps, o.steps, o.decay_steps, time_left)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # All weights at once, which torch does not do for sharded ones
    ema = EMAModel(parameters, decay=o.ema_decay, use_ema_warmup=False, foreach=not sharded)
    accelerator.register_for_checkpointing(lr_scheduler)
    if o.in_memory:
        progress = partial(tqdm, desc="reading", unit="object", disable=not accelerator.is_main_process)
        dataset = TilesInMemory(dataset, accelerator.device, o.workers, o.permute_colours, progress)

    # 3. Continue from the newest checkpoint. The options of this run count, not those in the state
    rates = list(lr_scheduler.base_lrs)
    step, seen = run.restore(ema, optimizer)
    ema.decay, lr_scheduler.base_lrs = o.ema_decay, rates
    for group, rate, factor in zip(optimizer.param_groups, rates, lr_scheduler.lr_lambdas):
        group["lr"] = rate * factor(lr_scheduler.last_epoch)
    stop = seen + (o.steps - step) * o.batch_size
    stream = Stream(dataset, o.seed, seen, stop, o.image_sizes, o.pictures, o.batch_size)
    loader_options = {"collate_fn": collate, "num_workers": o.workers}
    if o.in_memory:
        loader_options = {"collate_fn": dataset.batch}
    loader = torch.utils.data.DataLoader(stream, o.micro_batch_size, drop_last=True, **loader_options)
    loader = accelerator.prepare(loader)
    log = run.open_log(step)
    accelerator.init_trackers("zero123plus", {k: str(v) for k, v in vars(o).items()})
    save = partial(run.save, partial(write_weights, pipe=pipe), model, ema, optimizer)
    last = time.time()
    bar = tqdm(total=o.steps, initial=step, unit="step", disable=not accelerator.is_main_process)

    # 4. Train
    total = skipped = 0
    decays_later = o.lr_scheduler == "timed" or (o.lr_scheduler == "decay" and o.steps - step > o.decay_steps)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = loss_function(model, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, o.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.detach() / accelerator.gradient_accumulation_steps
        skipped += sum(batch["skipped"])
        if not accelerator.sync_gradients:
            continue
        lr_scheduler.step()
        ema.step(parameters)
        step, seen = step + 1, seen + o.batch_size
        bar.update()
        line = {"step": step, "tiles": seen, "loss": accelerator.reduce(total, "mean")}
        now = time.time()
        line["tiles_per_second"] = round(o.batch_size / (now - last), 2)
        last = now
        line |= {"lr": lr_scheduler.get_last_lr()[0], **({"skipped": skipped} if skipped else {})}
        line |= {"pictures": 1 + len(batch["azimuths"][0])} if o.pictures > 1 else {}
        total = 0
        if step % o.validation_steps == 0:  # in all processes: with FSDP each has a part of the weights
            path = o.output / "validation" / f"{step:06d}.webp" if accelerator.is_main_process else None
            ema.store(parameters)
            ema.copy_to(parameters)  # what a checkpoint holds
            line |= validate(pipe, accelerator.unwrap_model(model), validation_loss, check, path)
            ema.restore(parameters)
        log.write(line)
        remaining = time_left()
        left = o.steps * remaining if o.lr_scheduler == "timed" else o.steps - step
        decays = decays_later and left <= o.decay_steps  # the state to train on from
        decays_later &= not decays
        done = remaining < 0 or step >= o.steps
        if run.is_due(o.save_minutes) or done or decays:
            log.flush()
            save(step, seen, kept=decays and left > 0)
        if done:
            break
    log.flush()
    bar.close()
    accelerator.end_training()
    if o.push_to_hub and accelerator.is_main_process:
        upload_folder(repo_id=o.push_to_hub, folder_path=checkpoints_of(o.output)[-1], ignore_patterns="state/*")


def absolute(checkpoint: str) -> str:
    """A local folder by its absolute path, so that it is found from anywhere; a Hub name as it is."""
    return str(Path(checkpoint).resolve()) if Path(checkpoint).is_dir() else checkpoint


@command
def main(argv: list[str] | None = None):
    """The command line."""
    train(parse_options(argv))


if __name__ == "__main__":
    main()
