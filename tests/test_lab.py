"""How the shipped weights were made: toys, the VAE, means of weights, and what they must reach."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from PIL import Image

from lab import bars, vae, weights
from training import checkpoints, encode
from zero123plus import loading

ROOT = Path(__file__).resolve().parent.parent


def test_initial_encoder_is_a_principal_component_analysis():
    """Its latents explain the picture as well as the leading singular vectors of all blocks of 16 x 16 pixels do."""
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(24, 3, 8, 8) - 0.5, size=(64, 64), mode="bicubic")
    model, alpha = vae.AutoencoderKL(**vae.CONFIG), torch.ones(24, 1, 64, 64)
    vae.initialise_encoder(model, smooth, alpha)
    blocks = torch.nn.functional.pixel_unshuffle(smooth, 16).transpose(0, 1).flatten(1).double()
    left, values, right = torch.linalg.svd(blocks, full_matrices=False)
    best = blocks - left[:, :32] * values[:32] @ right[:32]
    with torch.no_grad():
        latents = model.encode(smooth).latent_dist.mean.transpose(0, 1).flatten(1).double()
    latents = torch.cat([latents, torch.ones(1, latents.shape[1])])
    ours = blocks - torch.linalg.lstsq(latents.T, blocks.T).solution.T @ latents
    assert best.square().sum() < 0.5 * blocks.square().sum()
    assert ours.square().sum() < 1.05 * best.square().sum()


def test_the_closed_form_encoder_is_one_convolution(pipe):
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(24, 3, 8, 12) - 0.5, size=(64, 96), mode="bicubic")
    pixels = (smooth + 0.1 * torch.randn(24, 3, 64, 96)).clamp(-0.625, 0.625)
    model = vae.AutoencoderKL(**vae.CONFIG)
    vae.initialise_encoder(model, pixels, torch.ones(24, 1, 64, 96))
    with torch.no_grad():
        (mean, _), posterior = (
            encode.encode_blocks(pixels, *encode.encoder_matrix(model)).chunk(2, 1),
            model.encode(pixels).latent_dist,
        )
    assert ((mean - posterior.mean) / posterior.std).square().mean().sqrt() < 0.1
    assert encode.encoder_matrix(pipe.vae) is None  # an encoder of another kind


def test_small_controlnet_is_the_encoder_without_attention(pipe, picture, run):
    """It begins with the UNet's weights and without effect, and has less than half of a copy's parameters."""
    controlnet = weights.build_controlnet(pipe)
    torch.testing.assert_close(
        controlnet.down_blocks[0].resnets[0].conv1.weight, pipe.unet.down_blocks[0].resnets[0].conv1.weight
    )
    before = run(pipe, picture)
    whole = pipe.add_controlnet().num_parameters()
    assert controlnet.num_parameters() < whole / 2
    pipe.add_controlnet(controlnet)
    torch.testing.assert_close(run(pipe, picture, control_image=Image.new("RGB", (32, 48), "white")), before)


def test_a_decoder_goes_on_and_its_encoder_stays(shards, tmp_path, capsys, monkeypatch):
    """The clock goes on by a tenth of a second whenever it is read, however slow the machine is."""
    clock = itertools.count(step=0.1)
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(time=lambda: next(clock)))
    arguments = ["--data", shards, "--output", tmp_path / "out", "--batch-size", "2", "--gate", "0", "--minutes"]
    vae.main([str(part) for part in (*arguments, "0")])
    first = vae.AutoencoderKL.from_pretrained(loading.resolve_checkpoint(tmp_path / "out")).state_dict()
    vae.main([str(part) for part in (*arguments, "0.02")])
    step = json.loads(capsys.readouterr().out.splitlines()[-1])["step"]
    assert step > 1 and loading.resolve_checkpoint(tmp_path / "out").name == f"checkpoint-{step}"
    second = vae.AutoencoderKL.from_pretrained(loading.resolve_checkpoint(tmp_path / "out")).state_dict()
    changed = {name.partition(".")[0] for name in first if not torch.equal(first[name], second[name])}
    assert changed == {"decoder"}
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == step


def test_what_is_published_can_be_a_mean(pipe, tmp_path):
    pipe.register_to_config(ramping_coefficients=[0.0] * 16)
    pipe.save_pretrained(tmp_path / "before")
    before = pipe.unet.conv_in.weight.clone()
    pipe.register_to_config(ramping_coefficients=[1.0] * 16)
    with torch.no_grad():
        pipe.unet.conv_in.weight += 1
        pipe.vision_encoder.visual_projection.weight += 1
    pipe.save_pretrained(tmp_path / "after")
    arguments = ["--checkpoint", str(tmp_path / "after"), "--average", str(tmp_path / "before"), "--share", "0.25"]
    weights.main([*arguments, "--output", str(tmp_path / "mean")])
    mean = loading.Checkpoint(tmp_path / "mean", "cpu", "float32").load()
    torch.testing.assert_close(mean.unet.conv_in.weight, before + 0.75, rtol=0, atol=2e-3)
    torch.testing.assert_close(mean.config.ramping_coefficients, [0.75] * 16)
    difference = pipe.vision_encoder.visual_projection.weight - mean.vision_encoder.visual_projection.weight
    torch.testing.assert_close(difference, torch.full_like(difference, 0.25), rtol=0, atol=2e-3)


def test_bars(capsys):
    """A bar that compares with the checkpoint itself, and one whose system is not measured."""
    table = {bars.OURS: {"tile LPIPS": 0.4}, bars.controlled("depth"): {"tile LPIPS": 0.19}}
    control, matte = (bar for bar in bars.BARS if bar.system in (bars.controlled("depth"), bars.MATTES))
    lines, passed = bars.report({bars.TOY_KNOWN: table}, [control])
    assert passed and "| tile LPIPS, with the true depth | <= 0.2 (this checkpoint x 0.5) | 0.190 | yes |" in lines[2]
    lines, passed = bars.report({bars.TOY_KNOWN: table}, [control, matte])
    assert not passed and "| mask IoU, mattes of the true views | >= 0.95 | - | not measured |" in lines[3]


def test_bars_that_compare_with_baselines():
    """PSNR is compared by a difference in dB, other measures by a factor."""
    table = {name: {"tile PSNR": value, "tile LPIPS": 0.4} for name, value in zip(bars.BASELINES, (15, 16, 14))}
    table[bars.OURS] = {"tile PSNR": 17.9, "tile LPIPS": 0.3}
    group = [bar for bar in bars.BARS if bar.group == bars.TOY_KNOWN and bar.measure in table[bars.OURS]]
    assert {bar.system for bar in group[:2]} == {bars.OURS}
    lines, passed = bars.report({bars.TOY_KNOWN: table}, group[:2])
    assert "| tile PSNR | >= 18 (best baseline + 2) | 17.900 | NO |" in lines[2]
    assert "| tile LPIPS | <= 0.32 (copy of the input x 0.8) | 0.300 | yes |" in lines[3] and not passed


def test_a_decoder_trained_by_itself_joins_its_checkpoint_alone(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight += 1
    pipe.vae.save_pretrained(tmp_path / "vae" / "checkpoint-3")
    arguments = ["--checkpoint", str(tmp_path / "one"), "--vae", str(tmp_path / "vae")]
    weights.main([*arguments, "--output", str(tmp_path / "new")])
    made = loading.Checkpoint(tmp_path / "new", "cpu", "float32").load()
    torch.testing.assert_close(made.vae.decoder.conv_in.weight, pipe.vae.decoder.conv_in.weight)
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight += 1
    pipe.save_pretrained(tmp_path / "other")
    for name, folder in (("--average", "other"), ("--vae", "other/vae")):
        with pytest.raises(SystemExit, match=f"`{name}` .*has another .*encoder"):
            weights.main([*arguments[:2], name, str(tmp_path / folder), "--output", str(tmp_path / "mean")])
    assert not (tmp_path / "mean").exists()


def test_the_untrained_mini_is_what_ships(tmp_path):
    """Of the layers that ship, with a UNet that begins as the identity of its skip connections."""
    ours, shipped = weights.build_start(None), loading.Checkpoint(None, "cpu", "float32").load()
    for name in ("unet", "vae", "text_encoder", "vision_encoder"):
        shapes = [{k: v.shape for k, v in getattr(p, name).state_dict().items()} for p in (ours, shipped)]
        assert shapes[0] == shapes[1], name
    assert not ours.unet.conv_out.weight.any() and ours.default_size == shipped.default_size


@pytest.mark.slow
def test_toys_are_files_that_are_rendered(tmp_path):
    pytest.importorskip("bpy", reason="bpy is built for Python 3.11 only")
    from lab import toys
    from training import render
    from training.shards import load_objects

    (tmp_path / "names.txt").write_text("mug-1\n")
    subprocess.run(
        [sys.executable, "-m", "lab.toys", "--names", tmp_path / "names.txt", "--output", tmp_path / "toys"],
        check=True,
    )
    assert [path.name for path in (tmp_path / "toys").iterdir()] == ["mug-1.blend"]
    command = ["--objects", tmp_path / "toys", "--output", tmp_path / "data", "--size", 24, "--samples", 1]
    render.main([str(part) for part in [*command, "--workers", 1]])
    (item,) = load_objects(tmp_path / "data")
    assert item["name"] == "mug-1" and (item["targets"][..., 3].max((2, 3)) > 200).all()
    assert len(toys.KINDS) >= 20 and not set(toys.KINDS) & set(toys.UNSEEN)


def test_a_lower_rank_is_the_best_approximation():
    """Of the same norm, and a layer of fewer channels stays what it is: diffusers would scale one of another rank
    differently.
    """
    down, up = torch.randn(4, 5, 3, 3), torch.randn(6, 4, 1, 1)
    made_down, made_up = weights.reduce_rank(down, up, 2)
    u, values, v = torch.linalg.svd(up.flatten(1) @ down.flatten(1), full_matrices=False)
    best = u[:, :2] * values[:2] @ v[:2] * values.norm() / values[:2].norm()
    assert made_down.shape == (2, 5, 3, 3) and made_up.shape == (6, 2, 1, 1)
    torch.testing.assert_close((made_up.flatten(1) @ made_down.flatten(1)).float(), best, rtol=1e-4, atol=1e-4)
    down, up = torch.randn(4, 2, 3, 3), torch.randn(1, 4, 1, 1)
    made_down, made_up = weights.reduce_rank(down, up, 2)
    assert made_down.shape == (2, 2, 3, 3) and made_up.shape == (1, 2, 1, 1)
    expected = up.flatten(1) @ down.flatten(1)
    torch.testing.assert_close((made_up.flatten(1) @ made_down.flatten(1)).float(), expected, rtol=1e-4, atol=1e-4)


def test_a_lora_of_too_low_a_rank_is_refused(tmp_path):
    layers = {"unet.a.lora_A.weight": torch.ones(2, 3), "unet.a.lora_B.weight": torch.ones(3, 2)}
    safetensors.torch.save_file(layers, tmp_path / loading.LORA_FILE)
    with pytest.raises(SystemExit, match="`--rank` is 5"):
        weights.main(["--lora", str(tmp_path), "--rank", "5", "--output", str(tmp_path / "new")])
    weights.main(["--lora", str(tmp_path), "--rank", "1", "--output", str(tmp_path / "new")])
    assert (tmp_path / "new" / loading.LORA_FILE).is_file()


def test_no_code_outside_knows_the_mini():
    """Nor imports the lab. An import never runs up the floors of CONTRIBUTING.md."""
    floors = {"pipeline": 0, "zero123plus": 1, "training": 2, "examples": 2, "evaluation": 3, "lab": 4}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in (name for name in tracked if name.endswith((".py", ".sh"))):
        text, top = (ROOT / name).read_text(), name.partition("/")[0].removesuffix(".py")
        if top not in ("lab", "examples", "tests"):
            assert not re.search(r"\b(toys?|mini|kinds)\b", text, re.IGNORECASE), name
        for module in re.findall(r"^ *(?:from|import) (\w+)", text, re.MULTILINE) if top != "tests" else ():
            assert floors.get(module, 0) <= floors.get(top, 2), f"{name} imports {module}"
