"""From a text to six views: a text-to-image pipeline makes the picture, its background is removed, Zero123++ turns it.

    pip install "rembg[cpu]"
    python examples/text_to_views.py "a wooden toy robot" -o out/robot --checkpoint sudo-ai/zero123plus-v1.2

Writes `picture.png`, `input.png` (cut out and centred), and tile, views and cameras like generate.py. One model is in
memory at a time.
"""

import argparse
import gc
import sys
from pathlib import Path

import torch
from diffusers import AutoPipelineForText2Image
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from generate import load_pipeline, tile_size, write_result  # noqa: E402
from prepare import recentre, remove_background  # noqa: E402

SUFFIX = ", single object, whole, centred, plain white background"  # what background removal and Zero123++ want


def free():
    """Gives back the memory of models that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def text_to_picture(text: str, model: str, device: str, dtype: torch.dtype, seed: int, steps: int) -> Image.Image:
    """One picture by a text-to-image pipeline, which is gone afterwards.

    Args:
        text: what to show.
        model: folder or Hub name of any pipeline that `AutoPipelineForText2Image` knows.
        device: to run on.
        dtype: of its weights.
        seed: of its noise.
        steps: of its denoising.
    """
    pipe = AutoPipelineForText2Image.from_pretrained(model, torch_dtype=dtype).to(device)
    return pipe(text, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed)).images[0]


def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Six views of what a text says.")
    parser.add_argument("text")
    parser.add_argument("-o", "--output", type=Path, required=True, help="new folder to write to")
    parser.add_argument(
        "--text-model", default="stabilityai/stable-diffusion-xl-base-1.0", help="default: %(default)s"
    )
    parser.add_argument("--checkpoint", help="of Zero123++ (default: the one in this repository)")
    parser.add_argument("--keep-background", action="store_true", help="do not cut the object out")
    parser.add_argument("--foreground-ratio", type=float, default=0.85, help="default: %(default)s")
    parser.add_argument("--text-steps", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=28, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    o = parser.parse_args(argv)
    if o.output.exists():
        raise SystemExit(f"{o.output} exists: choose a new --output.")
    dtype = torch.float16 if o.device.startswith("cuda") else torch.float32

    # 1. Text to picture
    picture = text_to_picture(o.text + SUFFIX, o.text_model, o.device, dtype, o.seed, o.text_steps)
    free()

    # 2. Cut out and centre
    try:
        cut = picture if o.keep_background else recentre(remove_background(picture), o.foreground_ratio)
    except ValueError as error:
        raise SystemExit(str(error)) from error

    # 3. Picture to views
    pipe = load_pipeline(o.checkpoint, o.device, None)
    generator = torch.Generator().manual_seed(o.seed)
    result = pipe(cut, **tile_size(pipe), num_inference_steps=o.steps, generator=generator)
    o.output.mkdir(parents=True)
    picture.save(o.output / "picture.png")
    cut.save(o.output / "input.png")
    write_result(o.output, pipe, result.images[0], result.views[0], exports=[])


if __name__ == "__main__":
    main()
