"""Alpha mattes of views, made of their normals by closed-form matting. Needs the package pymatting."""

import numpy as np
from scipy.ndimage import binary_erosion

# Lengths of predicted normals: of unit length on the object, zero on the grey background, in between at its edge
FOREGROUND, BACKGROUND = 0.6, 0.2


def trimap(normals: np.ndarray) -> np.ndarray:
    """1 where the object is for certain, 0 where it is not, 0.5 between: shape (S, S), of a view's picture of normals,
    uint8 of shape (S, S, 3).
    """
    length = np.linalg.norm(normals / 127.5 - 1, axis=-1)
    width = max(1, len(normals) // 160)  # pixels that are left to matting on either side
    inside, outside = (
        binary_erosion(mask, iterations=width, border_value=1) for mask in (length > FOREGROUND, length < BACKGROUND)
    )
    return np.where(inside, 1.0, np.where(outside, 0.0, 0.5))


def view_without_background(view: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """A view without its background, uint8 RGBA of shape (S, S, 4) with the object's own colours at its edge, of the
    view and its normals, uint8 of shape (S, S, 3).
    """
    from pymatting import estimate_alpha_cf, estimate_foreground_ml

    known, pixels = trimap(normals), view / 255.0
    certain = (known == 1).any() and (known == 0).any()
    alpha = estimate_alpha_cf(pixels, known) if certain else np.round(known)
    colour = estimate_foreground_ml(pixels, alpha)
    return np.round(255 * np.clip(np.dstack([colour, alpha]), 0, 1)).astype(np.uint8)
