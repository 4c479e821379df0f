"""Where CP's descent begins."""

import torch
from torch import Tensor


def random_start(core: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    """Unit Gaussian columns, drawn on the CPU, so that a seed means the same on every device."""
    draws = [torch.randn(size, rank, generator=generator, dtype=torch.float64, device="cpu") for size in core.shape]
    return [(draw / draw.norm(dim=0)).to(core) for draw in draws]


def hosvd_start(core: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    """Leading singular vectors of each mode, filled up with random columns where the rank exceeds its size.

    The core is in HOSVD coordinates, so its singular vectors are the unit vectors.
    """
    start = random_start(core, rank, generator)
    for factor in start:
        kept = min(factor.shape)
        factor[:, :kept] = torch.eye(factor.shape[0], kept, dtype=core.dtype, device=core.device)
    return start


def pencil_start(core: Tensor, rank: int, generator: torch.Generator) -> list[Tensor] | None:
    """The components of a tensor of exactly this rank, from the eigenvectors of a matrix pencil.

    Needs two modes that are no smaller than the rank (Leurgans, Ross, Abel, 1993; Sanchez and Kowalski, 1990); None
    where there are none, or where the pencil is singular.
    """
    modes = sorted(range(3), key=lambda m: core.shape[m])
    small, first, second = modes
    if min(core.shape[first], core.shape[second]) < rank or core.shape[small] < 2:
        return None
    cube = core.double().permute(small, first, second)[:, :rank, :rank].cpu()
    mixes = torch.randn(2, core.shape[small], generator=generator, dtype=torch.float64, device="cpu")
    one, two = torch.einsum("ms,sij->mij", mixes, cube)
    solved, failed = torch.linalg.solve_ex(two.T, one.T)  # (one two⁻¹)ᵀ
    if int(failed) or not bool(torch.isfinite(solved).all()):
        return None
    values, vectors = torch.linalg.eig(solved.T)
    # of a complex pair, which a tensor of this real rank would not have, the parts span the same plane
    basis = torch.where(values.imag < 0, vectors.imag, vectors.real)
    left = basis / basis.norm(dim=0).clamp_min(1e-300)
    slices = torch.linalg.lstsq(left, cube.movedim(1, 0).flatten(1)).solution.unflatten(1, (core.shape[small], rank))
    u, s, vh = torch.linalg.svd(slices, full_matrices=False)  # each (small, rank) slice is of rank one
    factors = [torch.empty(0)] * 3
    factors[small] = (u[:, :, 0] * s[:, :1]).T
    factors[first], factors[second] = left, vh[:, 0].T
    full = [torch.zeros(size, rank, dtype=torch.float64, device="cpu") for size in core.shape]
    for target, factor in zip(full, factors, strict=True):
        target[: factor.shape[0]] = factor
    return [factor.to(core) for factor in full]
