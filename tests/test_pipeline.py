"""What a call computes: against a plain reference, and in every way it can be asked."""

import copy
import threading

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import TILE, assert_differ, assert_same, noise_picture, seeded
from diffusers import ControlNetModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.utils._python_dispatch import TorchDispatchMode

import pipeline
from evaluation.plain import PlainZero123Plus


def run_plain(pipe, picture, seed=0, **options):
    """The plain reference with the pipeline's components."""
    plain = PlainZero123Plus(
        **{name: part for name, part in pipe.components.items() if part is not None},
        ramping_coefficients=[i / 16 for i in range(1, 17)],
    )
    plain.set_progress_bar_config(disable=True)
    return plain(picture, **TILE, **options, output_type="latent", generator=seeded(seed))


@pytest.mark.parametrize("seed", (0, 7))
def test_equals_plain_reference(pipe, picture, run, seed):
    options = {"prompt": "a mug", "num_inference_steps": 3, "guidance_scale": 3.0, "num_images_per_prompt": 2}
    assert_same(run(pipe, picture, seed, **options), run_plain(pipe, picture, seed, **options))


def test_reference_matters(pipe, run):
    """Without the mixer, only reference attention can tell two pictures apart."""
    pipe.register_to_config(ramping_coefficients=[0.0] * 16)
    assert_differ(run(pipe, noise_picture(0)), run(pipe, noise_picture(1)))


def test_ramp_matters(pipe, picture, run):
    before = run(pipe, picture)
    pipe.register_to_config(ramping_coefficients=[2.0] * 16)
    assert_differ(before, run(pipe, picture))


def test_processor_without_reference_is_stock_attention(pipe):
    sample, states = torch.randn(2, 4, 6, 4), torch.randn(2, 16, 128)
    ours = pipe.unet(sample, 7, states).sample
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    assert_same(ours, pipe.unet(sample, 7, states).sample)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_list_of_generators_equals_alone(pipe, run, scale):
    pictures = [noise_picture(i, (30 + 4 * i, 40)) for i in range(3)]
    together = run(pipe, pictures, generator=[seeded(i) for i in range(3)], guidance_scale=scale)
    alone = torch.cat([run(pipe, picture, seed=i, guidance_scale=scale) for i, picture in enumerate(pictures)])
    assert_same(together, alone)


