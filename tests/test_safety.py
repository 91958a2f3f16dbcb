"""Nothing of the user's is lost, and no code of others runs."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from conftest import assert_same, noise_picture
from peft import LoraConfig

import pipeline
from pipeline import Zero123PlusPipeline, load_pictures, pad_to_square
from zero123plus import checks, loading, pictures, results


def write(folder):
    (folder / "tile.png").write_bytes(b"new")
    (folder / checks.LAST).write_text("{}")


@pytest.mark.parametrize("name", ("...png", "a/..png"))
def test_names_that_lead_out_of_the_output_are_refused(tmp_path, name):
    (tmp_path / "in" / "a").mkdir(parents=True)
    noise_picture().save(tmp_path / "in" / name, "PNG")
    with pytest.raises(ValueError, match="which is no name of a folder"):
        checks.find_pictures([str(tmp_path / "in" / name)])


def test_a_link_out_of_the_output_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "duck").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="does not lie below"):
        results.put_result(write, str(tmp_path / "out"), "duck", overwrite=True)


def test_only_results_are_replaced(tmp_path):
    (tmp_path / "Documents").mkdir()
    (tmp_path / "Documents" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="is no result"):
        results.put_result(write, str(tmp_path), "Documents", overwrite=True)
    assert (tmp_path / "Documents" / "mine.txt").read_text() == "precious"


def test_what_appears_meanwhile_is_never_removed(tmp_path):
    def slowly(folder):
        write(folder)
        (tmp_path / "duck").mkdir()
        (tmp_path / "duck" / "mine.txt").write_text("precious")

    with pytest.raises(OSError):
        results.put_result(slowly, str(tmp_path), "duck", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["duck"]
    assert (tmp_path / "duck" / "mine.txt").read_text() == "precious"


def test_a_replacement_that_fails_loses_nothing(tmp_path, monkeypatch):
    results.put_result(write, str(tmp_path), "duck")
    (tmp_path / "duck" / "mine.txt").write_text("precious")
    rename = Path.rename

    def fail(source, target):
        if str(source).endswith(".partial"):
            raise OSError("the disk is gone")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        results.put_result(write, str(tmp_path), "duck", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["duck"]
    assert (tmp_path / "duck" / "mine.txt").read_text() == "precious" and (tmp_path / "duck" / checks.LAST).exists()


def test_two_writers_of_one_result_keep_what_is_not_theirs(tmp_path, monkeypatch):
    """The second begins while the first has moved the earlier result aside."""
    results.put_result(write, str(tmp_path), "duck")
    (tmp_path / "duck" / "mine.txt").write_text("precious")
    rename, others = Path.rename, []

    def interrupted(source, target):
        moved = rename(source, target)
        if str(target).endswith(".old") and not others:
            others.append(threading.Thread(target=results.put_result, args=(write, str(tmp_path), "duck", True)))
            others[0].start()
            others[0].join(0.5)
        return moved

    monkeypatch.setattr(Path, "rename", interrupted)
    results.put_result(write, str(tmp_path), "duck", overwrite=True)
    others[0].join()
    assert [path.name for path in tmp_path.iterdir()] == ["duck"]
    assert (tmp_path / "duck" / "mine.txt").read_text() == "precious" and (tmp_path / "duck" / checks.LAST).exists()


def test_file_systems_without_their_package_are_one_line():
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(ValueError, match="gs://bucket/x.png needs another package: .*gcsfs"):
        checks.find_pictures(["gs://bucket/x.png"])


def test_files_that_are_left_out_are_counted_and_named(tmp_path):
    for name in ("a.png", "b.heic", "notes.txt"):
        (tmp_path / name).touch()
    found, left_out = checks.find_pictures([str(tmp_path)])
    assert [key for _, key in found] == ["a"] if checks.HEIF_SUFFIXES.isdisjoint(checks.SUFFIXES) else ["a", "b"]
    words = checks.describe_left_out([*left_out, "b.heic"])
    assert "files are left out" in words and "notes.txt" in words and "`pip install pillow-heif` reads HEIC" in words


def test_results_and_what_is_hidden_are_no_pictures(tmp_path):
    """As where results lie beside their pictures."""
    for name in ("duck.png", "duck/tile.png", "duck/cameras.json", "duck/nerfstudio/images/view_0.png", ".a/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found, left_out = checks.find_pictures([str(tmp_path)])
    assert found == [(str(tmp_path / "duck.png"), "duck")]
    assert {str(Path(path).relative_to(tmp_path)) for path in left_out} == {
        "duck/tile.png",
        "duck/cameras.json",
        "duck/nerfstudio/images/view_0.png",
    }
    (tmp_path / "duck" / "cameras.json").unlink()  # pictures of the user's own
    found, _ = checks.find_pictures([str(tmp_path / "duck")])
    assert [key for _, key in found] == ["nerfstudio/images/view_0", "tile"]


def test_formats_are_recognised_by_content(tmp_path):
    noise_picture().save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match="it is no picture of PNG"):
        pictures.read_picture(tmp_path / "a.png", "a.png")


def test_large_pictures(tmp_path):
    PIL.Image.new("1", (20_000, 1)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match="20000 x 1 pixels"):
        pictures.read_picture(tmp_path / "wide.png", "wide.png")
    with pytest.raises(ValueError, match="20000 x 1 pixels"):
        load_pictures(PIL.Image.new("RGB", (20_000, 1)), "image")
    assert pad_to_square(PIL.Image.new("RGB", (14_000, 1))).size == (1024, 1024)
    dot = PIL.Image.new("RGBA", (4000, 4000))
    dot.paste((255, 0, 0, 255), (0, 0, 900, 100))
    assert pictures.recentre(dot, 0.01).size == (1024, 1024)


def test_premultiplied_grey():
    grey = PIL.Image.fromarray(np.dstack([np.full((4, 4), 60, np.uint8), np.full((4, 4), 255, np.uint8)]))
    assert load_pictures(grey.convert("La"), "image")[0].getpixel((0, 0)) == (60, 60, 60)


def test_orientation_and_few_transparent_pixels(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    noise_picture(0, (8, 4)).save(tmp_path / "phone.png", exif=exif)
    assert pictures.read_picture(tmp_path / "phone.png", "phone").size == (4, 8)
    rounded = noise_picture(0, (40, 40)).convert("RGBA")
    rounded.putpixel((0, 0), (0, 0, 0, 0))
    assert not pictures.is_cut_out(rounded)


class TestCheckpoints:
    @pytest.fixture
    def folder(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path / "checkpoint")
        return tmp_path / "checkpoint"

    def change(self, folder, **entries):
        path = folder / "model_index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    def test_code_of_a_component_does_not_run(self, folder, tmp_path):
        self.change(folder, unet=["evil", "UNet2DConditionModel"])
        (folder / "unet" / "evil.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'w')\nclass UNet2DConditionModel: pass\n"
        )
        with pytest.raises(ValueError):
            loading.Checkpoint(folder, "cpu").load()
        assert not (tmp_path / "ran").exists()

    def test_code_of_a_pipeline_does_not_run(self, folder, tmp_path):
        self.change(folder, _class_name=["pipeline", "Zero123PlusPipeline"])
        (folder / "pipeline.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        assert isinstance(loading.Checkpoint(folder, "cpu").load(), Zero123PlusPipeline)
        assert not (tmp_path / "ran").exists()

    def test_pickle_is_refused(self, folder, pipe):
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        torch.save(pipe.unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
        with pytest.raises(ValueError, match="stored with pickle"):
            loading.Checkpoint(folder, "cpu").load()
        assert loading.Checkpoint(folder, "cpu", pickle=True).load().unet.dtype == torch.float32

    def test_other_kinds_are_named(self, folder):
        with pytest.raises(ValueError, match="holds a UNet2DConditionModel"):
            loading.Checkpoint(folder / "unet", "cpu").load()
        self.change(folder, _class_name="StableDiffusionPipeline")
        with pytest.raises(ValueError, match="holds a StableDiffusionPipeline"):
            loading.Checkpoint(folder, "cpu").load()

    @pytest.mark.parametrize(
        ("file", "text", "message"),
        (
            ("model_index.json", '{"_class', "model_index.json cannot be read as JSON"),
            ("model_index.json", "[]", "model_index.json holds a list"),
            ("vision_encoder/config.json", "[1]", "checkpoint cannot be loaded: "),
            ("tokenizer/tokenizer_config.json", "[1]", "checkpoint cannot be loaded: "),
            ("unet/diffusion_pytorch_model.safetensors", "x", "checkpoint cannot be loaded: "),
        ),
    )
    def test_damaged_configurations_are_named(self, folder, file, text, message):
        (folder / file).write_text(text)
        with pytest.raises(ValueError, match=message):
            loading.Checkpoint(folder, "cpu").load()

    def test_the_variant_that_is_there_is_taken(self, folder, pipe, picture, run, tmp_path):
        pipe.save_pretrained(tmp_path / "half", variant="fp16")
        again = loading.Checkpoint(tmp_path / "half", "cpu").load()
        again.warned.add("background")
        assert_same(run(again, picture), run(pipe, picture))
        assert loading.find_variant(folder.glob("*/*")) is None

    def test_loras_as_diffusers_saves_them(self, folder, pipe, picture, run, tmp_path):
        """The keys of a model's own have no prefix. Its alpha counts too."""
        config = LoraConfig(r=2, lora_alpha=7, target_modules=["to_q"], init_lora_weights=False)
        pipe.unet.add_adapter(config)
        pipe.unet.save_lora_adapter(tmp_path / "lora")
        again = loading.Checkpoint(folder, "cpu", lora=tmp_path / "lora").load()
        assert_same(run(again, picture), run(pipe, picture))
        file = loading.Checkpoint(folder, "cpu", lora=tmp_path / "lora" / loading.LORA_FILE)
        assert file.defaults()["num_inference_steps"] > 0
        assert_same(run(file.load(), picture), run(pipe, picture))
        safetensors.torch.save_file({"net.weight": torch.ones(2)}, tmp_path / "lora" / loading.LORA_FILE)
        with pytest.raises(ValueError, match="has weights such as 'net.weight', but those of a LoRA begin with unet."):
            loading.Checkpoint(folder, "cpu", lora=tmp_path / "lora").load()

    def test_cameras_belong_to_weights(self, folder, tmp_path, monkeypatch):
        self.change(folder, cameras=None)
        unknown, said = loading.Checkpoint(folder, "cpu").load(), []
        monkeypatch.setattr(pipeline.logger, "warning", said.append)
        for _ in range(2):  # poses and intrinsics of each result ask for them
            assert unknown.cameras.elevations == (20, -10) * 3
        assert len(said) == 1 and "--cameras v1.1" in said[0]
        asked = loading.Checkpoint(folder, "cpu", cameras="v1.1").load()
        assert asked.cameras.elevations == (30, -20) * 3 and asked.cameras.fov == pytest.approx(49.134, abs=1e-3)
        named = Path(shutil.copytree(folder, tmp_path / "zero123plus-v1.1"))
        assert loading.Checkpoint(named, "cpu").load().cameras.elevations == (30, -20) * 3
        asked.save_pretrained(tmp_path / "saved")
        with pytest.raises(ValueError, match="`--cameras` has the cameras of v1.2, but the checkpoint says"):
            loading.Checkpoint(tmp_path / "saved", "cpu", cameras="v1.2").load()

    @pytest.mark.parametrize(
        "name, preset",
        (
            ("sudo-ai/zero123plus-v1.1", "v1.1"),
            ("models/zero123plus_v12", "v1.2"),
            ("hub/models--sudo-ai--zero123plus-v1.2/snapshots/0123abc", "v1.2"),
            ("zero123plus-v1.1/zero123plus-v1.2", "v1.2"),
            ("zero123plus-v1.1/out/mine", None),
            ("zero123plus-v1.1-experiments", None),
            ("sudo-ai/controlnet-zp11-depth-v1", "v1.1"),
            ("org/zero123plus-v1.15", None),
            ("mine", None),
        ),
    )
    def test_public_checkpoints_are_known_by_name(self, name, preset):
        assert pipeline.preset_of(name) == preset

    def test_controls_of_other_cameras_are_refused(self, folder, pipe, tmp_path):
        pipe.add_controlnet().save_pretrained(tmp_path / "control")
        (tmp_path / "control" / loading.RUN_FILE).write_text('{"cameras": "v1.1"}')
        with pytest.raises(ValueError, match="`--controlnet` .* has the cameras of v1.1, but the checkpoint says"):
            loading.load_controlnet(loading.Checkpoint(folder, "cpu").load(), tmp_path / "control")
        (tmp_path / "control" / loading.RUN_FILE).write_text('{"cameras": "v9"}')
        with pytest.raises(ValueError, match="'v9', but there are only v1.1, v1.2"):
            loading.load_controlnet(loading.Checkpoint(folder, "cpu").load(), tmp_path / "control")

    @pytest.mark.parametrize("offline", ("0", "1"))
    def test_a_hub_out_of_reach_is_one_line(self, tmp_path, offline):
        """Nothing listens at the discard port."""
        program = "from zero123plus.loading import resolve_checkpoint\nresolve_checkpoint('org/nothing')"
        hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": offline}
        job = [sys.executable, "-c", program]
        done = subprocess.run(job, cwd=loading.ROOT, env=os.environ | hub, capture_output=True, text=True)
        assert "ValueError: org/nothing is no folder here" in done.stderr.splitlines()[-1]

    @pytest.mark.parametrize("device", ("gpu", "cuda:99", "tpu"))
    def test_devices_that_are_not_there(self, device):
        with pytest.raises(ValueError, match=f"`--device` is '{device}'"):
            loading.choose_device(device)


