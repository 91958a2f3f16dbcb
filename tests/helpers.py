"""What several test files need: true silhouettes, and readers of the exports."""

import json

import numpy as np
import PIL.Image

from pipeline import CAMERAS

SIZE = 64
POSES = CAMERAS["v1.2"].poses()


def intrinsics(size):
    """Intrinsics of a view of `size` x `size` pixels."""
    return CAMERAS["v1.2"].intrinsics(size, size)


def silhouettes(centre, size=32):
    """True masks of a ball of radius 0.2 at `centre`: a pixel is inside where its ray passes the centre within 0.2."""
    rows, columns = np.mgrid[:size, :size] + 0.5
    pixels = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ np.linalg.inv(intrinsics(size)).T
    masks = []
    for pose in POSES:
        rays = pixels * (1, -1, -1) @ pose[:3, :3].T
        rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
        offset = np.asarray(centre) - pose[:3, 3]
        masks.append(np.linalg.norm(np.cross(rays, offset), axis=-1) < 0.2)
    return np.stack(masks)


def hull_iou(frames, focal, centre, is_inside):
    """IoU of a visual hull with a solid.

    `frames` are pairs of a world-to-camera matrix in OpenCV's convention and an alpha channel.

    `is_inside` takes points of shape (N, 3).
    """
    axis = np.linspace(-0.5, 0.5, 48)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    hull = np.ones(len(points), bool)
    for matrix, alpha in frames:
        x, y, z = matrix[:3, :3] @ points.T + matrix[:3, 3:]
        column, row = (focal * x / z + centre).astype(int), (focal * y / z + centre).astype(int)
        hull &= alpha[row.clip(0, SIZE - 1), column.clip(0, SIZE - 1)] > 127
    truth = is_inside(points)
    return (hull & truth).sum() / (hull | truth).sum()


def alpha_of(path):
    return np.asarray(PIL.Image.open(path))[..., 3]


def read_nerfstudio(folder):
    """Reads a nerfstudio export: frames, focal length and centre, as [`hull_iou`] takes them."""
    transforms = json.loads((folder / "transforms.json").read_text())
    frames = []
    for frame in transforms["frames"]:
        matrix = np.linalg.inv(np.array(frame["transform_matrix"]) @ np.diag([1, -1, -1, 1]))
        frames.append((matrix, alpha_of(folder / frame["file_path"])))
    return frames, transforms["fl_x"], transforms["cx"]


def lines_of(folder, name):
    return [line for line in (folder / "sparse" / "0" / f"{name}.txt").read_text().splitlines() if line[:1] != "#"]


def read_colmap(folder):
    """Reads a COLMAP export: frames, focal length and centre, as [`hull_iou`] takes them."""
    (camera,) = lines_of(folder, "cameras")
    assert camera.split()[:4] == ["1", "PINHOLE", str(SIZE), str(SIZE)]
    frames = []
    for line in lines_of(folder, "images")[::2]:
        _, w, x, y, z, *translation, _, name = line.split()
        w, x, y, z = (float(value) for value in (w, x, y, z))
        matrix = np.eye(4)
        matrix[:3, :3] = [  # COLMAP's documentation of its format
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
        matrix[:3, 3] = [float(value) for value in translation]
        frames.append((matrix, alpha_of(folder / "images" / name)))
    return frames, float(camera.split()[4]), float(camera.split()[6])


READERS = {"nerfstudio": read_nerfstudio, "colmap": read_colmap}
