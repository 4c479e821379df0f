"""Decoding NF4 by torch and by bitsandbytes, side by side: lower quartiles, and whether the values have the same bits.

The sizes are of parts that layers read at once: a small projection, a large one, and a block of a dense weight (2²⁰).

python -m benchmarks.decoding            # to three dtypes, on the CPU
python -m benchmarks.decoding --quick    # one size, in a second
"""

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from compress_bilinear.fitting import latencies
from compress_bilinear.quantization import FORMATS

SIZES = ((24, 16, 64), (1, 100, 1000), (1, 768, 768), (4, 256, 1024))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Decoders = dict[str, Callable[[], Tensor]]


def decoders(shape: tuple[int, int, int], dtype: torch.dtype) -> Decoders:
    """How torch and bitsandbytes read the same stored tensor."""
    values, everything = torch.randn(shape, generator=torch.Generator().manual_seed(0)), slice(None)
    stored = FORMATS["nf4"].encode(values, "weight")
    return {
        "torch": lambda: stored.format.decode(stored, everything, dtype),
        "bitsandbytes": lambda: stored.format.decode_by_bitsandbytes(stored, everything, dtype),
    }


def main() -> None:
    """Time and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long to time each pair")
    parser.add_argument("--quick", action="store_true", help="one size, briefly")
    options = parser.parse_args()
    table = Table("Values", "To", "torch µs", "bitsandbytes µs", "Ratio", "Same bits")
    for shape in SIZES[:1] if options.quick else SIZES:
        for dtype in DTYPES:
            calls = decoders(shape, dtype)
            same = torch.equal(*(call() for call in calls.values()))
            found = latencies(calls, torch.device("cpu"), 0.02 if options.quick else options.seconds)
            ours, theirs = (1e3 * found[who].lower for who in ("torch", "bitsandbytes"))
            sizes = "x".join(map(str, shape))
            table.add_row(sizes, str(dtype)[6:], f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}", str(same))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
