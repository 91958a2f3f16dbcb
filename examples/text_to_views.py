"""From a text to six views: a text-to-image pipeline makes the picture, its background is removed, Zero123++ turns it.

    pip install "rembg[cpu]"
    python -m examples.text_to_views "a wooden toy robot" -o out/robot --checkpoint sudo-ai/zero123plus-v1.2

Writes `picture.png`, `input.png` (cut out and centred), and tile, views and cameras like generate.py. One model is in
memory at a time.
"""

import gc
from pathlib import Path

from zero123plus import checks
from zero123plus.options import Parser, add_checkpoint_options, command, count, load_from_options, ratio, seed

SUFFIX = ", single object, whole, centred, plain white background"  # what background removal and Zero123++ want


def free():
    """Gives back the memory of models that nothing refers to any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def text_to_picture(text: str, model: str, device: str, dtype, seed: int, steps: int):
    """One PIL picture by any pipeline that `AutoPipelineForText2Image` knows. The pipeline is gone afterwards."""
    import torch
    from diffusers import AutoPipelineForText2Image

    pipe = AutoPipelineForText2Image.from_pretrained(model, dtype=dtype).to(device)
    return pipe(text, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed)).images[0]


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = Parser("Six views of what a text says.")
    parser.add_argument("text")
    parser.add_argument("-o", "--output", type=Path, required=True, help="new folder to write to")
    parser.add_argument("--text-model", default="stabilityai/stable-diffusion-xl-base-1.0")
    add_checkpoint_options(parser.add_argument)
    parser.add_argument("--keep-background", action="store_true", help="do not cut the object out")
    parser.add_argument("--foreground-ratio", type=ratio, default=0.85)
    parser.add_argument("--text-steps", type=count, default=30)
    parser.add_argument("--steps", type=count, help="denoising steps; the checkpoint's if missing")
    parser.add_argument("--seed", type=seed, default=0)
    o = parser.parse_args(argv)
    checks.check_new(o.output)
    checks.check_device(o.device)
    # They take seconds, which mistakes need not wait for
    import torch

    from zero123plus import loading
    from zero123plus.pictures import prepare, rembg_session
    from zero123plus.results import put_new, write_result

    if not o.keep_background:
        rembg_session()
    o.device = loading.choose_device(o.device)
    dtype = loading.choose_dtype(o.device)

    # 1. Text to picture
    model = str(loading.resolve_checkpoint(o.text_model))
    picture = text_to_picture(o.text + SUFFIX, model, o.device, dtype, o.seed, o.text_steps)
    free()

    # 2. Cut out and centre
    cut = picture if o.keep_background else prepare(picture, "remove", o.foreground_ratio)

    # 3. Picture to views
    pipe = load_from_options(o)
    result = pipe(cut, num_inference_steps=o.steps, generator=torch.Generator().manual_seed(o.seed))

    def write(folder: Path):
        picture.save(folder / "picture.png")
        cut.save(folder / "input.png")
        write_result(folder, pipe, result.images[0], result.views[0])

    put_new(write, o.output)


if __name__ == "__main__":
    main()
