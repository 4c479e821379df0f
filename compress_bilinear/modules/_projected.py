"""What CP and Tucker layers have in common: a small product between linear layers."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._base import CompressedBilinear, block_rows
from ._operands import Operands, operands, reason_against, tensor_of


class ProjectedBilinear(CompressedBilinear):
    """A small product between linear layers: what CP and Tucker have in common.

    Attributes:
        in1_proj, in2_proj, out_proj: linear layers, the last one with the bias. They are ordinary ones, except for a
            Tucker mode of rank near its size (`InterpolativeLinear`) or of full rank (`nn.Identity`, `AddBias`).
    """

    part_names: ClassVar[tuple[str, ...]]  # the inner layers in the order in which `ops` takes their weights
    takes_identities: ClassVar[bool] = False  # whether one of them may have no weight

    in1_proj: nn.Module
    in2_proj: nn.Module
    out_proj: nn.Module

    @property
    def weight(self) -> Tensor:
        """The weight (O, I, J) that the layer stands for, computed in each access (`to_dense()`)."""
        return self.to_dense()

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias (O,) of `out_proj`."""
        bias: nn.Parameter | None = getattr(self.out_proj, "bias", None)
        return bias

    def _first_weight(self) -> Tensor | None:
        for name in self.part_names:
            weight = tensor_of(self._modules[name], "weight")
            if isinstance(weight, Tensor) and weight.is_floating_point():  # others replace it by integers
                return weight
        return None

    def _operands(self) -> Operands | str:
        """The tensors of the inner layers, or the reason to call these layers one by one."""
        return operands(self._modules, self.part_names, self.takes_identities)

    def _reason_against_kernels(self) -> str | None:
        reason = self._operands()
        return reason if isinstance(reason, str) else super()._reason_against_kernels()

    def set_bias(self, bias: nn.Parameter | None) -> None:
        self.out_proj.register_parameter("bias", bias)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise AttributeError(
                f"`{name}` of a {type(self).__name__} is computed from its parts: set out_proj.bias, or the weights of "
                "in1_proj, in2_proj and out_proj."
            )
        super().__setattr__(name, value)


def project_blocks(
    linear: nn.Module,
    input: Tensor,  # (..., K, I / K)
) -> Tensor:  # (..., K, out_features)
    """Each of K blocks of the input times its own columns of a linear layer of I inputs."""
    if type(linear) is nn.Linear and linear.bias is None and reason_against(linear) is None:
        weight = linear.weight.unflatten(1, tuple(input.shape[-2:]))
        return torch.einsum("...kb,rkb->...kr", input, weight)
    projected: Tensor = linear(block_rows(input))  # any other module takes whole rows
    return projected
