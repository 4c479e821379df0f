"""`plan` and `compress`: check everything, solve and measure everything, then only swap."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from typing_extensions import Unpack

from ..config import AutoConfig, Config, Evaluate, PlanOptions, by_glob, completed, not_default, plain
from ..decomposition import Budget
from ..errors import CompressionError, ConfigError, StalePlanError
from ..fitting import Job, environment, stored_bytes, task_metric
from ..modules import check_inplace, fingerprint, parameter_owners, plain_reference, reason_against, swap, take_flags
from ..report import FrontPoint, Report, render_text
from ._distill import DEFAULT_SECONDS
from ._planner import calibrate, choose, distil_all, find_jobs, fit_all, judge_all, judging_seconds
from ._progress import ProgressBars

_MOST_JUDGING = 0.25  # of the time

_Model = TypeVar("_Model", bound=nn.Module)


class Plan(Generic[_Model]):
    """What `compress` would do to a model: solved, checked and measured, and nothing changed yet.

    `print(plan)` shows it; `plan.report` is the same as data; `plan.apply()` carries it out.
    """

    def __init__(self, model: _Model, jobs: Sequence[Job], report: Report, evaluate: Evaluate | None = None) -> None:
        self.model = model
        self.report = report
        self._jobs = tuple(jobs)
        self._evaluate = evaluate

    @property
    def fronts(self) -> dict[str, tuple[FrontPoint, ...]]:
        """For each layer of an `AutoConfig` by its name, the candidates that were tried, by bytes."""
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
        replaced = [job for job in self._jobs if job.chosen is not None]
        owners = parameter_owners(self.model)
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for job in replaced:
            _check_fresh(modules, job, owners)
        before = None if self._evaluate is None else task_metric(self._evaluate, self.model)
        if not inplace:
            copied = self._copied(replaced)
            return copied, self._evaluated(before, copied)
        undo = self._apply_inplace(replaced)
        try:
            return self.model, self._evaluated(before, self.model)
        except BaseException:
            undo()  # a metric that fails leaves the model as it was too
            raise

    @torch.inference_mode(False)  # so that the copy can be trained
    def _copied(self, replaced: Sequence[Job]) -> _Model:
        """A copy of the model with the replacements."""
        memo: dict[int, Any] = {}
        try:
            for job in replaced:
                # deepcopy finds the replacement where it would have copied the layer, under whatever name or in
                # whatever list it meets it; a bias that is tied elsewhere stays tied in the copy
                bias = copy.deepcopy(job.layer.bias, memo)
                memo[id(job.found.module)] = _ready(job, bias, memo)
            copied = copy.deepcopy(self.model, memo)
        except Exception as error:
            raise CompressionError(
                f"The model could not be copied ({type(error).__name__}: {error}). `inplace=True` does not copy it."
            ) from error
        there = dict(copied.named_modules(remove_duplicate=False))
        for job in replaced:
            for name in job.found.names:
                if there.get(name) is not memo[id(job.found.module)]:
                    raise CompressionError(
                        f"A copy of the model should hold the replacement of layer {name or '(root)'!r}. Found another "
                        "module: some `__deepcopy__` of the model's does not copy as usual. Use `inplace=True`."
                    )
        return copied

    def _evaluated(self, before: float | None, compressed: _Model) -> Report:
        if self._evaluate is None:
            return self.report
        return replace(self.report, metric_before=before, metric_after=task_metric(self._evaluate, compressed))

    @torch.inference_mode(False)
    def _apply_inplace(self, replaced: Sequence[Job]) -> Callable[[], None]:
        """Swap the replacements in; returns what undoes it."""
        for job in replaced:
            check_inplace(self.model, job.found.names)
            held = plain_reference(self.model, job.found.module)
            if held is not None:
                raise CompressionError(
                    f"`inplace=True` needs every reference to layer {job.found.names[0]!r} to be a registered "
                    f"submodule. Found {held}, which would go on using the old layer: use `inplace=False`."
                )
        return swap(self.model, {id(job.found.module): _ready(job, job.layer.bias) for job in replaced})


@torch.inference_mode(False)  # whatever the caller is in: factors are fitted by gradients
def plan(model: _Model, config: Config | Mapping[str, Config | None], **options: Unpack[PlanOptions]) -> Plan[_Model]:
    """Solve and measure a replacement for each selected bilinear layer, without changing the model.

    These are the `nn.Bilinear` layers, and modules of another form that `register_adapter` describes or that are known
    by structure: biaffine scorers, einsums, and a flat `nn.Linear` on a product. A layer under several names is
    replaced once and stays shared. A layer that cannot be replaced faithfully (own forward, hooks, parametrizations,
    tied, meta or non-finite weights), or whose replacement is not smaller or misses its target, is kept, and the report
    says why.

    Args:
        model: any module; an `nn.Bilinear` itself too.
        config: one config for all layers, or a mapping from globs of layer names (`model.named_modules()`; "*" also
            matches dots) to configs, of which the first match holds. None leaves the layers that it matches alone.
        options: see `PlanOptions` for every keyword, with its default.

    Returns:
        A `Plan`.

    Raises:
        MatchError: a glob matches no bilinear layer, or none that earlier globs leave; the message lists what there is.
        ConfigError: a config or an option is invalid, or a rank fits none of the layers that it is meant for.
        CompressionError: calibration yields no batch, or the model fails on one.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` should be an nn.Module. Found {type(model).__name__}.")
    given, configs = completed(options), by_glob(config)
    if given["compute"] != "on_the_fly" and not any(
        isinstance(each, AutoConfig) or getattr(each, "quantize", None) for each in configs.values()
    ):
        raise ConfigError(f"`compute={given['compute']!r}` needs a config with `quantize`. Found none.")
    refine, whole = given["refine"], Budget(given["max_seconds"])
    jobs = find_jobs(model, configs, calibrated=given["calibration"] is not None)
    with ProgressBars(given["progress"]) as bars:
        with bars.stage("calibrate"):
            batches = calibrate(model, jobs, given, bars)
            shares = judging_seconds(jobs, given) if whole.limited else {}
        rest = whole.child(1.0 if refine is None else 0.5)
        kept_back = min(sum(shares.values()) / max(rest.left(), 1e-3), _MOST_JUDGING)
        budget = rest.child(1 - kept_back)
        with bars.stage("fit"):
            searches = fit_all(jobs, given, budget, bars)
        with bars.stage("choose"):
            choose(jobs, searches, given, budget, bars)
        with bars.stage("judge"):
            judge_all(jobs, given, rest, shares, bars)
        if refine is not None:
            with bars.stage("distil"):
                left = whole.left() if whole.limited else DEFAULT_SECONDS
                distil_all(model, jobs, batches, given, left, bars)
    for job in jobs:
        job.release()
    report = _report(model, jobs, plain(configs, not_default(given)), bars.seconds)
    return Plan(model, jobs, report, given["evaluate"])


def compress(
    model: _Model,
    config: Config | Mapping[str, Config | None],
    *,
    inplace: bool = False,
    **options: Unpack[PlanOptions],
) -> tuple[_Model, Report]:
    """`plan(...)` and `apply(inplace)` in one call: returns the compressed model and the report.

    Arguments and errors are those of `plan` and `Plan.apply`. An error leaves the model exactly as it was.
    """
    return plan(model, config, **options).apply(inplace)


def _report(model: nn.Module, jobs: Sequence[Job], config: Mapping[str, Any], seconds: Mapping[str, float]) -> Report:
    layers = tuple(job.report for job in jobs if job.report is not None)
    before = stored_bytes(model)
    first = next((job.layer.weight for job in jobs if job.chosen is not None), None)
    return Report(
        layers=layers,
        model_bytes_before=before,
        model_bytes_after=before - sum(layer.bytes_before - layer.bytes_after for layer in layers),
        environment=environment(
            torch.device("cpu") if first is None else first.device,
            torch.get_default_dtype() if first is None else first.dtype,
        ),
        config=config,
        seconds=seconds,
    )


def _check_fresh(modules: Mapping[str, nn.Module], job: Job, owners: Mapping[int, Sequence[str]]) -> None:
    """Raise StalePlanError unless the model has the layer that the job was planned for."""
    found = job.found
    for name in found.names:
        if modules.get(name) is not found.module:
            raise StalePlanError(
                f"Layer {name or '(root)'!r} should be the one that was planned for. "
                f"Found {type(modules[name]).__name__ if name in modules else 'nothing'} there now: plan again."
            )
    reason = reason_against(found, owners)
    if reason is not None:
        raise StalePlanError(f"Layer {job.label!r} can no longer be replaced: {reason}. Plan again.")
    if fingerprint(found.current()) != job.fingerprint:
        raise StalePlanError(
            f"Layer {job.label!r} should have the weights that were planned for. Found that its weight or bias has "
            "changed, or has moved to another device or dtype: plan again."
        )


def _ready(job: Job, bias: nn.Parameter | None, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of the replacement with the layer's flags and this bias, which keeps its identity unless it is corrected.

    Of an adapted module, inside what else the module has: the very same, or copies by `memo`.
    """
    assert job.chosen is not None
    new = copy.deepcopy(job.chosen.module)
    assert new is not None
    take_flags(new, job.layer)
    if bias is None or not job.chosen.bias_corrected:
        new.set_bias(bias)
    return new if job.found.adapted is None else job.found.adapted.replaced(new, memo)
