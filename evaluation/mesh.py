"""Measures `zero123plus.mesh` on held-out objects: against the true shape, and re-rendered against the views.

    python -m training.render --objects meshes --output data/heldout
    python -m evaluation.mesh --objects meshes --renders data/heldout                          # with their true views
    python -m evaluation.mesh --objects meshes --renders data/heldout --predictions out/views  # of generate.py, by
    name python -m evaluation.mesh --objects meshes --renders data/heldout --draw FILE duck robot   # views, mesh, two
    sides

`--texture` paints the objects' own meshes with their true views, and with those of the shipped depth ControlNet.

Volume IoU compares with the object itself, normalised in Blender and filled on a grid. Re-rendered, the mesh is seen
by the six cameras with its own texture and no light, on grey. Needs `bpy` and the packages of a mesh.
"""

import json
import tempfile
import time
from functools import partial
from pathlib import Path

import bpy
import numpy as np
import torch
from PIL import Image
from scipy import sparse
from tqdm import tqdm

from pipeline import CAMERAS, RADIUS, Cameras, split_views
from training import blender
from training.data import on_grey, select_views
from training.render import file_items
from training.shards import index_shards, read_member, read_object
from zero123plus import loading
from zero123plus.mesh import Mesh, build_mesh, cross, depth_maps, paint, rasterise, split_alpha
from zero123plus.options import DEPTH_SCALE, Parser, command, count
from zero123plus.pictures import depth_tile

from . import metrics
from .evaluate import mean_and_error

GRID = 128  # voxels of an edge, for volumes
SIZE = 256  # pixels of views, for textures


def crossings(vertices: np.ndarray, faces: np.ndarray, grid: int) -> np.ndarray:
    """How often a closed surface winds around each voxel's centre, shape (grid, grid, grid): the signed number of its
    triangles below the centre, along z.
    """
    # In voxels; not quite through the centres, so that no ray meets an edge
    corners = (vertices[faces] + RADIUS) * grid - 0.5 + np.array([1e-5, 2e-5, 0])
    a, b, c = (corners[:, i, :2] for i in range(3))
    side, winding = np.sign(cross(b - a, c - a)).astype(int), np.zeros((grid, grid, grid + 1), int)
    for triangle, row, column, weights in rasterise(corners[..., :2], (grid, grid)):
        above = np.ceil((weights * corners[triangle, :, 2]).sum(1)).clip(0, grid).astype(int)
        np.add.at(winding, (column, row, above), -side[triangle])
    return winding[..., :-1].cumsum(-1)


def voxels(vertices: np.ndarray, faces: np.ndarray, grid: int = GRID) -> np.ndarray:
    """The solid within surfaces, booleans of shape (grid, grid, grid): all centres of voxels that one of the connected
    pieces winds around. The pieces may lie within each other, as those of many models do. Two of the three axes
    decide, because a piece that is open at an end leaks along one.
    """
    edges = np.concatenate([faces[:, :2], faces[:, 1:]])
    graph = sparse.csr_matrix((np.ones(len(edges)), edges.T), shape=(len(vertices),) * 2)
    count, piece = sparse.csgraph.connected_components(graph, directed=False)
    piece = piece[faces[:, 0]]
    solid = np.zeros((grid,) * 3, bool)
    for i in np.unique(piece):
        votes = np.zeros((grid,) * 3, int)
        for axes in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):  # the last is the ray's
            winding = crossings(vertices[:, axes], faces[piece == i], grid)
            votes += (winding != 0).transpose(np.argsort(axes))
        solid |= votes >= 2
    return solid


