"""Puts what was trained into the root of this repository, in half precision and in shards that git can hold.

python -m training.publish --checkpoint out/scratch
python -m training.publish --controlnet out/depth
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import ControlNetModel

from pipeline import Zero123PlusPipeline
from zero123plus.loading import ROOT, RUN_FILE, find, run_record
from zero123plus.options import add_cameras_option, command

from .checkpoints import load_start

MAX_SHARD_SIZE = "16MB"


def write_pipeline(pipe: Zero123PlusPipeline, folder: Path):
    """Writes a pipeline as this repository has it: it loads by itself, and names no folder of where it was trained."""
    pipe.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    index = folder / "model_index.json"
    config = json.loads(index.read_text())
    # Written as a pair, the class is found in pipeline.py and the folder loads without `custom_pipeline`. The
    # ControlNet is loaded by subfolder: if it were named here, `from_pretrained` would not take another.
    config |= {"_class_name": ["pipeline", "Zero123PlusPipeline"], "controlnet": [None, None]}
    index.write_text(json.dumps(config, indent=2) + "\n")
    # transformers before 5 reads a tokenizer from these two
    bpe = json.loads(pipe.tokenizer.backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(bpe["vocab"], indent=0) + "\n")
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def replace(part: Path, target: Path):
    """Puts a file or folder in the place of an earlier one, which is removed when the new one is there.

    Raises:
        ValueError: if a folder is there that is no component of a checkpoint.
    """
    old = target.with_name(f".{target.name}.old")
    if target.is_dir():
        if not list(target.glob("*config.json")):  # config.json, scheduler_config.json, tokenizer_config.json, ...
            raise ValueError(f"{target} is no component of a checkpoint: move it, or choose another --output.")
        target.rename(old)
    part.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def publish(o: argparse.Namespace):
    """Publishes as the options say."""
    o.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=o.output) as folder:
        folder = Path(folder)
        if o.controlnet:
            source = find(o.controlnet)
            controlnet = ControlNetModel.from_pretrained(source, dtype=torch.float16, use_safetensors=True)
            controlnet.save_pretrained(folder / o.name, max_shard_size=MAX_SHARD_SIZE)
            record = {name: run_record(source).get(name) for name in ("condition", "cameras")}
            if None not in (o.cameras, record["cameras"]) and o.cameras != record["cameras"]:
                raise ValueError(f"`--cameras` is {o.cameras}, but {source} was trained for {record['cameras']}.")
            record["cameras"] = o.cameras or record["cameras"]
            (folder / o.name / RUN_FILE).write_text(json.dumps(record, indent=2) + "\n")
        else:
            pipe = load_start(o.checkpoint, cameras=o.cameras)  # a LoRA is merged
            write_pipeline(pipe.to(torch.float16), folder)
        for path in (*folder.glob("model_index.json"), *folder.glob("*/config.json")):
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)  # where it lay on the machine that trained it
            if "dtype" in config:  # transformers' default is what is written here; diffusers' is float32
                config["dtype"] = "float32"
            path.write_text(json.dumps(config, indent=2) + "\n")
        for part in folder.iterdir():
            if part.name != "pipeline.py" or not (o.output / part.name).exists():
                replace(part, o.output / part.name)


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Make a checkpoint the one that ships with the repository.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, help="a pipeline's folder, or a run's output")
    what.add_argument("--controlnet", type=Path, help="a ControlNet's folder, or a run's output")
    parser.add_argument("--name", default="controlnet", help="folder of the ControlNet (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT, help="default: the root of this repository")
    add_cameras_option(parser.add_argument)
    publish(parser.parse_args(argv))


if __name__ == "__main__":
    main()
