"""Put the replacements of jobs in place, in a copy of the model or in the model itself."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import nn

from ..config import PlanOptions
from ..errors import CompressionError, StalePlanError
from ..fitting import Job
from ..modules import (
    CompressedBilinear,
    call,
    check_inplace,
    fingerprint,
    guard_saving,
    noting,
    reason_against,
    reference,
    replacements,
    swap,
    take_flags,
    undisturbed,
)

_Model = TypeVar("_Model", bound=nn.Module)


def check_fresh(modules: Mapping[str, nn.Module], job: Job, owners: Mapping[int, Sequence[str]]) -> None:
    """Raise StalePlanError unless the model has the layer that the job was planned for."""
    found = job.found
    for name in found.names:
        if modules.get(name) not in found.modules:
            raise StalePlanError(
                f"Layer {name or '(root)'!r} should be the one that was planned for. "
                f"Found {type(modules[name]).__name__ if name in modules else 'nothing'} there now: plan again."
            )
    reason = reason_against(found, owners)
    if reason is not None:
        raise StalePlanError(f"Layer {job.label!r} can no longer be replaced: {reason}. Plan again.")
    check_same_weight(job)


def check_same_weight(job: Job) -> None:
    """Raise StalePlanError unless the layer has the weight and bias that the job was planned for."""
    if fingerprint(job.found.current()) != job.fingerprint:
        raise StalePlanError(
            f"Layer {job.label!r} should have the weights that were planned for. Found that its weight or bias has "
            "changed, or has moved to another device or dtype: plan again."
        )


def called_check(
    model: nn.Module, replaced: Sequence[Job], batches: Sequence[Any], options: PlanOptions
) -> Callable[[nn.Module], None]:
    """A function that raises CompressionError where the compressed model fails, or does not call a replacement.

    That is on these batches, and of a layer which the model calls there. Both models run once.
    """
    run = options["loss_fn"] or options["forward_fn"]

    def called(network: nn.Module) -> set[str]:
        names: set[str] = set()
        there = dict(network.named_modules(remove_duplicate=False))
        with ExitStack() as hooks, undisturbed(network):
            for job in replaced:
                module = there[name := job.found.names[0]]
                # any call of ours checks its inputs: `pairwise` too
                method = "_check" if isinstance(module, CompressedBilinear) else job.found.method
                hooks.enter_context(noting(module, method, lambda *_, name=name, **__: names.add(name)))
            for batch in batches:
                call(network, batch, run)
        return names

    try:
        before = called(model) if batches else set()
    except Exception:  # on a batch that was changed since it calibrated, say: there is nothing to compare with
        return lambda compressed: None

    def check(compressed: nn.Module) -> None:
        try:
            missing = before - called(compressed) if before else set()
        except Exception as error:
            raise CompressionError(
                "The compressed model should take what the model takes. Found that it fails on the first calibration "
                f"batch ({type(error).__name__}: {error}): leave out the layers whose parts it uses, by {{name: None}}."
            ) from error
        if missing:
            raise CompressionError(
                f"The compressed model should call its replacements. Found that it does not call {sorted(missing)}: "
                "something in it goes on running the original layers. Have that look the layer up in the model at each "
                "call, set `inplace=` the other way round, or leave the layer out by {name: None}."
            )

    return check


@torch.inference_mode(False)  # so that the copy can be trained
def copied(model: _Model, replaced: Sequence[Job]) -> _Model:
    """A copy of the model with the replacements."""
    memo: dict[int, Any] = {}
    try:
        # deepcopy finds the replacement where it would have copied the layer, under whatever name or in
        # whatever list it meets it; a bias that is tied elsewhere stays tied in the copy
        layers = [(job.found, _ready(job, copy.deepcopy(job.layer.bias, memo))) for job in replaced]
        modules = replacements(layers, memo)
        new = copy.deepcopy(model, memo)
    except Exception as error:
        raise CompressionError(
            f"The model could not be copied ({type(error).__name__}: {error}). `inplace=True` does not copy it."
        ) from error
    there = dict(new.named_modules(remove_duplicate=False))
    for job in replaced:
        for name in job.found.names:
            if there.get(name) is not modules[id(job.found.module)]:
                raise CompressionError(
                    f"A copy of the model should hold the replacement of layer {name or '(root)'!r}. Found another "
                    "module: some `__deepcopy__` of the model's does not copy as usual. Use `inplace=True`."
                )
    held = reference(new, _holders(model, replaced))
    if held is not None:
        raise CompressionError(
            f"A copy of the model should run its own replacements. Found {held}, which in the copy holds the original "
            "model or a layer to replace. Use `inplace=True`, or have it look the layer up in the model that it is of."
        )
    guard_saving(new)
    return new


def _holders(model: nn.Module, replaced: Sequence[Job]) -> set[int]:
    """The ids of the modules to replace, and of those that they are in."""
    there = dict(model.named_modules(remove_duplicate=False))
    parts = [name.split(".") for job in replaced for name in job.found.names]
    holders = {".".join(path[:count]) for path in parts for count in range(len(path) + 1)}
    return {id(there[name]) for name in holders if name in there}  # those of a file's tensors have dots in their names


@torch.inference_mode(False)
def swapped(model: nn.Module, replaced: Sequence[Job]) -> Callable[[], None]:
    """Swap the replacements in; returns what undoes it."""
    for job in replaced:
        check_inplace(model, job.found.names)
        held = reference(model, {id(job.found.module)}, {id(job.found.module)})
        if held is not None:
            raise CompressionError(
                f"`inplace=True` needs every reference to layer {job.found.names[0]!r} to be a registered "
                f"submodule. Found {held}, which would go on using the old layer: use `inplace=False`, or have it "
                "look the layer up in the model at each call."
            )
    return swap(model, replacements((job.found, _ready(job, job.layer.bias)) for job in replaced))


def _ready(job: Job, bias: nn.Parameter | None) -> CompressedBilinear:
    """A copy of the replacement with the layer's flags, and with this bias itself unless it is corrected."""
    assert job.chosen is not None
    new = copy.deepcopy(job.chosen.module)
    assert new is not None
    take_flags(new, job.layer)
    if bias is None or not job.chosen.bias_corrected:
        new.set_bias(bias)
    return new
