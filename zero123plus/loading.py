"""Loading a checkpoint, ready to call: from a folder, a training run or the Hub, without running code of it."""

import contextlib
import importlib.util
import itertools
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import diffusers
import numpy as np
import safetensors.torch
import torch
import transformers
from diffusers import ControlNetModel
from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.utils import HfHubHTTPError, LocalEntryNotFoundError, filter_repo_objects

from pipeline import Zero123PlusPipeline, preset_of

from .options import ROOT, one_line

logger = logging.getLogger(__name__)

STUDENT = ROOT / "student"  # its LoRA for few steps, where there is one
LORA_FILE = "pytorch_lora_weights.safetensors"
RUN_FILE = "run.json"  # what a training run says of itself in each of its checkpoints, and a ControlNet of its cameras
# What components need: weights lie in the components' folders, but for a LoRA's and a ControlNet's own
WEIGHTS = ("*.json", "*.txt", "*.model", "*/*.safetensors", "diffusion_pytorch_model*.safetensors", LORA_FILE)
OTHERS = ("*non_ema*", "*onnx*", "*openvino*", "*flax*")  # not downloaded
VARIANTS = ("fp16", "bf16")  # whose weights are taken where a component has no others
TEXT_LORA_PREFIXES = ("text_encoder.", "lora_te")
LORA_PREFIXES = ("unet.", "lora_unet_", *TEXT_LORA_PREFIXES)
LORA_UP = re.compile(r"lora(_B|_up|\.up|_linear_layer\.up)\b")  # the second matrix of a layer
# What else files of these names hold, by what their keys have
OTHER_KINDS = {r"\.hada_": "LoHa", r"\.lokr_": "LoKr", r"\.oft_|\.boft_": "OFT", r"\.on_input$": "IA3"}
OTHER_KINDS |= {r"\.(diff|diff_b)$": "set of whole differences", r"\.[ab][12]\.weight$": "GLoRA"}
OTHER_KINDS |= {r"\.lora_mid\.": "LoCon with Tucker decomposition"}
LORA_DOWN = re.compile(r"lora(_A|_down|\.down|_linear_layer\.down)\b")  # the first matrix of a layer


def choose_device(device: str | None = None) -> str:
    """Checks that a device is there; without a name takes cuda, else mps, else cpu.

    Raises:
        ValueError: if there is no such device.
    """
    there = [name for name, ok in (("cuda", torch.cuda.is_available()), ("mps", torch.mps.is_available())) if ok]
    if device is None:
        return (there or ["cpu"])[0]
    kind, _, index = device.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind not in (*there, "cpu") or (index and not (index.isdecimal() and int(index) < count)):
        raise ValueError(f"`--device` is {device!r}, but there is only {', '.join([*there, 'cpu'])} on this machine.")
    return device


def choose_dtype(device: str, dtype: str | None = None) -> torch.dtype:
    """A dtype by its name; without one float16 on cuda, bfloat16 on a processor that multiplies it by itself, else
    float32.
    """
    if dtype is None and device == "cpu":
        dtype = "bfloat16" if cpu_has_bfloat16() else "float32"
    return getattr(torch, dtype or ("float16" if device.startswith("cuda") else "float32"))


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices by itself (AVX512_BF16 or AMX). Without that they take up to
    60 times as long as float32 ones.
    """
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def checkpoints_of(run: Path) -> list[Path]:
    """The folders `checkpoint-STEP` of a training run, oldest first. They appear by a rename, so all are complete."""
    found = [path for path in Path(run).glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def resolve_checkpoint(name: str | Path, pickle: bool = False, revision: str | None = None) -> Path:
    """The local folder of a checkpoint.

    Args:
        name: a folder, a training run's folder (of which the newest checkpoint is taken), or a Hub name, whose weights
            and configurations are downloaded.
        pickle: whether to download .bin files too.
        revision: branch, tag or commit of a Hub name.

    Raises:
        ValueError: if there is no such folder, and it cannot be downloaded, or there is one, but a revision is asked
            for.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and revision is not None:
        raise ValueError(f"`--revision` is {revision}, but {name} is a folder here, which has none: leave it out.")
    if folder.is_dir():
        return (checkpoints_of(folder) or [folder])[-1]
    if folder.exists():
        raise ValueError(f"{name} is a file, but a checkpoint is a folder or a Hub name.")
    chosen = {"revision": revision} if revision else {}
    wanted = {"allow_patterns": [*WEIGHTS, "*.bin"] if pickle else list(WEIGHTS), "ignore_patterns": list(OTHERS)}
    try:
        try:
            files = list(filter_repo_objects(list_repo_files(str(name), **chosen), **wanted))
        except Exception:  # of the network: the cache is taken as it is, or the download says what is wrong
            files = []
        keep = find_variant(map(PurePosixPath, files))
        wanted["ignore_patterns"] += [f"*.{variant}[.-]*" for variant in VARIANTS if variant != keep]
        return Path(snapshot_download(str(name), **chosen, **wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ValueError(
            f"{name} is no folder here, and cannot be had from the Hub ({one_line(error, 300)}): check"
            " the name, the network, and that the folder HF_HOME names can be written to."
        ) from error


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: if it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}): it is damaged or incomplete.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, but must hold a JSON object.")
    return found


