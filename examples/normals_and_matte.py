"""Normals and alpha mattes of generated views: a ControlNet makes normals of the tile, their length tells the object.

    pip install pymatting
    python examples/normals_and_matte.py examples/images/duck.png -o out/duck --guidance 2

Writes `tile.png`, `normals.png`, `matte.png` and six RGBA pictures `view_0.png` to `view_5.png`. With `--tile` the
views are not generated but given; where that tile is transparent, the matte is scored against it. For the public
checkpoint:
`--checkpoint sudo-ai/zero123plus-v1.2 --controlnet sudo-ai/controlnet-zp12-normal-gen-v1`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image
from scipy.ndimage import binary_erosion

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from generate import load_pipeline, tile_size  # noqa: E402
from pipeline import load_pictures, split_views  # noqa: E402

# Lengths of predicted normals: of unit length on the object, zero on the grey background, in between at its edge
FOREGROUND, BACKGROUND = 0.6, 0.2


def trimap(normals: np.ndarray) -> np.ndarray:
    """1 where the object is for certain, 0 where it is not, 0.5 between.

    Args:
        normals: a view's picture of normals, uint8 of shape (S, S, 3).

    Returns:
        Shape (S, S).
    """
    length = np.linalg.norm(normals / 127.5 - 1, axis=-1)
    width = max(1, len(normals) // 160)  # pixels that are left to matting on either side
    inside, outside = (
        binary_erosion(mask, iterations=width, border_value=1) for mask in (length > FOREGROUND, length < BACKGROUND)
    )
    return np.where(inside, 1.0, np.where(outside, 0.0, 0.5))


def cut_out(view: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """A view without its background.

    Args:
        view: uint8 RGB of shape (S, S, 3).
        normals: its normals, likewise.

    Returns:
        uint8 RGBA of shape (S, S, 4), with the object's own colours at its edge.
    """
    from pymatting import estimate_alpha_cf, estimate_foreground_ml

    known, pixels = trimap(normals), view / 255.0
    certain = (known == 1).any() and (known == 0).any()
    alpha = estimate_alpha_cf(pixels, known) if certain else np.round(known)
    colour = estimate_foreground_ml(pixels, alpha)
    return np.round(255 * np.clip(np.dstack([colour, alpha]), 0, 1)).astype(np.uint8)


def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Six views without background, and their normals.")
    parser.add_argument("picture", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="new folder to write to")
    parser.add_argument("--tile", type=Path, help="views to cut out, instead of generated ones")
    parser.add_argument("--checkpoint", default=str(ROOT), help="default: the one in this repository")
    parser.add_argument(
        "--controlnet",
        default=str(ROOT / "controlnet_normals"),
        help="folder or Hub name, of training.train_controlnet; default: that of the checkpoint in this repository",
    )
    parser.add_argument("--steps", type=int, default=28, help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=4.0, help="default: %(default)s; 2 suits the mini")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    o = parser.parse_args(argv)
    if o.output.exists():
        raise SystemExit(f"{o.output} exists: choose a new --output.")

    pipe = load_pipeline(o.checkpoint, o.device, None)
    picture = Image.open(o.picture)

    # 1. The views
    truth = Image.open(o.tile) if o.tile else None
    if truth:
        tile = load_pictures(truth, "--tile")[0]
    else:
        tile = pipe(
            picture,
            **tile_size(pipe),
            num_inference_steps=o.steps,
            guidance_scale=o.guidance,
            generator=torch.Generator().manual_seed(0),
        ).images[0]

    # 2. Their normals
    pipe.add_controlnet(ControlNetModel.from_pretrained(o.controlnet, torch_dtype=pipe.unet.dtype).to(o.device))
    normals = pipe(
        picture,
        control_image=tile,
        **tile_size(pipe),
        num_inference_steps=o.steps,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]

    # 3. Their mattes, view by view
    normals = normals.resize(tile.size)
    parts = zip(split_views([tile])[0], split_views([normals])[0])
    views = [cut_out(np.asarray(view), np.asarray(normal)) for view, normal in parts]

    o.output.mkdir(parents=True)
    tile.save(o.output / "tile.png")
    normals.save(o.output / "normals.png")
    for i, view in enumerate(views):
        Image.fromarray(view).save(o.output / f"view_{i}.png")
    size = len(views[0])
    matte = np.stack(views)[..., 3].reshape(3, 2, size, size).swapaxes(1, 2).reshape(3 * size, 2 * size)
    Image.fromarray(matte).save(o.output / "matte.png")
    if truth and truth.mode == "RGBA":
        ours, true = matte > 127, np.asarray(truth)[..., 3] > 127
        print(f"mask IoU {(ours & true).sum() / max(1, (ours | true).sum()):.3f}")


if __name__ == "__main__":
    main()
