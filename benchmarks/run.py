"""Latency, peak memory and fraction of the roofline on the shape suite, after a correctness gate.

python -m benchmarks.run                    # on the CPU, float32: some minutes
python -m benchmarks.run docred enormous    # only these cases
python -m benchmarks.run --device cuda      # bfloat16, float32, float16, forward and backward: at most 8 minutes

Needs torch, and on a GPU Triton; the package need not be installed. Writes results/latency_<device>.csv.
"""

import argparse
import csv
import gc
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
try:
    import compress_bilinear  # noqa: F401
except ImportError:  # where its other dependencies are missing, its operations still stand on torch alone
    package = types.ModuleType("compress_bilinear")
    package.__path__ = [str(ROOT / "compress_bilinear")]
    sys.modules["compress_bilinear"] = package

from benchmarks.cases import SUITE, Case, Contestant, contestants  # noqa: E402 - after the stand-in above

RESULTS = Path(__file__).parent / "results"
MOST_FLOPS = 2e11  # of a case that is measured on a CPU unless it is named
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # relative Frobenius
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
GATE_ROWS = 8  # whose outputs are compared with float64
ROUNDS = (5, 40)

Row = dict[str, object]


def main() -> None:
    """Run the chosen cases, print a table and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [case.name for case in SUITE]
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(names)}; on a CPU those up to 2e11 FLOPs by default")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="float32 on a CPU, all three on a GPU by default")
    parser.add_argument(
        "--rows", nargs="+", default=None, help="numbers of rows, or 'suite'; all of 1 32 suite by default"
    )
    parser.add_argument("--passes", nargs="+", choices=("forward", "training"), help="forward, and on a GPU training")
    parser.add_argument("--seconds", type=float, default=None, help="about how long to time a group; 2 or 0.3")
    parser.add_argument("--minutes", type=float, default=7.5, help="when no more is begun")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the CSV")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(names):
        parser.error(f"cases should be among {', '.join(names)}. Found {', '.join(sorted(unknown))}.")
    device, on_gpu = torch.device(options.device), options.device == "cuda"
    begun = time.monotonic()
    rows: list[Row] = []
    skipped = 0
    for dtype_name in options.dtypes or (list(DTYPES) if on_gpu else ["float32"]):
        dtype = DTYPES[dtype_name]
        limits = roofline(device, dtype)
        hardware = environment(device, dtype_name, limits)
        for case in SUITE:
            if (options.cases and case.name not in options.cases) or (
                not options.cases and not on_gpu and case.flops > MOST_FLOPS
            ):
                continue
            for count in counts(case, options.rows or ["1", "32", "suite"]):
                for kind in options.passes or (["forward", "training"] if on_gpu else ["forward"]):
                    if time.monotonic() - begun > 60 * options.minutes:
                        skipped += 1
                        continue
                    print(f"{dtype_name} {case.name} rows={count} {kind} ...", file=sys.stderr)
                    compiling = on_gpu and dtype == torch.bfloat16 and count == case.rows and kind == "forward"
                    compiling = compiling and time.monotonic() - begun < 30 * options.minutes
                    seconds = options.seconds or (0.3 if on_gpu else 2.0)
                    group = measured(case, count, dtype, device, kind == "training", compiling, limits, seconds)
                    rows += [row | {"pass": kind} | hardware for row in group]
    if not rows:
        sys.exit("Nothing was measured: more --minutes are needed.")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"latency_{options.device}.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    summary(rows)
    if skipped:
        print(f"{skipped} groups were not begun for want of time.")
    print(f"Wrote {path} after {time.monotonic() - begun:.0f} s")


def counts(case: Case, asked: list[str]) -> list[int]:
    """Numbers of rows, each once; a case of pairs has its own only."""
    found = [case.rows if rows == "suite" or case.pairs else int(rows) for rows in asked]
    return list(dict.fromkeys(found))


def measured(
    case: Case,
    count: int,
    dtype: torch.dtype,
    device: torch.device,
    training: bool,
    compiling: bool,
    limits: tuple[float, float],
    seconds: float,
) -> list[Row]:
    """One row for each contestant; ends the program where one is wrong."""
    calls: dict[str, Callable[[], object]] = {}
    found = contestants(case, count, dtype, device)
    for name, contestant in list(found.items()):
        if (training and not contestant.trains) or (contestant.compiled and not compiling):
            del found[name]
            continue
        error = gate(contestant, bool(case.pairs))
        if not error < TOLERANCES[dtype]:
            sys.exit(f"{case.name}, {count} rows, {dtype}: {name} is wrong: relative error {error:.3g}")
        calls[name] = trained(contestant) if training else forward(contestant)
    timed = latencies(calls, device, seconds)
    baseline = timed["nn.Bilinear"][1]
    result: list[Row] = []
    for name, (lower, median, upper) in timed.items():
        contestant = found[name]
        size = sum(tensor.numel() * tensor.element_size() for tensor in contestant.tensors)
        outputs = count * max(1, case.pairs**2) * case.out * dtype.itemsize
        ideal = (3 if training else 1) * max(contestant.flops / limits[0], (size + outputs) / limits[1])
        result.append(
            {
                "case": case.name,
                "in1": case.in1,
                "in2": case.in2,
                "out": case.out,
                "rows": f"{count}x{case.pairs}^2" if case.pairs else count,
                "contestant": name,
                "family": contestant.family,
                "median_ms": f"{median:.5g}",
                "lower_quartile_ms": f"{lower:.5g}",
                "upper_quartile_ms": f"{upper:.5g}",
                "speedup_vs_bilinear": f"{baseline / median:.3f}",
                "of_roofline": f"{ideal * 1e3 / median:.3f}",
                "peak_extra_mb": peak(calls[name], device),
            }
        )
    return result


def gate(contestant: Contestant, pairs: bool) -> float:
    """The relative error of the first rows' outputs against the definition in float64, on the CPU."""
    with torch.no_grad():
        output = contestant.call(*contestant.tensors)
        rows = 1 if pairs else GATE_ROWS
        inputs = [tensor[:rows] for tensor in contestant.tensors[:2]]
        wide = [tensor.double() for tensor in (*inputs, *contestant.tensors[2:])]
        exact = contestant.reference(*wide)
        return float((output[:rows].double() - exact).norm() / exact.norm())


