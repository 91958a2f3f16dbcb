"""A mistake that needs no model is told at once: torch is not imported for it."""

import subprocess
import sys

import pytest
from conftest import noise_picture

from zero123plus import options
from zero123plus.options import ROOT

RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""
MISSING = "import sys; sys.modules.update(dict.fromkeys({names}))\n"


def run(*arguments, missing=()):
    """The exit status, the last line of standard error, and whether torch was imported."""
    program = MISSING.format(names=list(missing)) + RUN if missing else RUN
    job = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(job, cwd=ROOT, capture_output=True, text=True)
    *_, line, torch = done.stderr.strip().splitlines()
    return done.returncode, line, torch == "True"


@pytest.fixture
def picture(tmp_path):
    noise_picture().save(tmp_path / "toy.png")
    return tmp_path / "toy.png"


@pytest.mark.parametrize("command", ("generate.py", "examples.normals_and_matte"))
@pytest.mark.parametrize(
    "mistake, words",
    [
        ("a result that exists", "exists"),
        ("a device", "`--device` is 'tpu'"),
        ("a GPU", "`--device` is 'mps', which is not there"),
        ("an empty picture", "cannot be read as a picture"),
        ("a damaged picture", "cannot be read as a picture"),
    ],
)
def test_mistakes_are_told_before_torch_is_imported(tmp_path, picture, command, mistake, words):
    more = {"a device": ["--device", "tpu"], "a GPU": ["--device", "mps"]}.get(mistake, [])
    if mistake == "a result that exists":
        (tmp_path / "out" / "toy").mkdir(parents=True)
    elif mistake == "an empty picture":
        picture.write_bytes(b"")
    elif mistake == "a damaged picture":
        picture.write_bytes(picture.read_bytes()[:200])
    output = (
        tmp_path / "out" if command == "generate.py" or not mistake.startswith("a result") else tmp_path / "out/toy"
    )
    status, line, torch = run(command, picture, "-o", output, *more)
    name = "generate.py: " if command == "generate.py" else "python -m examples.normals_and_matte: "
    assert status == 2 and line.startswith(name) and words in line and not torch


@pytest.mark.parametrize(
    "arguments, missing, words",
    [
        (("generate.py", "--export", "glb"), "xatlas", "glb needs the packages of `pip install scikit-image trimesh"),
        (("generate.py", "--upscale", "4"), "ncnn", "upscale needs the packages of `pip install ncnn"),
        (("examples.normals_and_matte",), "pymatting", "mattes needs the packages of `pip install pymatting`"),
    ],
)
def test_missing_packages_are_told_before_torch_is_imported(tmp_path, picture, arguments, missing, words):
    command, *more = arguments
    status, line, torch = run(command, picture, "-o", tmp_path / "out", *more, missing=[missing])
    assert status == 2 and words in line and not torch


def test_a_text_model_that_cannot_be_had_is_one_line(tmp_path):
    arguments = ("a robot", "-o", tmp_path / "out", "--keep-background", "--text-model", "org/nothing")
    status, line, _ = run("examples.text_to_views", *arguments)
    assert status == 2 and line.startswith("python -m examples.text_to_views: org/nothing is no folder here")


@pytest.mark.parametrize("command", ("generate.py", "examples.normals_and_matte", "examples.text_to_views", "app.py"))
def test_help_needs_nothing(command):
    job = [sys.executable, "-c", RUN, command, "--help"]
    done = subprocess.run(job, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.endswith("False\n") and "usage: " in done.stdout


def test_a_good_run_says_its_device_and_every_file(tmp_path, picture):
    """And nothing else, but for one bar of steps."""
    job = [sys.executable, "generate.py", picture, "-o", tmp_path / "out", "--steps", "1", "--device", "cpu"]
    done = subprocess.run(list(map(str, job)), cwd=ROOT, capture_output=True, text=True)
    files = sorted(str(path) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert done.stdout.splitlines() == files
    device, *bars = [line for line in done.stderr.splitlines() if line.strip() and "background" not in line]
    assert device.startswith("generate.py: on cpu") and all("1/1" in line or "0/1" in line for line in bars)


def test_long_errors_end_with_a_sentence():
    words = "The first thing. " + "The second thing is long. " * 50
    assert options.one_line(ValueError(words), 60) == "The first thing. The second thing is long."
