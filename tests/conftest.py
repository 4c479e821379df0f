"""One thread: the tests' tensors are small, and on a busy machine threads that wait for each other cost most of it."""

import os

import pytest
import torch
from support import Run, command_line

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line with some arguments: its status, stdout and stderr."""
    return lambda *args: command_line(monkeypatch, capsys, *args)
