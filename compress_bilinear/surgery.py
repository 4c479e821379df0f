"""Find the layers, check and solve everything, then only swap."""

import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from . import adapters, discovery
from .calibration import LayerInputs, collect_inputs
from .config import Config, CPConfig, DenseConfig, TuckerConfig
from .decomposition import check_max_seconds
from .errors import CompressionError, ConfigError, InfeasibleError, StalePlanError
from .measure import environment, stored_bytes, weight_error
from .modules import CompressedBilinear
from .progress import ProgressBars
from .report import LayerReport, Report, render_text
from .selection import Candidate, Decision, judge, keep, solve

_DEFAULT_ROWS = 256
_MOST_ROWS = 2**15
_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class _Entry:
    """One selected layer, what becomes of it, and, where it is replaced, the fingerprint of its weights."""

    found: discovery.FoundLayer
    decision: Decision
    fingerprint: str = ""

    @property
    def replacement(self) -> CompressedBilinear | None:
        return self.decision.replacement


class Plan(Generic[_Model]):
    """What `compress` would do to a model: solved, checked and measured, and nothing changed yet.

    `print(plan)` shows it; `plan.report` is the same as data; `plan.apply()` carries it out.
    """

    def __init__(self, model: _Model, entries: Sequence[_Entry], report: Report) -> None:
        self.model = model
        self.report = report
        self._entries = tuple(entries)

    def __str__(self) -> str:
        return render_text(self.report, title="Plan (the model is untouched)")

    def apply(self, inplace: bool = False) -> tuple[_Model, Report]:
        """Put the replacements in place.

        Args:
            inplace: False gives a copy of the model and leaves the model as it is, without ever copying the layers
                that are replaced. True changes the model itself.

        Returns:
            The compressed model and the report. Of a model that is itself the layer, its replacement.

        Raises:
            StalePlanError: since planning, a layer was changed, moved, hooked or taken out.
            CompressionError: the model cannot be copied; or `inplace=True` where the model itself is the layer.
        """
        chosen = [entry for entry in self._entries if entry.replacement is not None]
        owners = discovery.parameter_owners(self.model)
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for entry in chosen:
            _check_fresh(modules, entry, owners)
        if inplace:
            return self._apply_inplace(chosen), self.report
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
        return copied, self.report

    def _apply_inplace(self, chosen: Sequence[_Entry]) -> _Model:
        for entry in chosen:
            if "" in entry.found.names:
                raise CompressionError(
                    "`inplace=True` needs a model that contains the layer. Found a model that is itself the "
                    f"{type(self.model).__name__}: use the model that `inplace=False` returns."
                )
            held = discovery.plain_reference(self.model, entry.found.module)
            if held is not None:
                raise CompressionError(
                    f"`inplace=True` needs every reference to layer {entry.found.names[0]!r} to be a registered "
                    f"submodule. Found {held}, which would go on using the old layer: use `inplace=False`."
                )
        discovery.swap(self.model, {id(e.found.module): _ready(e, e.found.layer.bias) for e in chosen})
        return self.model


