"""The public checkpoints' size in fp16 on a GPU, random weights: finite, within time and memory, compiled as eager."""

import time

import pytest
import torch
from conftest import noise_picture, seeded

from evaluation.benchmark import compile_pipeline
from training.untrained import FULL, build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def full():
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    pipe = build(FULL, "cuda", torch.float16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, steps=4):
    result = pipe(noise_picture(), num_inference_steps=steps, generator=seeded(), output_type="latent")
    return result.images.float()


def peak():
    """GiB since the pipeline was built."""
    return torch.cuda.max_memory_allocated() / 2**30


def test_a_tile_in_time_and_memory(full):
    full(noise_picture(), num_inference_steps=1)  # finds kernels
    start = time.perf_counter()
    result = full(noise_picture(), num_inference_steps=28, generator=seeded(), output_type="pt")
    seconds = time.perf_counter() - start
    assert result.images.shape == (1, 3, 960, 640) and result.images.isfinite().all()
    assert seconds < 60 and peak() < 12


def test_offloaded_and_tiled_under_3_gib(full):
    full.to("cpu")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    full.enable_model_cpu_offload()
    full.vae.enable_tiling()
    result = full(noise_picture(), num_inference_steps=2, generator=seeded(), output_type="pt")
    assert result.images.isfinite().all() and peak() < 3


@pytest.mark.timeout(1800)  # compiling takes minutes
def test_compiled_equals_eager(full):
    eager = latents(full)
    compile_pipeline(full)
    compiled = latents(full)
    assert (compiled - eager).norm() / eager.norm() < 1e-2


def test_a_batch_equals_its_tiles(full):
    pictures = [noise_picture(seed) for seed in range(2)]
    options = {"num_inference_steps": 2, "output_type": "latent"}
    together = full(pictures, generator=[seeded(0), seeded(1)], **options).images.float()
    alone = torch.cat([full(picture, generator=seeded(i), **options).images for i, picture in enumerate(pictures)])
    assert (together - alone.float()).norm() / alone.float().norm() < 1e-2
