"""Loading as users load: from a folder and through the Hub's protocol, with this repository's pipeline.py."""

import ast
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import assert_same, noise_picture
from diffusers import ControlNetModel, DiffusionPipeline
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects

from zero123plus import loading

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def repository(pipe, tmp_path):
    """A folder like this repository, with components, pipeline.py and a model_index.json that names its class."""
    folder = tmp_path / "repository"
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", "Zero123PlusPipeline"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_folder_loads_without_custom_pipeline(pipe, run, repository):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(repository)
    again = DiffusionPipeline.from_pretrained(repository, trust_remote_code=True)
    assert type(again).__name__ == "Zero123PlusPipeline"
    assert_same(run(again, noise_picture()), run(pipe, noise_picture()))


@pytest.mark.parametrize("name", ("controlnet", "controlnet_normals"))
def test_shipped_controlnets_decide_what_the_shipped_checkpoint_makes(name):
    pipe = DiffusionPipeline.from_pretrained(ROOT, trust_remote_code=True)
    pipe.add_controlnet(ControlNetModel.from_pretrained(ROOT, subfolder=name))
    shapes = np.random.default_rng(0).random((2, *pipe.default_size, 3))
    size = {"num_inference_steps": 1, "output_type": "np"}
    tiles = [
        pipe(noise_picture(), control_image=shape, generator=torch.Generator().manual_seed(0), **size).images
        for shape in shapes
    ]
    assert np.abs(tiles[0] - tiles[1]).mean() > 1e-3


def test_the_shipped_student_is_sharper_than_as_many_steps_without_it():
    """And at most a tenth sharper than its teacher with the guidance scale that it learned from, as noise would be."""
    pipe = loading.Checkpoint(ROOT, "cpu").load()
    picture = PIL.Image.open(ROOT / "examples" / "images" / "cactus.png")

    def sharpness(**options):
        tile = pipe(picture, generator=torch.Generator().manual_seed(0), output_type="np", **options).images[0]
        return sum(np.abs(np.diff(tile, axis=axis)).mean() for axis in (0, 1))

    teacher, plain = sharpness(guidance_scale=3.5), sharpness(num_inference_steps=2, guidance_scale=1.0)
    loading.add_lora(pipe, loading.STUDENT)
    assert (pipe.config.default_num_inference_steps, pipe.config.default_guidance_scale) == (2, 1.0)
    assert 1.1 * plain < sharpness() < 1.1 * teacher


def test_other_checkpoint_loads_with_this_repository_as_custom_pipeline(pipe, run, tmp_path):
    """A public checkpoint names its class as a string and lists the safety checker as null."""
    pipe.save_pretrained(tmp_path)
    (tmp_path / "pipeline.py").unlink()
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None]
    index["_class_name"] = "Zero123PlusPipeline"
    for ours in ("cameras", "controlnet"):
        del index[ours]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(ROOT))
    again = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(ROOT), trust_remote_code=True)
    assert again.cameras.elevations == (20, -10) * 3
    assert_same(run(again, noise_picture()), run(pipe, noise_picture()))


@pytest.mark.parametrize("source", ("nothing", "itself", "this repository"))
def test_saved_folder_loads(pipe, tmp_path, source):
    pipe.save_pretrained(tmp_path)
    options = {"itself": {"custom_pipeline": str(tmp_path)}, "this repository": {"custom_pipeline": str(ROOT)}}
    again = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True, **options.get(source, {}))
    assert type(again).__name__ == "Zero123PlusPipeline"
    again.save_pretrained(tmp_path)  # over itself
    assert (tmp_path / "pipeline.py").read_text() == (ROOT / "pipeline.py").read_text()


def test_a_half_precision_checkpoint_has_one_dtype(pipe, tmp_path):
    pipe.to(torch.float16).save_pretrained(tmp_path)
    for options, dtype in (({}, torch.float32), ({"dtype": torch.bfloat16}, torch.bfloat16)):
        again = type(pipe).from_pretrained(tmp_path, **options)
        modules = again.vae, again.unet, again.text_encoder, again.vision_encoder
        assert {module.dtype for module in modules} == {dtype}


