"""A mesh, seen in new colours: its depth from the six cameras controls the views, a picture gives their look.

    pip install -r requirements-training.txt
    python -m examples.depth_control examples/rocket.glb examples/images/car.png -o out/rocket

Writes `depth.png`, what the ControlNet sees, tile, views and cameras like generate.py. The mesh's front is +X, up
is +Z, in Blender's coordinates. For the public checkpoint:
`--checkpoint sudo-ai/zero123plus-v1.1 --controlnet sudo-ai/controlnet-zp11-depth-v1 --cameras v1.1`.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline import Cameras
from training import blender
from zero123plus import loading
from zero123plus.options import Parser, add_checkpoint_options, command, count, load_from_options, scale
from zero123plus.pictures import depth_tile, read_picture
from zero123plus.results import put_result, write_result


def render_depth(mesh: Path, size: int, cameras: Cameras) -> Image.Image:
    """The six depth pictures of a mesh, tiled, as RGBA whose background is transparent.

    Args:
        mesh: a file that Blender imports.
        size: pixels of a view's edge.
        cameras: of the views.
    """
    blender.reset_scene(1)
    blender.load_object({"path": str(mesh)})
    blender.normalise()
    with tempfile.TemporaryDirectory() as folder:
        views = [blender.render_view(camera, size, folder)["depth"] for camera in blender.tile_cameras(cameras)]
    return depth_tile(np.stack(views), np.stack(views) < blender.NO_DEPTH)


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = Parser("Views of a mesh in the look of a picture.")
    add = parser.add_argument
    add("mesh", type=Path)
    add("picture", type=Path)
    add("-o", "--output", type=Path, required=True, help="new folder to write to")
    add_checkpoint_options(add)
    add(
        "--controlnet",
        default=str(loading.ROOT / "controlnet"),
        help="folder, run or Hub name of a ControlNet; the shipped checkpoint's if missing",
    )
    add("--scale", type=scale, default=0.75, help="strength of the ControlNet")
    add("--steps", type=count, default=36)
    add("--guidance", type=scale, help="guidance scale; the checkpoint's if missing")
    o = parser.parse_args(argv)
    if o.output.exists():
        raise ValueError(f"{o.output} exists: choose a new --output.")
    if blender.importer(o.mesh) is None:
        raise ValueError(f"{o.mesh} is no file that Blender imports (.glb, .obj, .ply, .usd, .blend, ...).")
    picture = read_picture(o.picture, str(o.picture))
    pipe = load_from_options(o)
    loading.load_controlnet(pipe, o.controlnet, o.scale)
    try:
        depth = render_depth(o.mesh, pipe.default_size[1] // 2, pipe.cameras)
    except RuntimeError as error:  # Blender's
        raise ValueError(f"{o.mesh}: {error}") from error
    result = pipe(
        picture,
        control_image=depth,
        num_inference_steps=o.steps,
        guidance_scale=o.guidance,
        generator=torch.Generator().manual_seed(0),
    )

    def write(folder: Path):
        depth.save(folder / "depth.png")
        write_result(folder, pipe, result.images[0], result.views[0])

    put_result(write, str(o.output.absolute().parent), o.output.name)


if __name__ == "__main__":
    main()
