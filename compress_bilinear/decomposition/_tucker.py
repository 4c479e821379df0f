"""Tucker: HOSVD for the start and for the choice of ranks, HOOI to refine.

Sources: De Lathauwer, De Moor, Vandewalle, "A multilinear singular value decomposition" and "On the best rank-1 and
rank-(R1, ..., RN) approximation" (SIAM J. Matrix Anal. Appl., 2000); Vannieuwenhoven, Vandebril, Meerbergen, "A new
truncation strategy for the higher-order singular value decomposition" (SIAM J. Sci. Comput., 2012).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import prod
from typing import cast

import torch
from torch import Tensor

from ..config import MaxError, MaxSize, Quantize, TuckerRank, check_quantize
from ..errors import InfeasibleError
from ._budget import Budget, Progress
from ._factors import SMALL, Factors, TuckerDecomposition, relative, squared_norm
from ._hosvd import ordered_, start
from ._search import tightened
from ._sizes import check_tucker_rank, check_weight, tucker_bytes
from ._source import Basis, Source, full_precision, gram, mode_product
from ._tucker_ranks import BlockEnergies, Triple

_MAX_SWEEPS = 30
_TOLERANCE = 1e-3  # HOOI stops where a sweep lowers the error by less than this part of it
_GRAM_LIMIT = 1e-11  # squared relative error near which singular values are lost in a Gram's rounding
_NARROW_LIMIT = 1e-4  # the same for float32, with room
_ITERATED = 1024  # size of a mode from which on eigenvectors cost more than an orthogonal iteration
_SMALLER = 4  # times fewer elements than the weight make the block worth it that HOOI begins in
_TELLING = 1e-3  # the same above which the energy that is kept, in float32, tells it to three digits


def tucker(
    weight: Tensor,  # (O, I, J)
    rank: TuckerRank,
    *,
    quantize: Quantize | None = None,
    ordered: bool = False,
    max_seconds: float | None = None,
    progress: Progress | None = None,
) -> TuckerDecomposition:
    """Decompose a three-way weight into a core and three factors with orthonormal columns.

    A mode whose rank is its size has the identity for its factor: it is absorbed into the core, which is smaller and
    loses nothing. So a target may give Tucker-2 or tensor-train shapes, wherever these are the cheapest. Costs are
    those of `TuckerBilinear`, which stores a factor (d, r) with r > 3 d / 4 as r (d − r) numbers: see `interpolation`.

    Args:
        weight: (O, I, J), any floating dtype, on any device.
        rank: the triple (R_o, R_i, R_j); or `MaxError(e)`, the fewest bytes with a relative error of at most e, after
            the factors are rounded to the weight's dtype; or `MaxSize(f)`, the lowest error within f of the weight's
            bytes.
        quantize: the format in which the caller will store the result; it only changes the bytes that are counted.
        ordered: the weight is in the coordinates of its HOSVD, as `decomposition.ordered` gives it: none is computed,
            and ranks are those of a leading block, which is not refined.
        max_seconds: time to refine in; the start, an HOSVD, is always completed. None refines to convergence.
        progress: called with the part done and the relative error so far.

    Returns:
        A `TuckerDecomposition` in the weight's dtype and device; its `error` is the true residual in float64 after
        that rounding; for a `MaxSize` or ranks, of a large weight, it may be told by the energy that is kept, to three
        digits. Besides the weight, the solver holds at most three times its bytes; more for weights of under
        2¹⁶ elements, which it works on in float64.

    Raises:
        CompressionError: the weight is not three-way, floating, finite and non-empty.
        ConfigError: a rank is not within 1..size of its mode, or an option is not one of those above.
        InfeasibleError: not even the smallest ranks are within a `MaxSize`.
    """
    check_weight(weight)
    check_quantize(quantize)
    budget = Budget(max_seconds, progress)
    with full_precision(weight.device):
        if isinstance(rank, (MaxError, MaxSize)):
            return _to_target(weight, rank, quantize, ordered, budget)
        check_tucker_rank(rank, weight.shape)
        source = Source(weight)
        solver = _InOrder(weight, source, []) if ordered and source.total else _Solver(weight, source)
        return solver.at(rank, budget)


def _to_target(
    weight: Tensor, wanted: MaxError | MaxSize, quantize: Quantize | None, ordered: bool, budget: Budget
) -> TuckerDecomposition:
    """The best ranks by the energies of the HOSVD. (Lower ones that HOOI brings within an error save 6% at most.)"""
    prices = partial(tucker_bytes, shape=weight.shape, itemsize=weight.element_size(), quantize=quantize)
    original = weight.numel() * weight.element_size()
    least = min(product(*({1, size} for size in weight.shape)), key=prices)  # a full rank may be the cheapest
    if isinstance(wanted, MaxSize) and prices(least) > wanted.fraction * original:
        raise InfeasibleError(
            f"Rank {least} stores {prices(least)} bytes. MaxSize({wanted.fraction:.4g}) of the weight's {original} "
            f"bytes allows {int(wanted.fraction * original)}."
        )
    source = Source(weight)
    if source.total == 0:
        return _Solver(weight, source).at((1, 1, 1), budget)
    solver = _InOrder(weight, source, [] if ordered else None)
    energies = BlockEnergies(solver.source.weight)

    def chosen(size: float | None = None, error: float = 1.0) -> Triple:
        found = energies.best(prices, size, error)
        assert found is not None  # the whole has no error, and some ranks are known to meet the size
        return found[0]

    if isinstance(wanted, MaxSize):
        return solver.at(chosen(wanted.fraction * original), budget)

    def within(error: float) -> tuple[TuckerDecomposition, float]:
        found = solver.at(chosen(error=error), budget, exact=True)
        return found, found.error or 0.0

    best, error = tightened(within, wanted.error)  # the factors are rounded to the weight's dtype
    if error > wanted.error:
        return solver.at(cast(Triple, tuple(weight.shape)), budget)  # the weight itself, for which nothing is rounded
    return best


class _Solver:
    """HOOI for one weight, at any ranks."""

    def __init__(self, weight: Tensor, source: Source) -> None:
        """`source` reads the weight."""
        self.weight, self.source, self._scale = weight, source, source.scale
        self._telling = _TELLING

    def at(self, rank: Triple, budget: Budget, exact: bool = False) -> TuckerDecomposition:
        """HOOI within a block that holds most of what matters, then over the whole.

        `exact` takes the error from the residual, a pass in float64, also where the energy tells three digits of it.
        """
        whole = self.source
        wide = [min(size, r + max(2, r // 3)) for size, r in zip(whole.shape, rank, strict=True)]
        if prod(wide) * _SMALLER > prod(whole.shape):
            wide = list(rank)
        basis, block = self._start(wide)
        if wide != list(rank):
            inner = Source(block, whole.dtype)
            outside = whole.total * inner.scale**2 - inner.total
            found = refine(inner, _units(inner, rank), budget.child(span=(0.1, 0.4)), max(outside, 0.0))[0]
            pairs = zip(basis, found, strict=True)
            basis = [u if v is None else v if u is None else u @ v for u, v in pairs]
            del inner
        del block
        return self._result(*refine(whole, basis, budget.child(span=(0.4, 1.0))), exact)

    def _start(self, sizes: Sequence[int]) -> tuple[Basis, Tensor]:
        """Bases with this many columns, None for full modes, and the core: nearly those of the HOSVD."""
        return start(self.source, sizes)

    def _lifted(self, basis: Basis, core: Tensor) -> tuple[Basis, Tensor]:
        """Bases and a core in the weight's own coordinates."""
        return basis, core

    def _result(self, basis: Basis, core: Tensor, exact: bool) -> TuckerDecomposition:
        weight, total = self.weight.detach(), self.source.total
        lost = total - squared_norm(core)
        basis, core = self._lifted(basis, core)
        core = core if self._scale == 1.0 else core.double() / self._scale
        if all(u is None for u in basis):
            core = weight.clone()
        factors = [
            torch.eye(size, dtype=weight.dtype, device=weight.device) if u is None else u.to(weight.dtype)
            for size, u in zip(weight.shape, basis, strict=True)
        ]
        result = TuckerDecomposition(core.to(weight.dtype), cast(Factors, tuple(factors)))
        exact |= weight.numel() <= SMALL or weight.dtype != self.source.dtype or lost < self._telling * total
        return replace(result, error=result.relative_error(weight) if exact else relative(lost, total))