def test_saves_its_own_file_after_another_pipeline_was_loaded(pipe, tmp_path):
    """diffusers keeps one cached file, and one module, for all local files of the name pipeline.py."""
    pipe.save_pretrained(tmp_path / "checkpoint")
    options = {"custom_pipeline": str(ROOT), "trust_remote_code": True}
    ours = DiffusionPipeline.from_pretrained(tmp_path / "checkpoint", **options)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pipeline.py").write_text(
        "from diffusers import DiffusionPipeline\n\n\nclass Zero123PlusPipeline(DiffusionPipeline):\n"
        "    def __init__(self, scheduler):\n        super().__init__()\n"
    )
    theirs = {"custom_pipeline": str(tmp_path / "other"), "trust_remote_code": True}
    DiffusionPipeline.from_pretrained(tmp_path / "checkpoint", **theirs)
    ours.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "pipeline.py").read_text() == (ROOT / "pipeline.py").read_text()


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's protocol that downloads use, for repositories in `root`/ORG/NAME."""

    root: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        url = urlparse(self.path)
        parts = url.path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            folder = self.root / parts[2] / parts[3]
            files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
            if len(parts) > 4 and parts[4] == "tree":
                tree = [
                    {"type": "file", "path": name, "oid": "0" * 40, "size": (folder / name).stat().st_size}
                    for name in files
                ]
                return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            info = {
                "id": "/".join(parts[2:4]),
                "sha": COMMIT,
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
            info["siblings"] = [{"rfilename": name} for name in files]
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        path = self.root / parts[0] / parts[1] / "/".join(parts[4:])
        if not path.is_file():
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        body = path.read_bytes()
        tag = f'"{hashlib.sha256(body).hexdigest()}"'
        self.answer(200, body, ETag=tag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")

    do_HEAD = do_GET


def test_through_the_hub(repository, tmp_path):
    """`from_pretrained(ORG/NAME)` and `custom_pipeline=ORG/NAME`, against a server on loopback, in a new process."""
    root = tmp_path / "hub"
    shutil.copytree(repository, root / "org" / "zero123plus")
    checkpoint = root / "org" / "checkpoint"
    shutil.copytree(repository, checkpoint)
    (checkpoint / "pipeline.py").unlink()
    index = json.loads((checkpoint / "model_index.json").read_text())
    (checkpoint / "model_index.json").write_text(json.dumps({**index, "_class_name": "Zero123PlusPipeline"}))

    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Hub,), {"root": root}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = """
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
for name, options in (("org/zero123plus", {}), ("org/checkpoint", {"custom_pipeline": "org/zero123plus"})):
    try:
        DiffusionPipeline.from_pretrained(name, **options)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise SystemExit("loaded without being trusted")
    pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True, **options)
    print(type(pipe).__name__, pipe.camera_poses().shape)
"""
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    try:
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["Zero123PlusPipeline (6, 4, 4)"] * 2


def test_upload_is_a_working_repository(tmp_path):
    """The files that the `hf upload` of docs/training.md sends, stray files excluded, load and run."""
    text = (ROOT / "docs" / "training.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("hf upload") and "--exclude" in line]
    assert len(lines) == 1
    for line in lines:
        parts = shlex.split(line)
        patterns = [value for option, value in zip(parts, parts[1:]) if option == "--exclude"]
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        strays = [
            "out/duck/tile.png",
            "data/shard-0.tar",
            ".venv/lib/a.py",
            "training/__pycache__/train.pyc",
            "a.partial",
        ]
        sent = list(filter_repo_objects([*tracked.splitlines(), ".git/config", *strays], ignore_patterns=patterns))
        assert not {".git/config", *strays} & set(sent)
    for name in sent:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    pipe = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    result = pipe(noise_picture(), num_inference_steps=1)
    assert [view.size for view in result.views[0]] == [(pipe.default_size[1] // 2,) * 2] * 6
    card = ModelCard.load(tmp_path / "README.md")
    assert (tmp_path / card.data["app_file"]).is_file() and card.data["license"] == "apache-2.0"
    assert f"gradio=={card.data['sdk_version']}" in (tmp_path / "requirements-app.txt").read_text().splitlines()


def test_pipeline_file_stands_alone():
    """A Hub load fetches pipeline.py and nothing else, and inference needs no torchvision. Imports inside of functions
    and of `try` count too.
    """
    nodes = [node for node in ast.walk(ast.parse((ROOT / "pipeline.py").read_text()))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += ["." * node.level + node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    allowed = sys.stdlib_module_names | {"numpy", "PIL", "torch", "transformers", "diffusers"}
    assert len(names) > 20 and {name.split(".")[0] for name in names} <= allowed


def test_half_precision_is_downloaded_where_there_is_nothing_else(pipe, run, tmp_path, monkeypatch):
    """A folder stands for the Hub, of which what the patterns allow is copied."""

    def files_of(name):
        return [str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*") if path.is_file()]

    def download(name, allow_patterns, ignore_patterns):
        for file in filter_repo_objects(
            files_of(name), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (tmp_path / "cache" / name / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / name / file, tmp_path / "cache" / name / file)
        return tmp_path / "cache" / name

    monkeypatch.setattr(loading, "list_repo_files", files_of)
    monkeypatch.setattr(loading, "snapshot_download", download)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    pipe.save_pretrained(tmp_path / "both", variant="fp16")
    pipe.save_pretrained(tmp_path / "both")
    for name, count in (("half", 4), ("both", 4)):
        assert len(list(loading.resolve_checkpoint(name).glob("*/*.safetensors"))) == count
        again = loading.Checkpoint(name, "cpu").load()
        again.warned.add("background")
        assert_same(run(again, noise_picture()), run(pipe, noise_picture()))
