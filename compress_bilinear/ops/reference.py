"""The definitions. Every faster spelling is tested against these einsums, gradients included."""

import torch
from torch import Tensor


def bilinear_dense(
    input1: Tensor,  # (..., I)
    input2: Tensor,  # (..., J)
    weight: Tensor,  # (O, I, J)
    bias: Tensor | None = None,  # (O,)
) -> Tensor:  # (..., O)
    """y_o = x1ᵀ W_o x2 + b_o."""
    output = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
    return output if bias is None else output + bias


def bilinear_cp(
    input1: Tensor,  # (..., I)
    input2: Tensor,  # (..., J)
    factors: tuple[Tensor, Tensor, Tensor],  # (O, R), (I, R), (J, R)
    bias: Tensor | None = None,  # (O,)
) -> Tensor:  # (..., O)
    """y = C (Aᵀ x1 * Bᵀ x2) + b."""
    out, in1, in2 = factors
    output = ((input1 @ in1) * (input2 @ in2)) @ out.mT
    return output if bias is None else output + bias


def bilinear_tucker(
    input1: Tensor,  # (..., I)
    input2: Tensor,  # (..., J)
    core: Tensor,  # (R_o, R_i, R_j)
    factors: tuple[Tensor, Tensor, Tensor],  # (O, R_o), (I, R_i), (J, R_j)
    bias: Tensor | None = None,  # (O,)
) -> Tensor:  # (..., O)
    """y = U G(Aᵀ x1, Bᵀ x2) + b."""
    out, in1, in2 = factors
    output = bilinear_dense(input1 @ in1, input2 @ in2, core) @ out.mT
    return output if bias is None else output + bias


def pairwise_dense(
    input1: Tensor,  # (..., L1, I)
    input2: Tensor,  # (..., L2, J)
    weight: Tensor,  # (O, I, J)
    bias: Tensor | None = None,  # (O,)
) -> Tensor:  # (..., L1, L2, O)
    """y_klo = x1_kᵀ W_o x2_l + b_o, for all pairs of k and l."""
    return bilinear_dense(input1.unsqueeze(-2), input2.unsqueeze(-3), weight, bias)


def pairwise_cp(
    input1: Tensor,  # (..., L1, I)
    input2: Tensor,  # (..., L2, J)
    factors: tuple[Tensor, Tensor, Tensor],  # (O, R), (I, R), (J, R)
    bias: Tensor | None = None,  # (O,)
) -> Tensor:  # (..., L1, L2, O)
    """y_kl = C (Aᵀ x1_k * Bᵀ x2_l) + b."""
    return bilinear_cp(input1.unsqueeze(-2), input2.unsqueeze(-3), factors, bias)


def pairwise_tucker(
    input1: Tensor,  # (..., L1, I)
    input2: Tensor,  # (..., L2, J)
    core: Tensor,  # (R_o, R_i, R_j)
    factors: tuple[Tensor, Tensor, Tensor],  # (O, R_o), (I, R_i), (J, R_j)
    bias: Tensor | None = None,  # (O,)
) -> Tensor:  # (..., L1, L2, O)
    """y_kl = U G(Aᵀ x1_k, Bᵀ x2_l) + b."""
    return bilinear_tucker(input1.unsqueeze(-2), input2.unsqueeze(-3), core, factors, bias)
