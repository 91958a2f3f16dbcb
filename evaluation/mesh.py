"""Measures `zero123plus.mesh` on held-out toys: against the true shape, and re-rendered against the views.

    python -m training.render --names evaluation/toys.txt --size 128 --output data/heldout
    python -m evaluation.mesh --renders data/heldout                          # with the toys' true views
    python -m evaluation.mesh --renders data/heldout --predictions out/tiles  # with views of evaluation.evaluate

Volume IoU compares with the toy itself, rebuilt in Blender and filled on a grid. Re-rendered, the mesh is seen by the
six cameras with its own colours and no light, on grey. Needs the packages `bpy`, `scikit-image` and `trimesh`.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import bpy
import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from pipeline import CAMERAS, GREY, split_views
from training import blender
from training.data import index_shards, on_grey, read_member, read_object, select_views
from zero123plus.mesh import RADIUS, Mesh, build_mesh, linear

from . import metrics
from .heldout import group_of

GRID = 96  # voxels of an edge, for volumes


def voxels(vertices: np.ndarray, faces: np.ndarray, grid: int = GRID) -> np.ndarray:
    """The solid within a closed surface, booleans of shape (grid, grid, grid): all that cannot be reached from outside
    without crossing a voxel that the surface touches. Half of the surface's voxels are inside, so that it is counted
    half.
    """
    corners = vertices[faces]  # (F, 3, 3)
    longest = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=2).max() * grid
    steps = np.arange(0, 1, 1 / max(2, np.ceil(1.5 * longest)))
    u, v = (part.ravel() for part in np.meshgrid(steps, steps))
    inside = u + v <= 1
    weights = np.stack([1 - u - v, u, v], axis=-1)[inside]
    touched = np.zeros((grid + 2,) * 3, bool)
    for triangle in corners:
        points = weights @ triangle if np.ptp(triangle, axis=0).max() * grid > 0.5 else triangle
        index = np.floor((points + RADIUS) * grid).astype(int).clip(0, grid - 1) + 1
        touched[tuple(index.T)] = True
    filled = ndimage.binary_fill_holes(touched)
    return ndimage.binary_erosion(filled) | (filled & ~touched)


def true_mesh(name: str, azimuth: float) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and triangles of a toy as it was rendered, turned so that the input view stands on +X."""
    blender.reset_scene(1)
    blender.load_object({"id": name, "source": "toys"})
    blender.normalise()
    (thing,) = (thing for thing in bpy.context.scene.objects if thing.type == "MESH")
    data = thing.evaluated_get(bpy.context.evaluated_depsgraph_get()).to_mesh()
    data.calc_loop_triangles()
    vertices = np.array([thing.matrix_world @ vertex.co for vertex in data.vertices])
    faces = np.array([triangle.vertices for triangle in data.loop_triangles])
    c, s = np.cos(np.radians(azimuth)), np.sin(np.radians(azimuth))
    return vertices @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]), faces


def render_mesh(mesh: Mesh, cameras, size: int) -> np.ndarray:
    """The six views of a mesh with its own colours, RGB on grey in [0, 1], shape (6, size, size, 3)."""
    blender.reset_scene(4)
    data = bpy.data.meshes.new("mesh")
    data.from_pydata(mesh.vertices.tolist(), [], mesh.faces.tolist())
    layer = data.color_attributes.new("colour", "FLOAT_COLOR", "POINT")
    colours = np.c_[linear(mesh.colours.clip(0, 1)), np.ones(len(mesh.colours))]
    layer.data.foreach_set("color", colours.astype(np.float32).ravel())
    material = bpy.data.materials.new("colours")
    material.use_nodes = True
    nodes, links = material.node_tree.nodes, material.node_tree.links
    attribute, emission = nodes.new("ShaderNodeVertexColor"), nodes.new("ShaderNodeEmission")
    attribute.layer_name = "colour"
    links.new(attribute.outputs["Color"], emission.inputs["Color"])
    links.new(emission.outputs["Emission"], nodes["Material Output"].inputs["Surface"])
    data.materials.append(material)
    bpy.context.scene.collection.objects.link(bpy.data.objects.new("mesh", data))
    with tempfile.TemporaryDirectory() as folder:
        views = [blender.render_view(camera, size, folder)["rgba"] for camera in blender.tile_cameras(cameras)]
    return on_grey(np.stack(views)) / 255


def measure(entry: dict, predictions: Path | None) -> dict:
    """Measures one held-out toy.

    Args:
        entry: of [`index_shards`].
        predictions: folder of tiles, `NAME.png`; None takes the true views.
    """
    record, item = json.loads(read_member(entry, "json")), read_object(entry)
    cameras = CAMERAS[record["cameras"]["preset"]]
    truth = select_views(item, 0, False)[1]
    size = truth.shape[1]
    views = [Image.fromarray(view) for view in truth]
    if predictions:
        views = split_views([Image.open(predictions / f"{item['name']}.png").convert("RGB")])[0]
    start = time.perf_counter()
    mesh = build_mesh(views, cameras.poses(), cameras.intrinsics(views[0].height, views[0].width))
    seconds = time.perf_counter() - start
    rendered = render_mesh(mesh, cameras, size)
    ours = voxels(mesh.vertices, mesh.faces)
    true = voxels(*true_mesh(item["name"], record["cameras"]["inputs"][0]["azimuth"]))
    shown = on_grey(truth) / 255 if not predictions else np.stack([np.asarray(v.resize((size, size))) for v in views]) / 255
    return {
        "name": item["name"],
        "volume IoU": metrics.mask_iou(ours, true),
        "PSNR of re-rendered views": metrics.psnr(rendered, shown),
        "seconds": seconds,
        "vertices": len(mesh.vertices),
    }


def main(argv: list[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure meshes of held-out toys.")
    parser.add_argument("--renders", type=Path, required=True, help="shards of the held-out toys")
    parser.add_argument("--predictions", type=Path, help="folder of tiles NAME.png, in place of the true views")
    parser.add_argument("--limit", type=int, help="measure only the first N toys")
    o = parser.parse_args(argv)
    groups = {}
    for entry in tqdm(index_shards(o.renders)[: o.limit], unit="object"):
        row = measure(entry, o.predictions)
        groups.setdefault(group_of(row.pop("name")), []).append(row)
    for group, rows in groups.items():
        print(f"{group} ({len(rows)})")
        for name in rows[0]:
            values = np.array([row[name] for row in rows])
            print(f"  {name}: {values.mean():.3f} ± {values.std(ddof=1) / len(values) ** 0.5:.3f}, worst {values.min():.3f}, largest {values.max():.3f}")


if __name__ == "__main__":
    main()
