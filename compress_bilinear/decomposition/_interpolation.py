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
    """Whether a factor (d, r) is stored as coefficients beside an identity; ranks may be tensors."""
    return 2 * rank > size


def interpolation(
    factor: Tensor,  # (d, r), d ≥ r
) -> tuple[Tensor, Tensor, Tensor]:
    """Order (d,), coefficients F (d − r, r) and T (r, r) with factor[order] = [I; F] T; float64 but for the order.

    No coefficient exceeds 1.1 in magnitude, or hardly, so that T is about as well conditioned as the factor.
    """
    wide = factor.detach().double()
    size, rank = wide.shape
    permutation, lower, _ = torch.linalg.lu(wide)
    order = permutation.argmax(0)
    # pivoting gives a first choice of rows, whatever the factor's rank is: U = P L R = P [I; L₂ L₁⁻¹] L₁ R
    columns = torch.linalg.solve_triangular(lower[:rank], lower, upper=False, left=False, unitriangular=True)
    for _ in range(2 * size if size > rank else 0):
        flat = int(columns[rank:].abs().argmax())
        row, column = rank + flat // rank, flat % rank
        if not abs(float(columns[row, column])) > _LARGEST:
            break
        # the row takes the place of the one that is this column's unit vector
        new = columns[row].clone()
        old = columns[:, column].clone()
        new[column] -= 1
        columns -= torch.outer(old, new / old[row])
        columns[[row, column]] = columns[[column, row]]
        order[[row, column]] = order[[column, row]]
    kept, by_kept = order[:rank].sort()
    others, by_others = order[rank:].sort()
    return torch.cat([kept, others]), columns[rank:][by_others][:, by_kept], wide[kept]
