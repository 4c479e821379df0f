"""What layers store of a factor, a core or a weight, rounded so that the errors of its entries cancel.

Entries are rounded one after another, and those that follow are changed so that they take back the error, as far as
they can. Sources: GPTQ (Frantar, Ashkboos, Hoefler, Alistarh, 2023), in the form of LDLQ (Chee, Cai, Kuleshov, De Sa,
"QuIP", 2023), which needs no inverse; the nearest plane algorithm (Babai, 1986).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import Quantize
from ..quantization import FORMATS, LEVELS, UNIT, Format
from ._budget import Budget
from ._factors import slabs, working_dtype
from ._metric import Metric
from ._source import full_precision

_TILE = 32  # entries along each axis that are rounded diagonal by diagonal; a product takes their errors to the rest
_TOGETHER = 2**25  # entries of the outputs that are rounded together
_DAMPING = 1e-3  # of the system's mean diagonal: steps along directions of little weight stay small
_INPUT_DAMPING = 1e-2  # the same of inputs' moments, whose small directions may be larger in other data
_GAIN = 0.97  # of the error of the nearest values, above which errors are not fed back


def unit_columns(
    factor: Tensor,  # (d, R)
) -> tuple[Tensor, Tensor]:
    """Columns whose largest magnitude is 127/128, what int8 without a scale holds, and their scales (R,); float64."""
    wide = factor.detach().double()
    scale = wide.abs().amax(0) / UNIT / LEVELS
    return wide / scale.where(scale > 0, 1.0), scale


def stored_columns(
    factor: Tensor,  # (d, R)
    mode: int,
    quantize: Quantize,
    gram: Tensor | None = None,  # (R, R)
) -> tuple[Tensor, Tensor]:
    """A factor's columns as a layer stores them, (d, R) float64, and their scales (R,).

    Each entry is rounded to the nearest value. With a `gram` of what the columns multiply, columns are rounded one
    after another, so that the rounding E of the factor is small in Σ_d E_d gram E_dᵀ. This helps most where components
    cancel.
    """
    unit, scale = unit_columns(factor)
    form = FORMATS[quantize]
    stored = form.encode(unit if mode == 0 else unit.T, "factor")
    plain, peaks = stored.decode(torch.float64), form.peaks(stored, slice(None))
    if mode != 0:
        plain, peaks = plain.T, None if peaks is None else peaks.T
    if gram is None or peaks is None:
        return plain, scale
    wanted, result, highest = (part.T.unsqueeze(1) for part in (unit, plain.clone(), peaks))  # (R, 1, d)
    taken, _ = _feedback(gram * scale * scale[:, None], _DAMPING)
    _feed_back_(result, wanted, highest, taken, taken.new_zeros(1, 1), form)
    return result.squeeze(1).T, scale


def stored_weight(
    weight: Tensor,  # (O, I, J)
    quantize: Quantize,
    metric: Metric,
    budget: Budget | None = None,
    most: int = _TOGETHER,
    overwrite: bool = False,
) -> Tensor | None:  # (O, I, J)
    """A weight as a dense layer stores it, rounded so that its outputs change little; in float32 or its wider dtype.

    The entries of each output are rounded one after another in the metric of its inputs, whose Kronecker product is
    never formed; at most `most` entries are worked on together, or one output. Outputs for which the budget leaves no
    time are rounded to the nearest values. None where that is what the moments advise for all, as for independent
    inputs. `overwrite` lets the result take the memory of a weight in float32 or wider.
    """
    form, dtype = FORMATS[quantize], working_dtype(weight)
    (from1, left1), (from2, left2) = (
        (weight.new_zeros(size, size), 1.0) if root is None else _feedback(root.T @ root, _INPUT_DAMPING, last)
        for size, root, last in zip(weight.shape[1:], metric.roots[1:], (False, True), strict=True)
    )
    if left1 * left2 > _GAIN or not form.coarse:
        return None
    from1, from2 = (taken.to(weight.device, dtype) for taken in (from1, from2))
    stored, budget = form.encode(weight, "weight"), budget or Budget()
    weight = weight.detach()
    result = weight if overwrite else torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    over = False
    for rows in slabs(weight.shape, most=most, least=most // 4):
        nearest = stored.decode(result.dtype, rows)
        peaks = form.peaks(stored, rows, dtype)
        if peaks is not None and not over:
            span = budget.child(span=(rows.start / len(weight), rows.stop / len(weight)))
            found, wanted, highest = (part.permute(1, 2, 0) for part in (nearest, weight[rows], peaks))
            with full_precision(weight.device):
                over = not _feed_back_(found, wanted, highest, from1, from2, form, span)
            if over:
                nearest = stored.decode(result.dtype, rows)  # errors half taken back are worse than none
        result[rows] = nearest
    return result


def _feedback(system: Tensor, damping: float, from_last: bool = False) -> tuple[Tensor, float]:
    """What each entry should take back of the errors of those before it (d, d), and the part of the error that is left.

    For a damped system U D Uᵀ with a unit triangular U, upper where the first entry is rounded first, it is Uᵀ - 1.
    Where there is no such factorization, nothing is taken back. The second is a ratio to the error of the nearest
    values, for errors that are independent.
    """
    system = system.clone()
    system.diagonal().add_(damping * float(system.diagonal().mean()) + 1e-300)
    turned = () if from_last else (0, 1)
    root, failed = torch.linalg.cholesky_ex(system.flip(turned))
    root = root.flip(turned)
    if int(failed) or not bool(torch.isfinite(root).all()):
        return torch.zeros_like(system), 1.0
    left = math.sqrt(float(root.diagonal().square().sum() / system.trace()))
    return (root / root.diagonal()).T.contiguous().fill_diagonal_(0), left


def _feed_back_(
    result: Tensor,  # (I, J, ·) the nearest values; those found take their place
    wanted: Tensor,  # (I, J, ·)
    peaks: Tensor,  # (I, J, ·) of the format
    from1: Tensor,  # (I, I), what an entry takes back of those before it, in the dtype to work in
    from2: Tensor,  # (J, J), the same, of those after it
    form: Format,
    budget: Budget | None = None,
) -> bool:
    """Round entry after entry in the metric of a Kronecker product, all of the last axis at once.

    With E = wanted - result, the entry (i, j) becomes what is nearest to wanted + Σ (1 + F1)_ik (1 + F2)_jl E_kl, the
    sum over all k <= i and l >= j but itself. Tile by tile: products take back the errors from before a tile. False
    where the budget ran out.
    """
    passed = from1.new_zeros(wanted.shape)  # E + F2 E
    for rows in _tiles(len(wanted)):
        if budget is not None and budget.left() <= 0:
            return False
        if budget is not None:
            budget.report(rows.start / len(wanted), 1.0)
        exact, high, found = (part[rows].to(from1.dtype).contiguous() for part in (wanted, peaks, result))
        above = (from1[rows, : rows.start] @ passed[: rows.start].flatten(1)).view_as(exact)
        errors = torch.zeros_like(exact)
        fixed = found.abs() >= high  # the largest entry of each block: its scale is derived from it
        for columns in reversed(_tiles(wanted.shape[1])):
            beside = torch.matmul(from2[columns, columns.stop :], errors[:, columns.stop :])
            tiles = [part[:, columns] for part in (exact, high, fixed, found, errors, passed[rows], above)]
            _round_tile_([*tiles, beside], from1[rows, rows], from2[columns, columns], form)
        result[rows] = found
    return True


def _tiles(size: int) -> list[slice]:
    return [slice(start, min(start + _TILE, size)) for start in range(0, size, _TILE)]


def _round_tile_(tiles: Sequence[Tensor], from1: Tensor, from2: Tensor, form: Format) -> None:
    """Round the entries of a tile diagonal by diagonal: those of one do not depend on each other.

    Args:
        tiles: (I, J, ·) each, in the words of `_feed_back_`: what is wanted, its peaks, whether it stays as it was
            encoded, the nearest values, E and E + F2 E, which all three are written to, and from before the tile
            F1 (E + F2 E) and F2 E.
        from1, from2: (I, I) and (J, J).
    """
    height, width = tiles[0].shape[:2]
    passed, errors = tiles[5].transpose(0, 1), tiles[4]
    for k in range(width - 1, -height, -1):
        i, j = slice(max(0, -k), min(height, width - k)), slice(max(0, k), min(width, height + k))
        wanted, peaks, stays, nearest, error, sent, up, side = (part.diagonal(k).T.unsqueeze(1) for part in tiles)
        side = torch.baddbmm(side, from2[j].unsqueeze(1), errors[i])
        value = torch.baddbmm(up, from1[i].unsqueeze(1), passed[j]).add_(side).add_(wanted)
        torch.where(stays, nearest, form.nearest(value, peaks), out=nearest)
        torch.sub(wanted, nearest, out=error)
        torch.add(error, side, out=sent)