def plan(
    model: _Model,
    config: Config | Mapping[str, Config],
    *,
    calibration: Iterable[Any] | None = None,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    batch_size: int | None = None,
    measure_latency: bool = True,
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
            labels. With it the report has output errors, on a sample of the rows that reach each layer.
        include, exclude: a glob or several.
        batch_size: rows in a timed call; None takes the mean of the calibration's calls, or 256.
        measure_latency: False leaves latencies and speedups out, which saves a second or so for each layer.
        force: replace whatever the verdict; the report still says what was lost.
        max_seconds: time for all decompositions together, shared by the layers' sizes; each layer gets the best that
            was found in its share. With a limit, results depend on the machine's speed. None is no limit.
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
    selected = discovery.select(model, _configs(config), include, exclude)
    owners = discovery.parameter_owners(model)
    refusals = [discovery.refusal(found, owners) for found, _ in selected]
    outcomes = [(*pair, refusal) for pair, refusal in zip(selected, refusals, strict=True)]
    open_layers = {found.label: found for found, _, refusal in outcomes if refusal is None}
    with ProgressBars(progress) as bars:
        inputs: dict[str, LayerInputs | None] = {}
        if calibration is not None and open_layers:
            with adapters.observing(found.adapted for found in open_layers.values()):
                seen_by = {label: found.rows for label, found in open_layers.items()}
                inputs = collect_inputs(model, seen_by, bars.track(calibration, "Calibrating"))
        entries: list[_Entry] = []
        misfits: list[tuple[Config, ConfigError | None]] = []
        solving = bars.parts("Solving", len(selected))
        decomposed = [found.layer for found, c, no in outcomes if no is None and not isinstance(c, DenseConfig)]
        seconds = _TimeShares(max_seconds, decomposed)
        for k, (found, wanted, refusal) in enumerate(outcomes):
            if refusal is not None:
                entries.append(_Entry(found, keep(found, wanted, refusal)))
                continue
            try:
                if found.adapted is not None:
                    found.adapted.verify()
                with seconds.share(found.layer) as share:
                    candidate = solve(found.layer, wanted, share, solving(k, found.label))
            except ConfigError as error:
                misfit = _named(error, found.label)
                misfits.append((wanted, misfit))
                entries.append(_Entry(found, keep(found, wanted, str(misfit))))
                continue
            except CompressionError as error:
                entries.append(_Entry(found, keep(found, wanted, str(error))))
                continue
            misfits.append((wanted, None))
            seen = inputs.get(found.label)
            rows = batch_size or (min(seen.rows_per_call, _MOST_ROWS) if seen is not None else _DEFAULT_ROWS)
            time_rows = rows if measure_latency else None
            unreached = calibration is not None and seen is None
            decision = judge(found, wanted, candidate, seen, unreached, time_rows, force)
            fingerprint = discovery.fingerprint(found.current()) if decision.replacement is not None else ""
            entries.append(_Entry(found, decision, fingerprint))
    for wanted, unfit in misfits:
        if unfit is not None and all(other is not None for config_, other in misfits if config_ is wanted):
            raise unfit
    return Plan(model, entries, _report(model, entries))


def compress(
    model: _Model,
    config: Config | Mapping[str, Config],
    *,
    inplace: bool = False,
    calibration: Iterable[Any] | None = None,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    batch_size: int | None = None,
    measure_latency: bool = True,
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
        include=include,
        exclude=exclude,
        batch_size=batch_size,
        measure_latency=measure_latency,
        force=force,
        max_seconds=max_seconds,
        progress=progress,
    )
    return planned.apply(inplace)


class _TimeShares:
    """What is left of a time budget, shared among the layers that are left by the sizes of their weights."""

    def __init__(self, max_seconds: float | None, layers: Sequence[nn.Bilinear]) -> None:
        self._left = max_seconds
        self._sizes = {id(layer): layer.weight.numel() for layer in layers}

    @contextmanager
    def share(self, layer: nn.Bilinear) -> Iterator[float | None]:
        """This layer's part; only what is spent within the context is gone."""
        rest = sum(self._sizes.values())
        size = self._sizes.pop(id(layer), 0)
        begun = time.perf_counter()
        try:
            yield None if self._left is None else max(self._left * size / max(rest, 1), 1e-3)
        finally:
            if self._left is not None:
                self._left = max(self._left - (time.perf_counter() - begun), 0.0)


def compare_layers(
    name: str, layer: nn.Bilinear, module: CompressedBilinear, batch_size: int | None = _DEFAULT_ROWS
) -> LayerReport:
    """The report on a replacement that has been made already, say in a checkpoint."""
    found = discovery.FoundLayer((name,), layer)
    wanted: Config
    match module.rank:
        case None:
            wanted = DenseConfig(quantize=module.quantize)
        case int(rank):
            wanted = CPConfig(rank=rank, quantize=module.quantize)
        case triple:
            wanted = TuckerConfig(rank=triple, quantize=module.quantize)
    candidate = Candidate(module, weight_error(layer.weight.detach(), module), None)
    report = judge(found, wanted, candidate, None, False, batch_size, True).report
    return replace(report, reason=report.reason.removeprefix("forced, although "))  # it is there already


def _configs(config: Config | Mapping[str, Config]) -> dict[str, Config]:
    """Globs to configs; a single config holds for every name."""
    configs = dict(config) if isinstance(config, Mapping) else {"*": config}
    if not configs:
        raise ConfigError("`config` should have at least one glob. Found an empty mapping.")
    for pattern, value in configs.items():
        if not isinstance(pattern, str) or not isinstance(value, (CPConfig, TuckerConfig, DenseConfig)):
            raise ConfigError(
                "`config` should be a CPConfig, TuckerConfig or DenseConfig, or a mapping of globs to them. "
                f"Found {pattern!r}: {value!r}."
            )
    return configs


def _named(error: ConfigError, label: str) -> ConfigError:
    return ConfigError(str(error).replace("the weight", f"layer {label!r}"))


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
    refusal = discovery.refusal(found, owners)
    if refusal is not None:
        raise StalePlanError(f"Layer {found.label!r} can no longer be replaced: {refusal}. Plan again.")
    if discovery.fingerprint(found.current()) != entry.fingerprint:
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
    for parameter in new.parameters():
        parameter.requires_grad_(layer.weight.requires_grad)
    new.set_bias(bias)
    return new if entry.found.adapted is None else entry.found.adapted.replaced(new, memo)
