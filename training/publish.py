"""Puts what was trained into the root of this repository, in half precision and in shards that git can hold.

python -m training.publish --checkpoint out/2
python -m training.publish --controlnet out/depth
python -m training.publish --lora out/student
"""

import json
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from diffusers import ControlNetModel

from pipeline import Zero123PlusPipeline
from zero123plus.files import put_folder, write_file
from zero123plus.loading import LORA_FILE, ROOT, RUN_FILE, STUDENT, find_lora, resolve_checkpoint, run_record
from zero123plus.options import Parser, add_cameras_option, command

from .checkpoints import load_start

MAX_SHARD_SIZE = "16MB"


def write_pipeline(pipe: Zero123PlusPipeline, folder: Path):
    """Writes a pipeline as this repository has it: it loads by itself, and names no folder of where it was trained."""
    pipe.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    index = folder / "model_index.json"
    config = json.loads(index.read_text())
    # The ControlNet is loaded by subfolder: if it were named here, `from_pretrained` would not take another
    config["controlnet"] = [None, None]
    index.write_text(json.dumps(config, indent=2) + "\n")
    # transformers before 5 reads a tokenizer from these two
    bpe = json.loads(pipe.tokenizer.backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(bpe["vocab"], indent=0) + "\n")
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def write_record(source: Path, folder: Path, names: tuple[str, ...], cameras: str | None):
    """Writes what a run says of how its weights are used: `names`, and its cameras or `cameras`.

    Raises:
        ValueError: if these differ.
    """
    run = run_record(source)
    if None not in (cameras, run.get("cameras")) and cameras != run["cameras"]:
        raise ValueError(f"`--cameras` is {cameras}, but {source} was trained for {run['cameras']}.")
    record = {name: run[name] for name in names if name in run} | {"cameras": cameras or run.get("cameras")}
    (folder / RUN_FILE).write_text(json.dumps(record, indent=2) + "\n")


def write_controlnet(source: Path, folder: Path, cameras: str | None):
    """Writes a ControlNet with the record of what it sees and of its cameras."""
    controlnet = ControlNetModel.from_pretrained(source, dtype=torch.float16, use_safetensors=True)
    controlnet.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    write_record(source, folder, ("condition",), cameras)


def write_lora(source: Path, weight_name: str, folder: Path, cameras: str | None):
    """Writes a LoRA with the record of its cameras and of how it is used: steps, guidance, scheduler, pictures."""
    layers = safetensors.torch.load_file(source / weight_name)
    folder.mkdir()
    layers = {key: value.half().contiguous() for key, value in layers.items()}
    safetensors.torch.save_file(layers, folder / LORA_FILE)
    write_record(source, folder, ("num_inference_steps", "guidance_scale", "scheduler", "pictures", "unet"), cameras)


def publish(
    output: Path,
    checkpoint: Path | None,
    controlnet: Path | None,
    lora: Path | None,
    name: str | None,
    cameras: str | None,
):
    """Publishes a pipeline, a ControlNet or a LoRA. For the arguments see the options.

    Raises:
        ValueError: if a folder has a component's name and is none, or `cameras` contradict what is published.
    """
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        folder = Path(folder)
        if controlnet:
            write_controlnet(resolve_checkpoint(controlnet), folder / (name or "controlnet"), cameras)
        elif lora:
            source, weight_name = find_lora(lora)
            kind = "pictures" if "pictures" in run_record(source) else STUDENT.name
            write_lora(source, weight_name, folder / (name or kind), cameras)
        else:
            write_pipeline(load_start(checkpoint, cameras=cameras).to(torch.float16), folder)  # a LoRA is merged
        for path in (*folder.glob("model_index.json"), *folder.glob("*/config.json")):
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)  # where it lay on the machine that trained it
            if "dtype" in config:  # transformers' default is what is written here; diffusers' is float32
                config["dtype"] = "float32"
            path.write_text(json.dumps(config, indent=2) + "\n")
        parts = list(folder.iterdir())
        for part in parts:  # all are checked before the first is replaced
            target = output / part.name
            known = [*target.glob("*config.json"), *target.glob(LORA_FILE)]
            if part.is_dir() and target.is_dir() and not known:
                raise ValueError(f"{target} is no component of a checkpoint: move it, or choose another --output.")
        for part in parts:
            if part.is_dir():
                put_folder(part, output / part.name, owned=lambda name: True)
            elif part.name != "pipeline.py" or not (output / part.name).exists():
                write_file(output / part.name, part.read_bytes())


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = Parser("Make a checkpoint the one that ships with the repository.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, help="a pipeline's folder, or a run's output")
    what.add_argument("--controlnet", type=Path, help="a ControlNet's folder, or a run's output")
    what.add_argument("--lora", type=Path, help="a student's folder, or a run's output")
    parser.add_argument(
        "--name",
        help=f"folder of the ControlNet or LoRA in --output; controlnet, {STUDENT.name} or pictures if missing",
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT, help="folder to publish into; the root of this repository if missing"
    )
    add_cameras_option(parser.add_argument)
    publish(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
