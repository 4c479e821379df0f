"""The Triton kernels under the interpreter, in processes of their own: it is chosen when Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHARDS = ["dense", "not dense"]


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_every_kernel_under_the_interpreter(shard, marked, tmp_path):
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    options = ["-q", "-x", "-n0", "-p", "no:cacheprovider", "-m", marked, "-k", shard]
    command = [sys.executable, "-m", "pytest", *options, str(HERE / "interpreted.py")]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
