"""Puts a trained pipeline into the root of this repository, in half precision and in shards that git can hold.

python -m training.publish --checkpoint out/scratch/pipeline
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch

from pipeline import Zero123PlusPipeline

ROOT = Path(__file__).resolve().parent.parent
MAX_SHARD_SIZE = "16MB"


def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Make a checkpoint the one that ships with the repository.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the pipeline to publish")
    parser.add_argument("--output", type=Path, default=ROOT, help="default: the root of this repository")
    options = parser.parse_args(argv)

    pipe = Zero123PlusPipeline.from_pretrained(options.checkpoint, torch_dtype=torch.float16)
    with tempfile.TemporaryDirectory(dir=options.output) as folder:
        pipe.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        index = Path(folder) / "model_index.json"
        config = json.loads(index.read_text())
        # As a pair, the class is found in pipeline.py and the folder loads without `custom_pipeline`. The ControlNet
        # is loaded by subfolder: named here, it could not be replaced by another.
        config |= {"_class_name": ["pipeline", "Zero123PlusPipeline"], "controlnet": [None, None]}
        index.write_text(json.dumps(config, indent=2) + "\n")
        for path in (index, *Path(folder).glob("*/config.json")):
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)  # where it lay on the machine that trained it
            if "dtype" in config:  # transformers' default is what is written here; diffusers' is float32
                config["dtype"] = "float32"
            path.write_text(json.dumps(config, indent=2) + "\n")
        # transformers before 5 reads a tokenizer from these; the mini's has no merges
        vocabulary = json.dumps(pipe.tokenizer.get_vocab(), indent=0)
        (Path(folder) / "tokenizer" / "vocab.json").write_text(vocabulary + "\n")
        (Path(folder) / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
        for part in Path(folder).iterdir():
            target = options.output / part.name
            if part.name == "pipeline.py" and target.exists():
                continue
            if target.is_dir():
                shutil.rmtree(target)
            part.rename(target)


if __name__ == "__main__":
    main()
