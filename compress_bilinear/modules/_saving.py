"""Models that save themselves for a loader which would make their compressed layers anew."""

from typing import Any, NoReturn

from torch import nn

from ..errors import CompressionError
from ._base import CompressedBilinear
from .adapters import AdaptedBilinear


def guard_saving(model: nn.Module) -> None:
    """Let `save_pretrained` of the model, and of its parts, raise where compressed layers would be lost.

    That is of the libraries' classes, not of one that has its own, as `PretrainedMixin` does. Where no layer is
    compressed, or only exactly, with `nn.Bilinear`'s own state, saving is as it was.
    """
    for module in model.modules():
        save = getattr(type(module), "save_pretrained", None)
        if getattr(save, "__module__", "").partition(".")[0] not in ("transformers", "huggingface_hub"):
            continue
        if any(map(has_other_state, module.modules())):
            vars(module)["save_pretrained"] = _refuse
        elif vars(module).get("save_pretrained") is _refuse:
            del vars(module)["save_pretrained"]


def has_other_state(part: nn.Module) -> bool:
    """Whether it is a replacement whose state a network without it would not load: all but exact `DenseBilinear`."""
    exact = "weight" in part._parameters  # of a `DenseBilinear`
    return isinstance(part, AdaptedBilinear) or (isinstance(part, CompressedBilinear) and not exact)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise CompressionError(
        "A network with compressed layers should be of a class whose `from_pretrained` makes them. Found one that "
        "would make the layers of before, with random values: write `class Net(PretrainedMixin, PreTrainedModel)` with "
        "compress_bilinear.PretrainedMixin, or use compress_bilinear.save and load."
    )