def true_mesh(item: dict, azimuth: float) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and triangles of an object of `training.render` as it was rendered, turned so that the input view
    stands on +X.
    """
    blender.reset_scene(1)
    with tempfile.TemporaryDirectory() as folder:
        blender.load_object(item, folder)
    blender.normalise()
    vertices, faces, _ = blender.shown_faces()
    c, s = np.cos(np.radians(azimuth)), np.sin(np.radians(azimuth))
    return vertices @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]), faces


def render_mesh(mesh: Mesh, cameras, size: int) -> np.ndarray:
    """The six views of a mesh with its own texture, RGB on grey in [0, 1], shape (6, size, size, 3)."""
    blender.reset_scene(4)
    data = bpy.data.meshes.new("mesh")
    data.from_pydata(mesh.vertices.tolist(), [], mesh.faces.tolist())
    corners = mesh.corners * (1, -1) + (0, 1)  # Blender counts from below
    data.uv_layers.new().data.foreach_set("uv", corners.astype(np.float32).ravel())
    height, width, _ = mesh.texture.shape
    image = bpy.data.images.new("texture", width, height)
    pixels = np.dstack([mesh.texture[::-1].clip(0, 1), np.ones((height, width))])
    image.pixels.foreach_set(pixels.astype(np.float32).ravel())
    material = bpy.data.materials.new("texture")
    material.use_nodes = True
    nodes, links = material.node_tree.nodes, material.node_tree.links
    texture, emission = nodes.new("ShaderNodeTexImage"), nodes.new("ShaderNodeEmission")
    texture.image = image
    links.new(texture.outputs["Color"], emission.inputs["Color"])
    links.new(emission.outputs["Emission"], nodes["Material Output"].inputs["Surface"])
    data.materials.append(material)
    bpy.context.scene.collection.objects.link(bpy.data.objects.new("mesh", data))
    return on_grey(render_scene(cameras, size)) / 255


def render_scene(cameras: Cameras, size: int) -> np.ndarray:
    """Six renders of the scene, uint8 RGBA of shape (6, size, size, 4)."""
    with tempfile.TemporaryDirectory() as folder:
        views = [blender.render_view(camera, size, folder)["rgba"] for camera in blender.tile_cameras(cameras)]
    return np.stack(views)


def views_of(entry: dict, predictions: Path | None) -> tuple[dict, Cameras, list[Image.Image]]:
    """A held-out object ([`read_object`]), its cameras, and the six views that its mesh is made of: the true ones,
    RGBA, or RGB of a folder of `NAME/tile.png`.
    """
    item = read_object(entry)
    cameras = CAMERAS[json.loads(read_member(entry, "json"))["cameras"]["preset"]]
    if predictions:
        views = split_views([Image.open(predictions / item["name"] / "tile.png").convert("RGB")])[0]
    else:
        views = [Image.fromarray(view) for view in select_views(item, 0, False)[1]]
    return item, cameras, views


def on_grey_rgb(views: list[Image.Image]) -> np.ndarray:
    """Views as uint8 RGB on grey, shape (6, S, S, 3)."""
    return np.stack([np.asarray(view) if view.mode == "RGB" else on_grey(np.asarray(view)) for view in views])


def mesh_row(entry: dict, predictions: Path | None) -> np.ndarray:
    """A row of pictures of one object: input, six views, and their mesh from two sides; uint8 of shape (S, 9 S, 3)."""
    item, cameras, views = views_of(entry, predictions)
    size = views[0].height
    mesh = build_mesh(views, cameras.poses(), cameras.intrinsics(size, size))
    sides = render_mesh(mesh, Cameras((315.0, 135.0) * 3, (15.0,) * 6, cameras.fov), size)[:2]
    image = Image.fromarray(on_grey(select_views(item, 0, False)[0])).resize((size, size), Image.Resampling.BOX)
    pictures = [np.asarray(image), *on_grey_rgb(views), *np.round(255 * sides).astype(np.uint8)]
    return np.concatenate(pictures, axis=1)


def measure_mesh(entry: dict, source: dict, predictions: Path | None) -> dict:
    """Measures one held-out object; `source` is its item of `training.render`. For the rest see [`views_of`]."""
    item, cameras, views = views_of(entry, predictions)
    start = time.perf_counter()
    mesh = build_mesh(views, cameras.poses(), cameras.intrinsics(views[0].height, views[0].width))
    seconds = time.perf_counter() - start
    rendered = render_mesh(mesh, cameras, views[0].height)
    ours = voxels(mesh.vertices, mesh.faces)
    record = json.loads(read_member(entry, "json"))
    true = voxels(*true_mesh(source, record["cameras"]["inputs"][0]["azimuth"]))
    return {
        "volume IoU": metrics.mask_iou(ours, true),
        "PSNR of re-rendered views": metrics.psnr(rendered, on_grey_rgb(views) / 255),
        "seconds": seconds,
        "faces": len(mesh.faces),
        "genus": metrics.genus(mesh.faces),
    }


def measure_texture(entry: dict, source: dict, pipe) -> dict:
    """Paints an object's own mesh, and compares it from six other cameras with the object: with its true views, of
    `SIZE` pixels, and with the views that a pipeline with a depth ControlNet makes of its input, beside one colour.
    """
    record, item = json.loads(read_member(entry, "json")), read_object(entry)
    preset, first = CAMERAS[record["cameras"]["preset"]], record["cameras"]["inputs"][0]["azimuth"]
    cameras = Cameras(tuple(first + azimuth for azimuth in preset.azimuths), preset.elevations, preset.fov)
    others = Cameras(tuple(first + 60 * k for k in range(6)), (5.0,) * 6, preset.fov)
    blender.reset_scene(8)
    with tempfile.TemporaryDirectory() as folder:
        blender.load_object(source, folder)
        solid, _ = blender.shown_mesh(item["name"])
        hdri = next(path for path in blender.hdri_paths() if path.name == record["light"]["hdri"])
        blender.light(hdri, record["light"]["rotation"], record["light"]["strength"])
        views, truth = (render_scene(one, SIZE) for one in (cameras, others))
    poses, (colours, alphas) = cameras.poses(), split_alpha(list(map(Image.fromarray, views)))
    start = time.perf_counter()
    painted, seen = paint(solid, colours, alphas, poses, cameras.intrinsics(SIZE, SIZE))
    scores = {"share seen": seen.sum(), "seconds": time.perf_counter() - start}
    shown, grey = truth[..., 3] > 127, on_grey(truth) / 255
    scores["PSNR on the object"] = metrics.psnr(render_mesh(painted, others, SIZE)[shown], grey[shown])

    edge = pipe.default_size[1] // 2
    intrinsics = pipe.camera_intrinsics(edge, edge)
    depths = depth_maps(solid.vertices, solid.faces, poses, intrinsics, edge)
    control = depth_tile(depths, np.isfinite(depths))
    made = pipe(Image.fromarray(item["inputs"][0]), control_image=control, generator=torch.Generator().manual_seed(0))
    colours, alphas = split_alpha(made.views[0])
    painted, _ = paint(solid, colours, alphas, poses, intrinsics)
    scores["LPIPS, generated views"] = metrics.lpips(render_mesh(painted, others, SIZE), grey)
    painted.texture[:] = colours[alphas > 0.5].mean(0)
    scores["LPIPS, one colour"] = metrics.lpips(render_mesh(painted, others, SIZE), grey)
    return scores


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = Parser("Measure meshes of held-out objects.")
    parser.add_argument("--objects", type=Path, nargs="+", required=True, help="files of the held-out objects")
    parser.add_argument("--renders", type=Path, required=True, help="shards that training.render made of --objects")
    parser.add_argument("--predictions", type=Path, help="folder of NAME/tile.png, in place of the true views")
    parser.add_argument("--texture", action="store_true", help="paint the objects' own meshes, and measure that")
    parser.add_argument("--limit", type=count, help="measure only the first N objects")
    parser.add_argument(
        "--draw",
        nargs="+",
        metavar=("FILE", "OBJECT"),
        help="draw these objects into a file, which is replaced, and measure nothing",
    )
    o = parser.parse_args(argv)
    entries = index_shards(o.renders)
    if o.draw:
        path, *names = o.draw
        named = {json.loads(read_member(entry, "json"))["object"]: entry for entry in entries}
        if not names or set(names) - named.keys():
            raise ValueError(f"`--draw` is {' '.join(o.draw)}: after the file give objects of {', '.join(named)}.")
        rows = [mesh_row(named[name], o.predictions) for name in names]
        Image.fromarray(np.concatenate(rows)).save(path, quality=90)
        return
    sources = {item["id"]: item for path in o.objects for item in file_items(path)}
    if missing := [entry["key"] for entry in entries[: o.limit] if entry["key"] not in sources]:
        raise ValueError(f"`--objects` has no file of {', '.join(missing[:5])}, which `--renders` shows: name it too.")
    measure = partial(measure_mesh, predictions=o.predictions)
    if o.texture:
        pipe = loading.Checkpoint(None, "cpu").load()
        loading.load_controlnet(pipe, loading.ROOT / "controlnet", DEPTH_SCALE)
        pipe.set_progress_bar_config(disable=True)
        measure = partial(measure_texture, pipe=pipe)
    rows = [measure(entry, sources[entry["key"]]) for entry in tqdm(entries[: o.limit])]
    means, errors = mean_and_error(rows)
    print(f"{len(rows)} objects")
    for name, mean in means.items():
        values = [row[name] for row in rows]
        error = f" ± {errors[name]:.3f}" if errors else ""
        print(f"  {name}: {mean:.3f}{error} (from {min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
