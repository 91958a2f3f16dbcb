"""DeepCache: which layers run, and what that changes."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import assert_same, noise_picture
from diffusers import ControlNetModel

import pipeline
from zero123plus.deep_cache import DeepCache


@pytest.fixture
def calls(pipe):
    """Counts how often the first and the last resnet run."""
    counts = {"first": 0, "last": 0}

    def count(name):
        return lambda *args: counts.update({name: counts[name] + 1})

    pipe.unet.down_blocks[0].resnets[0].register_forward_hook(count("first"))
    pipe.unet.up_blocks[-1].resnets[-1].register_forward_hook(count("last"))
    return counts


def test_between_only_the_last_layers_run(pipe, calls, run):
    pictures = [noise_picture(0), noise_picture(1)]
    with DeepCache(pipe, interval=2):
        fewer = run(pipe, pictures, num_inference_steps=5)
        assert calls == {"first": 6, "last": 10}  # reference and tile passes together
        assert_same(fewer, run(pipe, pictures, num_inference_steps=5))  # the second call starts counting again
    exact = run(pipe, pictures, num_inference_steps=5)
    assert 1e-3 < (fewer - exact).norm() / exact.norm() < 0.5
    assert not pipe.unet.up_blocks[-1].attentions[-2]._forward_hooks and "forward" not in vars(pipe.unet)


def test_interval_1_is_exact(pipe, picture, run):
    before = run(pipe, picture)
    with DeepCache(pipe, interval=1):
        assert_same(run(pipe, picture), before)


def test_equals_the_whole_unet_on_the_same_input(pipe):
    """With features of the same step, the last layers alone return what the whole UNet returns."""
    kwargs = {"reference": pipeline.ReferenceCache(), "reference_mode": "write"}
    states, sample = torch.randn(2, 16, 128), torch.randn(2, 4, 6, 4)
    with DeepCache(pipe, interval=2):
        whole, shallow = (pipe.unet(sample, 7, states, cross_attention_kwargs=kwargs).sample for _ in range(2))
    assert_same(shallow, whole)


def test_with_other_intervals_and_a_controlnet(pipe, run, calls):
    torch.manual_seed(1)
    controlnet = ControlNetModel.from_unet(pipe.unet)
    for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.1)
    pipe.add_controlnet(controlnet)
    options = {"num_inference_steps": 6, "reference_interval": 2, "guidance_end": 0.5}
    with DeepCache(pipe, interval=3):
        result = run(pipe, noise_picture(), control_image=noise_picture(9, (32, 48)), **options)
    # The whole UNet runs for the tile at steps 0 and 3 (guidance ends at 3), and for the reference, which is written
    # at steps 0, 2, 3 and 4, at steps 0 and 3
    assert result.isfinite().all() and calls == {"first": 4, "last": 10}


@pytest.mark.parametrize("kind", ("compiled", "hooked", "enabled"))
def test_compiled_or_hooked_is_refused(pipe, kind):
    if kind == "compiled":
        pipe.unet = torch.compile(pipe.unet)
    elif kind == "hooked":
        add_hook_to_module(pipe.unet, ModelHook())  # as offloading does
    else:
        DeepCache(pipe).enable()
    with pytest.raises(ValueError, match="compiled or has hooks"):
        DeepCache(pipe)


def test_bad_interval(pipe):
    with pytest.raises(ValueError, match="`interval` is 0"):
        DeepCache(pipe, interval=0)
