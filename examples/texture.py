"""A texture for a mesh of your own, from one picture: a depth ControlNet makes six views of it, which are baked.

    python -m examples.texture examples/rocket.glb examples/images/lamp.png -o out/rocket
    python -m examples.texture chair.obj photo.png -o out/chair --checkpoint sudo-ai/zero123plus-v1.1 \
        --controlnet sudo-ai/controlnet-zp11-depth-v1 --scale 0.75 --steps 36 --upscale 4
    python -m examples.texture chair.obj -o out/chair --views out/other    # views that were made elsewhere

Writes `textured.glb`, whose axes and scale are the mesh's, `texture.png`, `seen.png` (where views saw the surface),
and tile, views and cameras like generate.py. Own UVs stay where they do not overlap. Needs the packages `bpy` and
`OpenEXR`, and those of `--export glb`.
"""

import json
import os
import sys
from pathlib import Path

from zero123plus import checks, options

MIN_IOU = 0.8  # of a mesh's silhouette and a generated view's, below which the ControlNet did not follow the mesh


def read_views(folder: Path, poses):
    """Six views that were made elsewhere: `view_0.png` to `view_5.png` of a result of generate.py, or six RGBA
    pictures of these names.

    Raises:
        ValueError: if one is missing, they differ in size, or `cameras.json` has other poses than `poses`, shape (6,
            4, 4).
    """
    import numpy as np

    from zero123plus.pictures import read_picture

    paths = [folder / f"view_{i}.png" for i in range(6)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ValueError(f"`--views` {folder} has no {', '.join(missing)}: six views are needed.")
    views = [read_picture(path, str(path)) for path in paths]
    if len(sizes := {edge for view in views for edge in view.size}) > 1:
        raise ValueError(f"`--views` {folder} has edges of {sizes} pixels, but squares of one size are needed.")
    record = folder / checks.LAST
    if record.is_file():
        try:
            theirs = np.array([frame["camera_to_world"] for frame in json.loads(record.read_text())["frames"]], float)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{record} cannot be read ({error!r}): remove it, or give another `--views`.") from error
        if theirs.shape != poses.shape or not np.allclose(theirs, poses, atol=1e-3):
            raise ValueError(f"`--views` {folder} has other cameras than the checkpoint: give `--cameras` or another.")
    return views


@options.command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = options.Parser("A texture for a mesh, from one picture.")
    add = parser.add_argument
    add("mesh", type=Path, help="file that Blender imports")
    add("picture", type=Path, nargs="?", help="picture of the look that the mesh is to have")
    add("-o", "--output", type=Path, required=True, help="new folder to write to")
    add("--views", type=Path, help="folder of six views, in place of a picture")
    options.add_checkpoint_options(add)
    add("--controlnet", default=str(options.ROOT / "controlnet"), help="depth ControlNet; the shipped one if missing")
    add(
        "--scale",
        type=options.scale,
        default=options.DEPTH_SCALE,
        help="of the ControlNet; 0.75 suits the public v1.1's",
    )
    add("--steps", type=options.count, help="denoising steps; the checkpoint's if missing")
    add("--guidance", type=options.scale, help="guidance scale; the checkpoint's if missing")
    add("--seed", type=options.seed, default=0, help="seed of the views")
    add("--upscale", type=int, choices=[options.SCALE], help="make the views this many times as large, by Real-ESRGAN")
    o = parser.parse_args(argv)
    if (o.picture is None) == (o.views is None):
        parser.error("give a picture, or `--views`, and not both")
    checks.check_new(o.output)
    checks.check_device(o.device)
    checks.check_packages("Blender", "glb", *(["upscale"] if o.upscale else []))
    for path in (o.mesh, o.views or o.picture):
        if not path.exists():
            raise ValueError(f"{path} is not there.")
    if o.picture:
        checks.check_picture(str(o.picture))
    # They take seconds, which mistakes need not wait for
    import numpy as np
    import torch
    from PIL import Image

    # 1. The mesh, and the checkpoint, whose cameras look at it
    from training import blender
    from zero123plus import loading, mesh, results
    from zero123plus.pictures import depth_tile, prepare, read_picture
    from zero123plus.upscale import Upscaler, join_views

    standard = os.dup(1)
    blender.silence_blender()
    blender.reset_scene(1)
    blender.load_object({"path": str(o.mesh)})
    solid, to_gltf = blender.shown_mesh(str(o.mesh))
    os.dup2(standard, 1)
    if solid.corners is None:
        print("The mesh has no UVs in [0, 1] without overlaps, and gets new ones.", file=sys.stderr)
    picture = prepare(read_picture(o.picture, str(o.picture))) if o.picture else None
    pipe = options.load_from_options(o)
    poses, edge = pipe.camera_poses(), pipe.default_size[1] // 2

    # 2. Its views
    if o.views:
        views = read_views(o.views, poses)
    else:
        depths = mesh.depth_maps(solid.vertices, solid.faces, poses, pipe.camera_intrinsics(edge, edge), edge)
        loading.load_controlnet(pipe, o.controlnet, o.scale)
        call = {"num_inference_steps": o.steps, "guidance_scale": o.guidance}
        call |= {"control_image": depth_tile(depths, np.isfinite(depths))}
        views = pipe(picture, **call, generator=torch.Generator().manual_seed(o.seed)).views[0]
        views = [Upscaler(pipe.device.type)(view) for view in views] if o.upscale else views

    # 3. Its texture
    edge = views[0].width
    intrinsics, (colours, alphas) = pipe.camera_intrinsics(edge, edge), mesh.split_alpha(views)
    solid, seen = mesh.paint(solid, colours, alphas, poses, intrinsics)

    # 4. Files
    def write(folder: Path):
        results.write_result(folder, pipe, join_views(views), views)
        Image.fromarray(np.round(255 * solid.texture.clip(0, 1)).astype(np.uint8)).save(folder / "texture.png")
        Image.fromarray(255 * (seen > 0).astype(np.uint8)).save(folder / "seen.png")
        mesh.write_glb(folder / "textured.glb", solid, to_gltf)

    results.put_new(write, o.output)
    silhouettes = np.isfinite(mesh.depth_maps(solid.vertices, solid.faces, poses, intrinsics, edge))
    both = [(a & b).sum() / max(1, (a | b).sum()) for a, b in zip(silhouettes, alphas > 0.5)]
    print(f"seen: {100 * seen.sum():.0f}% of the surface; silhouettes' IoU {', '.join(f'{iou:.2f}' for iou in both)}")
    if min(both) < MIN_IOU:
        print("The views do not follow the mesh: try another --scale, --seed or --controlnet.", file=sys.stderr)


if __name__ == "__main__":
    main()
