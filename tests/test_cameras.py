"""Poses and intrinsics: where things land in the picture."""

import numpy as np
import pytest
import torch


def project(pipe, view, point, size=320):
    """Pixel (x right, y down) of a world point in a view, and its depth."""
    camera = np.linalg.inv(pipe.camera_poses()[view]) @ [*point, 1]
    x, y, depth = camera[0], -camera[1], -camera[2]  # OpenGL looks along -Z with +Y up
    u, v, w = pipe.camera_intrinsics(size, size) @ [x, y, depth]
    return u / w, v / w, depth


def test_unit_axes_land_where_they_should(pipe):
    """View 1 stands at azimuth 90, on +Y, so that +X is on its left. It is below the horizon, and +Z is up."""
    assert project(pipe, 1, (0, 0, 0))[:2] == pytest.approx((160, 160))
    x_u, x_v, _ = project(pipe, 1, (0.5, 0, 0))
    assert x_u < 160 - 90 and x_v == pytest.approx(160)
    assert project(pipe, 1, (0, 0, 0.5))[1] < 160 - 90
    assert project(pipe, 1, (0, 0.5, 0))[2] < project(pipe, 1, (0, 0, 0))[2]


def test_the_sphere_fills_the_view(pipe):
    """A point of the sphere at a right angle to the view direction lies on the border of the view."""
    for view, pose in enumerate(pipe.camera_poses()):
        assert project(pipe, view, 0.5 * pose[:3, 1])[1] == pytest.approx(0)
        assert project(pipe, view, 0.5 * pose[:3, 0])[0] == pytest.approx(320)


def test_published_cameras(pipe):
    poses = pipe.camera_poses()
    assert poses.shape == (6, 4, 4)
    position = poses[:, :3, 3]
    assert np.linalg.norm(position, axis=1) == pytest.approx(np.full(6, 1.866), abs=1e-3)
    assert np.degrees(np.arctan2(position[:, 1], position[:, 0])) % 360 == pytest.approx([30, 90, 150, 210, 270, 330])
    assert np.degrees(np.arcsin(position[:, 2] / 1.86603)) == pytest.approx([20, -10] * 3, abs=1e-3)
    assert np.linalg.det(poses[:, :3, :3]) == pytest.approx(np.ones(6))
    assert np.linalg.norm(pipe.camera_poses(radius=3)[0, :3, 3]) == pytest.approx(3)


def test_version_1_1(pipe):
    old = type(pipe)(**pipe.components, cameras="v1.1")
    assert old.camera_intrinsics(320, 320)[0, 0] == pytest.approx(350, abs=0.01)  # 2 atan(16 / 35)
    position = old.camera_poses()[0, :3, 3]
    assert np.degrees(np.arcsin(position[2] / np.linalg.norm(position))) == pytest.approx(30)


def test_bad_cameras(pipe):
    with pytest.raises(ValueError, match="`radius` is 0"):
        pipe.camera_poses(radius=0)
    with pytest.raises(ValueError, match="`height`"):
        pipe.camera_intrinsics(0, 10)


def test_configuration_survives_saving(pipe, tmp_path):
    type(pipe)(**pipe.components, cameras="v1.1", ramping_coefficients=[0.5] * 16).save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    assert again.config.cameras == "v1.1" and again.config.ramping_coefficients == [0.5] * 16
    assert again.dtype == torch.float32
