"""The command line, on a checkpoint of the tests."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import PurePosixPath

import fsspec
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import noise_picture
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler

import generate
from zero123plus import jobs, loading, pictures, preview, results

STEP = {"num_inference_steps": 1}


@pytest.fixture
def command(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "checkpoint")
    noise_picture(0).save(tmp_path / "toy.png")

    def call(*arguments):
        fixed = ["--checkpoint", tmp_path / "checkpoint", "--steps", "1", "--device", "cpu"]
        return generate.main([str(part) for part in ("-o", tmp_path / "out", *fixed, *arguments)])

    return call


def test_writes_tile_views_and_cameras(command, tmp_path, capsys):
    assert command(tmp_path / "toy.png") == 0
    folder = tmp_path / "out" / "toy"
    assert sorted(path.name for path in folder.iterdir()) == [
        "cameras.json",
        "tile.png",
        *(f"view_{i}.png" for i in range(6)),
    ]
    tile = np.asarray(PIL.Image.open(folder / "tile.png"))
    assert np.array_equal(np.asarray(PIL.Image.open(folder / "view_3.png")), tile[16:32, 16:32])
    cameras = json.loads((folder / "cameras.json").read_text())
    assert np.array(cameras["frames"][5]["camera_to_world"]).shape == (4, 4)
    assert cameras["intrinsics"][0][2] == 8
    assert "tile.png" in capsys.readouterr().out


def test_never_overwrites_unasked(command, tmp_path, capsys):
    (tmp_path / "out" / "toy").mkdir(parents=True)
    (tmp_path / "out" / "toy" / "mine.txt").write_text("precious")
    for options in ([], ["--overwrite"], ["--resume"]):
        assert command(tmp_path / "toy.png", *options) == 2
        assert "exists and is no result" in capsys.readouterr().err
    (tmp_path / "out" / "toy").rename(tmp_path / "mine")
    assert command(tmp_path / "toy.png") == 0
    assert command(tmp_path / "toy.png") == 2
    assert "--overwrite" in capsys.readouterr().err
    (tmp_path / "out" / "toy" / "mine.txt").write_text("precious")
    assert command(tmp_path / "toy.png", "--overwrite") == 0
    assert (tmp_path / "out" / "toy" / "mine.txt").read_text() == "precious"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["toy"]


@pytest.mark.parametrize("content", [b"no picture", b""], ids=["text", "empty"])
def test_bad_input_is_one_line_and_code_2(command, tmp_path, capsys, content):
    """A good picture beside the bad one is still done."""
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    assert command(tmp_path / "toy.png", path) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("generate.py")]
    assert len(lines) == 2 and "on cpu, float32" in lines[0] and "bad.png cannot be read" in lines[1]
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["toy"]


def test_a_batch_that_does_not_fit_is_tried_one_picture_at_a_time(command, tmp_path):
    generator = jobs.Generator(
        jobs.Settings(str(tmp_path / "out"), loading.Checkpoint(tmp_path / "checkpoint", "cpu"), STEP)
    )
    noise_picture(1).save(tmp_path / "other.png")
    batches = []

    def little_memory(module, args):
        batches.append(len(args[0]))
        if len(args[0]) > 2:  # a guided picture alone has two samples
            raise torch.OutOfMemoryError("CUDA out of memory")

    generator.pipe.unet.register_forward_pre_hook(little_memory)
    done = generator([(str(tmp_path / f"{name}.png"), name) for name in ("toy", "other")])
    assert [result["error"] for result in done] == [None, None] and batches == [3, 2, 2, 2, 2]


def test_interrupting_leaves_nothing_half_made(command, tmp_path):
    options = ["--checkpoint", "checkpoint", "-o", "out", "--steps", "1000", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, str(loading.ROOT / "generate.py"), "toy.png", *options],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs of a script may ignore it
    )
    seen = ""
    while "/1000 " not in seen:  # the bar of steps
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in printed and printed.splitlines()[-1] == "generate.py: interrupted"
    assert not list(tmp_path.glob("out/*"))


def tile(tmp_path, name):
    return np.asarray(PIL.Image.open(tmp_path / "out" / name / "tile.png")).astype(int)


def test_folders_and_patterns_in_batches(command, tmp_path):
    """Each result of a batch equals that of its picture alone, and `--resume` leaves out results that exist."""
    (tmp_path / "photos" / "old").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.jpg", "old/c.webp")):
        noise_picture(i).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    assert command(tmp_path / "photos", "--batch-size", 2) == 0
    together = {name: tile(tmp_path, name) for name in ("a", "b", "old/c")}
    assert command(tmp_path / "photos" / "?.*") == 2  # the results of a and b exist
    (tmp_path / "out" / "a" / "tile.png").write_text("kept")
    shutil.rmtree(tmp_path / "out" / "b")
    assert command(tmp_path / "photos" / "?.*", "--resume") == 0
    assert (tmp_path / "out" / "a" / "tile.png").read_text() == "kept"
    assert np.abs(tile(tmp_path, "b") - together["b"]).max() <= 1
    assert np.abs(together["a"] - together["b"]).max() > 1


def test_pictures_that_would_share_a_result(command, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    noise_picture(1).save(tmp_path / "more" / "toy.jpg")
    assert command(tmp_path / "toy.png", tmp_path / "more" / "toy.jpg") == 2
    assert "would both be written to toy" in capsys.readouterr().err


def test_other_file_systems(command, tmp_path):
    """Pictures are read from, and results written to, a file system of fsspec that is not the disk."""
    memory = fsspec.filesystem("memory")
    memory.put_file(str(tmp_path / "toy.png"), "/photos/toy.png")
    assert command("memory://photos", "--output", "memory://views") == 0
    assert {PurePosixPath(path).name for path in memory.ls("/views/toy", detail=False)} >= {"tile.png", "cameras.json"}
    assert command("memory://photos", "--output", "memory://views") == 2
    memory.rm("/views/toy/cameras.json")  # as after a killed run
    assert command("memory://photos", "--output", "memory://views", "--resume") == 0
    assert memory.exists("/views/toy/cameras.json")


@pytest.mark.parametrize("option", ["--overwrite", "--resume"])
def test_what_else_lies_on_another_file_system_stays(command, tmp_path, capsys, option):
    memory = fsspec.filesystem("memory")
    output = f"/{tmp_path.name}"
    memory.pipe(f"{output}/toy/holiday.txt", b"mine")
    assert command(tmp_path / "toy.png", "--output", f"memory:/{output}", option) == 2
    assert "exists and is no result" in capsys.readouterr().err
    memory.pipe(f"{output}/toy/cameras.json", b"{}")
    assert command(tmp_path / "toy.png", "--output", f"memory:/{output}", "--overwrite") == 0
    assert memory.cat(f"{output}/toy/holiday.txt") == b"mine" and memory.exists(f"{output}/toy/tile.png")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_makes_what_one_machine_makes(command, ray_cluster, tmp_path):
    """When a worker is killed, nothing is lost and each picture is reported once."""
    address, kill = ray_cluster
    (tmp_path / "photos").mkdir()
    for i in range(6):
        noise_picture(i).save(tmp_path / "photos" / f"{i}.png")
    job = [sys.executable, loading.ROOT / "generate.py", tmp_path / "photos", "-o", tmp_path / "ray"]
    job += ["--checkpoint", tmp_path / "checkpoint", "--steps", 20, "--device", "cpu", "--dtype", "float32"]
    job += ["--ray", address, "--workers", 2]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen([str(part) for part in job], **pipes)
    kill("ray::MapWorker", job)
    printed, errors = job.communicate()
    assert job.returncode == 0, errors
    reported = sorted(line for line in printed.splitlines() if line.endswith("tile.png"))  # Ray prints lines too
    assert reported == [str(tmp_path / "ray" / str(i) / "tile.png") for i in range(6)], printed
    assert command(tmp_path / "photos", "--steps", 20) == 0
    for i in range(6):
        ours = np.asarray(PIL.Image.open(tmp_path / "ray" / str(i) / "tile.png")).astype(int)
        assert np.abs(ours - tile(tmp_path, str(i))).max() <= 1


def test_a_picture_that_fails_does_not_take_its_batch_along(command, tmp_path, capsys, monkeypatch):
    (tmp_path / "photos").mkdir()
    for i, name in enumerate("ab"):
        noise_picture(i).save(tmp_path / "photos" / f"{name}.png")
    put = results.put_result

    def fail(write, output, name, *more):
        if name == "a":
            raise OSError("no space")
        put(write, output, name, *more)

    monkeypatch.setattr(results, "put_result", fail)
    assert command(tmp_path / "photos", "--batch-size", 2) == 2
    assert "a: no space" in capsys.readouterr().err and tile(tmp_path, "b").any()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"]


def test_preview_without_the_vae(pipe, run, monkeypatch):
    """For a large VAE the preview uses a linear map, fitted to the encoded picture, that gives a pixel for each
    latent.
    """
    monkeypatch.setattr(preview, "SMALL_VAE", 0)
    shown = []
    callback = preview.Preview(pipe, noise_picture(), lambda step, picture: shown.append((step, picture.size)))
    run(pipe, noise_picture(), callback_on_step_end=callback)
    assert shown == [(1, (4, 6)), (2, (4, 6))]


@pytest.mark.parametrize("scheduler", (EulerAncestralDiscreteScheduler, DDIMScheduler))
def test_the_last_preview_is_the_tile(pipe, picture, run, scheduler):
    """Whatever the deviation of the latents, here that of an untrained UNet."""
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    shown = []
    callback = preview.Preview(pipe, picture, lambda step, tile: shown.append(np.asarray(tile, np.int16)))
    (tile,) = run(pipe, picture, num_inference_steps=3, output_type="pil", callback_on_step_end=callback)
    assert np.abs(shown[-1] - np.asarray(tile)).max() <= 1 and len(shown) == 3


def test_foreground_ratio_wants_transparency(command, tmp_path, capsys):
    assert command(tmp_path / "toy.png", "--foreground-ratio", 0.8) == 2
    assert "remove its background first" in capsys.readouterr().err
    picture = PIL.Image.new("RGBA", (40, 40))
    picture.paste((200, 0, 0, 255), (0, 0, 10, 5))
    picture.save(tmp_path / "toy.png")
    assert command(tmp_path / "toy.png", "--foreground-ratio", 0.8) == 0


def test_resuming_names_what_was_made_otherwise_and_adds_exports(command, tmp_path, capsys):
    assert command(tmp_path / "toy.png") == 0
    cameras = json.loads((tmp_path / "out" / "toy" / "cameras.json").read_text())
    made_with = [cameras[key] for key in ("checkpoint", "seed", "num_inference_steps", "guidance_scale")]
    assert made_with == [str(tmp_path / "checkpoint"), 0, 1, 2.0]
    before = tile(tmp_path, "toy")
    capsys.readouterr()
    assert command(tmp_path / "toy.png", "--resume") == 0 and not capsys.readouterr().err
    assert command(tmp_path / "toy.png", "--resume", "--seed", 7, "--steps", 2, "--export", "colmap") == 0
    said = "toy is kept, but was made with seed 0, not 7, num_inference_steps 1, not 2: --overwrite makes it anew"
    assert said in capsys.readouterr().err
    assert np.array_equal(tile(tmp_path, "toy"), before)
    assert (tmp_path / "out" / "toy" / "colmap" / "sparse" / "0" / "cameras.txt").is_file()


def test_help_and_missing_files_wait_for_nothing(tmp_path):
    program = """
