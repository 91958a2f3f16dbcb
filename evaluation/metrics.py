"""Measures of generated views. All take pixels as float arrays in [0, 1], channels last."""

import functools

import numpy as np
import torch
from scipy import sparse

from training.perceptual import Lpips


def psnr(ours: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, 100 for equal pictures."""
    return float(-10 * np.log10(max(np.mean((ours - truth) ** 2), 1e-10)))


def ssim(ours: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004: Gaussian window of sigma 1.5) of two pictures of shape (H, W, 3)."""
    from skimage.metrics import structural_similarity

    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    return float(structural_similarity(ours, truth, channel_axis=-1, **options))


def mask_iou(ours: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two boolean masks; 1 where both are empty."""
    union = np.logical_or(ours, truth).sum()
    return float(np.logical_and(ours, truth).sum() / union) if union else 1.0


def saturation(views: np.ndarray, mask: np.ndarray) -> float:
    """Mean difference of the largest and the smallest channel over the pixels of a mask; 0 for an empty one."""
    return float((views.max(-1) - views.min(-1))[mask].mean()) if mask.any() else 0.0


@functools.cache
def lpips_network() -> Lpips:
    return Lpips("alexnet")


@torch.no_grad()
def lpips(ours: np.ndarray, truth: np.ndarray) -> float:
    """LPIPS (AlexNet, arXiv 1801.03924), the mean over pictures of shape (..., H, W, 3)."""
    a, b = (torch.tensor(x.reshape(-1, *x.shape[-3:]) * 2 - 1).float().movedim(-1, 1) for x in (ours, truth))
    return lpips_network()(a, b).mean().item()


@functools.lru_cache(maxsize=1)
def grid_pixels(height: int, width: int, poses: bytes, intrinsics: bytes) -> np.ndarray:
    """Projects each point of a grid in the sphere of radius 0.5 into each view.

    Args:
        height, width: of a view.
        poses: float64 of shape (N, 4, 4), as bytes, which can be a key of the cache.
        intrinsics: float64 of shape (3, 3), likewise.

    Returns:
        The pixel of each point in each view, counted along the view's rows, shape (N, P); `height * width` for a point
        beside the view.
    """
    # Half a pixel apart, so that a filled solid leaves no holes between its points
    axis = np.linspace(-0.5, 0.5, 2 * max(height, width))
    slices = []
    for x in axis:  # a slice at a time stays in the processor's cache
        points = np.stack(np.meshgrid(x, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
        points = points[np.square(points).sum(1) <= 0.25]
        pixels = []
        for pose in np.frombuffer(poses).reshape(-1, 4, 4):
            camera = np.frombuffer(intrinsics).reshape(3, 3) @ np.diag([1, -1, -1]) @ pose[:3, :3].T
            u, v, w = camera @ (points - pose[:3, 3]).T
            column, row = np.floor(u / w).astype(np.int32), np.floor(v / w).astype(np.int32)
            seen = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            pixels.append(np.where(seen, row * width + column, height * width))
        slices.append(pixels)
    return np.concatenate(slices, axis=1)


def hull_consistency(masks: np.ndarray, poses: np.ndarray, intrinsics: np.ndarray) -> float:
    """Measures how well silhouettes agree on one solid, without ground truth.

    The visual hull is the set of all points that every mask contains. It is projected into every view again. If the
    views show one solid, the hull fills every mask; where they contradict each other, parts of the masks stay empty.

    Args:
        masks: booleans of shape (N, H, W).
        poses: camera-to-world matrices in the OpenGL convention, shape (N, 4, 4), of an object in the sphere of radius
            0.5.
        intrinsics: shape (3, 3), in pixels.

    Returns:
        The share of all masks' pixels that the hull fills, 0 to 1; 0 if they are all empty.
    """
    pixels = grid_pixels(*masks.shape[1:], *(np.asarray(x, np.float64).tobytes() for x in (poses, intrinsics)))
    padded = np.pad(masks.reshape(len(masks), -1), ((0, 0), (0, 1)))  # what lies beside a picture is in no mask
    hull = np.flatnonzero(padded[0][pixels[0]])  # a view after the other, because each leaves few points to the next
    for mask, pixel in zip(padded[1:], pixels[1:]):
        hull = hull[mask[pixel[hull]]]
    filled = np.zeros_like(padded)
    for view, pixel in zip(filled, pixels):
        view[pixel[hull]] = True
    return float(filled.sum() / masks.sum()) if masks.any() else 0.0


def genus(faces: np.ndarray) -> int:
    """The number of tunnels through closed surfaces, from Euler's V - E + F = 2 (pieces - tunnels).

    Args:
        faces: indices of vertices, shape (F, 3).
    """
    used, faces = np.unique(faces, return_inverse=True)
    faces = faces.reshape(-1, 3)
    edges = np.concatenate([faces[:, :2], faces[:, 1:]])
    graph = sparse.csr_matrix((np.ones(len(edges)), edges.T), shape=(len(used),) * 2)
    pieces = sparse.csgraph.connected_components(graph, directed=False)[0]
    return pieces - (len(used) - len(faces) // 2) // 2  # three edges for two faces
