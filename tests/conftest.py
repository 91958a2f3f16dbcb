"""Small real components that all tests share. Everything is seeded and offline."""

import os
import subprocess
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import PIL.Image
import psutil
import pytest
import torch
from diffusers import AutoencoderKL

from training.mini import build_pipeline
from zero123plus import loading

TILE = {"height": 48, "width": 32}  # the size of `build_pipe`'s checkpoint


def build_vae():
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.18215,
    ).eval()


def build_pipe(channels=(32, 64)):
    """A pipeline of real classes at toy size: tiles of 48 x 32 pixels."""
    torch.manual_seed(0)
    sizes = {"width": 128, "view_size": 16, "reference_size": 32, "clip_size": 32}
    pipe = build_pipeline(build_vae(), channels, attention=(True,) * len(channels), **sizes)
    for module in pipe.unet.modules():  # an untrained UNet has zeros in some layers, which would hide errors
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and not module.weight.any():
            module.reset_parameters()
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
    """Starts Ray with two workers on this machine. Yields its address and a function that kills a busy worker."""
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "ray.scripts.scripts"]
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    start = ["start", "--head", "--port", "6399", "--num-cpus", "2", "--include-dashboard", "false"]
    subprocess.run([*command, *start], **quiet)

    def kill(name, job):
        """Waits for a worker process whose title begins with `name` while `job` runs, and kills it."""
        found = []
        while not found and job.poll() is None:
            time.sleep(0.1)
            found = [process for process in psutil.process_iter(["name"]) if process.info["name"].startswith(name)]
        assert found, job.stderr.read()
        found[0].kill()

    yield "127.0.0.1:6399", kill
    subprocess.run([*command, "stop", "--force"], **quiet)
