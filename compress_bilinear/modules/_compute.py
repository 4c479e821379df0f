"""How a quantized layer computes: the modes that it has, and the one that is set."""

import warnings
from collections.abc import Callable
from typing import Any, ClassVar, cast, get_args

from torch import Tensor, nn
from typing_extensions import Self

from ..config import Compute, Quantize
from ..errors import ConfigError
from ..quantization import FORMATS, QuantizedTensor, missing

_GONE = "`compress_bilinear.dequantize` stores the weights in floating point instead"


class ComputeModes(nn.Module):
    """A layer that may be quantized, and then computes in one of several modes."""

    method: ClassVar[str]

    def __init__(self, quantize: Quantize | None) -> None:
        super().__init__()
        self.quantize = quantize
        self.compute: Compute = "on_the_fly"

    @property
    def computes(self) -> tuple[Compute, ...]:
        """The modes that `set_compute` takes."""
        return tuple(mode for mode in get_args(Compute) if self.refused_compute(mode) is None)

    def refused_compute(self, compute: str) -> str | None:
        """The reason why `set_compute` does not take a mode, or None where it does.

        bitsandbytes is imported if the layer's format and device allow it, and tried on the layer's values.
        """
        if self.quantize is None:
            return "the layer is in floating point"
        if compute not in get_args(Compute):
            return _GONE if compute == "resident" else "there is no such mode"
        if compute == "bitsandbytes":
            reasons = [part.reason_against_bitsandbytes() for part in self._stored()]
            return None if None in reasons else "; ".join(dict.fromkeys(filter(None, reasons)))
        linear = (part for part in self.modules() if part is self or not isinstance(part, ComputeModes))
        if compute != "int8" or any(getattr(part, "takes_int8", False) for part in linear):
            return None
        if not FORMATS[self.quantize].integers:
            bits = FORMATS[self.quantize].bits
            return f"its values have {bits} bits, in {self.quantize}, and only int8 is multiplied as integers"
        return "none of its projections is in int8 without scales of its own"

    def set_compute(self, compute: Compute) -> None:
        """Choose how a quantized layer computes. It is no part of its `state_dict`; `compress_bilinear.save` keeps it.

        Args:
            compute: "on_the_fly" decodes the weights slab by slab in each call. "int8" rounds each row of the longer
                input of a dense layer, or of a CP's or Tucker's inputs and intermediates, to int8 and multiplies
                integers (`torch._int_mm`), which costs about 1% of the outputs' norm; a Tucker's core is computed on
                the fly. "bitsandbytes" is "on_the_fly" with its kernels, to the same values, for nf4. Compiled graphs
                and transforms of torch.func decode by torch. Where the layer moves to a device on which these kernels
                cannot be used, it warns and computes on the fly.

        Raises: ConfigError for another mode, an unquantized layer, or a mode that is refused: see `refused_compute`.
        """
        reason = self.refused_compute(compute)
        if reason is not None:
            raise ConfigError(
                f"`compute` should be one of {self.computes} for this {self.method} layer, quantize={self.quantize!r}. "
                f"Found {compute!r}: {reason}."
            )
        for part in self.modules():
            core = part is not self and isinstance(part, ComputeModes)  # which does not multiply integers
            if isinstance(part, QuantizedTensor):
                part.use_bitsandbytes(compute == "bitsandbytes")
            elif isinstance(part, ComputeModes):
                part.compute = "on_the_fly" if compute == "int8" and core else compute
            if hasattr(part, "takes_int8"):
                cast(Any, part).integer = compute == "int8" and part.takes_int8 and not core

    def _stored(self) -> list[QuantizedTensor]:
        return [part for part in self.modules() if isinstance(part, QuantizedTensor)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.compute != "bitsandbytes":
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        devices = [part.device.type for part in self._stored()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if devices != [part.device.type for part in self._stored()]:
            self._try_bitsandbytes()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call, unused-ignore]
        if self.compute == "bitsandbytes" and missing() is not None:  # it was pickled where there is one
            self._try_bitsandbytes()

    def _try_bitsandbytes(self) -> None:
        """Go on by bitsandbytes; where that is refused, warn and compute on the fly."""
        refused = self.refused_compute("bitsandbytes")
        self.set_compute("bitsandbytes" if refused is None else "on_the_fly")
        if refused is not None:
            warnings.warn(f"A layer computes on the fly from now on: {refused}.", stacklevel=3)
