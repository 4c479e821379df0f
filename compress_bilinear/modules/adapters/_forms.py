"""Forms that are recognised by structure: how a module computes its output from two inputs and a stored weight."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ...errors import InputError
from .._base import CompressedBilinear
from ._adapter import Adapter

Mode: TypeAlias = Literal["rows", "pairs", "blocks", "index"]
Leading: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""The leading dimensions of the two inputs."""

_TIMED_ROWS, _TIMED_BATCH = 256, (8, 32)


@dataclass(frozen=True)
class Form:
    """One way to evaluate y_o = x1ᵀ W_o x2 with a weight of one parameter.

    Attributes:
        parameter: the weight's name in the module; `bias` that of the bias, (O,) or (1,), or None.
        axes: which letter each axis of the stored weight is, say "oij"; "ij" for a single output, "o(kij)" for an
            `nn.Linear` on blocks, "(oj)i" for one whose outputs are multiplied by the second input. The bias of such a
            one (O·J,) is the weight's last column, for a 1 that is appended to input1.
        sizes: (I, J) of the whole inputs, ones included.
        ones: whether a 1 is appended to each input.
        mode: "rows" pair by pair; "pairs" all rows of one with all of the other; "blocks" summed over K blocks; "index"
            by the second input's number instead of a row.
        blocks: K.
        output: the order of the output's last axes: "o" for rows and blocks, say "oxy" for pairs. Without an o if that
            axis has size 1 and is squeezed away ("1" if nothing is left).
        dims: the numbers of dimensions of an input at which the form holds. They are no part of the name.
        factor: of the whole output.
    """

    parameter: str
    bias: str | None
    axes: str
    sizes: tuple[int, int]
    ones: tuple[bool, bool] = (False, False)
    mode: Mode = "rows"
    blocks: int = 1
    output: str = "o"
    dims: tuple[int, ...] = (1, 2, 3)
    factor: float = 1.0

    @property
    def name(self) -> str:
        """The adapter's name in a file: the same for a form at all sizes."""
        ones = "".join(f", 1 last in input{k}" for k, one in enumerate(self.ones, 1) if one)
        blocks = f" of {self.sizes[1]}" if self.mode == "blocks" else ""
        factor = "" if self.factor == 1 else f", times {self.factor:.12g}"
        return f"{self.mode}{blocks} {self.axes} -> {self.output}{ones}{factor}"

    @property
    def input_sizes(self) -> tuple[int, int]:
        """The last sizes of the two inputs as the module takes them: of all blocks, and without the added ones."""
        size1, size2 = (self.blocks * self.sizes[1],) * 2 if self.mode == "blocks" else self.sizes
        return size1 - self.ones[0], size2 - self.ones[1]

    def inputs(
        self, leading1: tuple[int, ...], leading2: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Random inputs of these leading dimensions, the same at each call."""
        generator = torch.Generator().manual_seed(0)
        shapes = (*leading1, self.input_sizes[0]), (*leading2, self.input_sizes[1])
        input1, input2 = (torch.randn(shape, generator=generator, dtype=dtype, device="cpu") for shape in shapes)
        if self.mode == "index":
            input2 = torch.randint(self.sizes[1], leading2, generator=generator, device="cpu")
        return input1, input2

    def adapter(self) -> Adapter:
        return Adapter(self.name, {"": self.to_weight}, self.call, {"": self.to_bias}, self.example)

    def to_weight(self, module: nn.Module) -> Tensor:
        """(O, I, J), a view but for a factor or a column."""
        stored: Tensor = module.get_parameter(self.parameter)
        axes = self.axes
        if self.mode == "blocks":
            stored, axes = stored.unflatten(1, (-1, self.sizes[1])), "oij"
        elif "(" in axes:
            if self.bias is not None:
                stored = torch.cat([stored, module.get_parameter(self.bias).unsqueeze(1)], 1)
            axes = axes.replace("(", "").replace(")", "")
            stored = stored.unflatten(0, (self.sizes[1], -1) if axes[0] == "j" else (-1, self.sizes[1]))
        elif "o" not in axes:
            stored, axes = stored.unsqueeze(0), f"o{axes}"
        weight = stored.permute(*(axes.index(letter) for letter in "oij"))
        return weight if self.factor == 1 else weight * self.factor

    def to_bias(self, module: nn.Module) -> Tensor | None:
        """(O,)."""
        column = self.axes.startswith("(")
        if self.bias is None or column:
            return None
        bias: Tensor = module.get_parameter(self.bias)
        if len(bias) != (out := self.to_weight(module).shape[0]):
            bias = bias.expand(out)
        return bias if self.factor == 1 else bias * self.factor

    def call(self, module: Any, layer: CompressedBilinear, input1: Tensor, input2: Tensor) -> Tensor:
        """What the module's forward does, with `layer` in place of the weight.

        Raises: InputError for inputs of other numbers of dimensions than were compared.
        """
        if not {input1.dim(), input2.dim() + (self.mode == "index")} <= set(self.dims):
            dims = " or ".join(map(str, self.dims))
            raise InputError(
                f"The inputs should have {dims} dimensions, as this form was recognised by. "
                f"Found {tuple(input1.shape)} and {tuple(input2.shape)}."
            )
        input1, input2 = (
            torch.cat([value, torch.ones_like(value[..., :1])], -1) if one else value
            for value, one in zip((input1, input2), self.ones, strict=True)
        )
        match self.mode:
            case "rows":
                if input1.shape[:-1] != input2.shape[:-1]:  # an einsum with "..." or a product broadcasts
                    leading = torch.broadcast_shapes(input1.shape[:-1], input2.shape[:-1])
                    input1, input2 = input1.expand(*leading, -1), input2.expand(*leading, -1)
                output = layer(input1, input2)
            case "blocks":
                shape = (self.blocks, self.sizes[1])
                output = layer.blockwise(input1.unflatten(-1, shape), input2.unflatten(-1, shape))
            case "pairs":
                output = layer.pairwise(input1, input2)
            case "index":
                output = layer.indexed(input1, input2)
        return arranged(output, self.output)

    def example(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Random inputs: 256 rows, or a batch of 8 with 32 each."""
        leading = (_TIMED_ROWS,) if 2 in self.dims else _TIMED_BATCH
        return self.inputs(leading, leading)


def arranged(
    output: Tensor,  # (..., O), or (..., L1, L2, O)
    order: str,
) -> Tensor:
    """An output in the order of a form's `output`."""
    if "o" not in order:
        output = output.squeeze(-1)
        return output.mT if order == "yx" else output
    if order == "o":
        return output
    return output.permute(*range(output.dim() - 3), *("xyo".index(letter) - 3 for letter in order))
