"""Reports for the renderers' tests, made without solving or timing anything."""

from typing import Any

from compress_bilinear.report import AS_CONFIGURED, ComputeMode, FrontPoint, LayerReport, Note, Report, Spectrum

NASTY = (
    "<script>alert(1)</script>",
    "\"onload='alert(1)",
    "a&b<i>c",
    "$x^2$ _{y}",
    "{{ 7 * 7 }}{% raw %}",
    "\u202egnp.\ud800\x1b[31m\x00",
)
"""Names that a page, a plot's text, a template or a terminal could take for something else."""


def front() -> tuple[FrontPoint, ...]:
    return (
        FrontPoint(method="cp", rank=4, quantize="int8", bytes=3000, flops=9, output_error=0.5),
        FrontPoint(method="cp", rank=8, bytes=9000, flops=9, output_error=0.2, chosen=True),
        FrontPoint(method="tucker", rank=(4, 5, 6), bytes=30_000, flops=9, output_error=0.1),
        FrontPoint(method="dense", quantize="int8", bytes=250_000, flops=9, output_error=0.004),
        FrontPoint(method="keep", bytes=1_000_000, flops=9, output_error=0.0),
    )


def spectra(*sizes: int) -> tuple[Spectrum, ...]:
    found = []
    for size in sizes:
        indices = tuple(sorted({1 + round(k * (size - 1) / 40) for k in range(41)}))
        found.append(Spectrum(indices=indices, values=tuple(0.5 / index for index in indices)))
    return tuple(found)


def modes() -> tuple[ComputeMode, ...]:
    return (
        ComputeMode(
            mode="on_the_fly", chosen=False, latency_ms=0.7, latency_quartiles_ms=(0.6, 0.8), output_change=0.0
        ),
        ComputeMode(mode="bitsandbytes", chosen=True, latency_ms=0.5, output_change=1e-7),
        ComputeMode(mode="int8", chosen=False, latency_ms=0.6, output_change=0.0066, refused="it is <not> allowed"),
    )


def replaced(name: str = "rel", **changes: Any) -> LayerReport:
    """A layer with every figure that a report may have."""
    known: dict[str, Any] = {
        "name": name, "shape": (50, 100, 100), "method": "cp", "rank": 8, "quantize": "int8", "decision": "replaced",
        "notes": (AS_CONFIGURED,), "weight_error": 0.6, "output_error": 0.2, "calibration_rows": 512,
        "calibration_groups": 128,
        "truncation_error": 0.59, "quantization_error": 0.01, "compute": "bitsandbytes",
        "compute_modes": modes(),
        "params_before": 250_000, "params_after": 2000, "bytes_before": 1_000_000, "bytes_after": 9000,
        "flops_before": 10**6, "flops_after": 10**4, "dense_order": "one_gemm", "batch_size": 64,
        "latency_before_ms": 2.5, "latency_before_quartiles_ms": (2.3, 2.9), "speedup": 5.0, "amplification": 1.5,
        "latency_after_ms": 0.5, "latency_after_quartiles_ms": (0.4, 0.6), "speedup_vs_dense": 2.0, "front": front(),
        "latency_dense_ms": 1.0, "latency_dense_quartiles_ms": (0.9, 1.2), "spectra": spectra(50, 100, 100),
    }  # fmt: skip
    return LayerReport(**known | changes)


def kept(name: str = "kept", **changes: Any) -> LayerReport:
    """A layer that stayed, with the figures of what was turned down."""
    own = {
        "decision": "kept",
        "notes": (Note("not_smaller", "it is not smaller"),),
        "bytes_after": 1_000_000,
        "front": (),
    }
    return replaced(name, **own | {"speedup": 0.4, "speedup_vs_dense": 0.3, "latency_after_ms": 6.25} | changes)


def report(*layers: LayerReport, **changes: Any) -> Report:
    known: dict[str, Any] = {
        "model_bytes_before": sum(layer.bytes_before for layer in layers) + 1000,
        "model_bytes_after": sum(layer.bytes_after for layer in layers) + 1000,
        "environment": {
            "device": "cpu",
            "dtype": "float32",
            "processor": "a <fast> one",
            "threads": 2,
            "torch": "2.13",
        },
        "config": {"layers": {"*": {"method": "cp", "rank": 8}}},
    }
    return Report(layers=layers, **known | changes)
