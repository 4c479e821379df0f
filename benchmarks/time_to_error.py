"""Output error against seconds: `AutoConfig(size=1/8)` under several time limits: results/time_to_error_cpu.{csv,png}.

python -m benchmarks.time_to_error              # all layers, about an hour on two quiet cores
python -m benchmarks.time_to_error 50,100,100   # only this one (O,I,J); other rows stay
python -m benchmarks.time_to_error --quick      # a tiny layer, under a minute

Weight and inputs have power k^-1/2 along random orthogonal axes, in every mode; 2,048 rows in 8 batches calibrate. The
error is ‖y − ŷ‖/‖y − b‖ on as many rows of the same distribution that are in no batch. Beside it stand TensorLy's
Tucker and CP of the weight, at the rank that fills the size, their parts rounded by bitsandbytes to int8, linear, a
scale for 256 values. Every point has a process of its own; what its first call loads, a second of code, and what the
process holds before, count neither as seconds nor as peak memory.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import compress_bilinear as cb
from benchmarks.memory import with_peak
from benchmarks.quality import proportional_ranks
from benchmarks.rows import Row, write
from benchmarks.time_to_error_shown import plot, promises, table
from compress_bilinear.fitting import environment, stored_bytes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LAYERS = ((50, 100, 100), (97, 148, 148), (128, 128, 128), (256, 256, 256), (512, 512, 512))
SECONDS = (2, 5, 10, 30, 60, None)
QUICK = ((16, 24, 20),), (0.5, 1, None)
ROWS, BATCH, SIZE = 2048, 256, 1 / 8
BLOCK = 256  # values that share a scale of bitsandbytes
MOST_FLOPS = 1e13  # of TensorLy's CP: some minutes
LIBRARIES = {"Tucker": "TensorLy Tucker, int8", "CP": "TensorLy CP, int8"}


def axes(size: int, generator: torch.Generator) -> Tensor:
    """Orthogonal columns times k^-1/2."""
    return torch.linalg.qr(torch.randn(size, size, generator=generator))[0] * torch.arange(1, size + 1) ** -0.5


def problem(shape: Sequence[int]) -> tuple[nn.Bilinear, list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """The layer, the batches that calibrate, and those that measure."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(tuple(shape), generator=generator)
    for mode, size in enumerate(shape):
        weight = torch.tensordot(axes(size, generator), weight, dims=([1], [mode])).movedim(0, mode)
    torch.manual_seed(0)  # the bias's
    layer = nn.Bilinear(shape[1], shape[2], shape[0])
    layer.weight.data.copy_(weight)
    parts = []
    for seed, size in enumerate(shape[1:], start=1):
        generator = torch.Generator().manual_seed(seed)
        turn = axes(size, generator)
        parts.append([(torch.randn(ROWS, size, generator=generator) @ turn.T).split(BATCH) for _ in range(2)])
    seen, unseen = (list(zip(*both, strict=True)) for both in zip(*parts, strict=True))
    return layer, seen, unseen


def automatic(layer: nn.Bilinear, batches: Any, asked: float | None) -> tuple[nn.Module, Row]:
    """What `compress` makes with its defaults."""
    config = cb.AutoConfig(size=SIZE)
    module, report = cb.compress(layer, config, calibration=batches, max_seconds=asked, progress=False)
    found = report.layers[0]
    choice = {"method": found.method, "rank": _rank(found.rank), "format": found.quantize or ""}
    choice = choice if found.decision == "replaced" else {"method": "keep"}
    return module, {**choice, "bytes": found.bytes_after, "reported_error": found.output_error}


def libraries(method: str, layer: nn.Bilinear) -> Callable[[], tuple[nn.Module, Row]]:
    """TensorLy's decomposition of the weight at the rank that fills the size in int8, and bitsandbytes' rounding."""
    import tensorly
    from bitsandbytes import functional
    from tensorly.decomposition import parafac, tucker

    bnb: Any = functional
    tensorly.set_backend("pytorch")
    weight, shape, used = layer.weight.detach(), layer.weight.shape, 4 * layer.out_features

    def rounded(part: Tensor) -> Tensor:
        nonlocal used
        columns = part.mT.contiguous()  # a CP's have scales of their own, so that a block should be of few
        stored, state = bnb.quantize_blockwise(columns, code=bnb.create_linear_map(), blocksize=BLOCK)
        used += stored.numel() + 4 * state.absmax.numel()
        return bnb.dequantize_blockwise(stored, state).mT

    def call() -> tuple[nn.Module, Row]:
        budget = int((SIZE * stored_bytes(layer) - used - 16) / (1 + 4 / BLOCK))  # 16: of blocks that are not full
        if method == "CP":
            rank: Any = budget // sum(shape)
            head, factors = parafac(weight, rank, init="random", random_state=0)
            dense = tensorly.cp_to_tensor((head, [rounded(part) for part in factors]))
        else:
            rank = proportional_ranks(shape, budget)
            head, factors = tucker(weight, rank=rank)
            dense = tensorly.tucker_to_tensor((rounded(head), [rounded(part) for part in factors]))
        module = nn.Bilinear(shape[1], shape[2], shape[0])
        module.weight, module.bias = nn.Parameter(dense), layer.bias
        return module, {"method": method.lower(), "rank": _rank(rank), "format": "int8", "bytes": used}

    return call