def check_kind(folder: Path):
    """Checks that a folder holds a pipeline of Zero123++.

    Raises:
        ValueError: saying what it holds instead, and what to do.
    """
    if (folder / "model_index.json").is_file():
        kind = read_json(folder / "model_index.json").get("_class_name")
        kind = kind[-1] if isinstance(kind, list) else kind
        if kind == "Zero123PlusPipeline":
            return
        raise ValueError(
            f"{folder} holds a {kind}, but a Zero123PlusPipeline is needed. Stable Diffusion 2 becomes one by"
            " training: `python -m training.train --phase 1 --checkpoint ...`."
        )
    if (folder / "config.json").is_file():
        kind = read_json(folder / "config.json").get("_class_name", "model of transformers")
        remedy = "give it as `--controlnet`" if kind == "ControlNetModel" else "give the folder above it"
        raise ValueError(f"{folder} holds a {kind}, but a whole Zero123PlusPipeline is needed: {remedy}.")
    raise ValueError(
        f"{folder} holds no model_index.json: it is no checkpoint of a pipeline. Give the folder that has it, or a run"
        " of training.train."
    )


def check_weights(folder: Path, pickle: bool):
    """Checks that all weights are in safetensors.

    Raises:
        ValueError: if a component has only a file that is stored with pickle, which can run code when it is read.
    """
    if pickle:
        return
    for path in sorted(folder.glob("*/*.bin")):
        if not list(path.parent.glob("*.safetensors")):
            raise ValueError(
                f"{path} is stored with pickle, which can run code when it is read: convert it (load it where it is"
                " trusted, and `save_pretrained`), or pass `--pickle` if you trust its source."
            )


def run_record(folder: Path) -> dict:
    """What a training run wrote about itself beside its weights; empty for other folders."""
    path = folder / RUN_FILE
    return read_json(path) if path.is_file() else {}


def find_variant(files) -> str | None:
    """The variant, of `VARIANTS`, of which some component has weights and no others, given the paths of all files."""
    of_folder = {}
    for path in files:
        if path.suffix == ".safetensors" and len(path.parts) > 1:
            found = re.search(rf"\.({'|'.join(VARIANTS)})[.-]", path.name)
            of_folder.setdefault(path.parent, set()).add(found and found[1])
    return next((found for (found, *others) in of_folder.values() if found and not others), None)


