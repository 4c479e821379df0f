"""The worked examples of `docs/architecture.md` work: each diff is applied to a copy of the package, and tested there.

An example is a section whose title is in `EXAMPLES` and that has a fence of the language `diff`.
"""

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import compress_bilinear as cb

ROOT = Path(__file__).parent.parent
PACKAGE = Path(cb.__file__).parent
CONTRACTS = ROOT / "tests" / "contracts"

# how many files the diff of a section may touch, what pytest then runs in the copy, and what it runs too in a slow test
EXAMPLES = {
    "Add a method": (5, ["added_method.py"], []),
    "Add a format": (2, ["test_formats.py", "added_format.py", "-k", "fp8"], ["test_layers.py", "test_pipeline.py"]),
}


def diffs() -> dict[str, str]:
    """The diff in each section of the page that has one."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    title, found = "", {}
    for heading, body in re.findall(r"^#+ (.*?)$|^```diff\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        if heading:
            title = heading
        else:
            assert title not in found, title
            found[title] = body
    return found


def test_every_diff_of_the_page_is_an_example() -> None:
    assert diffs().keys() == EXAMPLES.keys()


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("title", EXAMPLES)
def test_a_worked_example_touches_few_files_and_works(title: str, slow: bool, tmp_path: Path) -> None:
    diff, (most, tests, more) = diffs()[title], EXAMPLES[title]
    touched = re.findall(r"^\+\+\+ b/(.*)$", diff, flags=re.MULTILINE)
    assert 1 <= len(touched) <= most
    assert all(name.startswith("compress_bilinear/") for name in touched)
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent), "PYTHONPATH": str(tmp_path)}
    run = partial(subprocess.run, cwd=tmp_path, env=alone, capture_output=True, text=True, check=False)
    applied = run(["git", "apply", "-"], input=diff)
    assert applied.returncode == 0, applied.stderr
    options = "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=--import-mode=importlib"
    chosen = ["-m", "" if slow else "not slow", *tests, *(more if slow else [])]
    chosen = [str(CONTRACTS / one) if one.endswith(".py") else one for one in chosen]
    done = run([sys.executable, "-m", "pytest", *options, "-c", ROOT / "pyproject.toml", *chosen])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    assert re.search(r"\d+ passed", done.stdout)
