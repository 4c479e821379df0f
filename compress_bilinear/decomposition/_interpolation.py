"""Factors that hold an identity, which need not be stored: the interpolative form of a Tucker factor.

A factor U (d, r) is C T, with r of C's rows those of the identity and T (r, r) for the core to absorb. That leaves
r (d − r) numbers instead of r d, and as many multiplications: worth it where the rank is near the size.

Sources: the interpolative decomposition of Cheng, Gimbutas, Martinsson, Rokhlin, "On the compression of low rank
matrices" (SIAM J. Sci. Comput., 2005); the choice of the rows by volume of Goreinov, Oseledets, Savostyanov,
Tyrtyshnikov, Zamarashkin, "How to find a good submatrix" (2010).
"""

from typing import Any

import torch
from torch import Tensor

_LARGEST = 1.1  # magnitude of a coefficient above which a row is exchanged


def is_interpolated(rank: Any, size: Any) -> Any:
    """Whether a factor (d, r) is stored as an identity and coefficients; ranks may be tensors.

    Below three quarters of the size it saves less, and an ordinary linear layer is faster than what picks columns.
    """
    return 4 * rank > 3 * size


def interpolation(
    factor: Tensor,  # (d, r), d ≥ r
) -> tuple[Tensor, Tensor, Tensor]:
    """Order (d,), coefficients F (d − r, r) and T (r, r) with factor[order] = [I; F] T; float64 but for the order.

    Coefficients have magnitudes up to about 1.1, so that T is about as well conditioned as the factor.
    """
    size, rank = factor.shape
    wide = factor.detach().double().cpu()  # small, and worked on entry by entry
    units = (wide == 1) & (wide.count_nonzero(1) == 1)[:, None]
    if size == rank:
        order, coefficients = torch.arange(size, device="cpu"), wide[:0]
    elif bool(units.any(0).all()):  # it is in this form already
        kept = units.int().argmax(0)
        others = torch.ones(size, dtype=torch.bool, device="cpu").index_fill_(0, kept, False).nonzero().squeeze(1)
        order, coefficients = torch.cat([kept, others]), wide[others]
    else:
        order, coefficients = _chosen_rows(wide)
    kept, by_kept = order[:rank].sort()
    others, by_others = order[rank:].sort()
    parts = (torch.cat([kept, others]), coefficients[by_others][:, by_kept], wide[kept])
    return tuple(part.to(factor.device) for part in parts)  # type: ignore[return-value]


def _chosen_rows(wide: Tensor) -> tuple[Tensor, Tensor]:
    """An order of the rows (d,), the kept first, and the coefficients (d − r, r) of the others."""
    size, rank = wide.shape
    permutation, lower, _ = torch.linalg.lu(wide)
    order = permutation.argmax(0)
    # pivoting gives a first choice of rows, whatever the factor's rank is: U = P L R = P [I; L₂ L₁⁻¹] L₁ R
    first = torch.linalg.solve_triangular(lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True)
    coefficients = first.contiguous()
    for _ in range(2 * size):
        flat = int(coefficients.abs().argmax())
        row, column = divmod(flat, rank)
        pivot = float(coefficients[row, column])
        if not abs(pivot) > _LARGEST:
            break
        # this row takes the place of the one that is the column's unit vector
        new = coefficients[row] / pivot
        new[column] -= 1 / pivot
        coefficients -= torch.outer(coefficients[:, column].clone(), new)
        coefficients[row] = -new
        coefficients[row, column] += 1
        order[[row + rank, column]] = order[[column, row + rank]]
    return order, coefficients
