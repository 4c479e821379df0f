"""The real binaries of what the launchers choose, for sm_80 and sm_90, built without a GPU.

The launchers run as they are, on meta tensors and with a stand-in for the driver that names the target, so sizes,
strides and constants are specialised as they would be. What they would launch is compiled and looked into instead.
"""

import itertools
import math
import os
import re
import subprocess
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from compress_bilinear.ops.triton import _cp as triton_cp  # noqa: E402
from compress_bilinear.ops.triton import _dense as triton_dense  # noqa: E402

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may ask for
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ALL = os.environ.get("COMPILE_ALL") == "1"  # some thousand binaries, an hour on one core; else `sampled`


class Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # a cache of its own for each target

    def get_current_stream(self, device):
        return 0


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def spilled(path, ptx):
    """Bytes, as ptxas says."""
    path.write_text(ptx)
    target = re.search(r"\.target (\w+)", ptx).group(1)
    for name in ("ptxas", "ptxas-blackwell"):  # which of the two knows this version of PTX
        command = [TOOLS / name, "-v", f"-arch={target}", path, "-o", path.with_suffix(".out")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))
    raise AssertionError(done.stderr)


def assert_lean(built, tmp_path, tensor_cores, configuration):
    """No spills, memory that the target has, and tensor cores if any are expected."""
    capability, binaries = built
    for binary in binaries:
        path = tmp_path / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        text = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
        used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        assert used["REG"] <= 255, configuration
        if used["STACK"] or used["LOCAL"]:  # which are not always spills
            assert spilled(tmp_path / "kernel.ptx", binary.asm["ptx"]) == 0, (configuration, used)
        assert binary.metadata.shared <= SHARED[capability], configuration
        assert bool(re.search(r"mma\.sync|wgmma", binary.asm["ptx"])) == tensor_cores, configuration


# (dtype, tf32, weights' dtype): what decides the code beside sizes
KINDS = {
    "bf16": (torch.bfloat16, False, torch.bfloat16),
    "fp16": (torch.float16, False, torch.float16),
    "tf32": (torch.float32, True, torch.float32),
    "fp32": (torch.float32, False, torch.float32),
    "fp16_int8": (torch.float16, False, torch.int8),
    "bf16_int8": (torch.bfloat16, False, torch.int8),
    "tf32_int8": (torch.float32, True, torch.int8),
    "fp32_int8": (torch.float32, False, torch.int8),
}
# one in each of the intervals between the powers of two that block sizes are, and past the largest; some divide by 16
SIZES = (1, 32, 33, 65, 256, 1001)
ROWS = (1, 32, 4097)


@contextmanager
def tf32_allowed(allowed):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def inputs(dtype, rows, in1, in2):
    return meta(rows, in1, dtype=dtype), meta(rows, in2, dtype=dtype)


def bilinears(dtype, stored):
    """What the dense launchers are called with: every size with every other."""
    for rows, in1, in2, out in itertools.product(ROWS, SIZES, SIZES, SIZES):
        if stored == dtype:
            x1, x2 = inputs(dtype, rows, in1, in2)
            yield triton_dense.launch_dense, (x1, x2, meta(out, in1, in2, dtype=stored))


def cps(dtype, stored):
    """What the launcher of a CP's product is called with."""
    for rows, in1, in2, rank in itertools.product(ROWS, SIZES, SIZES, SIZES):
        sigma = meta(rank, dtype=torch.float32) if stored == torch.int8 else None
        weights = [meta(rank, width, dtype=stored) for width in (in1, in2)]
        yield triton_cp.launch_product, (*inputs(dtype, rows, in1, in2), *weights, sigma)


FAMILIES = {"dense": (triton_dense, bilinears), "cp": (triton_cp, cps)}


