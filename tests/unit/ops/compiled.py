"""The real binaries of what dispatch launches, for sm_80 and sm_90, built without a GPU; `test_triton.py` runs this.

The launchers run as they are, on meta tensors and with a stand-in for the driver that names the target, so sizes,
strides and constants are specialised as they would be; what they would launch is compiled and looked into instead.
"""

import itertools
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from compress_bilinear.ops import _choice
from compress_bilinear.ops.triton import _cp as _triton_cp
from compress_bilinear.ops.triton import _cp_pairs as _triton_cp_pairs
from compress_bilinear.ops.triton import _dense as _triton_dense
from compress_bilinear.ops.triton import _tucker as _triton_tucker
from compress_bilinear.ops.triton import _tucker_pairs as _triton_tucker_pairs

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


def inputs(dtype, rows, in1, in2):
    return meta(rows, in1, dtype=dtype), meta(rows, in2, dtype=dtype)


def bilinears(dtype, stored):
    """What the dense launchers are called with: every size with every other."""
    for rows, in1, in2, out in itertools.product(ROWS, SIZES, SIZES, SIZES):
        scale = None
        if stored == torch.int8:
            scale = meta(out, *((-(-in1 // 128), in2) if in1 >= in2 else (in1, -(-in2 // 128))))
        x1, x2 = inputs(dtype, rows, in1, in2)
        yield _triton_dense.launch_dense, (x1, x2, meta(out, in1, in2, dtype=stored), scale)
        if stored == dtype:
            yield _triton_dense.launch_weight_gradient, (meta(rows, out, dtype=dtype), x1, x2)


def cps(dtype, stored):
    """What the launchers of a CP are called with, where `cp_splits` and `MOST_IN` let each of them be."""
    for rows, width, out, rank in itertools.product(ROWS, SIZES, SIZES, SIZES):
        sigma = meta(rank, dtype=torch.float32) if stored == torch.int8 else None
        for in1, in2 in {(width, 17), (17, width), (width, width)}:
            weights = [meta(*shape, dtype=stored) for shape in ((rank, in1), (rank, in2), (out, rank))]
            operands = (*inputs(dtype, rows, in1, in2), *weights, sigma)
            if _choice.cp_splits(rows, rank, out):
                yield _triton_cp.launch_product, (*operands[:4], sigma)
            else:
                yield _triton_cp.launch_forward, (*operands, meta(out, dtype=dtype))
                yield _triton_cp.launch_forward, (*operands, None)
            for wanted in ((True, False), (False, True), (True, True)) if stored == dtype else ((True, False),):
                narrow = max(in1, in2) <= _triton_cp.MOST_IN  # as `fused_cp_backward` has it
                asked = (wanted[0], wanted[1] or not narrow)
                yield _triton_cp.launch_backward, (meta(rows, out, dtype=dtype), *operands, *asked)


def tuckers(dtype, stored):
    """What the launcher of a Tucker layer is called with, where it fits one kernel."""
    for rows, width, out, rank_out, rank2 in itertools.product(
        ROWS, (1, 401), (1, 256), (1, 32, 33, 65), (1, 32, 33, 65)
    ):
        rank = (rank_out, 40, rank2)
        if not _choice.fits_one_kernel(rank, stored == torch.int8 or dtype == torch.float32):
            continue
        shapes = ((rank[1], width), (rank2, width), rank, (out, rank_out))
        scale = meta(rank_out, 1, rank2) if stored == torch.int8 else None
        factors = [meta(*shape, dtype=stored) for shape in shapes]
        operands = (*inputs(dtype, rows, width, width), *factors, meta(out, dtype=dtype), scale)
        yield _triton_tucker.launch_tucker, operands


def pairs(dtype, stored):
    """What the launchers of pairs are called with."""
    for length, rank, out in itertools.product((1, 17, 33, 65), (1, 32, 65, 1001), (1, 32, 33, 65, 256)):
        sigma = meta(rank, dtype=torch.float32) if stored == torch.int8 else None
        q, bias = meta(40, length, rank, dtype=dtype), meta(out, dtype=dtype)
        dy, weight = meta(40, length, length, out, dtype=dtype), meta(out, rank, dtype=stored)
        yield _triton_cp_pairs.launch_cp_pairs, (q, q, weight, sigma, bias)
        yield _triton_cp_pairs.launch_cp_pairs_gradient, (dy, q, weight, sigma)
        if stored == dtype:
            yield _triton_cp_pairs.launch_cp_pairs_weight_gradient, (dy, q, q, sigma)
        for rank_out in (1, 32, 33, 65):
            t, weight = meta(40, length, rank_out, rank, dtype=dtype), meta(out, rank_out, dtype=stored)
            yield _triton_tucker_pairs.launch_tucker_pairs, (t, q, weight, bias)
            yield _triton_tucker_pairs.launch_tucker_pairs_first_gradient, (dy, q, weight)
            yield _triton_tucker_pairs.launch_tucker_pairs_second_gradient, (dy, t, weight)
            if stored == dtype:
                yield _triton_tucker_pairs.launch_tucker_pairs_weight_gradient, (dy, t, q)


def configurations():
    """(kernel, kind, blocks and flags) of all that the launchers choose, each with a call that leads there.

    Nothing is listed here: the launchers run, and what they would have launched is noted.
    """
    noted = []
    found = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(JITFunction, "run", lambda self, *args, **options: noted.append((self.__name__, options)))
        for kind, (dtype, tf32, stored) in KINDS.items():
            torch.backends.cuda.matmul.allow_tf32 = tf32
            for launch, args in itertools.chain(*(calls(dtype, stored) for calls in (bilinears, cps, tuckers, pairs))):
                noted.clear()
                launch(*args)
                for name, options in noted:
                    blocks = tuple(
                        sorted((k, v) for k, v in options.items() if k not in ("grid", "warmup", "PRECISION"))
                    )
                    found[name, kind, blocks] = launch, args
    return found


def sampled(found):
    """For each kernel and kind, few that have each value of each block size and flag; the largest blocks first."""
    chosen = []
    for _, group in itertools.groupby(found, key=lambda key: key[:2]):
        size = lambda key: math.prod(value for name, value in key[2] if name.startswith("B") and value is not True)  # noqa: E731
        missing = set()
        members = sorted(group, key=size, reverse=True)
        for member in members:
            missing |= set(member[2])
        while missing:
            best = max(members, key=lambda key: (len(missing & set(key[2])), size(key)))
            missing -= set(best[2])
            chosen.append(best)
    return chosen


FOUND = dict(sorted(configurations().items(), key=lambda item: item[0][:2]))
# another's kind in the sample: fp16 is compiled as bf16 is, one int8 as another, and fp32 with int8 as without
SAMPLED_KINDS = {80: ("bf16", "fp32_int8"), 90: ("bf16", "tf32", "fp16_int8")}


def asked():
    for capability in SHARED:
        for key in FOUND if ALL else sampled(FOUND):
            if ALL or key[1] in SAMPLED_KINDS[capability]:
                yield pytest.param(capability, key, id=f"sm_{capability}-{key[0]}-{key[1]}-{_words(key[2])}")


def _words(blocks):
    return ",".join(f"{name}={value}" for name, value in blocks if name[0].isupper())


@pytest.mark.parametrize(("capability", "key"), list(asked()))
def test_what_dispatch_chooses_is_lean(capability, key, tmp_path, monkeypatch):
    name, kind, _ = key
    launch, args = FOUND[key]
    binaries = []
    run = JITFunction.run
    monkeypatch.setattr(
        JITFunction,
        "run",
        lambda self, *args, **options: binaries.append(run(self, *args, **options | {"warmup": True})),
    )
    triton.runtime.driver.set_active(Driver(capability))  # for good: the process ends with these tests
    torch.backends.cuda.matmul.allow_tf32 = KINDS[kind][1]
    launch(*args)
    assert {binary.metadata.name for binary in binaries} == {name}
    assert_lean((capability, binaries), tmp_path, not kind.startswith("fp32"))


def test_every_kernel_is_among_them():
    kernels = {
        name
        for module in (_triton_cp, _triton_cp_pairs, _triton_dense, _triton_tucker, _triton_tucker_pairs)
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.__module__ == module.__name__ and "program_id" in value.src
    }
    assert {key[0] for key in FOUND} == kernels
