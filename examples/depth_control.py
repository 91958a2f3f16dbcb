"""A mesh, seen in new colours: its depth from the six cameras controls the views, a picture gives their look.

    pip install -r requirements-training.txt
    python examples/depth_control.py examples/rocket.glb examples/images/robot.png -o out/rocket --guidance 2

Writes `depth.png`, what the ControlNet sees, tile, views and cameras like generate.py. The mesh's front is +X, up
is +Z, in Blender's coordinates. For the public checkpoint:
`--checkpoint sudo-ai/zero123plus-v1.1 --controlnet sudo-ai/controlnet-zp11-depth-v1 --cameras v1.1`.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from generate import load_pipeline, tile_size, write_result  # noqa: E402
from training import render  # noqa: E402
from training.data import depth_picture, to_tile  # noqa: E402


def render_depth(mesh: Path, size: int, cameras: str) -> Image.Image:
    """The six depth pictures of a mesh, tiled, as RGBA whose background is transparent.

    Args:
        mesh: a file that Blender imports.
        size: pixels of a view's edge.
        cameras: "v1.1" or "v1.2".
    """
    render.reset_scene(1)
    render.load_object({"source": "file", "path": str(mesh)})
    render.normalise()
    with tempfile.TemporaryDirectory() as folder:
        views = [render.render_view(camera, size, folder)["depth"] for camera in render.tile_cameras(cameras)]
    return Image.fromarray(to_tile(np.stack([depth_picture(view, view < render.NO_DEPTH) for view in views])))


def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Views of a mesh in the look of a picture.")
    parser.add_argument("mesh", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="new folder to write to")
    parser.add_argument("--checkpoint", default=str(ROOT), help="default: the one in this repository")
    parser.add_argument(
        "--controlnet",
        default=str(ROOT / "controlnet"),
        help="folder or Hub name, of training.train_controlnet; default: that of the checkpoint in this repository",
    )
    parser.add_argument("--cameras", choices=render.CAMERAS, default="v1.2", help="default: %(default)s")
    parser.add_argument("--scale", type=float, default=0.75, help="of the ControlNet (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=36, help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=4.0, help="default: %(default)s; 2 suits the mini")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    o = parser.parse_args(argv)
    if o.output.exists():
        raise SystemExit(f"{o.output} exists: choose a new --output.")
    if render.importer(o.mesh) is None:
        raise SystemExit(f"{o.mesh} is no file that Blender imports (.glb, .obj, .ply, .usd, .blend, ...).")

    pipe = load_pipeline(o.checkpoint, o.device, None)
    size = tile_size(pipe)
    depth = render_depth(o.mesh, size["width"] // 2, o.cameras)
    pipe.add_controlnet(
        ControlNetModel.from_pretrained(o.controlnet, torch_dtype=pipe.unet.dtype).to(o.device), o.scale
    )
    result = pipe(
        Image.open(o.picture),
        control_image=depth,
        **size,
        num_inference_steps=o.steps,
        guidance_scale=o.guidance,
        generator=torch.Generator().manual_seed(0),
    )
    o.output.mkdir(parents=True)
    depth.save(o.output / "depth.png")
    write_result(o.output, pipe, result.images[0], result.views[0], exports=[])


if __name__ == "__main__":
    main()
