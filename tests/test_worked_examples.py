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

# how many files the diff of a section may touch, and with which arguments pytest then runs in the copy
EXAMPLES = {
    "Add a method": (5, [CONTRACTS / "added_method.py"]),
    "Add a format": (2, [CONTRACTS / "test_formats.py", CONTRACTS / "added_format.py", "-k", "fp8"]),
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


@pytest.mark.parametrize("tests", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("title", EXAMPLES)
def test_a_worked_example_touches_few_files_and_works(title: str, tests: str, tmp_path: Path) -> None:
    diff, (most, arguments) = diffs()[title], EXAMPLES[title]
    touched = re.findall(r"^\+\+\+ b/(.*)$", diff, flags=re.MULTILINE)
    assert 1 <= len(touched) <= most
    assert all(name.startswith("compress_bilinear/") for name in touched)
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent), "PYTHONPATH": str(tmp_path)}
    run = partial(subprocess.run, cwd=tmp_path, env=alone, capture_output=True, text=True, check=False)
    applied = run(["git", "apply", "-"], input=diff)
    assert applied.returncode == 0, applied.stderr
    options = "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=--import-mode=importlib"
    done = run([sys.executable, "-m", "pytest", *options, "-m", tests, "-c", ROOT / "pyproject.toml", *arguments])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    assert re.search(r"\d+ passed", done.stdout)