def _rank(rank: Any) -> str:
    return "" if rank is None else str(rank) if isinstance(rank, int) else ",".join(map(str, rank))


def measure(contestant: str, shape: Sequence[int], asked: float | None, threads: int) -> Row:
    """One point, in this process."""
    torch.set_num_threads(threads)
    layer, seen, unseen = problem(shape)
    call = libraries(contestant, layer) if contestant in LIBRARIES else partial(automatic, layer, seen, asked)

    def timed() -> tuple[nn.Module, Row, float]:
        begun = time.perf_counter()
        return *call(), time.perf_counter() - begun

    (module, choice, seconds), peak = with_peak(timed)
    with torch.no_grad():
        exact, found = (torch.cat([each(*pair) for pair in unseen]).double() for each in (layer, module))
        error = float((found - exact).norm() / (exact - layer.bias.double()).norm())
    before = stored_bytes(layer)
    return {
        "seconds": round(seconds, 3),
        "overrun": round(seconds / asked, 3) if asked else "",
        "output_error": "" if module is layer else round(error, 6),
        **choice,
        "smaller_x": round(before / choice["bytes"], 3),
        "peak_mb": round(peak / 1e6, 1),
        "peak_memory_x": round(peak / before, 3),
    }


def points(shape: Sequence[int], seconds: Sequence[float | None], threads: int, timeout: float) -> Iterator[Row]:
    """A row for each limit and for each of TensorLy's decompositions, each measured in a process of its own."""
    plan: list[tuple[str, float | None]] = [("automatic", asked) for asked in seconds]
    cp_flops = 600 * math.prod(shape) ** 2 * 4 * SIZE / sum(shape)  # of 100 sweeps at that rank
    plan += [(name, None) for name in LIBRARIES if name == "Tucker" or cp_flops <= MOST_FLOPS]
    for contestant, asked in plan:
        about = {"layer": "x".join(map(str, shape)), "contestant": LIBRARIES.get(contestant, contestant)}
        row: Row = about | {"asked_seconds": asked or ""}
        child = [sys.executable, "-m", __spec__.name, "--child", json.dumps([contestant, shape, asked, threads])]
        try:
            done = subprocess.run(child, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=timeout)
            yield row | {"status": "ok"} | json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            yield row | {"status": f"over {timeout:g} s"}
        except subprocess.CalledProcessError as error:  # a library's, for want of memory
            yield row | {"status": f"fails: {error.returncode}"}


def layer_of(text: str) -> tuple[int, int, int]:
    """The (O, I, J) of an argument. Raises: ValueError for anything else."""
    out, in1, in2 = map(int, text.split(","))
    return out, in1, in2


def main() -> None:
    """Measure, print the points and what is promised of them, write the CSV and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layers", nargs="*", type=layer_of, help="O,I,J; the suite's where none is given")
    parser.add_argument("--quick", action="store_true", help="a tiny layer and short limits")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every process")
    parser.add_argument("--timeout", type=float, default=900, help="most seconds for one point, whatever it asks for")
    parser.add_argument("--out", type=Path, help="folder for the results; benchmarks/results where it is not quick")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        tiny = [(torch.randn(64, 8), torch.randn(64, 8))] * 4
        for config in (cb.AutoConfig(size=0.5), cb.CPConfig(rank=4)):  # loads code, starts threads
            cb.compress(nn.Bilinear(8, 8, 8), config, calibration=tiny, max_seconds=1, progress=False)
        print(json.dumps(measure(*json.loads(options.child))))
        return
    torch.set_num_threads(options.threads)  # for the record
    facts = environment(torch.device("cpu"), torch.float32)
    out = options.out or (None if options.quick else RESULTS)
    rows: list[Row] = []
    suite, seconds = QUICK if options.quick else (LAYERS, SECONDS)
    for shape in options.layers or suite:
        work = points(shape, seconds, options.threads, options.timeout)
        rows += track(work, ",".join(map(str, shape)), console=Console(stderr=True), transient=True)
        if out is not None:  # each time, for a run that is cut short; rows of other layers stay
            write(out / "time_to_error_cpu.csv", rows, facts, keys=("layer",))
    Console(width=160).print(table(rows), promises(rows))
    if out is not None:
        print(f"Wrote {plot(out / 'time_to_error_cpu.csv').with_suffix('.*')}")


if __name__ == "__main__":
    main()
