"""Six views of the object in each picture, from the command line.

    python generate.py examples/images/duck.png -o out

writes for each picture `out/NAME/`: `tile.png`, `view_0.png` to `view_5.png` and `cameras.json`, camera-to-world
matrices in the OpenGL convention and intrinsics in pixels.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import PIL.Image
import torch
from diffusers import DiffusionPipeline

ROOT = Path(__file__).resolve().parent


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Six consistent views of the object in each picture.")
    parser.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write to, one folder a picture")
    parser.add_argument(
        "--checkpoint", default=str(ROOT), help="folder or Hub name (default: the one in this repository)"
    )
    parser.add_argument("--steps", type=int, default=28, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of every picture (default: %(default)s)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on cuda, else float32"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results of an earlier run")
    return parser.parse_args(argv)


def load_pipeline(checkpoint: str, device: str, dtype: str | None) -> DiffusionPipeline:
    """Loads a checkpoint with this repository's pipeline and the "trailing" time steps that Zero123++ is used with."""
    dtype = getattr(torch, dtype or ("float16" if device.startswith("cuda") else "float32"))
    pipe = DiffusionPipeline.from_pretrained(
        checkpoint, custom_pipeline=str(ROOT), trust_remote_code=True, torch_dtype=dtype
    )
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe.to(device)


def tile_size(pipe) -> dict:
    """The size a checkpoint was trained at: the UNet's sample size where that is a tile's, else 960 x 640."""
    size = pipe.unet.config.sample_size
    if isinstance(size, int):
        return {"height": 960, "width": 640}
    return {"height": size[0] * pipe.vae_scale_factor, "width": size[1] * pipe.vae_scale_factor}


def write_result(folder: Path, pipe, tile, views):
    """Writes a picture's files beside their place and then puts the folder there, whole."""
    fresh = folder.with_name(folder.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    tile.save(fresh / "tile.png")
    poses = pipe.camera_poses()
    frames = []
    for i, view in enumerate(views):
        view.save(fresh / f"view_{i}.png")
        frames.append({"file": f"view_{i}.png", "camera_to_world": poses[i].tolist()})
    height, width = views[0].height, views[0].width
    cameras = {
        "convention": "OpenGL: +X right, +Y up, looking along -Z; world +Z up, input view at azimuth 0 on +X",
        "height": height,
        "width": width,
        "intrinsics": pipe.camera_intrinsics(height, width).tolist(),
        "frames": frames,
    }
    (fresh / "cameras.json").write_text(json.dumps(cameras, indent=2))
    if folder.exists():
        shutil.rmtree(folder)
    fresh.rename(folder)


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when all is written, 2 with one line on standard error for bad input."""
    options = parse_options(argv)
    try:
        folders = {}
        for path in options.pictures:
            folder = options.output / path.stem
            if folder in folders:
                raise ValueError(f"{path} and {folders[folder]} would both be written to {folder}: rename one.")
            if folder.exists() and not options.overwrite:
                raise ValueError(f"{folder} exists: choose another --output, or --overwrite it.")
            folders[folder] = path
        pictures = {}
        for folder, path in folders.items():
            try:
                with PIL.Image.open(path) as picture:
                    picture.load()
                    pictures[folder] = picture
            except OSError as error:
                raise ValueError(f"{path} cannot be read as a picture: {error}") from error
        if options.steps < 1:
            raise ValueError(f"--steps is {options.steps}, but must be at least 1.")

        pipe = load_pipeline(options.checkpoint, options.device, options.dtype)
        for folder, picture in pictures.items():
            pipe.set_progress_bar_config(desc=folders[folder].name)
            result = pipe(
                picture,
                **tile_size(pipe),
                num_inference_steps=options.steps,
                guidance_scale=options.guidance,
                generator=torch.Generator().manual_seed(options.seed),
            )
            write_result(folder, pipe, result.images[0], result.views[0])
            print(folder / "tile.png")
    except (ValueError, TypeError, OSError) as error:
        print(f"generate.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