@contextlib.contextmanager
def naming(name: str | Path):
    """Turns whatever a checkpoint makes diffusers and transformers raise into a ValueError that names it."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and len(str(error)) < 1000:
            raise
        reason = one_line(error, 300)
        raise ValueError(f"{name} cannot be loaded: {reason}") from error


def load_components(
    folder: Path, dtype: torch.dtype, pickle: bool = False, cameras: str | None = None
) -> Zero123PlusPipeline:
    """Loads a pipeline whose components all have one dtype. No code of the checkpoint runs. `cameras` is for a
    checkpoint that does not say its own.

    Raises:
        ValueError: if it is of another kind, names components of its own code, has weights stored with pickle and
            `pickle` does not allow it, or says that it has other cameras.
    """
    check_kind(folder)
    check_weights(folder, pickle)
    with naming(folder):
        for package in (diffusers, transformers):
            package.utils.logging.disable_progress_bar()  # loading takes a second; downloads have bars of their own
        options = {"use_safetensors": None if pickle else True, "variant": find_variant(folder.glob("*/*"))}
        pipe = Zero123PlusPipeline.from_pretrained(folder, dtype=dtype, **options)
    if cameras is not None:
        set_cameras(pipe, cameras, "`--cameras`")
    return pipe


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to load, as [`options.add_checkpoint_options`] describes it. It can be sent to another process,
    which then loads it. By default it is the one in this repository; a LoRA run is its LoRA on the checkpoint that it
    was trained from. For device and dtype see [`choose_device`] and [`choose_dtype`].
    """

    name: str | Path | None = None
    device: str | None = None
    dtype: str | None = None
    cameras: str | None = None
    lora: str | Path | None = None
    lora_scale: float = 1.0
    pickle: bool = False
    revision: str | None = None

    def describe(self) -> str:
        """Device and dtype in words."""
        device = choose_device(self.device)
        return f"on {device}, {str(choose_dtype(device, self.dtype)).removeprefix('torch.')}"

    def find(self) -> tuple[Path, list[str | Path]]:
        """The folder of the pipeline, and the LoRAs that are merged into it, in order: those that a run, or the LoRA,
        was trained on come first.

        Raises:
            ValueError: as [`resolve_checkpoint`], or if a LoRA does not say what it was trained from.
        """
        folder = resolve_checkpoint(ROOT if self.name is None else self.name, self.pickle, self.revision)
        loras = lora_chain(folder) if not (folder / "model_index.json").is_file() else []
        if loras:
            base = run_record(loras[0]).get("checkpoint")
            if base is None or Path(base) in loras:
                raise ValueError(f"{folder} holds a LoRA alone: give it as `--lora`, and its base as `--checkpoint`.")
            folder = resolve_checkpoint(base, self.pickle)
        if self.lora is not None:
            loras += [lora for lora in lora_chain(find_lora(self.lora)[0])[:-1] if lora not in loras] + [self.lora]
        return folder, loras

    def defaults(self) -> dict:
        """`num_inference_steps` and `guidance_scale` of a call that names none. A LoRA may have its own."""
        folder, loras = self.find()
        found, config = {"num_inference_steps": 28, "guidance_scale": 4.0}, read_json(folder / "model_index.json")
        found |= {name: config[f"default_{name}"] for name in found if f"default_{name}" in config}
        for lora in loras:
            found |= {name: value for name, value in run_record(find_lora(lora)[0]).items() if name in found}
        return found

    def load(self) -> Zero123PlusPipeline:
        """Loads it with the "trailing" time steps that Zero123++ is used with.

        Raises:
            ValueError: if it cannot be loaded, or `cameras` contradict it.
        """
        device, (folder, loras) = choose_device(self.device), self.find()
        pipe = load_components(folder, choose_dtype(device, self.dtype), self.pickle, self.cameras)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
        for lora in loras:
            add_lora(pipe, lora, self.lora_scale if lora is loras[-1] else 1.0)
        return pipe.to(device)


def set_cameras(pipe: Zero123PlusPipeline, preset: str, source: str):
    """Gives a pipeline the cameras of a preset. Whatever was rendered, trained or controlled with a preset is checked
    here against the checkpoint that it meets. For errors see `Zero123PlusPipeline.lora_settings`.
    """
    pipe.take_settings(pipe.lora_settings({"cameras": preset}, source))


def lora_chain(folder: Path) -> list[Path]:
    """The folders of a LoRA and of those that it was trained on, the first one first; empty for other folders."""
    found = []
    while (folder / LORA_FILE).is_file() and folder not in found:
        found.insert(0, folder)
        base = Path(str(run_record(folder).get("checkpoint") or ""))
        folder = resolve_checkpoint(base) if base.is_dir() else base
    return found


def find_lora(name: str | Path) -> tuple[Path, str]:
    """The folder of a LoRA, given as folder, run, Hub name or file, and the name of its file there. Raises ValueError
    if there is none.
    """
    path = Path(name)
    folder, weight_name = (path.parent, path.name) if path.is_file() else (resolve_checkpoint(name), LORA_FILE)
    if not (folder / weight_name).is_file():
        raise ValueError(f"`--lora` {name} has no {weight_name}.")
    return folder, weight_name


