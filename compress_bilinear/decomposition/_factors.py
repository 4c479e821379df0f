"""The results: frozen, validated, convertible to and from TensorLy, with the true residual in float64."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import CompressionError

Factors: TypeAlias = tuple[Tensor, Tensor, Tensor]
Reader: TypeAlias = Callable[[slice, torch.dtype], Tensor]
"""Some slices (·, I, J) of an approximation (O, I, J) along its first axis, in a dtype."""

MODES = ("out", "in1", "in2")
SMALL = 2**16  # elements of a weight that is worked on in float64 whatever its dtype
_WIDENED = 2**18  # elements of a slab that is widened to float64: 2 MiB, which caches hold
_TELLING = 1e-3  # an error above which float32 tells it to four digits


def _check_tensors(named: dict[str, Tensor]) -> None:
    """All floating and finite, with one dtype and one device."""
    first = next(iter(named.values()))
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CompressionError(f"`{name}` should be a floating torch.Tensor. Found {found}.")
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise CompressionError(
                f"`{name}` should be {first.dtype} on {first.device}, as the first part is. "
                f"Found {tensor.dtype} on {tensor.device}."
            )
        if tensor.numel() and not math.isfinite(peak(tensor)):
            raise CompressionError(f"`{name}` should be finite. Found NaN or infinity.")


def _check_factors(factors: Sequence[Tensor], ranks: Sequence[int]) -> None:
    if len(factors) != 3:
        raise CompressionError(f"`factors` should be three matrices (out, in1, in2). Found {len(factors)}.")
    for mode, factor, rank in zip(MODES, factors, ranks, strict=True):
        if factor.dim() != 2 or factor.shape[1] != rank:
            raise CompressionError(f"The {mode} factor should have shape (·, {rank}). Found {tuple(factor.shape)}.")


def _three(factors: Any, kind: str) -> Factors:
    """Factors of any TensorLy backend that numpy can read, as torch tensors."""
    if len(factors) != 3:
        raise CompressionError(f"A {kind} tensor of order 3 is required. Found {len(factors)} factors.")
    out, in1, in2 = (_tensor(factor) for factor in factors)
    return out, in1, in2


def _tensor(values: Any) -> Tensor:
    return values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")


def slabs(shape: Sequence[int], axis: int = 0, *, most: int = 2**20, least: int = 2**13) -> Iterator[slice]:
    """Slices of an axis whose slabs are an eighth of the tensor, within these numbers of elements.

    So copies of a slab take little memory. A slab has at least one index.
    """
    numel = max(1, math.prod(shape))
    step = max(1, min(most, max(least, numel // 8)) * shape[axis] // numel)
    for start in range(0, shape[axis], step):
        yield slice(start, min(start + step, shape[axis]))


def row_slices(shape: Sequence[int], most: int = _WIDENED) -> Iterator[slice]:
    """Slices of the first axis of an (O, I, J) tensor, for slabs in float64."""
    return slabs(shape, most=most, least=2**14)


class _Decomposition:
    factors: Factors

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (O, I, J) of the tensor that is decomposed."""
        out, in1, in2 = self.factors
        return out.shape[0], in1.shape[0], in2.shape[0]

    def dense_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Slices (·, I, J) of the tensor that the factors stand for."""
        raise NotImplementedError

    def to_tensor(self) -> Tensor:
        """The tensor (O, I, J) that the factors stand for, in their dtype."""
        return self.dense_rows(slice(None), self.factors[0].dtype)

    def relative_error(self, weight: Tensor) -> float:
        """‖W − Ŵ‖ / ‖W‖ in the Frobenius norm, from the residual itself; 0 where both are 0."""
        if tuple(weight.shape) != self.shape:
            raise CompressionError(f"`weight` should have shape {self.shape}. Found {tuple(weight.shape)}.")
        with torch.no_grad():
            return relative_errors(weight, self.dense_rows)[0]


def peak(tensor: Tensor) -> float:
    """The largest magnitude, without a copy; NaN or infinity where the tensor has one."""
    least, most = torch.aminmax(tensor.detach())
    return max(-float(least), float(most)) if not bool(torch.isnan(most)) else math.nan


def relative_errors(
    weight: Tensor,  # (O, I, J)
    *reads: Reader,
    most: int | None = None,
) -> list[float]:
    """‖X − Y‖ / ‖W‖ (Frobenius) for each two of the weight W and its approximations, slab by slab.

    Of two approximations A and B, these are W − A, W − B and A − B. Sums are in float64, and so is all arithmetic for
    float64 weights, small ones, and errors below 1e-3. A slab has at most `most` elements, or an eighth of all, and
    of a large weight a sixteenth: few slabs, for each reads the whole core of a Tucker.
    """
    largest = peak(weight)
    scale = 1.0 if 1e-15 < largest < 1e15 else largest or 1.0  # the squares of others leave the range
    for dtype in (working_dtype(weight), torch.float64):
        residuals, total = [0.0] * (len(reads) * (len(reads) + 1) // 2), 0.0
        for rows in slabs(weight.shape, most=most or max(weight.numel() // 16, 2**20)):
            parts = [weight.detach()[rows].to(dtype), *(read(rows, dtype) for read in reads)]
            parts = parts if scale == 1.0 else [part / scale for part in parts]
            total += squared_norm(parts[0])
            for number, (one, other) in enumerate(combinations(parts, 2)):
                residuals[number] += squared_norm(one - other)
        errors = [relative(residual, total) for residual in residuals]
        if dtype == torch.float64 or min(errors) > _TELLING:
            break
    return errors


def working_dtype(weight: Tensor) -> torch.dtype:
    """float64 for float64 weights and small ones, else float32."""
    return torch.float64 if weight.dtype == torch.float64 or weight.numel() <= SMALL else torch.float32


def squared_norm(tensor: Tensor) -> float:
    """The sum of squares, in float64: by products of vectors that caches hold, seven times as fast as a norm."""
    parts = (part.double() for part in tensor.flatten().split(_WIDENED))
    return sum(float(torch.dot(part, part)) for part in parts)


def relative(residual: float, total: float) -> float:
    """sqrt(residual / total) of two sums of squares; 0 for 0/0, infinite where only `total` is 0."""
    if total == 0:
        return 0.0 if residual == 0 else math.inf
    return math.sqrt(residual / total)


@dataclass(frozen=True, eq=False)
class CPDecomposition(_Decomposition):
    """W_oij = Σ_r λ_r C_or A_ir B_jr (Carroll and Chang, 1970; Harshman, 1970).

    Attributes:
        weights: λ (R,); float32 or wider, for a half-precision weight's norm can leave the factors' range.
        factors: C (O, R), A (I, R), B (J, R), in the order of the weight's axes.
        error: relative Frobenius error against the weight that was decomposed, in float64; None where unknown.

    Raises: CompressionError where shapes, dtypes or devices disagree, or values are not finite.
    """

    weights: Tensor
    factors: Factors
    error: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(self.factors))
        _check_tensors({f"factors[{k}]": factor for k, factor in enumerate(self.factors)})
        _check_tensors({"weights": self.weights})
        if self.weights.dim() != 1:
            raise CompressionError(f"`weights` should have shape (R,). Found {tuple(self.weights.shape)}.")
        _check_factors(self.factors, [self.rank] * 3)

    @property
    def rank(self) -> int:
        """The number of components R."""
        return self.weights.shape[0]

    @property
    def amplification(self) -> float:
        """sqrt(Σ_r ‖λ_r c_r ⊗ a_r ⊗ b_r‖²) / ‖Ŵ‖: 1 for orthogonal components, large where they cancel."""
        weights = self.weights.double()
        weights = weights / (float(weights.abs().max()) or 1.0)
        inner = weights[:, None] * weights[None, :]  # of each two components, their inner product
        for factor in self.factors:
            inner = inner * (factor.double().T @ factor.double())
        return relative(float(inner.diagonal().sum()), max(0.0, float(inner.sum())))

    def dense_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        out, in1, in2 = (factor.to(dtype) for factor in self.factors)
        weighted = (out * self.weights.to(dtype))[rows]
        return torch.stack([(row * in1) @ in2.T for row in weighted])  # an output at a time: (O, I, R) would be large

    def to_tensorly(self) -> Any:
        """The same as a `tensorly.cp_tensor.CPTensor` of torch tensors."""
        from tensorly.cp_tensor import CPTensor

        return CPTensor((self.weights, list(self.factors)))

    @classmethod
    def from_tensorly(cls, cp_tensor: Any) -> Self:
        """From a TensorLy `CPTensor` (or a pair of weights and factors) of torch tensors or numpy arrays."""
        weights, factors = cp_tensor
        converted = _three(factors, "CP")
        ones = converted[0].new_ones(converted[0].shape[-1])
        return cls(ones if weights is None else _tensor(weights), converted)


@dataclass(frozen=True, eq=False)
class TuckerDecomposition(_Decomposition):
    """W_oij = Σ_abc G_abc U_oa A_ib B_jc (Tucker, 1966).

    Attributes:
        core: G (R_o, R_i, R_j).
        factors: U (O, R_o), A (I, R_i), B (J, R_j), in the order of the weight's axes.
        error: relative Frobenius error against the weight that was decomposed, in float64; None where unknown.

    Raises: CompressionError where shapes, dtypes or devices disagree, or values are not finite.
    """

    core: Tensor
    factors: Factors
    error: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(self.factors))
        _check_tensors({"core": self.core} | {f"factors[{k}]": factor for k, factor in enumerate(self.factors)})
        if self.core.dim() != 3:
            raise CompressionError(f"`core` should have shape (R_o, R_i, R_j). Found {tuple(self.core.shape)}.")
        _check_factors(self.factors, self.rank)

    @property
    def rank(self) -> tuple[int, int, int]:
        """(R_o, R_i, R_j)."""
        out, in1, in2 = self.core.shape
        return out, in1, in2

    def dense_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        out, in1, in2 = (factor.to(dtype) for factor in self.factors)
        return tucker_rows(lambda part: self.core[part].to(dtype), out[rows], in1, in2)

    def to_tensorly(self) -> Any:
        """The same as a `tensorly.tucker_tensor.TuckerTensor` of torch tensors."""
        from tensorly.tucker_tensor import TuckerTensor

        return TuckerTensor((self.core, list(self.factors)))

    @classmethod
    def from_tensorly(cls, tucker_tensor: Any) -> Self:
        """From a TensorLy `TuckerTensor` (or a pair of core and factors) of torch tensors or numpy arrays."""
        core, factors = tucker_tensor
        return cls(_tensor(core), _three(factors, "Tucker"))


def tucker_rows(
    core: Callable[[slice], Tensor],  # slices (·, R_i, R_j)
    out: Tensor | None,  # (N, R_o), or None where `core` gives the slices that are wanted
    in1: Tensor | None,  # (I, R_i)
    in2: Tensor | None,  # (J, R_j)
) -> Tensor:  # (N, I, J)
    """Slices of a Tucker multiplied out. Of a core that is large, an eighth is read at once."""
    if out is None:
        dense = core(slice(None))
    else:
        count, first = out.shape[1], core(slice(0, 1))
        dense = out.new_zeros(len(out), first.numel())
        for part in slabs((count, *first.shape[1:]), most=2**30):
            dense.addmm_(out[:, part], core(part).flatten(1))
        dense = dense.view(-1, *first.shape[1:])
    if in1 is not None:
        dense = torch.bmm(in1.expand(len(dense), -1, -1), dense)  # matmul would copy the tensor
    return dense if in2 is None else dense @ in2.T