import sys, generate
try:
    generate.main(sys.argv[1:])
finally:
    print({"torch", "numpy"} & {*sys.modules})
"""
    for arguments in (["--help"], [str(tmp_path / "nothing.png"), "-o", str(tmp_path / "out")]):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
        assert done.stdout.endswith("set()\n")
    assert done.returncode == 2 and f"'{tmp_path / 'nothing.png'}' is not there" in done.stderr


def test_a_plain_background_is_cut_out(command, tmp_path):
    """Of a picture on white the model sees the object alone, unless the background is kept; grey stays as it is."""
    thing = PIL.Image.new("RGB", (60, 40), (200, 30, 30))
    for name, mode, colour in (
        ("alone", "RGBA", (0, 0, 0, 0)),
        ("white", "RGB", "white"),
        ("grey", "RGB", (127,) * 3),
    ):
        picture = PIL.Image.new(mode, (160, 120), colour)
        picture.paste(thing, (30, 5))
        picture.save(tmp_path / f"{name}.png")
    assert command(tmp_path / "alone.png", "--foreground-ratio", pictures.FOREGROUND_RATIO) == 0
    assert command(tmp_path / "white.png") == 0
    assert (
        np.abs(tile(tmp_path, "alone") - tile(tmp_path, "white")).mean() < 2
    )  # but for the object's outermost pixels
    assert command(tmp_path / "white.png", "--keep-background", "--overwrite") == 0
    assert np.abs(tile(tmp_path, "alone") - tile(tmp_path, "white")).mean() > 4
    assert command(tmp_path / "grey.png") == 0
    grey = tile(tmp_path, "grey")
    assert command(tmp_path / "grey.png", "--keep-background", "--overwrite") == 0
    assert np.array_equal(grey, tile(tmp_path, "grey"))


def test_a_background_that_cannot_be_removed(command, tmp_path, monkeypatch, capsys, caplog):
    """By default it stays, with one warning for all pictures; with --remove-background that is an error."""
    monkeypatch.setitem(sys.modules, "rembg", None)
    pictures.rembg_session.cache_clear()
    pictures.log_once.cache_clear()
    noise_picture(1).save(tmp_path / "other.png")
    assert command(tmp_path / "toy.png", tmp_path / "other.png") == 0
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [warning.partition(":")[0] for warning in warnings if "ackground" in warning] == [
        "The background stays, from which the views usually go wrong"
    ]
    assert command(tmp_path / "toy.png", "--remove-background", "--overwrite") == 2
    assert "needs the package rembg" in capsys.readouterr().err


def test_recentre():
    picture = PIL.Image.new("RGBA", (40, 30))
    picture.paste((200, 0, 0, 255), (2, 3, 22, 13))  # 20 x 10 pixels
    square = pictures.recentre(picture, 0.8)
    assert square.size == (25, 25)
    assert PIL.Image.fromarray(np.asarray(square)[..., 3]).getbbox() == (2, 7, 22, 17)
    with pytest.raises(ValueError, match="`foreground_ratio` is 2"):
        pictures.recentre(picture, 2)
    with pytest.raises(ValueError, match="transparent everywhere"):
        pictures.recentre(PIL.Image.new("RGBA", (4, 4), (0, 0, 0, 0)), 0.5)


def test_transparent_pictures_keep_their_own_matte():
    """A picture that has a matte needs no model."""
    picture = PIL.Image.new("RGBA", (4, 4), (9, 9, 9, 0))
    assert pictures.remove_background(picture).getpixel((0, 0)) == (9, 9, 9, 0)
    with pytest.raises(ValueError, match="`background` is 'white', but must be of auto, remove, keep"):
        pictures.prepare(picture, "white")


@pytest.mark.slow
@pytest.mark.timeout(1200)  # importing rembg compiles with numba
def test_rembg_removes_the_background(command, tmp_path, monkeypatch):
    """Runs rembg with a model of two operators in place of its download; the model calls dark pixels the object."""
    pytest.importorskip("rembg")
    onnx = pytest.importorskip("onnx")
    make = onnx.helper.make_node
    nodes = [make("ReduceMean", ["input.1"], ["grey"], axes=[1]), make("Neg", ["grey"], ["dark"])]
    ports = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, channels, 320, 320])
        for name, channels in (("input.1", 3), ("dark", 1))
    ]
    graph = onnx.helper.make_graph(nodes, "dark", ports[:1], ports[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, tmp_path / "u2net.onnx")
    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    monkeypatch.setenv("MODEL_CHECKSUM_DISABLED", "1")
    pictures.rembg_session.cache_clear()

    picture = PIL.Image.new("RGB", (80, 60), "white")
    picture.paste((120, 0, 0), (20, 10, 50, 40))
    alpha = np.asarray(pictures.remove_background(picture))[..., 3]
    assert alpha[25, 35] > 220 and alpha[:5].max() < 5 and alpha[:, 60:].max() < 5
    assert pictures.rembg_session() is pictures.rembg_session()
    picture.save(tmp_path / "toy.png")
    assert command(tmp_path / "toy.png", "--remove-background", "--foreground-ratio", 0.8) == 0
    pictures.rembg_session.cache_clear()


@pytest.mark.slow
def test_rembg_without_its_model_is_one_line(command, tmp_path, monkeypatch, capsys):
    pytest.importorskip("rembg")
    monkeypatch.setenv("U2NET_HOME", str(tmp_path / "nothing"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # an address where nobody answers
    pictures.rembg_session.cache_clear()
    PIL.Image.new("RGB", (40, 40), "white").save(tmp_path / "toy.png")
    assert command(tmp_path / "toy.png", "--remove-background") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("generate.py: ")]
    assert "rembg's model cannot be had" in line


def test_resume_sees_that_a_picture_or_a_run_has_changed(command, pipe, tmp_path, capsys):
    """`cameras.json` says what a result was made of: the picture's digest, and the folder that was loaded."""
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "checkpoint", run / "checkpoint-1")
    assert command(tmp_path / "toy.png", "--checkpoint", run) == 0
    made = json.loads((tmp_path / "out" / "toy" / "cameras.json").read_text())
    assert made["folders"] == [str(run / "checkpoint-1")]
    noise_picture(1).save(tmp_path / "toy.png")
    capsys.readouterr()
    assert command(tmp_path / "toy.png", "--checkpoint", run, "--resume") == 0
    assert f"toy is kept, but was made with picture_sha256 {made['picture_sha256']}, not" in capsys.readouterr().err
    (run / "checkpoint-1").rename(run / "checkpoint-2")
    assert command(tmp_path / "toy.png", "--checkpoint", run, "--resume") == 0
    assert "folders ['" in capsys.readouterr().err