class _InOrder(_Solver):
    """The same for a weight in the coordinates of its HOSVD: leading blocks need no other bases."""

    def __init__(self, weight: Tensor, source: Source, turns: list[Tensor] | None) -> None:
        """`turns`: empty for a weight that is in these coordinates already."""
        tensor = source.permuted((0, 1, 2))[0]
        if turns is None:
            tensor = tensor.clone() if tensor.data_ptr() == weight.data_ptr() else tensor
            turns = ordered_(tensor)
        super().__init__(weight, Source(tensor, source.dtype))
        self._turns, self._scale = turns, self._scale * source.scale
        self._telling = _TELLING if turns else _GRAM_LIMIT  # a block is of the weight's own entries, and sums are exact

    def at(self, rank: Triple, budget: Budget, exact: bool = False) -> TuckerDecomposition:
        """Where the caller has the coordinates, the leading block itself: HOOI lowers its error by less than 1%."""
        return super().at(rank, budget, exact) if self._turns else self._result(*self._start(rank), exact)

    def _start(self, sizes: Sequence[int]) -> tuple[Basis, Tensor]:
        out, in1, in2 = sizes
        block = self.source.weight[:out, :in1, :in2]
        return _units(self.source, sizes), block if self.source.scale == 1.0 else block * self.source.scale

    def _lifted(self, basis: Basis, core: Tensor) -> tuple[Basis, Tensor]:
        lifted = list(basis)
        for mode, turn in enumerate(self._turns):
            u = lifted[mode]
            if u is None:
                core = mode_product(core, turn.T.to(core.dtype), mode)
            else:
                lifted[mode] = turn @ u.double()
        return lifted, core


