"""Settings of every test run, and the fixtures that tests of several rooms use."""

import gc
import os
from collections.abc import Callable

import pytest
import torch
from support import Run, command_line

from compress_bilinear.quantization import _decode_bnb

# one thread: the tests' tensors are small, and on a busy machine threads that wait for each other cost most of the time
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

# files, or functions of them, with tests of several seconds: started first, so that none of them runs alone at the end
LONGEST = (
    "test_triton.py",
    "test_compiled.py",
    "test_worked_examples.py",
    "test_benchmarks.py",
    "test_docs.py",
    "test_public_forms.py",
    "test_planner.py",
    "test_compute.py::TestCompress",
    "test_demo.py",
    "test_bitsandbytes.py::TestImport",
    "test_fit.py",
    "test_latency_benchmark.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest tests; the others stay in their order."""

    def place(item: pytest.Item) -> int:
        name = item.nodeid.rpartition("/")[2]
        return next((at for at, start in enumerate(LONGEST) if name.startswith(start)), len(LONGEST))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Let the garbage collector overlook what lives until the end: modules and thousands of tests."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # extension modules complain of objects that survive the interpreter


@pytest.fixture
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes bitsandbytes one that is not installed."""
    error = ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes")
    return lambda: monkeypatch.setattr(_decode_bnb, "imported", lambda: error)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line with some arguments: its status, stdout and stderr."""
    return lambda *args: command_line(monkeypatch, capsys, *args)
