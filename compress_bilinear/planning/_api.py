"""Find the layers, check and solve everything, then only swap."""

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import torch
from torch import nn

from ..config import Config, asked, by_glob
from ..decomposition import check_max_seconds
from ..errors import CompressionError, ConfigError, InfeasibleError, StalePlanError
from ..fitting import ComputeAsked, LayerInputs, check_asked, collect_inputs, environment, stored_bytes, task_metric
from ..modules import (
    Call,
    CompressedBilinear,
    FoundLayer,
    fingerprint,
    observing,
    parameter_owners,
    patterns,
    plain_reference,
    reason_against,
    select,
    swap,
)
from ..report import FrontPoint, Report, render_text
from ._distill import DEFAULT_SECONDS, BatchSample, check_refinable
from ._planner import Options, Planner, Request, check_calibrated
from ._progress import ProgressBars
from ._verdict import Decision

_Model = TypeVar("_Model", bound=nn.Module)

Evaluate: TypeAlias = Callable[[Any], float]
"""The caller's own task metric of a model."""


@dataclass(frozen=True, eq=False)
class _Entry:
    """One selected layer, what becomes of it, and, where it is replaced, the fingerprint of its weights."""

    found: FoundLayer
    decision: Decision
    fingerprint: str = ""

    @property
    def replacement(self) -> CompressedBilinear | None:
        return self.decision.replacement


class Plan(Generic[_Model]):
    """What `compress` would do to a model: solved, checked and measured, and nothing changed yet.

    `print(plan)` shows it; `plan.report` is the same as data; `plan.apply()` carries it out.
    """

    def __init__(
        self, model: _Model, entries: Sequence[_Entry], report: Report, evaluate: Evaluate | None = None
    ) -> None:
        self.model = model
        self.report = report
        self._entries = tuple(entries)
        self._evaluate = evaluate

    @property
    def fronts(self) -> dict[str, tuple[FrontPoint, ...]]:
        """For each layer by its name, the replacements that were considered, by bytes; of an `AutoConfig`."""
        return {layer.label: layer.front for layer in self.report.layers if layer.front}

    def __str__(self) -> str:
        return render_text(self.report, title="Plan (the model is untouched)")

    def apply(self, inplace: bool = False) -> tuple[_Model, Report]:
        """Put the replacements in place.

        Args:
            inplace: False gives a copy of the model and leaves the model as it is, without ever copying the layers
                that are replaced. True changes the model itself.

        Returns:
            The compressed model and the report, with the metric before and after where `plan` was given `evaluate`. Of
            a model that is itself the layer, its replacement.

        Raises:
            StalePlanError: since planning, a layer was changed, moved, hooked or taken out.
            CompressionError: the model cannot be copied; or `inplace=True` where the model itself is the layer.
        """
        chosen = [entry for entry in self._entries if entry.replacement is not None]
        owners = parameter_owners(self.model)
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for entry in chosen:
            _check_fresh(modules, entry, owners)
        before = None if self._evaluate is None else task_metric(self._evaluate, self.model)
        if inplace:
            undo = self._apply_inplace(chosen)
            try:
                return self.model, self._evaluated(before, self.model)
            except BaseException:
                undo()  # a metric that fails leaves the model as it was too
                raise
        memo: dict[int, Any] = {}
        try:
            for entry in chosen:
                # deepcopy finds the replacement where it would have copied the layer, under whatever name or in
                # whatever list it meets it; a bias that is tied elsewhere stays tied in the copy
                bias = copy.deepcopy(entry.found.layer.bias, memo)
                memo[id(entry.found.module)] = _ready(entry, bias, memo)
            copied = copy.deepcopy(self.model, memo)
        except Exception as error:
            raise CompressionError(
                f"The model could not be copied ({type(error).__name__}: {error}). `inplace=True` does not copy it."
            ) from error
        there = dict(copied.named_modules(remove_duplicate=False))
        for entry in chosen:
            for name in entry.found.names:
                if there.get(name) is not memo[id(entry.found.module)]:
                    raise CompressionError(
                        f"A copy of the model should hold the replacement of layer {name or '(root)'!r}. Found another "
                        "module: some `__deepcopy__` of the model's does not copy as usual. Use `inplace=True`."
                    )
        return copied, self._evaluated(before, copied)

    def _evaluated(self, before: float | None, compressed: _Model) -> Report:
        if self._evaluate is None:
            return self.report
        return replace(self.report, metric_before=before, metric_after=task_metric(self._evaluate, compressed))

    def _apply_inplace(self, chosen: Sequence[_Entry]) -> Callable[[], None]:
        for entry in chosen:
            if "" in entry.found.names:
                raise CompressionError(
                    "`inplace=True` needs a model that contains the layer. Found a model that is itself the "
                    f"{type(self.model).__name__}: use the model that `inplace=False` returns."
                )
            held = plain_reference(self.model, entry.found.module)
            if held is not None:
                raise CompressionError(
                    f"`inplace=True` needs every reference to layer {entry.found.names[0]!r} to be a registered "
                    f"submodule. Found {held}, which would go on using the old layer: use `inplace=False`."
                )
        return swap(self.model, {id(e.found.module): _ready(e, e.found.layer.bias) for e in chosen})