def fingerprint(unet: torch.nn.Module) -> list[float]:
    """The mean magnitudes of some of a UNet's matrices, by which it is known in every precision."""
    matrices = [value for name, value in unet.named_parameters() if value.ndim > 1 and "lora_" not in name]
    return [float(f"{matrix.detach().float().abs().mean():.6g}") for matrix in matrices[:: len(matrices) // 16 or 1]]


def check_base(pipe: Zero123PlusPipeline, record: dict, name: str | Path):
    """Checks a LoRA's record against the UNet, as it was loaded or as other LoRAs made it: a student that has another
    teacher is refused, and of other LoRAs a warning says so.
    """
    bases = [*getattr(pipe.unet, "bases", ()), fingerprint(pipe.unet)]
    pipe.unet.bases = bases
    trained_on = record.get("unet")
    if not trained_on or any(len(b) == len(trained_on) and np.allclose(b, trained_on, rtol=2e-4) for b in bases):
        return
    message = f"`--lora` {name} was trained on other weights than this checkpoint's"
    message += f": on {record['checkpoint']}" if "checkpoint" in record else ""
    if "num_inference_steps" in record:
        raise ValueError(f"{message}. A student works on its teacher alone: give that as `--checkpoint`.")
    logger.warning("%s. Its effect may be another.", message)


def read_lora(path: Path, name: str | Path) -> tuple[dict[str, torch.Tensor], bool]:
    """Reads the weights of a LoRA, into which what it says of alpha is multiplied where diffusers would drop it, and
    whether there was such.

    Raises:
        ValueError: if they are of another kind, or an alpha has no layer.
    """
    layers = safetensors.torch.load_file(path)
    for key, (pattern, kind) in itertools.product(layers, OTHER_KINDS.items()):
        if re.search(pattern, key):
            raise ValueError(
                f"`--lora` {name} is a {kind}, but only LoRA is loaded: merge it into a checkpoint first."
            )
    alphas = [key for key in layers if key.endswith(".alpha") and not key.startswith("lora_")]  # kohya's are read
    for key in alphas:
        layer, alpha = key.removesuffix("alpha"), layers.pop(key)
        ups = [other for other in layers if other.startswith(layer) and LORA_UP.search(other)]
        if not ups:
            raise ValueError(f"`--lora` {name} has {key}, but no layer for it: it is damaged.")
        for up in ups:
            layers[up] = layers[up] * (alpha.item() / layers[up].shape[1])
    return layers, bool(alphas)


def add_lora(pipe: Zero123PlusPipeline, name: str | Path, scale: float = 1.0):
    """Merges a LoRA into a pipeline's weights, so that it takes no time in any step. What its `run.json` says of its
    use, such as a student's steps, guidance scale and scheduler, is taken too. After an error the pipeline is as it
    was.

    Raises:
        ValueError: if there is none, it was trained for other cameras than the pipeline's or brings a scheduler that
            is not in `pipeline.SCHEDULERS`, it is a student of other weights, diffusers does not load all of its
            layers, or the package peft is missing.
    """
    if not importlib.util.find_spec("peft"):
        raise ValueError("`--lora` needs the package peft: `pip install -r requirements.txt`.")
    folder, weight_name = find_lora(name)
    record = run_record(folder)
    with naming(name):
        settings = pipe.lora_settings(record, f"`--lora` {name}")
        check_base(pipe, record, name)
        weights, has_alphas = read_lora(folder / weight_name, name)
        keys = list(weights)
        modules = {module for module, _ in pipe.unet.named_modules()}
        before = sum(".lora_A." in module for module in modules)
        # A file's header may say alphas too, which a dictionary of weights would lose
        given = (weights, {}) if has_alphas else (str(folder), {"weight_name": weight_name, "use_safetensors": True})
        ours = {key.partition(".lora_")[0].removeprefix("unet.") for key in keys}
        try:
            if ours and ours <= modules:  # `pipe.load_lora_weights` would warn of a text encoder without layers
                prefix = "unet" if keys[0].startswith("unet.") else None
                pipe.unet.load_lora_adapter(given[0], prefix=prefix, **given[1])
            elif any(key.startswith(LORA_PREFIXES) for key in keys):
                pipe.load_lora_weights(given[0], **given[1])
            else:
                raise ValueError(
                    f"`--lora` {name} has weights such as {next(iter(keys), 'none')!r}, but those of a LoRA begin with"
                    f" {', '.join(LORA_PREFIXES)} or the name of a module of the UNet."
                )
            layers = len([key for key in keys if LORA_DOWN.search(key) and not key.startswith(TEXT_LORA_PREFIXES)])
            loaded = sum(".lora_A." in module for module, _ in pipe.unet.named_modules()) - before
            if loaded != layers:
                raise ValueError(
                    f"`--lora` {name} has {layers} layers of the UNet, but diffusers loads {loaded}: their names"
                    " are of more than one kind, or of another UNet."
                )
        except Exception:
            pipe.unload_lora_weights()
            raise
        pipe.fuse_lora(lora_scale=scale)
        pipe.unload_lora_weights()
    pipe.take_settings(settings)


def load_controlnet(pipe: Zero123PlusPipeline, name: str | Path, scale: float = 1.0) -> ControlNetModel:
    """Adds a ControlNet of [`resolve_checkpoint`] to a pipeline, in the dtype and on the device of its UNet.

    Raises:
        ValueError: if it is of another kind, or was trained for other cameras than the pipeline's.
    """
    folder = resolve_checkpoint(name)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if config.get("_class_name") != "ControlNetModel":
        raise ValueError(f"`--controlnet` {name} holds no ControlNetModel: give a folder that has its config.json.")
    preset = run_record(folder).get("cameras") or preset_of(name)
    if preset:
        set_cameras(pipe, preset, f"`--controlnet` {name}")
    with naming(name):
        controlnet = ControlNetModel.from_pretrained(folder, use_safetensors=True)
    return pipe.add_controlnet(controlnet, scale)
