"""CUDA graphs, on a stand-in for the CPU that runs a pass again at each replay and overwrites what it gave before."""

import threading

import pytest
import torch
from conftest import assert_differ, assert_same, noise_picture
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler
from peft import LoraConfig

from training.mini import build_controlnet
from zero123plus import cuda_graphs
from zero123plus.cuda_graphs import CudaGraphs


@pytest.fixture
def captured(monkeypatch):
    """The number of inputs of each pass that is captured."""
    seen = []

    def capture(function, inputs, pool):
        seen.append(len(inputs))
        outputs = [output.clone() for output in function(inputs)]

        def replay():
            for output in outputs:  # what a pass of another step or thread would leave there
                output.fill_(float("nan"))
            for output, new in zip(outputs, function(inputs)):
                output.copy_(new)

        return replay, outputs

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(cuda_graphs, "memory_pool", lambda device: None)
    return seen


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"guidance_scale": 1.0},
        {"guidance_end": 0.5},
        {"guidance_start": 0.5},
        {"num_images_per_prompt": 2},
        {"reference_interval": 2},
        {"max_reference_bytes": 1},
        {"scheduler": DPMSolverMultistepScheduler},
        {"scheduler": HeunDiscreteScheduler},
    ),
    ids=str,
)
def test_graphs_change_nothing(pipe, picture, run, captured, options):
    options = {"num_inference_steps": 4, **options}
    if scheduler := options.pop("scheduler", None):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    expected = run(pipe, picture, **options)
    with CudaGraphs(pipe):
        assert_same(run(pipe, picture, **options), expected)
        count = len(captured)
        assert_same(run(pipe, picture, **options), expected)
        assert len(captured) == count > 1
    assert "forward" not in vars(pipe.unet)


def test_graphs_of_several_shapes_stay(pipe, run, captured):
    pictures = [noise_picture(0), noise_picture(1)]
    expected = run(pipe, pictures), run(pipe, pictures[0])
    with CudaGraphs(pipe):
        for _ in range(2):
            assert_same(run(pipe, pictures), expected[0])
            assert_same(run(pipe, pictures[0]), expected[1])
    assert len(captured) == 4


def test_a_controlnets_residuals_are_inputs(pipe, picture, run, captured):
    torch.manual_seed(0)
    for parameter in pipe.add_controlnet(build_controlnet(pipe)).parameters():
        if not parameter.any():  # an untrained ControlNet has no effect
            torch.nn.init.normal_(parameter)
    tiles, options = [noise_picture(seed, (32, 48)) for seed in (3, 4)], {"controlnet_conditioning_scale": 2.0}
    expected = [run(pipe, picture, control_image=tile, **options) for tile in tiles]
    assert_differ(*expected)
    with CudaGraphs(pipe):
        for tile, result in zip(tiles, expected):
            assert_same(run(pipe, picture, control_image=tile, **options), result)


def test_changed_weights_and_lora_are_captured_anew(pipe, picture, run, captured):
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    with CudaGraphs(pipe):
        whole = run(pipe, picture)
        pipe.set_adapters("default", 0.1)
        less = run(pipe, picture)
        scaled = run(pipe, picture, cross_attention_kwargs={"scale": 0.5})
        pipe.to(torch.bfloat16)
        assert run(pipe, picture).dtype == torch.bfloat16
    assert len(captured) == 8
    pipe.to(torch.float32)
    assert_differ(whole, less)
    assert_differ(scaled, less)


def test_threads_share_graphs(pipe, run, captured):
    expected = [run(pipe, noise_picture(i), seed=i, num_inference_steps=4) for i in range(2)]
    results = [None, None]

    def work(i):
        results[i] = run(pipe, noise_picture(i), seed=i, num_inference_steps=4)

    with CudaGraphs(pipe):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert_same(torch.cat(results), torch.cat(expected))


def test_graphs_are_refused_where_they_cannot_be(pipe):
    with pytest.raises(ValueError, match="The UNet is on cpu, but CUDA graphs need it on a GPU"):
        CudaGraphs(pipe).__enter__()
    assert "forward" not in vars(pipe.unet)
    pipe.unet.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled or offloaded"):
        CudaGraphs(pipe)


def test_leaving_the_context_gives_the_memory_back(pipe, picture, run, captured):
    graphs = CudaGraphs(pipe)
    with pytest.raises(KeyError), graphs:
        run(pipe, picture)
        raise KeyError
    assert graphs.graphs == {} and "forward" not in vars(pipe.unet)