def plan(
    model: _Model,
    config: Config | Mapping[str, Config],
    *,
    calibration: Iterable[Any] | None = None,
    forward_fn: Call | None = None,
    loss_fn: Call | None = None,
    refine: Literal["network"] | None = None,
    evaluate: Evaluate | None = None,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    batch_size: int | None = None,
    measure_latency: bool = True,
    compute: ComputeAsked = "on_the_fly",
    force: bool = False,
    max_seconds: float | None = None,
    progress: bool | None = None,
) -> Plan[_Model]:
    """Solve and measure a replacement for each selected bilinear layer, without changing the model.

    These are the `nn.Bilinear` layers, and modules of another form that `register_adapter` describes or that are known
    by structure: biaffine scorers, einsums, and a flat `nn.Linear` on a product.

    A layer is selected by its name in the model (`model.named_modules()`), by shell globs in which "*" also matches
    dots. A layer under several names is replaced once and stays shared. A layer that cannot be replaced faithfully
    (own forward, hooks, parametrizations, tied, meta or non-finite weights), or whose replacement is not smaller or
    misses its target, is kept, and the report says why.

    Args:
        model: any module; an `nn.Bilinear` itself too.
        config: one config for all selected layers, or a mapping from globs to configs of which the first match holds.
        calibration: an iterable of what the model takes (a tensor, or a tuple or dict of its arguments), without
            labels. With it factors are fitted to the layers' outputs (unless their config says otherwise), and the
            report has output errors, on rows that reach each layer and that no fit has seen.
        forward_fn: how to run the model on a batch that is something else, for instance one with labels:
            `lambda model, batch: model(batch[0])`.
        loss_fn: instead, a scalar loss of model and batch, which may use labels: layers are then fitted where it feels
            their outputs most.
        refine: "network" afterwards trains the factors of all replacements together, without labels, to give the
            original network's outputs on calibration batches, for as long as `max_seconds` leaves, or a minute.
        evaluate: your task metric of a model; the report of `apply` has it before and after.
        include, exclude: a glob or several.
        batch_size: rows in a timed call; None takes the mean of the calibration's calls, or 256.
        measure_latency: False leaves latencies and speedups out, which saves a second or so for each layer.
        compute: how quantized layers compute: see `set_compute`. "fastest" times the modes on rows that the layer saw,
            or Gaussian ones. A layer without the mode computes on the fly. Latencies, speedups and output errors are
            those of the mode; the report's `compute_modes` says what each would have given.
        force: replace whatever the verdict; the report still says what was lost.
        max_seconds: time for all decompositions together (half of it where `refine` takes the rest), shared by the
            layers' sizes; each layer gets the best that was found in its share. With a limit, results depend on the
            machine's speed. None is no limit.
        progress: show a progress bar on stderr; None shows it on a terminal only.

    Returns:
        A `Plan`.

    Raises:
        MatchError: a pattern matches no `nn.Bilinear` layer; the message lists what there is.
        ConfigError: a config is invalid, or its rank fits none of the layers that it is meant for.
        CompressionError: calibration yields no batch, or the model fails on one.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` should be an nn.Module. Found {type(model).__name__}.")
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ConfigError(f"`batch_size` should be a positive int or None. Found {batch_size!r}.")
    check_max_seconds(max_seconds)
    if refine not in (None, "network"):
        raise ConfigError(f"`refine` should be None or 'network'. Found {refine!r}.")
    if evaluate is not None and not callable(evaluate):
        raise ConfigError(f"`evaluate` should be a function of a model. Found {evaluate!r}.")
    for what, given in (("forward_fn", forward_fn), ("loss_fn", loss_fn), ("refine", refine)):
        if given is not None and calibration is None:
            raise ConfigError(f"`{what}` needs `calibration`, batches to run the model on. Found none.")
    configs, include = by_glob(config), patterns(include, "include")
    exclude = patterns(exclude, "exclude")
    check_asked(compute, configs.values(), measure_latency)
    selected = select(model, configs, include, exclude)
    owners = parameter_owners(model)
    requests = [Request(found, wanted, reason_against(found, owners)) for found, wanted in selected]
    check_calibrated(requests, calibration is not None)
    open_layers = {each.found.label: each.found for each in requests if each.refusal is None}
    options = Options(
        calibrated=calibration is not None,
        batch_size=batch_size,
        measure_latency=measure_latency,
        compute=compute,
        force=force,
        max_seconds=max_seconds if refine is None or max_seconds is None else max_seconds / 2,
    )
    sample, begun = BatchSample(), time.perf_counter()
    with ProgressBars(progress) as bars:
        inputs: dict[str, LayerInputs | None] = {}
        if calibration is not None and open_layers:
            batches = bars.track(calibration, "Calibrating")
            watched = batches if refine is None else sample.watch(batches)
            with observing(found.adapted for found in open_layers.values()):
                rows = {label: found.rows for label, found in open_layers.items()}
                inputs = collect_inputs(model, rows, watched, forward_fn=forward_fn, loss_fn=loss_fn)
        if refine is not None and open_layers:
            check_refinable(model, [found.module for found in open_layers.values()], sample.batches, forward_fn)
        planner = Planner(requests, inputs, owners, options, bars)
        decisions = planner.run()
        if refine is not None:
            left = DEFAULT_SECONDS if max_seconds is None else max_seconds - (time.perf_counter() - begun)
            decisions = planner.refined(model, sample.batches, forward_fn, left)
    entries = []
    for each, decision in zip(requests, decisions, strict=True):
        seen = fingerprint(each.found.current()) if decision.replacement is not None else ""
        entries.append(_Entry(each.found, decision, seen))
    options_given: dict[str, Any] = {
        "include": include,
        "exclude": exclude,
        "batch_size": batch_size,
        "measure_latency": measure_latency,
        "compute": compute,
    }
    options_given |= {"force": force, "max_seconds": max_seconds, "refine": refine}
    return Plan(model, entries, replace(_report(model, entries), config=asked(configs, options_given)), evaluate)


def compress(
    model: _Model,
    config: Config | Mapping[str, Config],
    *,
    inplace: bool = False,
    calibration: Iterable[Any] | None = None,
    forward_fn: Call | None = None,
    loss_fn: Call | None = None,
    refine: Literal["network"] | None = None,
    evaluate: Evaluate | None = None,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    batch_size: int | None = None,
    measure_latency: bool = True,
    compute: ComputeAsked = "on_the_fly",
    force: bool = False,
    max_seconds: float | None = None,
    progress: bool | None = None,
) -> tuple[_Model, Report]:
    """`plan(...)` and `apply(inplace)` in one call: returns the compressed model and the report.

    Arguments and errors are those of `plan` and `Plan.apply`. An error leaves the model exactly as it was.
    """
    planned = plan(
        model,
        config,
        calibration=calibration,
        forward_fn=forward_fn,
        loss_fn=loss_fn,
        refine=refine,
        evaluate=evaluate,
        include=include,
        exclude=exclude,
        batch_size=batch_size,
        measure_latency=measure_latency,
        compute=compute,
        force=force,
        max_seconds=max_seconds,
        progress=progress,
    )
    return planned.apply(inplace)


def _report(model: nn.Module, entries: Sequence[_Entry]) -> Report:
    saved = sum(entry.decision.report.bytes_before - entry.decision.report.bytes_after for entry in entries)
    before = stored_bytes(model)
    first = next((e.found.layer.weight for e in entries if e.replacement is not None), None)
    device = first.device if first is not None else torch.device("cpu")
    dtype = first.dtype if first is not None else torch.get_default_dtype()
    return Report(
        layers=tuple(entry.decision.report for entry in entries),
        model_bytes_before=before,
        model_bytes_after=before - saved,
        environment=environment(device, dtype),
    )


def _check_fresh(modules: Mapping[str, nn.Module], entry: _Entry, owners: Mapping[int, Sequence[str]]) -> None:
    found = entry.found
    for name in found.names:
        if modules.get(name) is not found.module:
            raise StalePlanError(
                f"Layer {name or '(root)'!r} should be the one that was planned for. "
                f"Found {type(modules[name]).__name__ if name in modules else 'nothing'} there now: plan again."
            )
    reason = reason_against(found, owners)
    if reason is not None:
        raise StalePlanError(f"Layer {found.label!r} can no longer be replaced: {reason}. Plan again.")
    if fingerprint(found.current()) != entry.fingerprint:
        raise StalePlanError(
            f"Layer {found.label!r} should have the weights that were planned for. Found that its weight or bias has "
            "changed, or has moved to another device or dtype: plan again."
        )


def _ready(entry: _Entry, bias: nn.Parameter | None, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of the replacement with the layer's flags and this bias, which keeps its identity.

    Of an adapted module, inside what else the module has: the very same, or copies by `memo`.
    """
    if entry.replacement is None:
        raise InfeasibleError(f"Layer {entry.found.label!r} has no replacement.")
    new, layer = copy.deepcopy(entry.replacement), entry.found.layer
    new.train(layer.training)
    if entry.decision.own_bias and bias is not None and isinstance(new.bias, nn.Parameter):
        bias = nn.Parameter(new.bias.detach().clone(), bias.requires_grad)  # it was corrected
    for parameter in new.parameters():
        parameter.requires_grad_(layer.weight.requires_grad)
    new.set_bias(bias)
    return new if entry.found.adapted is None else entry.found.adapted.replaced(new, memo)
