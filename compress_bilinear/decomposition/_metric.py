"""A metric from the inputs' second moments, in which a weight's error is the error of its layer's outputs.

E ‖(W − Ŵ)(x1, x2)‖² is ‖(W − Ŵ) ×_I S1^½ ×_J S2^½‖² for independent inputs of second moments S = E[x xᵀ], and with
M = E[g gᵀ] of the loss's gradients by the outputs, a further ×_O M^½ weighs the outputs by their effect on the loss.

Sources: the whitening of Chen et al., "DRONE: data-aware low-rank compression" (2021) and Wang et al., "SVD-LLM"
(2024), for matrices; Kronecker factors of the curvature: Martens and Grosse, "Optimizing neural networks with
Kronecker-factored approximate curvature" (2015).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CompressionError
from ._factors import CPDecomposition, TuckerDecomposition, peak, row_slices, working_dtype
from ._source import full_precision, turned_

_DAMPING = 1e-3  # of the mean eigenvalue
_FEW_ROWS = 0.05  # the same, for as many rows as dimensions


@dataclass(frozen=True, eq=False)
class Metric:
    """A change of coordinates T = W ×_m R for each mode, in which the error of W is T's Frobenius error.

    Attributes:
        roots: R (d, d), invertible, float64, in the order of the weight's axes (out, in1, in2); RᵀR is the mode's
            second moment. None is the identity.
        inverses: R⁻¹ (d, d), likewise.
    """

    roots: tuple[Tensor | None, Tensor | None, Tensor | None]
    inverses: tuple[Tensor | None, Tensor | None, Tensor | None]

    @classmethod
    def of_moments(cls, moments: Sequence[Tensor | None], rows: int) -> "Metric":
        """From second moments (d, d) of `rows` rows in the order (out, in1, in2); None weighs all directions alike.

        The moments are damped by a small multiple of the identity, a larger one for few rows: directions that were
        never seen still count a little, and the inverses exist. Their overall scale does not matter.

        Raises: CompressionError where a moment is not finite.
        """
        pairs = [(None, None) if moment is None else _roots(moment, rows) for moment in moments]
        (out, in1, in2) = pairs
        return cls((out[0], in1[0], in2[0]), (out[1], in1[1], in2[1]))

    def turned(self, bases: Sequence[Tensor]) -> "Metric":
        """The same metric in other coordinates, T ×_m Uᵀ, for orthogonal U (d, d) of each mode."""
        turns = [u.double() for u in bases]
        roots = [u.T if root is None else u.T @ root.to(u.device) for u, root in zip(turns, self.roots, strict=True)]
        inverses = [
            u if known is None else known.to(u.device) @ u for u, known in zip(turns, self.inverses, strict=True)
        ]
        return Metric((roots[0], roots[1], roots[2]), (inverses[0], inverses[1], inverses[2]))

    def whiten(
        self,
        weight: Tensor,  # (O, I, J)
    ) -> Tensor:  # (O, I, J)
        """The weight whose Frobenius error is the error in this metric: in float32 at least."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        white = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        out, in1, in2 = (None if root is None else root.to(weight.device, dtype) for root in self.roots)
        with full_precision(weight.device):
            for rows in row_slices(weight.shape):  # so that the result is the only copy of a large weight
                part = weight.detach()[rows].to(dtype)
                part = part if in2 is None else (part.flatten(0, 1) @ in2.T).view(part.shape)
                white[rows] = part if in1 is None else torch.matmul(in1, part)
            return white if out is None else turned_(white, out.T, 0)

    def whitened(self, mode: int, factor: Tensor) -> Tensor:  # (d, R) -> (d, R)
        """The inverse of `unwhiten`: a factor of the weight as one of the whitened weight, in float64."""
        root = self.roots[mode]
        return factor.double() if root is None else root.to(factor.device) @ factor.double()

    def unwhiten(self, mode: int, factor: Tensor) -> Tensor:  # (d, R) -> (d, R)
        """A factor of a whitened weight as one of the weight itself, in float64."""
        inverse = self.inverses[mode]
        return factor.double() if inverse is None else inverse.to(factor.device) @ factor.double()

    def whitened_rows(
        self,
        mode: int,
        rows: Tensor,  # (N, d)
    ) -> Tensor:  # (N, d)
        """Inputs for which the whitened weight has the outputs that the weight has for these rows; in their dtype."""
        inverse = self.inverses[mode]
        return rows if inverse is None else rows @ inverse.to(rows)


PLAIN = Metric((None, None, None), (None, None, None))
"""The metric of the weight's own Frobenius error."""


def _roots(moment: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    if not bool(torch.isfinite(moment).all()):
        raise CompressionError("Second moments should be finite. Found NaN or infinity.")
    size = len(moment)
    values, vectors = torch.linalg.eigh((moment.double() + moment.double().T) / 2)
    values = values.clamp_min(0)
    mean = float(values.mean())
    if mean == 0:
        identity = torch.eye(size, dtype=torch.float64, device=moment.device)
        return identity, identity
    values = (values / mean + _DAMPING + _FEW_ROWS * size / max(rows, 1)).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def unwhitened_cp(found: CPDecomposition, metric: Metric, dtype: torch.dtype) -> CPDecomposition:
    """A CP of a whitened weight as one of the weight: unit columns, in `dtype`."""
    wide = [metric.unwhiten(mode, factor) for mode, factor in enumerate(found.factors)]
    norms = [factor.norm(dim=0) for factor in wide]
    out, in1, in2 = ((f / torch.where(n > 0, n, 1.0)).to(dtype) for f, n in zip(wide, norms, strict=True))
    weights = found.weights.double() * norms[0] * norms[1] * norms[2]
    return CPDecomposition(weights.to(torch.promote_types(dtype, torch.float32)), (out, in1, in2))


def unwhitened_tucker(found: TuckerDecomposition, metric: Metric, dtype: torch.dtype) -> TuckerDecomposition:
    """A Tucker decomposition of a whitened weight as one of the weight, in `dtype`.

    A mode of full rank stays absorbed into the core. The other factors keep columns that give projections of
    equal variance, which rounds best, but for a common scale; where the core would leave the dtype's range so, they
    have unit columns.
    """
    core = found.core.to(working_dtype(found.core), copy=True)  # the only copy of it
    factors = [metric.unwhiten(mode, factor) for mode, factor in enumerate(found.factors)]
    free = [mode for mode, wide in enumerate(factors) if wide.shape[0] != wide.shape[1]]
    for mode in {0, 1, 2}.difference(free):
        turned_(core, factors[mode].T.to(core.dtype), mode)
        factors[mode] = torch.eye(len(factors[mode]), dtype=torch.float64, device=core.device)
    scales = {mode: float(factors[mode].norm(dim=0).max()) or 1.0 for mode in free}
    if peak(core) * math.prod(scales.values()) < torch.finfo(dtype).max:
        core *= math.prod(scales.values())
        factors = [factor / scales.get(mode, 1.0) for mode, factor in enumerate(factors)]
    else:
        for mode in free:
            norms = factors[mode].norm(dim=0)
            core *= norms.to(core.dtype).view([-1 if axis == mode else 1 for axis in range(3)])
            factors[mode] = factors[mode] / norms.where(norms > 0, 1.0)
    out, in1, in2 = (factor.to(dtype) for factor in factors)
    return TuckerDecomposition(core.to(dtype), (out, in1, in2))
