"""Starting, saving and continuing a training run."""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule

from pipeline import Zero123PlusPipeline
from zero123plus.files import put_folder, write_file
from zero123plus.loading import (
    RUN_FILE,
    Checkpoint,
    add_lora,
    checkpoints_of,
    load_components,
    run_record,
    set_cameras,
)

from .untrained import assemble

MAX_OVERFLOWS = 20  # steps in a row that a scaler of float16's gradients may leave out before the run ends


def load_start(
    checkpoint: str | Path, vision_encoder: str = "", pickle: bool = False, cameras: str | None = None
) -> Zero123PlusPipeline:
    """Loads what a run starts from, in float32 throughout: Zero123++, a run of it, a LoRA run (whose LoRA is merged),
    or Stable Diffusion 2, to which `vision_encoder` is added. For `pickle` and `cameras` see
    [`loading.load_components`].
    """
    folder, loras = Checkpoint(checkpoint, pickle=pickle).find()
    index = folder / "model_index.json"
    if index.is_file() and DiffusionPipeline.load_config(folder)["_class_name"] == "StableDiffusionPipeline":
        pipe = assemble(folder, vision_encoder)
        if cameras is not None:
            set_cameras(pipe, cameras, "`--cameras`")
        return pipe
    pipe = load_components(folder, torch.float32, pickle, cameras)
    for lora in loras:
        add_lora(pipe, lora)
    return pipe


def with_weights(module: torch.nn.Module, weights: dict[str, torch.Tensor], name: str) -> torch.nn.Module:
    """Returns a module like `module` with those of `weights` whose names begin with `name`. `module` itself, which may
    be in training, stays as it is.
    """
    with torch.device("meta"):
        diffusers_kind = hasattr(module, "from_config")
        fresh = type(module).from_config(module.config) if diffusers_kind else type(module)(module.config)
    part = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
    fresh.load_state_dict(part, assign=True, strict=False)  # strict: buffers like position_ids are not saved
    return fresh


