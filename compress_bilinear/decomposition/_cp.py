"""CP by alternating least squares: penalised, accelerated, from several starts.

Minimises ‖T − [[C, A, B]]‖² + μ Σ_r λ_r² with λ_r the norm of component r. The penalty keeps components from growing
and cancelling (degeneracy: de Silva and Lim, 2008; the ridge: Paatero, 1997), and μ is about the squared relative
error that 8-bit factors will have, so what it discourages is what rounding would destroy. Acceleration is Nesterov's
momentum with restarts (Mitchell, Ye, De Sterck, 2020). All sums are in float64.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import CPRank, MaxError, MaxSize, Quantize, check_quantize, check_rank
from ..errors import InfeasibleError
from ._rank import check_weight, cp_bytes
from ._tucker import leading, project, refine, truncated, unfold
from ._types import CPDecomposition

_STARTS = 3  # one from the HOSVD, the others random
_SCOUT_SWEEPS = 40  # for each start; the best one goes on
_MAX_SWEEPS = 200
_TOLERANCE = 1e-6  # stop where a sweep lowers the objective by less than this part of it
_PENALTY = (1e-1, 1e-4)  # from the first sweep to the end of the scouting
_AMPLIFICATION_LIMIT = 3.0
_ROUNDING = 0.01  # relative error of 8-bit factors, to be multiplied by the amplification
_KHATRI_RAO = 2**24  # elements of a partial product held at once: 128 MiB


def cp(
    weight: Tensor,  # (O, I, J)
    rank: CPRank,
    *,
    seed: int = 0,
    quantize: Quantize | None = None,
) -> CPDecomposition:
    """Decompose a three-way weight into a sum of R rank-one tensors.

    A weight with a mode of size 1 is a matrix and is solved exactly by its SVD.

    Args:
        weight: (O, I, J), any floating dtype, on any device.
        rank: R, which may exceed the modes' sizes; or `MaxError(e)`, the smallest rank found with relative error at
            most e, before the factors are rounded to the weight's dtype; or `MaxSize(f)`, the largest rank within f
            of the weight's bytes.
        seed: of the random starts. The same seed gives the same result.
        quantize: the format in which the caller will store the result; it only changes the bytes that are counted.

    Returns:
        A `CPDecomposition` in the weight's dtype and device: unit columns, components by descending weight. Its
        `error` is the true residual in float64 after that rounding. Warns where `amplification` is above 3 and 8-bit
        rounding, amplified so, would be more than a quarter of the error: then components cancel.

    Raises:
        CompressionError: the weight is not three-way, floating, finite and non-empty.
        ConfigError: the rank is not positive.
        InfeasibleError: no rank that stores fewer bytes than the weight meets the target.
    """
    check_weight(weight)
    check_quantize(quantize)
    wide = weight.detach().double()
    peak = float(wide.abs().max())
    norm = float((wide / peak).norm()) * peak if peak > 0 else 0.0
    unit = wide / norm if norm > 0 else wide
    itemsize = weight.element_size()
    match rank:
        case MaxError(error=limit):
            solved = _search(unit, limit, seed, lambda r: cp_bytes(r, weight.shape, itemsize, quantize), itemsize)
        case MaxSize(fraction=fraction):
            each = cp_bytes(1, weight.shape, itemsize, quantize)
            budget = fraction * weight.numel() * itemsize
            if each > budget:
                raise InfeasibleError(
                    f"Rank 1 stores {each} bytes. MaxSize({fraction:.4g}) of the weight's "
                    f"{weight.numel() * itemsize} bytes allows {int(budget)}."
                )
            solved = _solve(unit, int(budget // each), seed)
        case _:
            check_rank(rank)
            solved = _solve(unit, rank, seed)
    return _result(weight, solved, norm)


@dataclass
class _Iterate:
    """Factors (O, R), (I, R), (J, R) and the objective there; `residual` is its first term."""

    factors: list[Tensor]
    objective: float = math.inf
    residual: float = math.inf


def _result(weight: Tensor, factors: list[Tensor], norm: float) -> CPDecomposition:
    norms = torch.stack([factor.norm(dim=0) for factor in factors])
    weights = norms.prod(0)
    order = weights.argsort(descending=True, stable=True)
    columns = [(f / n.where(n > 0, torch.ones_like(n)))[:, order] for f, n in zip(factors, norms, strict=True)]
    out, in1, in2 = (column.to(weight.dtype) for column in columns)
    wide = torch.promote_types(weight.dtype, torch.float32)
    result = CPDecomposition((weights[order] * norm).to(wide), (out, in1, in2))
    error, amplification = result.relative_error(weight), result.amplification
    if amplification > _AMPLIFICATION_LIMIT and _ROUNDING * amplification > error / 4:
        warnings.warn(
            f"The CP components of rank {result.rank} cancel: amplification {amplification:.3g}, error {error:.3g}. "
            "Rounding the factors to 8 bits will be amplified as much; a lower rank may serve better.",
            stacklevel=3,
        )
    return CPDecomposition(result.weights, result.factors, error)


def _solve(unit: Tensor, rank: int, seed: int, sweeps: int = _MAX_SWEEPS, starts: int = _STARTS) -> list[Tensor]:
    """The factors for a tensor of norm 1 (or 0)."""
    if float(unit.abs().max()) == 0:
        return [unit.new_zeros(size, rank) for size in unit.shape]
    if 1 in unit.shape:
        return _matrix(unit, rank)
    size = [min(d, rank) for d in unit.shape]
    basis = refine(unit, truncated(unit, size)) if size != list(unit.shape) else None
    core = project(unit, basis) if basis is not None else unit
    generator = torch.Generator().manual_seed(seed)
    candidates = [_hosvd_start(core, rank, generator)]
    candidates += [_random_start(core, rank, generator) for _ in range(starts - 1)]
    scouts = [_descend(core, start, _penalties(min(sweeps, _SCOUT_SWEEPS))) for start in candidates]
    best = min(scouts, key=lambda iterate: iterate.objective)
    best = _descend(core, best.factors, [_PENALTY[1]] * sweeps)
    best = _release(core, best, sweeps)
    if basis is None:
        return best.factors
    # the subspace of the Tucker core is not quite CP's own, so a few sweeps see the whole tensor
    lifted = [u @ factor for u, factor in zip(basis, best.factors, strict=True)]
    return _release(unit, _descend(unit, lifted, [_PENALTY[1]] * 10), 20).factors


def _matrix(unit: Tensor, rank: int) -> list[Tensor]:
    """The best CP of a tensor with a mode of size 1: the truncated SVD (Eckart and Young, 1936)."""
    single = next(mode for mode in range(3) if unit.shape[mode] == 1)
    first, second = (mode for mode in range(3) if mode != single)
    left, values, right = torch.linalg.svd(unit.squeeze(single), full_matrices=False)
    kept = min(rank, values.shape[0])
    factors = [unit.new_zeros(size, rank) for size in unit.shape]  # rank above the matrix's: zero components
    factors[single][0, :kept] = 1.0
    factors[first][:, :kept] = left[:, :kept] * values[:kept].sqrt()
    factors[second][:, :kept] = right[:kept].T * values[:kept].sqrt()
    return factors


def _hosvd_start(core: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    """Leading singular vectors of each mode, filled up with random columns where the rank exceeds its size."""
    start = _random_start(core, rank, generator)
    for mode, factor in enumerate(start):
        kept = min(rank, core.shape[mode])
        factor[:, :kept] = leading(core, mode, kept)
    return start


def _random_start(core: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    # drawn on the CPU, so that a seed means the same on every device
    draws = [torch.randn(size, rank, generator=generator, dtype=core.dtype) for size in core.shape]
    return [(draw / draw.norm(dim=0)).to(core.device) for draw in draws]


def _penalties(sweeps: int) -> list[float]:
    """A geometric descent: strong while components find their places, weak at the end."""
    first, last = _PENALTY
    return [first * (last / first) ** (k / max(1, sweeps - 1)) for k in range(sweeps)]


def _release(tensor: Tensor, best: _Iterate, sweeps: int) -> _Iterate:
    """Lower the penalty while it is what holds the error up, as it does on weights that are exactly low rank."""
    penalty = _PENALTY[1]
    while best.residual < 10 * penalty and penalty > 1e-16:
        penalty /= 10
        lower = _descend(tensor, best.factors, [penalty] * sweeps)
        if not lower.residual < best.residual or _amplification(lower.factors) > _AMPLIFICATION_LIMIT:
            break
        best = lower
    return best


def _amplification(factors: list[Tensor]) -> float:
    sizes = torch.stack([factor.square().sum(0) for factor in factors]).prod(0)
    grams = torch.stack([factor.T @ factor for factor in factors]).prod(0)
    return math.sqrt(float(sizes.sum()) / max(float(grams.sum()), 1e-300))


def _descend(tensor: Tensor, factors: list[Tensor], penalties: list[float]) -> _Iterate:
    """Accelerated sweeps, one for each penalty; returns the best iterate under the last penalty."""
    best = _Iterate(_balanced(factors))
    previous = best.factors
    momentum = 0  # sweeps since the last restart
    settled = 0
    for k, penalty in enumerate(penalties):
        if k and penalty != penalties[k - 1]:
            best.objective = math.inf  # objectives under different penalties do not compare
        step = (momentum - 1) / (momentum + 2) if momentum > 1 else 0.0
        start = [b + step * (b - p) for b, p in zip(best.factors, previous, strict=True)]
        new = _sweep(tensor, start, penalty)
        if not new.objective < best.objective:  # also where it is NaN
            if step == 0.0:
                break  # a plain sweep cannot rise but by rounding: this is the minimum
            momentum = 0
            continue
        gain = best.objective - new.objective
        settled = settled + 1 if gain <= _TOLERANCE * new.objective else 0
        previous, best = best.factors, new
        momentum += 1
        if settled >= 3:
            break
    return best


def _balanced(factors: list[Tensor]) -> list[Tensor]:
    """The same components with equal norms in the three factors."""
    norms = torch.stack([factor.norm(dim=0) for factor in factors])
    target = norms.prod(0) ** (1 / 3)
    return [factor * (target / n.where(n > 0, torch.ones_like(n))) for factor, n in zip(factors, norms, strict=True)]


def _sweep(tensor: Tensor, factors: list[Tensor], penalty: float) -> _Iterate:
    """One exact penalised update of each factor in turn, and the objective after it."""
    out, in1, in2 = factors
    gram1, gram2 = in1.T @ in1, in2.T @ in2
    products = _Products(tensor, in2)
    out = _update(products.out(in1), gram1 * gram2, penalty)
    gram0 = out.T @ out
    in1 = _update(products.in1(out), gram0 * gram2, penalty)
    gram1 = in1.T @ in1
    normal = gram0 * gram1
    right = _mttkrp_in2(tensor, out, in1)
    in2 = _update(right, normal, penalty)
    # ‖T − Ŵ‖² = ‖T‖² − 2⟨T, Ŵ⟩ + ‖Ŵ‖², the last two from what the last update has at hand
    gram2 = in2.T @ in2
    model = normal * gram2
    residual = max(0.0, 1.0 - 2 * float((right * in2).sum()) + float(model.sum()))
    ridge = penalty * float(model.diagonal().sum())
    return _Iterate(_balanced([out, in1, in2]), residual + ridge, residual)


def _update(right: Tensor, normal: Tensor, penalty: float) -> Tensor:
    """The factor F that solves F (V + μ diag V) = M; the least-norm one where that is singular."""
    diagonal = normal.diagonal()
    # a component that has died has a zero row and column: 1 on its diagonal leaves it at zero
    floor = torch.where(diagonal > 0, diagonal * (penalty + 1e-15), torch.ones_like(diagonal))
    system = normal + torch.diag(floor)
    # with a unit diagonal the solve does not see the components' scales
    scale = system.diagonal().rsqrt()
    scaled = system * scale[:, None] * scale[None, :]
    triangle, failed = torch.linalg.cholesky_ex(scaled)
    if int(failed):
        values, vectors = torch.linalg.eigh(scaled)
        inverse = torch.where(values > 1e-14 * values[-1], 1 / values, torch.zeros_like(values))
        return ((right * scale) @ vectors * inverse) @ vectors.T * scale
    return torch.cholesky_solve((right * scale).T, triangle).T * scale


class _Products:
    """T ×_in2 B, shared by the updates of `out` and `in1`; in chunks over the rank where it is large."""

    def __init__(self, tensor: Tensor, in2: Tensor) -> None:
        rank = in2.shape[1]
        width = max(1, _KHATRI_RAO // max(1, tensor.shape[0] * tensor.shape[1]))
        self._columns = [slice(k, min(k + width, rank)) for k in range(0, rank, width)]
        self._make: Callable[[slice], Tensor] = lambda columns: tensor @ in2[:, columns]
        self._whole = self._make(self._columns[0]) if len(self._columns) == 1 else None

    def _parts(self) -> list[tuple[slice, Callable[[], Tensor]]]:
        if self._whole is not None:
            product = self._whole
            return [(self._columns[0], lambda: product)]
        return [(columns, lambda columns=columns: self._make(columns)) for columns in self._columns]  # type: ignore[misc]

    def out(self, in1: Tensor) -> Tensor:
        """Σ_ij T_oij A_ir B_jr: (O, R)."""
        return torch.cat([torch.einsum("oir,ir->or", z(), in1[:, c]) for c, z in self._parts()], dim=1)

    def in1(self, out: Tensor) -> Tensor:
        """Σ_oj T_oij C_or B_jr: (I, R)."""
        return torch.cat([torch.einsum("oir,or->ir", z(), out[:, c]) for c, z in self._parts()], dim=1)


def _mttkrp_in2(tensor: Tensor, out: Tensor, in1: Tensor) -> Tensor:
    """Σ_oi T_oij C_or A_ir: (J, R)."""
    rank = out.shape[1]
    width = max(1, _KHATRI_RAO // max(1, tensor.shape[1] * tensor.shape[2]))
    flat = tensor.flatten(1)
    parts = []
    for k in range(0, rank, width):
        columns = slice(k, min(k + width, rank))
        partial = (out[:, columns].T @ flat).unflatten(1, tensor.shape[1:])  # (R, I, J)
        parts.append(torch.einsum("rij,ir->jr", partial, in1[:, columns]))
    return torch.cat(parts, dim=1)


def _search(unit: Tensor, limit: float, seed: int, size: Callable[[int], int], itemsize: int) -> list[Tensor]:
    """The smallest rank found whose relative error is at most `limit`: doubling, then bisection to within 3%."""
    original = unit.numel() * itemsize
    most = max(1, (original - 1) // size(1))  # the largest rank that is smaller than the weight
    if float(unit.abs().max()) == 0:
        return _solve(unit, 1, seed)

    def attempt(rank: int, sweeps: int, starts: int) -> tuple[float, list[Tensor]]:
        factors = _solve(unit, rank, seed, sweeps, starts)
        model = CPDecomposition(unit.new_ones(rank), (factors[0], factors[1], factors[2]))
        return model.relative_error(unit), factors

    low, high = _rank_floor(unit, limit), 0
    if low > most:
        raise InfeasibleError(
            f"A relative error of {limit:g} needs a CP rank of at least {low} (the rank of an unfolding to that "
            f"error): {size(low)} bytes, where the weight has {original}."
        )
    low -= 1  # known to fail
    rank, found, error = low + 1, None, math.inf
    while found is None:
        error, factors = attempt(rank, 60, 1)
        if error <= limit:
            high, found = rank, factors
        elif rank >= most:
            error, factors = attempt(rank, _MAX_SWEEPS, _STARTS)
            if error > limit:
                raise InfeasibleError(
                    f"A relative error of {limit:g} needs a CP rank above {most}, the largest that is smaller than "
                    f"the weight's {original} bytes; the error there is {error:.4g}."
                )
            high, found = rank, factors
        else:
            low, rank = rank, min(2 * rank, most)
    while high - low > max(1, high // 32):
        rank = (low + high) // 2
        error, factors = attempt(rank, _MAX_SWEEPS, 1)
        if error <= limit:
            high, found = rank, factors
        else:
            low = rank
    return found


def _rank_floor(unit: Tensor, limit: float) -> int:
    """The largest over the modes of the matrix rank that the unfolding needs for the error: CP needs it too."""
    floor = 1
    for mode in range(3):
        flat = unfold(unit, mode)
        energy = torch.linalg.eigvalsh(flat @ flat.T).flip(0).clamp_min(0)
        tail = 1 - energy.cumsum(0) / energy.sum()
        enough = (tail <= limit**2 + 1e-12).nonzero()
        floor = max(floor, int(enough[0]) + 1 if len(enough) else len(energy))
    return floor