def _units(source: Source, sizes: Sequence[int]) -> list[Tensor | None]:
    """The leading unit vectors of each mode; None where they are all."""
    dtype, device = source.dtype, source.weight.device
    pairs = zip(source.shape, sizes, strict=True)
    return [None if k == d else torch.eye(d, k, dtype=dtype, device=device) for d, k in pairs]


def refine(source: Source, basis: Basis, budget: Budget, outside: float = 0.0) -> tuple[list[Tensor | None], Tensor]:
    """Higher-order orthogonal iteration: each factor is the best for the other two, until the error settles.

    Args:
        outside: squared norm that is lost besides, in the source's scale.

    Returns:
        The bases, and the core for them.
    """
    basis, total = list(basis), source.total + outside
    modes = [mode for mode in range(3) if basis[mode] is not None]
    core: Tensor | None = None
    energy, exact, narrow = 0.0, False, source.dtype != torch.float64
    # the product with the last mode serves the first two, unless it is nearly as large as the weight
    shared = {0, 1, 2} == set(modes) and 2 * basis[2].shape[1] <= basis[2].shape[0]  # type: ignore[union-attr]
    pace = 0.0  # seconds of a sweep
    for k in range(_MAX_SWEEPS if modes else 0):
        if budget.left() <= pace:
            break
        before, pace, core = energy, budget.elapsed(), None
        partial = source.project((None, None, basis[2])) if shared else None
        for mode in modes:
            core = None  # before the next is made
            if partial is None or mode == 2:
                part = source.project(basis, skip=mode)
            else:
                part = mode_product(partial, basis[1 - mode], 1 - mode)
            if mode == 1:
                partial = None
            precision = source.dtype if narrow else torch.float64
            basis[mode], energy = _dominant(part, mode, basis[mode], exact, precision)  # type: ignore[arg-type]
            core = mode_product(part, basis[mode], mode) if mode == modes[-1] else None
            del part
        lost, pace = max(total - energy, 0.0), budget.elapsed() - pace
        used, narrow = narrow, narrow and lost > _NARROW_LIMIT * total
        budget.report(k / _MAX_SWEEPS, relative(lost, total))
        # with one mode there is nothing to alternate with
        settled = len(modes) == 1 or (k and energy - before <= 2 * _TOLERANCE * lost)
        if settled and (narrow or not used):
            if exact or lost > _GRAM_LIMIT * total or source.dtype != torch.float64:
                break
            exact = True  # and go on, for what Grams cannot see
    return basis, source.project(basis) if core is None else core


def _dominant(tensor: Tensor, mode: int, current: Tensor, exact: bool, precision: torch.dtype) -> tuple[Tensor, float]:
    """The dominant left singular vectors of an unfolding, as many as there are now, and their energy.

    Where they are few among many, by one step of orthogonal iteration from the present ones: near convergence it is
    as good, and costs a fraction of the eigenvectors. `exact` takes no Gram, which would square small singular values;
    else `precision` is that of the Gram.
    """
    size, kept = current.shape
    if exact:
        flat = tensor.movedim(mode, 0).flatten(1)
        left, singular, _ = torch.linalg.svd(flat, full_matrices=False)
        if left.shape[1] < kept:  # of fewer columns than asked for, completed to an orthonormal basis
            left = torch.linalg.qr(torch.cat([left, current], dim=1))[0]
        return left[:, :kept].contiguous(), float(singular[:kept].square().sum())
    if size >= _ITERATED and 3 * kept <= size:
        flat = tensor.movedim(mode, 0).flatten(1)
        basis = torch.linalg.qr(flat @ (flat.T @ current))[0]
        return basis, float((basis.T @ flat).double().square().sum())
    values, vectors = torch.linalg.eigh(gram(tensor, mode, precision).double())  # float32 would not be orthogonal
    return vectors[:, -kept:].flip(1).to(tensor.dtype), float(values[-kept:].sum())