def write_weights(weights: dict[str, torch.Tensor], folder: Path, pipe: Zero123PlusPipeline):
    """Writes what was trained, weights of a [`loss.Denoiser`]: a ControlNet, LoRA layers, or the whole pipeline."""
    if pipe.controlnet is not None:
        with_weights(pipe.controlnet, weights, "controlnet").save_pretrained(folder)
    elif getattr(pipe.unet, "peft_config", None):
        layers = {
            name.removeprefix("unet.").replace(".default.", "."): value
            for name, value in weights.items()
            if "lora_" in name
        }
        # With peft's names. diffusers' own converter renames attention alone, and of mixed names the loader drops some
        pipe.save_lora_weights(folder, unet_lora_layers=layers)
    else:
        parts = {name: with_weights(getattr(pipe, name), weights, name) for name in ("unet", "vision_encoder")}
        kept = ("cameras", "default_num_inference_steps", "default_guidance_scale")
        options = {name: pipe.config[name] for name in kept}
        ramp = weights["ramp"].tolist()
        backend = pipe.tokenizer.backend_tokenizer  # which keeps, and would save, what the last call asked for
        backend.no_truncation()
        backend.no_padding()
        Zero123PlusPipeline(**{**pipe.components, **parts}, **options, ramping_coefficients=ramp).save_pretrained(
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


def decide(accelerator: Accelerator, *values: float) -> list[float]:
    """The main process's values, in all processes: these must not each look at a clock of their own."""
    if accelerator.num_processes == 1:
        return list(values)
    decision = torch.tensor(values, device=accelerator.device)
    torch.distributed.broadcast(decision, 0)
    return decision.tolist()


class StepLog:
    """The log of a run, written by the first process alone. A line is written when the next one comes, because its
    loss may still be computed on the GPU, and to wait for it would leave the GPU idle.
    """

    def __init__(self, file, accelerator: Accelerator):
        self.file, self.accelerator, self.line = file, accelerator, None
        self.overflows = 0  # steps in a row whose loss was not finite
        self.max_overflows = MAX_OVERFLOWS if accelerator.scaler else 0

    def write(self, line: dict):
        """Takes a step's line, with the `loss` as a tensor."""
        self.flush()
        self.line = line

    def flush(self):
        """Writes the line that was taken last.

        Raises:
            ValueError: if its loss is not finite, so that the weights are lost and must not be saved.
        """
        if self.line:
            line = {**self.line, "loss": self.line["loss"].item()}
            self.overflows = 0 if math.isfinite(line["loss"]) else self.overflows + 1
            if self.overflows > self.max_overflows:
                raise ValueError(
                    f"The loss of step {line['step']} is {line['loss']}: the training diverged. Go on from its newest"
                    " checkpoint, or if that diverges too from an earlier one, with a lower `--learning-rate`, more"
                    " `--warmup-steps` or `--mixed-precision bf16`."
                )
            if self.file:
                self.file.write(json.dumps(line) + "\n")
            self.accelerator.log(line, line["step"])
        self.line = None


class Run:
    """The folder of a run: its checkpoints, its log, and what it is a run of.

    Args:
        output: the folder.
        accelerator: of the run, after `prepare`.
        record: what the run is, written into every checkpoint. A run that continues must have the same.
        keep: how many of the newest checkpoints stay.

    Raises:
        ValueError: if the folder holds a run with another record.
    """

    def __init__(self, output: Path, accelerator: Accelerator, record: dict, keep: int):
        self.output, self.accelerator, self.record, self.keep = output, accelerator, record, keep
        self.start, self.saved = time.time(), time.time()
        done = checkpoints_of(output)
        self.newest = done[-1] if done else None
        for name, value in run_record(self.newest).items() if done else ():
            if name in record and value != record[name]:
                raise ValueError(
                    f"{output} holds a run with {name} {value!r}, but {record[name]!r} is asked for now: continue with"
                    " the same, or choose another --output."
                )

    def time_left(self, minutes: float) -> float:
        """The share of `minutes` that is left of this run by the first process's clock, 1 where there is no limit."""
        return decide(self.accelerator, 1 - (time.time() - self.start) / max(60 * minutes, 1e-9))[0]

    def is_due(self, minutes: float) -> bool:
        """Whether the last checkpoint is older than that, by the first process's clock."""
        return bool(decide(self.accelerator, time.time() - self.saved > 60 * minutes)[0])

    @property
    def rank(self) -> int:
        """The process that writes the EMA which this process loads. With FSDP each process has a share of the
        parameters and writes its own; otherwise the first process writes for all.
        """
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        return self.accelerator.process_index if sharded else 0

    def restore(self, ema: EMAModel, optimizer) -> tuple[int, int]:
        """Loads the newest checkpoint and returns its step and the samples that it has seen; 0 without any."""
        if self.newest is None:
            return 0, 0
        state = self.newest / "state"
        self.accelerator.load_state(state)
        # To the CPU first, because torch.load does not know the device "cpu:1" of a second process
        ema.load_state_dict(torch.load(state / f"ema-{self.rank}.pt", map_location="cpu", weights_only=True))
        ema.to(self.accelerator.device)
        own = state / f"optimizer-{self.accelerator.process_index}.pt"
        if own.is_file():
            optimizer.load_state_dict(torch.load(own, map_location="cpu", weights_only=True))
        record = run_record(self.newest)
        return record["step"], record["samples"]

    def save(
        self, write: Callable[[dict, Path], None], model, ema: EMAModel, optimizer, step: int, samples: int, kept=False
    ):
        """Writes `checkpoint-STEP`, which appears whole or not at all and holds the averages of the weights, and
        removes all but the newest, and those that were kept.

        Raises:
            ValueError: if it cannot be written, as on a full disk. Nothing of it is left then.
        """
        partial = self.output / "checkpoint.partial"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self._save(partial, write, model, ema, optimizer, step, samples, kept)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' own, on a full disk
            shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(self.output).free
            raise ValueError(
                f"{self.output}/checkpoint-{step} cannot be written ({' '.join(str(error).split())[:200]}):"
                f" {free / 2**20:,.0f} MiB are free there. Make room; the same command goes on from the newest"
                " checkpoint."
            ) from error
        self.saved = time.time()

    def _save(self, partial: Path, write, model, ema: EMAModel, optimizer, step: int, samples: int, kept: bool):
        accelerator, output = self.accelerator, self.output
        accelerator.save_state(partial / "state")
        if accelerator.process_index == self.rank:
            torch.save(ema.state_dict(), partial / "state" / f"ema-{self.rank}.pt")
        if getattr(optimizer.optimizer, "world_size", 1) > 1:
            torch.save(optimizer.state_dict(), partial / "state" / f"optimizer-{accelerator.process_index}.pt")
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ema.store(parameters)
        ema.copy_to(parameters)
        weights = accelerator.get_state_dict(model)
        accelerator.wait_for_everyone()  # all have written their state
        if accelerator.is_main_process:
            write(weights, partial)
            record = {**self.record, "step": step, "samples": samples, "kept": kept}
            (partial / RUN_FILE).write_text(json.dumps(record, indent=2) + "\n")
            put_folder(partial, output / f"checkpoint-{step}", owned=lambda name: True)
            for old in checkpoints_of(output)[: -self.keep]:
                if not run_record(old).get("kept"):
                    shutil.rmtree(old)
        ema.restore(parameters)
        accelerator.wait_for_everyone()

    def open_log(self, step: int) -> StepLog:
        """Opens the log of a run that continues after `step`, without the lines that were written beyond it.

        Raises:
            ValueError: if the file is something else.
        """
        if not self.accelerator.is_main_process:
            return StepLog(None, self.accelerator)
        path, start = self.output / "log.jsonl", '{"step": '
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for line in path.read_text().splitlines() if path.exists() else []:
            if not (line.startswith(start) or start.startswith(line)):
                raise ValueError(f"{path} is no log of a training run: move it, or choose another --output.")
            try:
                lines += [line] if json.loads(line)["step"] <= step else []
            except json.JSONDecodeError:  # killed while writing
                pass
        write_file(path, "".join(f"{line}\n" for line in lines).encode())
        return StepLog(open(path, "a", buffering=1), self.accelerator)
