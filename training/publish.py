"""Puts what was trained into the root of this repository, in half precision and in shards that git can hold.

python -m training.publish --checkpoint out/scratch
python -m training.publish --checkpoint out/scratch --average . --share 0.4 --vae out/vae
python -m training.publish --controlnet out/depth
python -m training.publish --lora out/student --rank 10
"""

import json
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from diffusers import AutoencoderKL, ControlNetModel
from torch.nn import functional as F

from pipeline import Zero123PlusPipeline
from zero123plus.files import put_folder, write_file
from zero123plus.loading import LORA_FILE, ROOT, RUN_FILE, STUDENT, find, find_lora, run_record
from zero123plus.options import Parser, add_cameras_option, command, count, share

from .checkpoints import load_start

MAX_SHARD_SIZE = "16MB"


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The floating-point tensors of a module by name, which are the module's own."""
    return {key: value for key, value in module.state_dict().items() if value.is_floating_point()}


def same_layers(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two modules have the same tensors but for their values."""
    return {key: value.shape for key, value in a.items()} == {key: value.shape for key, value in b.items()}


def same_latents(a: AutoencoderKL, b: AutoencoderKL) -> bool:
    """Whether two VAEs encode alike, up to half precision."""
    ours, theirs = (
        {key: value for key, value in weights(vae).items() if key.startswith(("encoder.", "quant_conv."))}
        for vae in (a, b)
    )
    return same_layers(ours, theirs) and all(torch.allclose(ours[key], theirs[key], 0.01, 1e-3) for key in ours)


def average(pipe: Zero123PlusPipeline, other: Zero123PlusPipeline, share: float):
    """Moves what was trained of a pipeline, UNet, vision encoder and ramp, to the mean of its weights and another's,
    which it was trained from or which were trained from the same (arXiv 2109.01903, section 3).

    Args:
        pipe: changed in place.
        other: with the same latents and layers.
        share: of the other's weights in the mean, 0 to 1.

    Raises:
        ValueError: if the two have other latents or layers.
    """

    if not same_latents(pipe.vae, other.vae):
        raise ValueError("`--average` has another VAE encoder: average checkpoints of the same latents.")
    for name in ("unet", "vision_encoder"):
        ours, theirs = weights(getattr(pipe, name)), weights(getattr(other, name))
        if not same_layers(ours, theirs):
            raise ValueError(f"`--average` has another {name}: average checkpoints with the same layers.")
        for key, value in ours.items():
            value.lerp_(theirs[key], share)
    ramps = (torch.tensor(p.config.ramping_coefficients) for p in (pipe, other))
    pipe.register_to_config(ramping_coefficients=torch.lerp(*ramps, share).tolist())


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


def reduce_rank(layers: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """The best approximation of a LoRA by one of a lower rank in the Frobenius norm of each layer's product, scaled so
    that this norm stays: without, the LoRA would do a little less of everything.

    Raises:
        ValueError: if the LoRA is of a lower rank, or has keys that are no pair of matrices.
    """
    pairs = {key: key.replace(".lora_A.", ".lora_B.") for key in layers if ".lora_A." in key}
    if layers.keys() != {*pairs, *pairs.values()}:
        raise ValueError("`--rank` changes pairs named lora_A and lora_B, but this LoRA has others too: leave it out.")
    reduced = {}
    for names in pairs.items():
        down, up = (layers[name] for name in names)
        if len(down) < rank:
            raise ValueError(
                f"`--rank` is {rank}, but {names[0]} is of rank {len(down)}: give at most that, or leave it out."
            )
        # The singular values of up @ down are those of the small product of the triangular factors
        (q_up, r_up), (q_down, r_down) = map(torch.linalg.qr, (up.flatten(1).double(), down.flatten(1).double().T))
        u, values, v = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
        root = (values[:rank] * values.norm() / values[:rank].norm().clamp(min=1e-12)).sqrt()
        # A layer of fewer channels is filled up with zeros: diffusers scales layers of other ranks differently
        factors = (q * root for q in (q_down @ v[:rank].T, q_up @ u[:, :rank]))
        left, right = (F.pad(factor, (0, rank - len(root))) for factor in factors)
        reduced |= zip(names, (left.T.reshape(rank, *down.shape[1:]), right.reshape(-1, rank, *up.shape[2:])))
    return reduced


def write_lora(source: Path, weight_name: str, folder: Path, cameras: str | None, rank: int | None):
    """Writes a LoRA with the record of its cameras and of a student's steps, guidance scale and scheduler."""
    layers = safetensors.torch.load_file(source / weight_name)
    if rank:
        layers = reduce_rank(layers, rank)
    folder.mkdir()
    layers = {key: value.half().contiguous() for key, value in layers.items()}
    safetensors.torch.save_file(layers, folder / LORA_FILE)
    write_record(source, folder, ("num_inference_steps", "guidance_scale", "scheduler"), cameras)


def publish(
    output: Path,
    checkpoint: Path | None,
    controlnet: Path | None,
    lora: Path | None,
    rank: int | None,
    name: str | None,
    cameras: str | None,
    other: Path | None,
    share: float,
    vae: Path | None,
):
    """Publishes a pipeline, a ControlNet or a LoRA. For the arguments see the options.

    Raises:
        ValueError: if a folder has a component's name and is none, `cameras` contradict what is published, or `vae`
            has other latents.
    """
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        folder = Path(folder)
        if controlnet:
            write_controlnet(find(controlnet), folder / (name or "controlnet"), cameras)
        elif lora:
            write_lora(*find_lora(lora), folder / (name or STUDENT.name), cameras, rank)
        else:
            pipe = load_start(checkpoint, cameras=cameras)  # a LoRA is merged
            if other:
                average(pipe, load_start(other, cameras=cameras), share)
            if vae:
                trained = AutoencoderKL.from_pretrained(find(vae), use_safetensors=True)
                if not same_latents(trained, pipe.vae):
                    raise ValueError(f"`--vae` {vae} has another encoder: train it from the VAE of `--checkpoint`.")
                pipe.vae = trained
            write_pipeline(pipe.to(torch.float16), folder)
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
    parser.add_argument("--rank", type=count, help="publish the best approximation of --lora of this lower rank")
    parser.add_argument("--name", help=f"folder of the ControlNet or LoRA; default: controlnet or {STUDENT.name}")
    parser.add_argument(
        "--average", dest="other", type=Path, help="publish the mean of --checkpoint's weights and this checkpoint's"
    )
    parser.add_argument("--share", type=share, default=0.5, help="of --average in the mean")
    parser.add_argument("--vae", type=Path, help="its VAE in place of --checkpoint's: a folder, or a run of train_vae")
    parser.add_argument("--output", type=Path, default=ROOT, help="default: the root of this repository")
    add_cameras_option(parser.add_argument)
    o = parser.parse_args(argv)
    if not o.checkpoint and (o.other or o.vae):
        name, published = "--average" if o.other else "--vae", "--controlnet" if o.controlnet else "--lora"
        parser.error(f"`{name}` is of pipelines, and `{published}` is published as it is: leave one of them out.")
    if o.rank and not o.lora:
        parser.error("`--rank` is of `--lora`: leave it out.")
    publish(**vars(o))


if __name__ == "__main__":
    main()
