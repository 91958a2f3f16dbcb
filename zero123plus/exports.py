"""Views as the input of reconstruction programs: nerfstudio's `transforms.json`, COLMAP's text model.

Both get RGBA pictures, transparent where a view shows its background, and the pipeline's cameras. A format is one
entry of `EXPORTS`.
"""

import json
from pathlib import Path

import numpy as np
import PIL.Image

from pipeline import GREY

from .pictures import cut_out

NUM_POINTS = 2000


def quaternion(rotation: np.ndarray) -> np.ndarray:
    """Unit quaternion (w, x, y, z) of a rotation matrix of shape (3, 3), w >= 0."""
    # The eigenvector of the largest eigenvalue of Bar-Itzhack's symmetric matrix (2000)
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = rotation
    matrix = np.array(
        [
            [xx + yy + zz, zy - yz, xz - zx, yx - xy],
            [zy - yz, xx - yy - zz, xy + yx, xz + zx],
            [xz - zx, xy + yx, yy - xx - zz, yz + zy],
            [yx - xy, xz + zx, yz + zy, zz - xx - yy],
        ]
    )
    vector = np.linalg.eigh(matrix)[1][:, -1]
    return vector if vector[0] >= 0 else -vector


def write_nerfstudio(folder: Path, views: list[PIL.Image.Image], poses: np.ndarray, intrinsics: np.ndarray):
    """Writes `transforms.json` and `images/`. nerfstudio's cameras are OpenGL's, like the pipeline's."""
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
        "frames": [{"file_path": name, "transform_matrix": pose.tolist()} for name, pose in zip(names, poses)],
    }
    (folder / "images").mkdir(parents=True)
    for name, view in zip(names, views):
        cut_out(view, name).save(folder / name)
    (folder / "transforms.json").write_text(json.dumps(transforms, indent=2) + "\n")


def write_colmap(folder: Path, views: list[PIL.Image.Image], poses: np.ndarray, intrinsics: np.ndarray):
    """Writes `images/` and the text model `sparse/0`: world-to-camera, OpenCV convention (+Y down, looking along +Z).

    Its points, which Gaussian splatting starts from, are spread over the sphere of radius 0.25.
    """
    width, height = views[0].size
    (folder / "images").mkdir(parents=True)
    (folder / "sparse" / "0").mkdir(parents=True)
    lines = ["# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, then its 2D points"]
    for i, (view, pose) in enumerate(zip(views, poses)):
        cut_out(view, f"view_{i}").save(folder / "images" / f"view_{i}.png")
        rotation = np.diag([1, -1, -1]) @ pose[:3, :3].T
        numbers = [*quaternion(rotation), *(-rotation @ pose[:3, 3])]
        lines += [f"{i + 1} {' '.join(f'{number:.12g}' for number in numbers)} 1 view_{i}.png", ""]
    model = folder / "sparse" / "0"
    (model / "images.txt").write_text("\n".join(lines) + "\n")
    fx, fy, cx, cy = intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]
    (model / "cameras.txt").write_text(
        f"# CAMERA_ID MODEL WIDTH HEIGHT FX FY CX CY\n1 PINHOLE {width} {height} {fx} {fy} {cx} {cy}\n"
    )
    # A Fibonacci sphere: even, and the same every time
    index = np.arange(NUM_POINTS) + 0.5
    z, angle = 1 - 2 * index / NUM_POINTS, np.pi * (1 + 5**0.5) * index
    ring = np.sqrt(1 - z**2)
    points = 0.25 * np.stack([ring * np.cos(angle), ring * np.sin(angle), z], axis=-1)
    rows = [f"{i + 1} {x:.6f} {y:.6f} {z:.6f} {GREY} {GREY} {GREY} 0" for i, (x, y, z) in enumerate(points)]
    # No tracks: pycolmap reads none that name 2D points which the pictures do not list
    (model / "points3D.txt").write_text("\n".join(["# POINT3D_ID X Y Z R G B ERROR", *rows]) + "\n")


# Each writes views and cameras into a new folder, and takes
#   folder: to make;
#   views: RGB pictures of one size;
#   poses: camera-to-world matrices in the OpenGL convention, shape (N, 4, 4);
#   intrinsics: shape (3, 3), in pixels.
EXPORTS = {"nerfstudio": write_nerfstudio, "colmap": write_colmap}