def test_prompt_each_and_images_per_prompt(pipe, run):
    pictures, prompts = [noise_picture(0), noise_picture(1)], ["a", "b"]
    seeds = [seeded(i) for i in range(4)]
    options = {"prompt": prompts, "negative_prompt": "c", "num_images_per_prompt": 2}
    together = run(pipe, pictures, generator=seeds, **options)
    alone = [run(pipe, pictures[i // 2], seed=i, prompt=prompts[i // 2], negative_prompt="c") for i in range(4)]
    assert_same(together, torch.cat(alone))


def test_prompt_embeds_stand_for_the_prompt(pipe, picture, run):
    embeds = pipe.encode_prompt("a mug", pipe.device)[0].detach()
    negative = pipe.encode_prompt("bad", pipe.device)[0].detach()
    ours = run(pipe, picture, prompt_embeds=embeds, negative_prompt_embeds=negative)
    assert_same(ours, run(pipe, picture, prompt="a mug", negative_prompt="bad"))


def test_seed_decides_everything(pipe, picture, run):
    torch.manual_seed(1)
    first = run(pipe, picture)
    torch.manual_seed(2)
    assert_same(first, run(pipe, picture))
    assert_differ(first, run(pipe, picture, seed=1))


def test_latents_are_the_initial_noise(pipe, picture, run):
    noise = torch.randn(1, 4, 6, 4, generator=seeded(5))
    pipe.scheduler.set_timesteps(2)
    assert pipe.scheduler.init_noise_sigma > 2  # the scheduler scales the noise, the caller does not
    options = {"latents": noise, "guidance_scale": 3.0, "num_inference_steps": 2}
    assert_same(run(pipe, picture, **options), run_plain(pipe, picture, **options))


def test_threads_take_copies(pipe, run):
    """They share the weights, and one that interrupts its call leaves the other alone."""
    pipes, steps = [copy.copy(pipe) for _ in range(2)], [[], []]
    expected = [run(pipe, noise_picture(i), seed=i, num_inference_steps=3 + i) for i in range(2)]
    results, started = [None, None], threading.Barrier(2)

    def work(i):
        def callback(pipe, step, t, tensors):
            if step == 0:
                started.wait(60)
            steps[i].append(step)
            pipe._interrupt = i == 0 and len(steps[0]) > 3
            return {}

        options = {"seed": i, "num_inference_steps": 3 + i, "callback_on_step_end": callback}
        results[i] = run(pipes[i], noise_picture(i), **options)
        if i == 0:
            run(
                pipes[i],
                noise_picture(i),
                **{**options, "callback_on_step_end": lambda *_: callback(pipes[0], 1, *_[2:])},
            )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(torch.cat(results), torch.cat(expected))
    assert steps == [[0, 1, 2, 1], [0, 1, 2, 3]] and pipes[0].unet is pipe.unet


def test_output_types_agree(pipe, picture):
    def call(output_type):
        return pipe(picture, **TILE, num_inference_steps=1, generator=seeded(), output_type=output_type)

    latent, pt, array, pil = (call(kind) for kind in ("latent", "pt", "np", "pil"))
    assert latent.views is None
    assert pt.images.shape == (1, 3, 48, 32) and pt.views.shape == (1, 6, 3, 16, 16)
    assert array.images.shape == (1, 48, 32, 3) and array.views.shape == (1, 6, 16, 16, 3)
    assert pil.images[0].size == (32, 48) and pil.views[0][0].size == (16, 16)
    decoded = pipe.vae.decode(latent.images / pipe.vae.config.scaling_factor).sample
    tile = (pipeline.unscale_image(decoded) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pt.images, tile, rtol=0, atol=1e-5)
    np.testing.assert_allclose(array.images[0], np.asarray(pil.images[0]) / 255, atol=0.003)
    for view, (row, column) in enumerate((r, c) for r in range(3) for c in range(2)):
        part = np.s_[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        assert np.array_equal(array.views[0, view], array.images[0][part])
        assert np.array_equal(pt.views[0, view], pt.images[0][(slice(None), *part)])
        assert np.array_equal(np.asarray(pil.views[0][view]), np.asarray(pil.images[0])[part])


def test_return_dict_false_gives_the_tiles_first(pipe, picture):
    tiles, views = pipe(picture, **TILE, num_inference_steps=1, return_dict=False)
    assert tiles[0].size == (32, 48) and len(views[0]) == 6


def test_callback_replaces_tensors_and_sees_every_step(pipe, picture, run):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = run(pipe, picture, callback_on_step_end=callback)
    assert steps == [0, 1]
    torch.testing.assert_close(latents, torch.full_like(latents, 0.22))


@pytest.mark.parametrize(("factor", "output_type"), [(float("nan"), "latent"), (float("nan"), "pil"), (1e30, "pil")])
def test_not_finite_is_an_error(pipe, picture, run, factor, output_type):
    def callback(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * factor}  # 1e30 overflows in the VAE

    with pytest.raises(ValueError, match="not finite: the UNet in torch.float32"):
        run(pipe, picture, num_inference_steps=1, callback_on_step_end=callback, output_type=output_type)


def test_another_size_gives_one_warning(pipe, picture, run, monkeypatch):
    said = []
    monkeypatch.setattr(pipeline.logger, "warning", said.append)
    assert run(pipe, picture).shape == (1, 4, 6, 4) and not said  # the checkpoint's own size by default
    assert run(pipe, picture, height=96, width=64).shape == (1, 4, 12, 8)
    assert len(said) == 1 and "the checkpoint was trained at 48 x 32" in said[0]


def test_warns_once_a_call_without_trailing(pipe, picture, run, monkeypatch):
    said = []
    monkeypatch.setattr(pipeline.logger, "warning", said.append)
    run(pipe, picture)
    assert not said
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="linspace")
    run(pipe, picture)
    assert len(said) == 1 and "trailing" in said[0]


@pytest.mark.parametrize("interval", [{"guidance_end": 0.5}, {"guidance_start": 0.5}])
def test_guidance_interval(pipe, picture, run, interval):
    """Steps outside of the interval equal those of a call without guidance."""
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        return {}

    run(pipe, picture, callback_on_step_end=callback, **interval)
    first_is_guided = "guidance_end" in interval
    run(pipe, picture, guidance_scale=None if first_is_guided else 1.0, callback_on_step_end=callback)
    assert_same(seen[0], seen[2])
    assert_differ(seen[1], seen[3])


@pytest.fixture
def passes(pipe):
    """The first letter of the mode, and the batch size, of each pass of the UNet."""
    seen = []

    def note(module, args, kwargs):
        seen.append(f"{kwargs['cross_attention_kwargs']['reference_mode'][0]}{len(args[0])}")

    pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def test_reference_interval(pipe, run, passes):
    """Steps in between read the last reference, except that it is written again where guidance ends."""
    pictures = [noise_picture(0), noise_picture(1)]
    fewer = run(pipe, pictures, num_inference_steps=5, reference_interval=2)
    assert passes == ["w9", *["r4"] * 5]  # three steps of a negative and two positive references
    passes.clear()
    run(pipe, pictures, num_inference_steps=4, reference_interval=4, guidance_end=0.5)
    assert passes == ["w3", "r4", "r4", "w2", "r2", "r2"]
    assert_differ(fewer, run(pipe, pictures, num_inference_steps=5))


def test_references_of_many_steps_are_those_of_each(pipe, picture, run, passes, monkeypatch):
    """In passes of one size, of at most so many references."""
    options = {"num_inference_steps": 5, "guidance_end": 0.8}
    whole = run(pipe, picture, **options)
    assert passes == ["w8", *["r2"] * 4, "w1", "r1"]
    passes.clear()
    monkeypatch.setattr(pipeline, "MAX_REFERENCES", 1)
    assert_same(run(pipe, picture, **options), whole)
    assert passes == ["w2", "r2"] * 4 + ["w1", "r1"]
    passes.clear()
    monkeypatch.setattr(pipeline, "MAX_REFERENCES", 6)
    run(pipe, picture, num_inference_steps=4)
    assert passes == ["w4", "r2", "r2"] * 2


def test_guidance_rescale(pipe, picture, run):
    assert_differ(run(pipe, picture), run(pipe, picture, guidance_rescale=0.7))


class TestControlNet:
    @pytest.fixture
    def controlled(self, pipe):
        torch.manual_seed(1)
        controlnet = ControlNetModel.from_unet(pipe.unet)
        for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
            torch.nn.init.normal_(block.weight, std=0.1)  # these layers are zero before training
        pipe.add_controlnet(controlnet, conditioning_scale=0.75)
        return pipe

    def test_scale_and_interval(self, controlled, picture, run):
        tile = noise_picture(9, (32, 48))
        full = run(controlled, picture, control_image=tile)
        assert_same(full, run(controlled, picture, depth_image=tile, controlnet_conditioning_scale=0.75))
        assert_differ(full, run(controlled, picture, control_image=tile, control_guidance_end=0.5))
        off = run(controlled, picture, control_image=tile, controlnet_conditioning_scale=0.0)
        controlled.controlnet = None
        assert_same(off, run(controlled, picture))

    def test_adding_twice_replaces(self, controlled):
        second = ControlNetModel.from_unet(controlled.unet)
        assert controlled.add_controlnet(second) is controlled.controlnet is second

    def test_one_tile_for_all_or_one_each(self, controlled, run):
        pictures, tiles = (
            [noise_picture(0), noise_picture(1)],
            [noise_picture(2, (32, 48)), noise_picture(3, (32, 48))],
        )
        for given in ([tiles[0]], tiles):
            both = run(controlled, pictures, control_image=given, generator=[seeded(0), seeded(1)])
            for i in range(2):
                alone = run(controlled, pictures[i], seed=i, control_image=given[i % len(given)])
                assert_same(both[i : i + 1], alone)

    def test_several_add_up(self, controlled, picture, run):
        """A ControlNet twice at half the scale equals it once, and each ControlNet needs a tile."""
        MultiControlNetModel = pytest.importorskip("diffusers.models.controlnets.multicontrolnet").MultiControlNetModel
        tile = noise_picture(9, (32, 48))
        alone = run(controlled, picture, control_image=tile, controlnet_conditioning_scale=0.8)
        controlled.add_controlnet(MultiControlNetModel([controlled.controlnet] * 2), conditioning_scale=0.4)
        assert_same(run(controlled, picture, control_image=[tile, tile]), alone)
        scales = {"controlnet_conditioning_scale": [0.8, 0.0]}
        assert_same(run(controlled, picture, control_image=[tile, noise_picture(8, (32, 48))], **scales), alone)
        with pytest.raises(ValueError, match="`control_image` must be a list of 2"):
            run(controlled, picture, control_image=tile)
        with pytest.raises(ValueError, match="`controlnet_conditioning_scale`"):
            run(controlled, picture, control_image=[tile, tile], controlnet_conditioning_scale=[1, 1, 1])

    @pytest.mark.parametrize("background, words", ((0, "background"), (127, None), (255, "background")))
    def test_a_background_that_is_not_grey_gives_a_warning(
        self, controlled, picture, run, monkeypatch, background, words
    ):
        said = []
        monkeypatch.setattr(pipeline.logger, "warning", said.append)
        tile = PIL.Image.new("RGB", (32, 48), (background,) * 3)
        for row in range(3):
            for column in range(2):
                tile.paste((60, 60, 60), (16 * column + 4, 16 * row + 4, 16 * column + 12, 16 * row + 12))
        run(controlled, picture, control_image=tile)
        assert [words in line for line in said] == ([True] if words else [])

    def test_other_size_of_the_same_ratio(self, controlled, picture, run):
        tile = noise_picture(9, (32, 48))
        assert run(controlled, picture, control_image=tile.resize((64, 96))).isfinite().all()
        with pytest.raises(ValueError, match="`control_image` is 32 x 40"):
            run(controlled, picture, control_image=noise_picture(9, (32, 40)))


@pytest.mark.parametrize("name", ("FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "TCDScheduler"))
def test_other_schedulers_are_refused(pipe, picture, run, name):
    pipe.scheduler = getattr(diffusers, name)()
    with pytest.raises(ValueError, match=f"The scheduler is a {name}"):
        run(pipe, picture)


STOCHASTIC = {"DDPMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LCMScheduler"}


@pytest.mark.parametrize("name", sorted(pipeline.SCHEDULERS))
def test_references_have_the_levels_that_the_scheduler_gives_step_by_step(pipe, name):
    """What `add_noise` and `scale_model_input` make of them, where `add_noise` knows the step's level."""
    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    ahead = pipeline.copy_scheduler(scheduler, 6)
    latents, count = torch.randn(1, 4, 2, 2, generator=seeded()), len(ahead.timesteps)
    noise = torch.randn(count, 1, 4, 2, 2, generator=seeded(1))
    ours, compared = pipeline.noise_to_levels(latents, noise, pipeline.noise_levels(ahead)), 0
    for i, t in enumerate(ahead.timesteps):
        if getattr(ahead, "state_in_first_order", True):
            expected = ahead.scale_model_input(ahead.add_noise(latents, noise[i], t.reshape(1)), t)
            torch.testing.assert_close(ours[i], expected, rtol=1e-4, atol=1e-4)
            compared += 1
        sample = torch.randn(1, 4, 2, 2, generator=seeded(i))
        ahead.scale_model_input(sample, t)
        ahead.step(sample, t, sample)
    assert compared >= 5


@pytest.mark.parametrize("name", sorted(pipeline.SCHEDULERS))
def test_every_scheduler_agrees_with_euler_and_never_clips(pipe, picture, run, name):
    """Solvers of one equation agree to 30 dB after 16 steps; with clipped latents it would be about 15. Those that add
    noise of their own make other tiles, and are compared with themselves.
    """

    def made_by(scheduler, **options):
        pipe.scheduler = getattr(diffusers, scheduler).from_config(config, **options)
        return run(pipe, picture, num_inference_steps=16, guidance_scale=1.0)

    config = pipe.scheduler.config
    expected = made_by(name if name in STOCHASTIC else "EulerDiscreteScheduler")
    result = made_by(name, clip_sample=True, thresholding=True)
    error = (result - expected).square().mean()
    assert 10 * torch.log10((expected.max() - expected.min()) ** 2 / error) > 30


def test_guidance_rescale_is_equation_16():
    """Equation 16 of arXiv 2305.08891: x_cfg std(x_pos) / std(x_cfg), mixed with x_cfg by phi."""
    negative, positive = torch.randn(2, 1, 4, 6, 4, generator=seeded())
    cfg = negative + 3 * (positive - negative)
    expected = 0.7 * cfg * positive.std() / cfg.std() + 0.3 * cfg
    ours = pipeline.Guidance(rescale=0.7)(torch.cat([negative, positive]), 3.0)
    torch.testing.assert_close(ours, expected)


def test_a_callback_may_raise_guidance_and_return_more(pipe, picture, run):
    def callback(pipe, step, t, tensors):
        pipe._guidance_scale += 1.0
        return {**tensors, "more": 1}

    run(pipe, picture, guidance_scale=2.0, callback_on_step_end=callback)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps


def test_encode_prompt_works_in_isolation(pipe, picture, run):
    """A pipeline of the text's components alone encodes what one without them takes (PipelineTesterMixin's test)."""
    text = ("text_encoder", "tokenizer")
    encoder, rest = (
        type(pipe)(**{name: part if (name in text) == wanted else None for name, part in pipe.components.items()})
        for wanted in (True, False)
    )
    rest.set_progress_bar_config(disable=True)
    embeds, negative = encoder.encode_prompt(
        prompt="a mug", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt="red"
    )
    ours = run(rest, picture, prompt_embeds=embeds, negative_prompt_embeds=negative, guidance_scale=2.0)
    assert_same(ours, run(pipe, picture, prompt="a mug", negative_prompt="red", guidance_scale=2.0))


def test_a_new_controlnet_is_like_the_unet(pipe):
    pipe.unet.to(torch.bfloat16)
    assert pipe.add_controlnet().dtype == torch.bfloat16
    assert pipe.add_controlnet(ControlNetModel.from_unet(pipe.unet).float()).dtype == torch.bfloat16


# ---- Waiting for the device ----

WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


class CountWaits(TorchDispatchMode):
    """Notes operators that would make the host wait for a GPU, from the UNet's first pass to its last."""

    def __init__(self, pipe, passes):
        super().__init__()
        self.found, self.begun = [], 0
        pipe.unet.register_forward_pre_hook(lambda *_: self.count(1))
        pipe.unet.register_forward_hook(lambda *_: self.count(1))
        self.passes = 2 * passes  # each is counted when it begins and when it ends

    def count(self, number):
        self.begun += number

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if 0 < self.begun < self.passes and operator._schema.name in WAITING:
            self.found.append(operator._schema.name)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("wait", ("", "item", "nonzero", "__bool__"))
def test_the_loop_never_waits_for_the_device(pipe, picture, run, wait):
    """One that does, in a callback, is noticed."""
    callback = (lambda pipe, step, t, tensors: {} if getattr(t, wait)() is None else {}) if wait else None
    with CountWaits(pipe, passes=4) as waits:
        run(pipe, picture, num_inference_steps=3, callback_on_step_end=callback)
    assert bool(waits.found) == bool(wait)
