"""Toys and renders, in a real Blender."""

import numpy as np
import pytest

bpy = pytest.importorskip("bpy", reason="bpy is built for Python 3.11 only")

from training import render, toys  # noqa: E402
from training.data import load_objects  # noqa: E402


def points(thing):
    return np.array([vertex.co[:] for vertex in thing.data.vertices])


def test_every_kind_is_built_and_depends_on_its_seed_alone():
    assert len(toys.KINDS) >= 20 and not set(toys.KINDS) & set(toys.UNSEEN_KINDS)
    for kind in toys.KINDS | toys.UNSEEN_KINDS:
        render.reset_scene(16, 1)
        first, again, other = (points(toys.build(kind, seed)) for seed in (1, 1, 2))
        assert len(first) > 100 and np.array_equal(first, again)
        assert first.shape != other.shape or not np.allclose(first, other), kind
    with pytest.raises(ValueError, match="`kind` is 'cup'"):
        toys.build("cup", 0)


def test_normalise_fits_the_sphere():
    render.reset_scene(16, 1)
    with pytest.raises(ValueError, match="no extent"):
        render.normalise()
    toy = toys.build("car", 3)
    toy.location = (3, 4, 5)
    bpy.context.view_layer.update()
    render.normalise()
    matrix = np.array(toy.matrix_world)
    world = points(toy) @ matrix[:3, :3].T + matrix[:3, 3]
    np.testing.assert_allclose(world.min(0) + world.max(0), 0, atol=1e-5)
    assert np.linalg.norm(world, axis=1).max() == pytest.approx(0.5, abs=1e-5)


def test_shards_are_whole_and_a_run_continues(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("lamp-1\n")
    arguments = ["--names", str(names), "--output", str(tmp_path / "data"), "--size", "16", "--samples", "1"]
    render.main([*arguments, "--workers", "1"])
    (path,) = (tmp_path / "data").iterdir()
    assert path.name == "shard-00000.tar"
    written = path.stat().st_mtime_ns
    (item,) = load_objects(tmp_path / "data")
    assert item["name"] == "lamp-1" and item["inputs"].shape == (6, 16, 16, 4)
    assert item["targets"].shape == (2, 6, 16, 16, 4)
    alpha = item["targets"][..., 3]
    assert (alpha.max((2, 3)) > 200).all() and (alpha[..., 0, 0] == 0).all()
    render.main([*arguments, "--workers", "1"])
    assert path.stat().st_mtime_ns == written
