"""Views for other programs: nerfstudio's `transforms.json`, COLMAP's text model, and a mesh.

The first two get the pictures, the pipeline's cameras, and points that Gaussian splatting starts from. A format is one
entry of `EXPORTS`.
"""

import json
import logging
from pathlib import Path

import numpy as np
import PIL.Image
from scipy.spatial.transform import Rotation

from pipeline import GREY

from .mesh import build_mesh, surface_points, write_glb
from .options import NUM_FACES

logger = logging.getLogger(__name__)

NUM_POINTS = 2000
# A 2D point of an image that belongs to no 3D point. COLMAP reads images without points too, but programs that skip
# empty lines, or stop at the first, read one image of six.
NO_POINT = "0 0 -1"


def initial_points(views, poses: np.ndarray, intrinsics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points that Gaussian splatting starts from, shape (P, 3), and their colours, uint8 of shape (P, 3). They lie on
    the object's surface, or, where the silhouettes show none, grey and evenly on the sphere of radius 0.25.
    """
    try:
        return surface_points(views, poses, intrinsics)
    except ValueError as error:
        logger.warning("%s The exported points are those of a sphere.", error)
    # A Fibonacci sphere: even, and the same every time
    index = np.arange(NUM_POINTS) + 0.5
    z, angle = 1 - 2 * index / NUM_POINTS, np.pi * (1 + 5**0.5) * index
    ring = np.sqrt(1 - z**2)
    points = 0.25 * np.stack([ring * np.cos(angle), ring * np.sin(angle), z], axis=-1)
    return points, np.full((NUM_POINTS, 3), GREY, np.uint8)


def on_black(view: PIL.Image.Image) -> PIL.Image.Image:
    """An RGBA view premultiplied by its alpha: programs that read its colours alone see the object on black, and not
    the background that transparency hides.
    """
    pixels = np.asarray(view)
    colours = np.round(pixels[..., :3] * (pixels[..., 3:] / 255)).astype(np.uint8)
    return PIL.Image.fromarray(np.dstack([colours, pixels[..., 3]]))


def write_ply(path: Path, points: np.ndarray, colours: np.ndarray):
    """Writes points of shape (N, 3) and their colours, uint8 of shape (N, 3), as an ASCII .ply file."""
    header = ["ply", "format ascii 1.0", f"element vertex {len(points)}"]
    header += [f"property float {axis}" for axis in "xyz"]
    header += [f"property uchar {name}" for name in ("red", "green", "blue")]
    rows = [f"{x:.6f} {y:.6f} {z:.6f} {r} {g} {b}" for (x, y, z), (r, g, b) in zip(points, colours)]
    path.write_text("\n".join([*header, "end_header", *rows]) + "\n")


def write_nerfstudio(folder: Path, views: list[PIL.Image.Image], poses: np.ndarray, intrinsics: np.ndarray):
    """Writes `transforms.json`, `images/` and `points.ply`. nerfstudio's cameras are OpenGL's, like the pipeline's."""
    width, height = views[0].size
    names = [f"images/view_{i}.png" for i in range(len(views))]
    transforms = {
        "camera_model": "OPENCV",
        "fl_x": intrinsics[0, 0],
        "fl_y": intrinsics[1, 1],
        "cx": intrinsics[0, 2],
        "cy": intrinsics[1, 2],
        "w": width,
        "h": height,
        "ply_file_path": "points.ply",
        "frames": [{"file_path": name, "transform_matrix": pose.tolist()} for name, pose in zip(names, poses)],
    }
    (folder / "images").mkdir(parents=True)
    for name, view in zip(names, views):
        on_black(view).save(folder / name)
    write_ply(folder / "points.ply", *initial_points(views, poses, intrinsics))
    (folder / "transforms.json").write_text(json.dumps(transforms, indent=2) + "\n")


def write_colmap(folder: Path, views: list[PIL.Image.Image], poses: np.ndarray, intrinsics: np.ndarray):
    """Writes `images/` and the text model `sparse/0`: world-to-camera, OpenCV (+Y down, looking along +Z)."""
    width, height = views[0].size
    (folder / "images").mkdir(parents=True)
    (folder / "sparse" / "0").mkdir(parents=True)
    lines = ["# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, then its 2D points"]
    for i, (view, pose) in enumerate(zip(views, poses)):
        on_black(view).save(folder / "images" / f"view_{i}.png")
        rotation = np.diag([1, -1, -1]) @ pose[:3, :3].T
        numbers = [*np.roll(Rotation.from_matrix(rotation).as_quat(canonical=True), 1), *(-rotation @ pose[:3, 3])]
        lines += [f"{i + 1} {' '.join(f'{number:.12g}' for number in numbers)} 1 view_{i}.png", NO_POINT]
    model = folder / "sparse" / "0"
    (model / "images.txt").write_text("\n".join(lines) + "\n")
    fx, fy, cx, cy = intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]
    (model / "cameras.txt").write_text(
        f"# CAMERA_ID MODEL WIDTH HEIGHT FX FY CX CY\n1 PINHOLE {width} {height} {fx} {fy} {cx} {cy}\n"
    )
    rows = [
        f"{i + 1} {x:.6f} {y:.6f} {z:.6f} {r} {g} {b} 0"
        for i, ((x, y, z), (r, g, b)) in enumerate(zip(*initial_points(views, poses, intrinsics)))
    ]
    # No tracks: pycolmap reads none that name 2D points which the pictures do not list
    (model / "points3D.txt").write_text("\n".join(["# POINT3D_ID X Y Z R G B ERROR", *rows]) + "\n")


def write_mesh(folder: Path, views: list[PIL.Image.Image], poses, intrinsics, faces: int = NUM_FACES):
    """Writes `mesh.glb`, as [`mesh.write_glb`] describes it, of about so many faces."""
    folder.mkdir()
    write_glb(folder / "mesh.glb", build_mesh(views, poses, intrinsics, faces))


# Each writes views and cameras into a new folder, and takes
#   folder: to make;
#   views: RGBA pictures of one size, transparent where they show their background (`pictures.cut_out`);
#   poses: camera-to-world matrices in the OpenGL convention, shape (N, 4, 4);
#   intrinsics: shape (3, 3), in pixels.
# A ValueError says why the views cannot be written so; the other files of a result are written all the same.
EXPORTS = {"nerfstudio": write_nerfstudio, "colmap": write_colmap, "glb": write_mesh}