def forward(contestant: Contestant) -> Callable[[], object]:
    """A forward without gradients."""

    def call() -> Tensor:
        with torch.no_grad():
            return contestant.call(*contestant.tensors)

    return call


def trained(contestant: Contestant) -> Callable[[], object]:
    """A forward, and a backward to all that is stored and to the inputs."""
    tensors = [tensor.detach().requires_grad_() for tensor in contestant.tensors]
    with torch.no_grad():
        direction = torch.ones_like(contestant.call(*contestant.tensors))
    return lambda: torch.autograd.grad(contestant.call(*tensors), tensors, direction)


def latencies(
    calls: dict[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, tuple[float, float, float]]:
    """Quartiles in milliseconds; in every round each call is timed once, so that drift meets all alike."""
    for call in calls.values():
        call()
    single = {name: _timed(call, device, 1) for name, call in calls.items()}
    repeats = {name: max(1, min(100, round(2e-3 / duration))) for name, duration in single.items()}
    share = sum(single[name] * repeats[name] for name in calls)
    rounds = round(min(max(seconds / share, ROUNDS[0]), ROUNDS[1]))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(1e3 * _timed(call, device, repeats[name]))
    result = {}
    for name, values in samples.items():
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        result[name] = (lower, median, upper)
    return result


def _timed(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def peak(call: Callable[[], object], device: torch.device) -> str:
    """Megabytes beyond what was there before the call, the output included; on a GPU only."""
    if device.type != "cuda":
        return ""
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return f"{(torch.cuda.max_memory_allocated() - before) / 1e6:.4g}"


def roofline(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s of a large copy, measured here and now."""
    size = 4096 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    from compress_bilinear import ops

    def multiply() -> Tensor:
        return ops.linear(left, right)

    def copied() -> Tensor:
        return target.copy_(source)

    for _ in range(3):
        multiply(), copied()
    product = min(_timed(multiply, device, 3) for _ in range(5))
    copy = min(_timed(copied, device, 3) for _ in range(5))
    return 2 * size**3 / product, 2 * source.numel() / copy


def environment(device: torch.device, dtype: str, limits: tuple[float, float]) -> Row:
    """What the figures were measured on."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "not installed"
    processor = platform.processor() or platform.machine()
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "device": device.type,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "product_tflops": f"{limits[0] / 1e12:.4g}",
        "copy_gb_per_s": f"{limits[1] / 1e9:.4g}",
        "torch": torch.__version__,
        "triton": version,
        "cuda": torch.version.cuda or "",
    }


def summary(rows: list[Row]) -> None:
    """Geometric means over the cases, against `nn.Bilinear` and against the best exact contestant."""
    rivals = ("nn.Bilinear", "einsum", "one GEMM", "outer", "einsum, compiled", "plain Triton")
    groups: dict[tuple[object, ...], dict[str, float]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("dtype", "pass", "case", "rows"))
        groups.setdefault(key, {})[str(row["contestant"])] = float(str(row["median_ms"]))
    for key, group in groups.items():
        best = min(group[name] for name in rivals if name in group)
        cells = ", ".join(f"{name} {group[name]:.4g}" for name in group)
        print(f"{' '.join(map(str, key))}: {cells} ms; dense takes {group['dense'] / best:.2f}x the best rival")
    for heading in dict.fromkeys(key[:2] for key in groups):
        chosen = [group for key, group in groups.items() if key[:2] == heading]
        for name in ("dense", "dense int8", "CP", "Tucker"):
            ratios = [group["nn.Bilinear"] / group[name] for group in chosen if name in group]
            if ratios:
                mean = statistics.geometric_mean(ratios)
                print(f"{' '.join(map(str, heading))}: {name} {mean:.2f}x nn.Bilinear, least {min(ratios):.2f}x")


if __name__ == "__main__":
    main()
