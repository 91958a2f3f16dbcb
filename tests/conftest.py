"""Small real components that all tests share. Everything is seeded and offline."""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import PIL.Image
import psutil
import pytest
import torch
from filelock import FileLock

from training.untrained import Size, attention_levels, build, clip_layers, vae_levels
from zero123plus import loading

TILE = {"height": 48, "width": 32}  # the size of `build_pipe`'s checkpoint


def size_of(channels=(32, 64)):
    """Tiles of 48 x 32 pixels, made by a UNet of these widths."""
    levels = "C" * len(channels)
    unet = {"attention_head_dim": [width // 32 for width in channels], "layers_per_block": 1, "norm_num_groups": 16}
    return Size(
        tile=(48, 32),
        picture=32,
        width=128,
        unet={"block_out_channels": channels, **unet, **attention_levels(levels, levels)},
        vae=vae_levels((8, 8, 8, 8), layers=1, groups=4),
        text=clip_layers(2, 4, vocab_size=190, max_position_embeddings=16),
        vision=clip_layers(4, 4, hidden_size=128, intermediate_size=512, image_size=32, patch_size=8),
        clip_resample=4,
        settings={"default_num_inference_steps": 8, "default_guidance_scale": 2.0},
    )


def build_pipe(channels=(32, 64)):
    """A pipeline of real classes at toy size: tiles of 48 x 32 pixels."""
    torch.manual_seed(0)
    pipe = build(size_of(channels))
    pipe.set_progress_bar_config(disable=True)
    pipe.warned.add("background")  # the tests' pictures are noise
    return pipe


@pytest.fixture(autouse=True)
def one_thread():
    """The models are too small for more, and several tests run at once. Set before each test, because a library that
    an earlier test called may have changed it, and the order of sums depends on it.
    """
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def float32_by_default(monkeypatch):
    """So that tests compute alike on all processors."""
    monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda: False)


@pytest.fixture
def pipe():
    return build_pipe()


def noise_picture(seed=0, size=(40, 40)):
    """A random RGB picture, width by height."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


@pytest.fixture
def picture():
    return noise_picture()


@pytest.fixture
def run():
    """Calls a pipeline with two steps and a seed, and returns latents unless told otherwise."""

    def call(pipe, image, seed=0, **options):
        options = {"num_inference_steps": 2, "output_type": "latent", "generator": seeded(seed), **options}
        return pipe(image, **options).images

    return call


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_same(ours, expected):
    """Asserts that two tensors are equal up to rounding, which may depend on the alignment of memory."""
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def assert_differ(first, second):
    """Asserts that two tensors differ by more than rounding."""
    assert (first - second).abs().max() > 1e-2


@pytest.fixture
def ray_cluster():
    """Starts Ray with two workers on this machine. Yields its address and a function that kills a busy worker. One
    test at a time has it, because what stops a cluster stops all of the machine's.
    """
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "ray.scripts.scripts"]
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    start = ["start", "--head", "--port", "6399", "--num-cpus", "2", "--include-dashboard", "false"]

    def kill(name, job):
        """Waits for a worker process whose title begins with `name` while `job` runs, and kills it."""
        found = []
        while not found and job.poll() is None:
            time.sleep(0.1)
            found = [process for process in psutil.process_iter(["name"]) if process.info["name"].startswith(name)]
        assert found, job.stderr.read()
        found[0].kill()

    with FileLock(Path(tempfile.gettempdir(), "zero123plus-ray-tests.lock")):
        subprocess.run([*command, *start], **quiet)
        yield "127.0.0.1:6399", kill
        subprocess.run([*command, "stop", "--force"], **quiet)


@pytest.fixture
def shards(tmp_path):
    """One shard of two objects in plain colours. Red is a view's azimuth column, green its elevation row."""
    webdataset = pytest.importorskip("webdataset")
    folder = tmp_path / "shards"
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "shard-00000.tar"), encoder=False) as writer:
        for name in ("mug-1", "car-2"):
            sample = {"__key__": name, "json": json.dumps({"object": name}).encode()}
            for kind, rows in (("inputs", 1), ("targets", 2)):
                sheet = np.full((16 * rows, 16 * 6, 4), 255, np.uint8)
                for row in range(rows):
                    for column in range(6):
                        sheet[16 * row : 16 * row + 16, 16 * column : 16 * column + 16, :2] = (20 * column, 100 * row)
                buffer = io.BytesIO()
                PIL.Image.fromarray(sheet).save(buffer, "WEBP", lossless=True)
                sample[f"{kind}.webp"] = buffer.getvalue()
            depth = np.full((32, 96), 65535, np.uint16)
            depth[4:12, 4:12] = np.linspace(20000, 30000, 8)  # of the view in row 0, column 0, nearer on the left
            normal = np.full((32, 96, 3), 127, np.uint8)
            normal[4:12, 4:12] = (200, 127, 250)
            for kind, pixels in (("depth", depth), ("normal", normal)):
                buffer = io.BytesIO()
                PIL.Image.fromarray(pixels).save(buffer, "PNG")
                sample[f"targets.{kind}.png"] = buffer.getvalue()
            writer.write(sample)
    return folder