@cache
def configurations(family, kind):
    """(kernel, blocks and flags) of all that the launchers of a family choose, each with a call that leads there.

    Nothing is listed here: the launchers run, and what they would have launched is noted.
    """
    noted, found = [], {}
    dtype, tf32, stored = KINDS[kind]
    with pytest.MonkeyPatch.context() as patched, tf32_allowed(tf32):
        patched.setattr(JITFunction, "run", lambda self, *args, **options: noted.append((self.__name__, options)))
        for launch, args in FAMILIES[family][1](dtype, stored):
            noted.clear()
            launch(*args)
            for name, options in noted:
                blocks = ((k, v) for k, v in options.items() if k not in ("grid", "warmup", "PRECISION"))
                found[name, tuple(sorted(blocks))] = launch, args
    return found


def sampled(found):
    """For each kernel few that have each value of each block size and flag; the largest blocks first."""
    chosen = []
    size = lambda key: math.prod(value for name, value in key[1] if name.startswith("B") and value is not True)  # noqa: E731
    for _, group in itertools.groupby(sorted(found, key=lambda key: key[0]), key=lambda key: key[0]):
        members = sorted(group, key=size, reverse=True)
        missing = set().union(*(member[1] for member in members))
        while missing:
            best = max(members, key=lambda key: (len(missing & set(key[1])), size(key)))
            missing -= set(best[1])
            chosen.append(best)
    return chosen


def largest(found):
    """For each kernel the largest blocks, with most of its flags set: what spills first."""
    kernels = {name for name, _ in found}
    cost = lambda key: math.prod(int(value) for _, value in key[1] if value)  # noqa: E731
    return [max((key for key in found if key[0] == kernel), key=cost) for kernel in sorted(kernels)]


# by default the largest blocks of three; then a sample of these; fp16, which the dense kernel refuses, is compiled
# as bf16 is, one int8 as another, and fp32 with int8 as without
USUAL_KINDS = {80: ("bf16",), 90: ("bf16", "fp32", "fp32_int8")}
SAMPLED_KINDS = {80: ("bf16", "fp32_int8"), 90: ("bf16", "tf32", "bf16_int8")}


def cases():
    for capability, family in itertools.product(SHARED, FAMILIES):
        kinds = {name: kind for name, kind in KINDS.items() if family == "cp" or kind[0] == kind[2]}  # dense: no int8
        for kind in [kind for kind in USUAL_KINDS[capability] if kind in kinds]:
            yield pytest.param(capability, family, kind, largest, id=f"sm_{capability}-{family}-{kind}")
        for kind in kinds if ALL else [kind for kind in SAMPLED_KINDS[capability] if kind in kinds]:
            name = f"sm_{capability}-{family}-{kind}-sampled"
            yield pytest.param(capability, family, kind, dict if ALL else sampled, id=name, marks=pytest.mark.slow)


@pytest.fixture
def target(monkeypatch, tmp_path):
    """Sets what is compiled for."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    yield lambda capability: triton.runtime.driver.set_active(Driver(capability))
    if torch.cuda.is_available():  # else there is no driver to go back to
        triton.runtime.driver.reset_active()


@pytest.mark.parametrize(("capability", "family", "kind", "choose"), list(cases()))
def test_what_the_launchers_choose_is_lean(capability, family, kind, choose, target, tmp_path, monkeypatch):
    found = configurations(family, kind)
    binaries = []
    run = JITFunction.run
    monkeypatch.setattr(
        JITFunction,
        "run",
        lambda self, *args, **options: binaries.append(run(self, *args, **options | {"warmup": True})),
    )
    target(capability)
    for key in choose(found):
        launch, args = found[key]
        binaries.clear()
        with tf32_allowed(KINDS[kind][1]):
            launch(*args)
        assert {binary.metadata.name for binary in binaries} == {key[0]}
        assert_lean((capability, binaries), tmp_path, not kind.startswith("fp32"), key)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_is_among_them(family):
    module = FAMILIES[family][0]
    kernels = {
        name
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.__module__ == module.__name__ and "program_id" in value.src
    }
    assert {name for name, _ in configurations(family, "bf16")} == kernels
