"""Normals and alpha mattes of generated views: a ControlNet makes normals of the tile, their length tells the object.

    pip install pymatting
    python -m examples.normals_and_matte examples/images/cactus.png -o out/cactus

Writes `tile.png`, `normals.png`, `matte.png` and six RGBA pictures `view_0.png` to `view_5.png`. With `--tile` the
views are not generated but given; where that tile is transparent, the matte is scored against it. For the public
checkpoint:
`--checkpoint sudo-ai/zero123plus-v1.2 --controlnet sudo-ai/controlnet-zp12-normal-gen-v1`.
"""

from pathlib import Path

from zero123plus import checks
from zero123plus.options import ROOT, Parser, add_checkpoint_options, command, count, load_from_options, scale


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = Parser("Six views without background, and their normals.")
    parser.add_argument("picture", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="new folder to write to")
    parser.add_argument("--tile", type=Path, help="views to cut out, instead of generated ones")
    add_checkpoint_options(parser.add_argument)
    parser.add_argument(
        "--controlnet",
        default=str(ROOT / "controlnet_normals"),
        help="folder, run or Hub name of a ControlNet; the shipped checkpoint's if missing",
    )
    parser.add_argument("--steps", type=count, default=28)
    parser.add_argument("--guidance", type=scale, help="guidance scale; the checkpoint's if missing")
    o = parser.parse_args(argv)
    checks.check_new(o.output)
    checks.check_device(o.device)
    for path in filter(None, (o.picture, o.tile)):
        checks.check_picture(str(path))
    checks.check_packages("mattes")
    # They take seconds, which mistakes need not wait for
    import numpy as np
    import torch
    from PIL import Image

    from pipeline import load_pictures, split_views
    from zero123plus import loading
    from zero123plus.mattes import view_without_background
    from zero123plus.pictures import read_picture, to_tile
    from zero123plus.results import put_new

    picture = read_picture(o.picture, str(o.picture))
    truth = read_picture(o.tile, str(o.tile)) if o.tile else None
    pipe = load_from_options(o)

    # 1. The views
    if truth:
        tile = load_pictures(truth, "--tile")[0]
    else:
        tile = pipe(
            picture, num_inference_steps=o.steps, guidance_scale=o.guidance, generator=torch.Generator().manual_seed(0)
        ).images[0]

    # 2. Their normals
    loading.load_controlnet(pipe, o.controlnet)
    normals = pipe(
        picture,
        control_image=tile,
        num_inference_steps=o.steps,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]

    # 3. Their mattes, view by view
    normals = normals.resize(tile.size)
    parts = zip(split_views([tile])[0], split_views([normals])[0])
    views = [view_without_background(np.asarray(view), np.asarray(normal)) for view, normal in parts]

    matte = to_tile(np.stack(views)[..., 3:])[..., 0]

    def write(folder: Path):
        tile.save(folder / "tile.png")
        normals.save(folder / "normals.png")
        for i, view in enumerate(views):
            Image.fromarray(view).save(folder / f"view_{i}.png")
        Image.fromarray(matte).save(folder / "matte.png")

    put_new(write, o.output)
    if truth and truth.mode == "RGBA":
        ours, true = matte > 127, np.asarray(truth)[..., 3] > 127
        print(f"mask IoU {(ours & true).sum() / max(1, (ours | true).sum()):.3f}")


if __name__ == "__main__":
    main()