def test_the_inside_of_a_grey_ball_stays_opaque():
    """A ball in greys of 90 to 190, 127 among them, on the background's grey."""
    rows, columns = np.mgrid[:64, :64] - 31.5
    inside = np.hypot(rows, columns) < 20
    shade = np.clip(140 + 2.5 * columns, 90, 190)
    shade[np.abs(np.hypot(rows, columns) - 19) < 1.5] = 60  # its outline
    view = np.where(inside, shade, 127)[..., None].repeat(3, -1).astype(np.uint8)
    alpha = np.asarray(pictures.cut_out(PIL.Image.fromarray(view)))[..., 3] > 127
    assert (alpha & inside).sum() / (alpha | inside).sum() > 0.97


def test_depth_tiles_from_any_unit_and_direction():
    masks = np.zeros((6, 8, 8), bool)
    masks[:, 2:6, 2:6] = True
    depth = np.where(masks, np.arange(8.0)[None, None] + 1000, 0)  # millimetres on black
    tile = np.asarray(pictures.depth_tile(depth, masks))
    assert tile.shape == (24, 16, 4) and tile[3, 2, 0] == 0 and tile[3, 5, 0] == 255 and tile[0, 0, 3] == 0
    assert np.array_equal(np.asarray(pictures.depth_tile(-depth, masks, near="large")), tile)
    with pytest.raises(ValueError, match="`near` is 'white'"):
        pictures.depth_tile(depth, masks, near="white")
