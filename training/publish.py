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
from zero123plus.loading import ROOT, find

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


def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Make a checkpoint the one that ships with the repository.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, help="a pipeline's folder, or a run's output")
    what.add_argument("--controlnet", type=Path, help="a ControlNet's folder, or a run's output")
    parser.add_argument("--name", default="controlnet", help="folder of the ControlNet (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT, help="default: the root of this repository")
    options = parser.parse_args(argv)

    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.output) as folder:
        folder = Path(folder)
        if options.controlnet:
            controlnet = ControlNetModel.from_pretrained(find(options.controlnet), dtype=torch.float16)
            controlnet.save_pretrained(folder / options.name, max_shard_size=MAX_SHARD_SIZE)
        else:
            write_pipeline(load_start(options.checkpoint, "").to(torch.float16), folder)  # a LoRA is merged
        for path in (*folder.glob("model_index.json"), *folder.glob("*/config.json")):
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)  # where it lay on the machine that trained it
            if "dtype" in config:  # transformers' default is what is written here; diffusers' is float32
                config["dtype"] = "float32"
            path.write_text(json.dumps(config, indent=2) + "\n")
        for part in folder.iterdir():
            target = options.output / part.name
            if part.name == "pipeline.py" and target.exists():
                continue
            if target.is_dir():
                shutil.rmtree(target)
            part.rename(target)


if __name__ == "__main__":
    main()
