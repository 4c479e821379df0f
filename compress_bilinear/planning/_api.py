"""`plan` and `compress`: check everything, solve and measure everything, then only swap."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from typing_extensions import Unpack

from ..config import (
    AutoConfig,
    Config,
    Evaluate,
    MaxError,
    MaxSize,
    PlanOptions,
    by_glob,
    completed,
    not_default,
    plain,
)
from ..decomposition import Budget
from ..errors import ConfigError
from ..fitting import Job, Search, environment, stored_bytes, task_metric
from ..modules import parameter_owners
from ..report import FrontPoint, Report, render_text
from ._choose import choose
from ._execute import called_check, check_fresh, check_same_weight, copied, swapped
from ._planner import Times, aim_all, calibrate, distil_all, find_jobs, fit_all, judge_all
from ._progress import ProgressBars

_Model = TypeVar("_Model", bound=nn.Module)


class Plan(Generic[_Model]):
    """What `compress` would do to a model: solved, checked and measured, and nothing changed yet.

    `print(plan)` shows it; `plan.report` is the same as data; `plan.apply()` carries it out; `plan.at(size=1/16)` is
    another plan in a fraction of the time. For that, a plan with an `AutoConfig` holds about twice the bytes of the
    layers' weights, and their calibration rows.
    """

    report: Report

    def __init__(
        self,
        model: _Model,
        configs: Mapping[str, Config | None],
        options: PlanOptions,
        undecided: Sequence[Job],  # before anything is chosen
        searches: Mapping[Job, Search],  # of those with an `AutoConfig`
        unknown: tuple[str, ...],  # sentences of `find_jobs`
        first: list[Any],  # batch of the calibration
        batches: list[Any],
    ) -> None:
        """Nothing is chosen yet: see `_decided`."""
        self.model = model
        self._configs, self._options = configs, options
        self._undecided, self._searches = undecided, searches
        self._unknown, self._first, self._batches = unknown, first, batches
        self._jobs: Sequence[Job] = ()

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
            CompressionError: the model cannot be copied; `inplace=True` where the model itself is the layer; or the
                compressed model fails on the first calibration batch, or does not call its replacements there.
        """
        replaced = [job for job in self._jobs if job.chosen is not None]
        owners = parameter_owners(self.model)
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for job in replaced:
            check_fresh(modules, job, owners)
        evaluate = self._options["evaluate"]
        before = None if evaluate is None else task_metric(evaluate, self.model)
        check_called = called_check(self.model, replaced, self._first, self._options)
        if not inplace:
            compressed = copied(self.model, replaced)
            check_called(compressed)
            return compressed, self._evaluated(before, compressed)
        undo = swapped(self.model, replaced)
        try:
            check_called(self.model)
            return self.model, self._evaluated(before, self.model)
        except BaseException:
            undo()  # a metric that fails leaves the model as it was too
            raise

    def _evaluated(self, before: float | None, compressed: _Model) -> Report:
        evaluate = self._options["evaluate"]
        if evaluate is None:
            return self.report
        return replace(self.report, metric_before=before, metric_after=task_metric(evaluate, compressed))

    @torch.inference_mode(False)
    def at(
        self,
        *,
        size: MaxSize | float | None = None,
        error: MaxError | float | None = None,
        metric_drop: float | None = None,
        max_seconds: float | None = None,
    ) -> "Plan[_Model]":
        """Another plan, with another target for every `AutoConfig`; what was predicted and made is not done again.

        Args:
            size, error, metric_drop: one of them, as of an `AutoConfig`. What other configs asked for stays.
            max_seconds: for this plan.

        Raises:
            ConfigError: no layer has an `AutoConfig`, or the tables are not of the errors that `error` counts on.
            StalePlanError: a layer has changed since its tables were made.
        """
        if not self._searches:
            raise ConfigError("`at` needs a plan in which an AutoConfig is fitted to some layer. Found none.")
        target: dict[str, Any] = {"size": size, "error": error, "metric_drop": metric_drop}
        new = {
            id(config): replace(config, **target) if isinstance(config, AutoConfig) else config
            for config in self._configs.values()
        }
        configs = {glob: new[id(config)] for glob, config in self._configs.items()}
        _check_metric(configs.values(), self._options["evaluate"])
        jobs = {job: job.again(new[id(job.config)] or job.config) for job in self._undecided}
        searches = {jobs[job]: search for job, search in self._searches.items()}
        for job, search in searches.items():
            check_same_weight(job)
            if job.limit is not None and (job.limit.on == "output") != search.fitting.on_output:
                raise ConfigError(
                    f"The plan should have been made for errors of the {job.limit.on}. Found that layer {job.label!r} "
                    f"has those of the {'output' if search.fitting.on_output else 'weight'}: plan again."
                )
        options: PlanOptions = {**self._options, "max_seconds": max_seconds}
        other = Plan(
            self.model, configs, options, tuple(jobs.values()), searches, self._unknown, self._first, self._batches
        )
        whole = Budget(max_seconds)
        with ProgressBars(options["progress"]) as bars:
            times = Times.of(whole, other._undecided, options)
            with bars.stage("fit"):
                aim_all(searches, times.solving, bars)
            return other._decided(times, bars)

    def _decided(self, times: Times, bars: ProgressBars) -> "Plan[_Model]":
        """The plan itself, after choosing, judging and distilling."""
        model, options = self.model, self._options
        again = {job: job.again(job.config) for job in self._undecided}
        jobs, searches = tuple(again.values()), {again[job]: search for job, search in self._searches.items()}
        with bars.stage("choose"):
            choose(model, jobs, searches, options, times.solving, bars)
        with bars.stage("judge"):
            judge_all(jobs, options, times, bars)
        if options["refine"] is not None:
            with bars.stage("distil"):
                distil_all(model, jobs, self._batches, options, times, bars)
        for job in (*jobs, *(job for job in self._undecided if job not in self._searches)):
            job.release()
        self.report = _report(model, jobs, self._unknown, plain(self._configs, not_default(options)), bars.seconds)
        self._jobs = jobs
        return self


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
    if given["compute"] not in (None, "on_the_fly") and not any(
        isinstance(each, AutoConfig) or getattr(each, "quantize", None) for each in configs.values()
    ):
        raise ConfigError(f"`compute={given['compute']!r}` needs a config with `quantize`. Found none.")
    _check_metric(configs.values(), given["evaluate"])
    whole = Budget(given["max_seconds"])
    jobs, unknown = find_jobs(model, configs, calibrated=given["calibration"] is not None)
    with ProgressBars(given["progress"]) as bars:
        with bars.stage("calibrate"):
            first, batches = calibrate(model, jobs, given, bars)
            times = Times.of(whole, jobs, given)
        with bars.stage("fit"):
            searches = fit_all(jobs, given, times.solving, bars)
        given["calibration"] = None  # a plan should not hold a data set
        return Plan(model, configs, given, jobs, searches, unknown, first, batches)._decided(times, bars)


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


def _check_metric(configs: Iterable[Config | None], evaluate: Evaluate | None) -> None:
    """Raise ConfigError where a config's limit on the metric cannot be measured."""
    limits = {id(config) for config in configs if isinstance(config, AutoConfig) and config.metric_drop is not None}
    if limits and evaluate is None:
        raise ConfigError("`metric_drop` needs `evaluate`, the network's metric as a function of it. Found none.")
    if len(limits) > 1:
        raise ConfigError(
            f"`metric_drop` should be in one config, for one network has one metric. Found {len(limits)}."
        )


def _report(
    model: nn.Module,
    jobs: Sequence[Job],
    unknown: tuple[str, ...],
    config: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> Report:
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
        unknown=unknown,
    )
