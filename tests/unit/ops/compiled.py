"""The real binaries of what dispatch launches, for sm_80 and sm_90, built without a GPU; `test_triton.py` runs this.

The launchers run as they are, on meta tensors and with a stand-in for the driver that names the target, so sizes,
strides and constants are specialised as they would be; what they would launch is compiled and looked into instead.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from compress_bilinear.ops import _choice, _triton_cp, _triton_dense, _triton_tucker

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may ask for
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
N = 4096


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


@pytest.fixture(params=SHARED, ids="sm_{}".format)
def build(request, monkeypatch):
    """Runs a launcher and gives the binaries that it would have launched."""
    found = []
    run = JITFunction.run

    def compile_only(self, *args, **options):
        found.append(run(self, *args, **options | {"warmup": True}))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    triton.runtime.driver.set_active(Driver(request.param))

    def built(launch, *args):
        launch(*args)
        return request.param, found

    return built  # the process ends with these tests, and there may be no driver to go back to


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


def assert_lean(built, tmp_path, tensor_cores=True):
    capability, binaries = built
    assert binaries
    for binary in binaries:
        path = tmp_path / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        text = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
        used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        assert used["REG"] <= 255
        if used["STACK"] or used["LOCAL"]:  # which are not always spills
            assert spilled(tmp_path / "kernel.ptx", binary.asm["ptx"]) == 0, (binary.metadata.name, used)
        assert binary.metadata.shared <= SHARED[capability]
        assert bool(re.search(r"mma\.sync|wgmma", binary.asm["ptx"])) == tensor_cores


def set_tf32(allowed):
    torch.backends.cuda.matmul.allow_tf32 = allowed


# (dtype, tf32, weights' dtype): what decides the code beside sizes
KINDS = {
    "bf16": (torch.bfloat16, False, torch.bfloat16),
    "tf32": (torch.float32, True, torch.float32),
    "fp32": (torch.float32, False, torch.float32),
    "fp16_int8": (torch.float16, False, torch.int8),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(32, 32, 16), (401, 51, 50), (512, 512, 512)], ids=str)
def test_dense(build, tmp_path, kind, sizes):
    dtype, tf32, stored = KINDS[kind]
    set_tf32(tf32)
    in1, in2, out = sizes
    scale = meta(out, *(-(-in1 // 128), in2) if in1 >= in2 else (in1, -(-in2 // 128))) if stored == torch.int8 else None
    operands = (meta(N, in1, dtype=dtype), meta(N, in2, dtype=dtype), meta(out, in1, in2, dtype=stored), scale)
    assert_lean(build(_triton_dense.launch_dense, *operands), tmp_path, kind != "fp32")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "int8" not in kind])
def test_dense_weight_gradient(build, tmp_path, kind):
    dtype, tf32, _ = KINDS[kind]
    set_tf32(tf32)
    operands = [meta(N, size, dtype=dtype) for size in (97, 148, 148)]
    assert_lean(build(_triton_dense.launch_weight_gradient, *operands), tmp_path, kind != "fp32")


def cp_operands(dtype, stored, in1, in2, out, rank):
    sigma = meta(rank, dtype=torch.float32) if stored == torch.int8 else None
    inputs = meta(N, in1, dtype=dtype), meta(N, in2, dtype=dtype)
    return [*inputs, *(meta(*shape, dtype=stored) for shape in ((rank, in1), (rank, in2), (out, rank))), sigma]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(32, 32, 16, 16), (401, 51, 50, 200), (256, 128, 256, 128)], ids=str)
def test_cp(build, tmp_path, kind, sizes):
    dtype, tf32, stored = KINDS[kind]
    set_tf32(tf32)
    operands = cp_operands(dtype, stored, *sizes)
    forward = build(_triton_cp.launch_forward, *operands, meta(sizes[2], dtype=dtype))
    assert_lean(forward, tmp_path, kind != "fp32")


@pytest.mark.parametrize("kind", KINDS)
def test_cp_product(build, tmp_path, kind):
    dtype, tf32, stored = KINDS[kind]
    set_tf32(tf32)
    x1, x2, in1, in2, _, sigma = cp_operands(dtype, stored, 512, 512, 512, 1024)
    assert_lean(build(_triton_cp.launch_product, x1, x2, in1, in2, sigma), tmp_path, kind != "fp32")


@pytest.mark.parametrize("asked", [(True, False), (False, True), (True, True)], ids=["inputs", "weights", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_cp_backward(build, tmp_path, kind, asked):
    dtype, tf32, stored = KINDS[kind]
    set_tf32(tf32)
    operands = cp_operands(dtype, stored, _triton_cp.MOST_IN, 101, 97, 148)
    launched = build(_triton_cp.launch_backward, meta(N, 97, dtype=dtype), *operands, *asked)
    assert_lean(launched, tmp_path, kind != "fp32")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [(16, 16, 16), (50, 64, 60), (64, 200, 128)], ids=str)
def test_tucker(build, tmp_path, kind, rank):
    dtype, tf32, stored = KINDS[kind]
    set_tf32(tf32)
    in1, in2, out = 401, 256, 256
    if not _choice.fits_one_kernel(rank, stored == torch.int8):
        rank = (64, 200, 64)
    shapes = ((rank[1], in1), (rank[2], in2), rank, (out, rank[0]))
    scale = meta(rank[0], -(-rank[1] // 128), rank[2]) if stored == torch.int8 else None
    inputs = meta(N, in1, dtype=dtype), meta(N, in2, dtype=dtype)
    factors = [meta(*shape, dtype=stored) for shape in shapes]
    launched = build(_triton_tucker.launch_tucker, *inputs, *factors, meta(out, dtype=dtype), scale)
    assert_lean(launched, tmp_path, kind != "fp32")


@pytest.mark.parametrize("kind", KINDS)
def test_pairs(build, tmp_path, kind):
    dtype, tf32, stored = KINDS[kind]
    set_tf32(tf32)
    rank, out = 128, 101
    scale = meta(rank, dtype=torch.float32) if stored == torch.int8 else None
    weight, bias = meta(out, rank, dtype=stored), meta(out, dtype=dtype)
    p, q = meta(40, 30, rank, dtype=dtype), meta(40, 30, rank, dtype=dtype)
    build(_triton_tucker.launch_cp_pairs, p, q, weight, scale, bias)
    t = meta(40, 30, rank, rank, dtype=dtype)
    assert_lean(build(_triton_tucker.launch_tucker_pairs, t, q, weight, bias), tmp_path, kind != "fp32")
