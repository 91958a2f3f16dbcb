"""LoRA: what a file says is applied or refused, and its settings travel with it."""

import json

import pytest
import safetensors.torch
import torch
from conftest import assert_differ, assert_same, build_pipe, noise_picture
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler

from training import train
from zero123plus import loading

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
STUDENT = {"num_inference_steps": 2, "guidance_scale": 1.0, "scheduler": "EulerDiscreteScheduler", "cameras": "v1.2"}


@pytest.fixture
def teacher(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def matrices(rank=4):
    """The two matrices of a layer's LoRA."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rank, 64, generator=generator), torch.randn(64, rank, generator=generator)


def write_lora(folder, keys=None, record=None, metadata=None):
    down, up = matrices()
    folder.mkdir(exist_ok=True)
    keys = keys or {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}
    safetensors.torch.save_file(keys, folder / loading.LORA_FILE, metadata)
    if record is not None:
        (folder / loading.RUN_FILE).write_text(json.dumps(record))
    return folder


def change(pipe):
    """What was merged into the layer, over the product of the matrices."""
    down, up = matrices()
    before = build_pipe().unet.get_submodule(LAYER).weight
    return ((pipe.unet.get_submodule(LAYER).weight - before) / (up @ down)).median().item()


NAMES = {
    "peft": (f"unet.{LAYER}.lora_A.weight", f"unet.{LAYER}.lora_B.weight", f"unet.{LAYER}.alpha"),
    "bare": (f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight", f"{LAYER}.alpha"),
    "diffusers": (f"unet.{LAYER}.lora.down.weight", f"unet.{LAYER}.lora.up.weight", f"unet.{LAYER}.alpha"),
    "kohya": [
        f"lora_unet_{LAYER.replace('.', '_')}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")
    ],
}


@pytest.mark.parametrize("names", NAMES)
def test_alpha_is_applied(pipe, tmp_path, names):
    keys = dict(zip(NAMES[names], (*matrices(), torch.tensor(1.0))))
    loading.add_lora(pipe, write_lora(tmp_path / "lora", keys))
    assert change(pipe) == pytest.approx(0.25, rel=1e-3)


def test_alpha_of_the_header_is_applied(pipe, tmp_path):
    settings = {"unet.r": 4, "unet.lora_alpha": 2, "unet.target_modules": ["to_q"]}
    loading.add_lora(pipe, write_lora(tmp_path / "lora", metadata={"lora_adapter_metadata": json.dumps(settings)}))
    assert change(pipe) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(
    "suffix, kind",
    [
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("oft_blocks", "OFT"),
        ("lora_mid.weight", "LoCon"),
        ("diff", "set of whole differences"),
        ("a1.weight", "GLoRA"),
    ],
)
@pytest.mark.parametrize("prefix", ("lora_unet_mid_block_attentions_0", "unet.mid_block.attentions.0"))
def test_other_kinds_are_one_short_line(pipe, tmp_path, prefix, suffix, kind):
    folder = write_lora(tmp_path / "other", {f"{prefix}.{suffix}": torch.ones(2, 2), f"{prefix}.b": torch.ones(2)})
    with pytest.raises(ValueError, match=f"is a {kind}.*, but only LoRA is loaded") as error:
        loading.add_lora(pipe, folder)
    assert len(str(error.value)) < 300 + len(str(tmp_path))


def test_an_alpha_without_its_layer_is_refused(pipe, tmp_path):
    down, up = matrices()
    keys = {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up, "unet.other.alpha": torch.ones(1)}
    with pytest.raises(ValueError, match="has unet.other.alpha, but no layer for it"):
        loading.add_lora(pipe, write_lora(tmp_path / "lora", keys))


def settings_of(pipe):
    names = ("cameras", "default_num_inference_steps", "default_guidance_scale", "pictures")
    return [type(pipe.scheduler).__name__, *(pipe.config[name] for name in names)]


@pytest.mark.parametrize(
    "more, keys",
    [
        ({"unet": [1.0, 2.0]}, None),
        ({"scheduler": "DPMSolverSDEScheduler"}, None),
        ({}, {"unet.nowhere.lora_A.weight": torch.ones(4, 64), "unet.nowhere.lora_B.weight": torch.ones(64, 4)}),
        ({}, {f"unet.{LAYER}.lora_A.weight": torch.ones(4, 7), f"unet.{LAYER}.lora_B.weight": torch.ones(64, 4)}),
        ({"num_inference_steps": "two"}, None),
        ({"unet": 5}, None),
    ],
)
def test_a_lora_that_is_refused_changes_nothing(pipe, picture, run, tmp_path, more, keys):
    before, made = settings_of(pipe), run(pipe, picture)
    with pytest.raises(ValueError):
        loading.add_lora(pipe, write_lora(tmp_path / "lora", keys, STUDENT | {"pictures": 4} | more))
    assert settings_of(pipe) == before
    assert_same(run(pipe, picture), made)


def test_settings_travel_with_a_lora(pipe, tmp_path):
    """Until it is unloaded; of one that is fused they stay."""
    folder, before = write_lora(tmp_path / "student", record=STUDENT | {"pictures": 3}), settings_of(pipe)
    after = ["EulerDiscreteScheduler", "v1.2", 2, 1.0, 3]
    pipe.load_lora_weights(str(tmp_path), subfolder="student", weight_name=loading.LORA_FILE)
    assert settings_of(pipe) == after
    pipe.unload_lora_weights()
    assert settings_of(pipe) == before
    pipe.load_lora_weights(folder)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert settings_of(pipe) == after


def options(data, checkpoint, output, *more):
    fixed = ["--data", data, "--checkpoint", checkpoint, "--output", output, "--steps", 1, "--batch-size", 1]
    fixed += ["--phase", "2", "--lora-rank", 2, "--micro-batch-size", 1, "--report-to", "none", "--warmup-steps", 0]
    return [str(part) for part in (*fixed, "--learning-rate", 1.0, "--optimizer", "adamw", *more)]


@pytest.fixture
def chain(teacher, shards, tmp_path):
    """A LoRA run on the teacher, and one on that."""
    pipe = build_pipe()
    pipe.register_to_config(cameras="v1.2")
    train.main(options(shards, teacher, tmp_path / "first", "--image-sizes", 0, 0))
    train.main(options(shards, tmp_path / "first", tmp_path / "second", "--image-sizes", 0, 0, "--seed", 5))
    return tmp_path / "first", tmp_path / "second"


def test_a_lora_on_a_lora(teacher, chain, picture, run, caplog):
    """As `--checkpoint`, as `--lora` on the base, and as `--lora` on the first run, they are both merged."""
    first, second = chain

    def made(name, lora=None):
        pipe = loading.Checkpoint(name, "cpu", lora=lora).load()
        pipe.warned.add("background")
        return run(pipe, picture, guidance_scale=4.0)

    both = made(second)
    assert_same(made(teacher, second), both)
    assert_same(made(first, second), both)
    assert_differ(made(first), both)
    assert "was trained on other weights" not in caplog.text


def test_a_lora_on_another_checkpoint(pipe, chain, teacher, tmp_path, caplog):
    """A warning says so; a student is refused there, and taken on its teacher in any precision."""
    other = build_pipe()
    with torch.no_grad():
        other.unet.conv_in.weight *= 1.01
    other.save_pretrained(tmp_path / "other")
    loading.Checkpoint(tmp_path / "other", "cpu", lora=chain[0]).load()
    assert f"was trained on other weights than this checkpoint's: on {teacher}" in caplog.text
    student = write_lora(tmp_path / "student", record=STUDENT | {"unet": loading.fingerprint(pipe.unet)})
    with pytest.raises(ValueError, match="A student works on its teacher alone"):
        loading.Checkpoint(tmp_path / "other", "cpu", lora=student).load()
    for dtype in ("float32", "bfloat16", "float16"):
        loaded = loading.Checkpoint(teacher, "cpu", dtype, lora=student).load()
        assert loaded.config.default_num_inference_steps == 2
    loading.add_lora(loading.Checkpoint(chain[0], "cpu").load(), student)  # another LoRA beside it is the user's wish


def test_a_circle_of_loras_ends(tmp_path):
    write_lora(tmp_path / "circle", record={"checkpoint": str(tmp_path / "circle")})
    with pytest.raises(ValueError, match="holds a LoRA alone"):
        loading.Checkpoint(tmp_path / "circle", "cpu").load()


@pytest.mark.parametrize("scheduler", (DDIMScheduler, DDPMScheduler, LCMScheduler, EulerAncestralDiscreteScheduler))
def test_zero_terminal_snr(pipe, run, scheduler):
    """The last time step is noise alone, and so is the reference there."""
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options)
    made = run(pipe, noise_picture(), num_inference_steps=4)
    assert torch.isfinite(made).all() and made.std() < 10


def test_a_revision_is_of_a_hub_name(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(loading, "list_repo_files", lambda name, revision: ["model_index.json"])
    monkeypatch.setattr(loading, "snapshot_download", lambda name, revision, **_: asked.append(revision) or tmp_path)
    assert loading.Checkpoint("org/name", revision="v2").find() == (tmp_path, [])
    assert asked == ["v2"]
    with pytest.raises(ValueError, match="`--revision` is v2, but .* is a folder here"):
        loading.Checkpoint(tmp_path, revision="v2").find()
