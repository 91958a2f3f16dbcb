"""The snippets of the README run as printed, one after the other, from the root of the repository."""

import inspect
import re
import textwrap
from pathlib import Path

import pytest

from evaluation.benchmark import compile_pipeline

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.timeout(600)
def test_python_snippets_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) >= 3
    namespace = {}
    for snippet in snippets:
        exec(snippet, namespace)
    assert len(namespace["views"]) == 6 and namespace["poses"].shape == (6, 4, 4)


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"\]\((?!http|#)([^)]+)\)", README) + re.findall(r"examples/images/\w+\.png", README):
        assert (ROOT / name).is_file(), name


def test_the_recipe_for_compiling_is_the_one_that_is_measured():
    recipe = inspect.getsource(compile_pipeline).split('"""')[2].replace(", **options", "")
    assert textwrap.dedent(recipe).strip() in (ROOT / "docs" / "speed.md").read_text()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
