"""What becomes of each selected layer: solved one after another in their shares of the time, and judged."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..config import AutoConfig, Config, DenseConfig, MaxError
from ..errors import CompressionError, ConfigError, InfeasibleError
from ..fitting import (
    Candidate,
    Chooser,
    ComputeAsked,
    Fitting,
    LayerInputs,
    Option,
    OutputError,
    WeightFitting,
    as_candidate,
    choose_compute,
    misses,
    seen_rows,
    solve,
    stored_bytes,
    weight_error,
)
from ..modules import Call, CompressedBilinear, CPBilinear, DenseBilinear, FoundLayer
from ..report import AS_CONFIGURED, Note
from ._allocate import allocate, best_within
from ._baselines import front, renewed
from ._distill import refine
from ._progress import ProgressBars
from ._verdict import Decision, cancelling, judge, keep

_DEFAULT_ROWS = 256
_MOST_ROWS = 2**15
_CLOSING = 0.1  # of a time budget, to compare what has been chosen with what the weight alone gives


@dataclass(frozen=True, eq=False)
class Request:
    """A selected layer, what is asked of it, and why it cannot be replaced, if so."""

    found: FoundLayer
    config: Config
    refusal: str | None


def check_calibrated(requests: Sequence[Request], calibrated: bool) -> None:
    """Raise ConfigError where an error on the outputs is asked for, and there are no inputs to have outputs for."""
    for request in requests:
        config = request.config
        rank = config.error if isinstance(config, AutoConfig) else getattr(config, "rank", None)
        if isinstance(rank, MaxError) and rank.on == "output" and not calibrated:
            raise ConfigError(f"{rank} needs `calibration`: inputs whose outputs can be compared. Found none.")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to solve and judge: arguments of `surgery.plan`, and `calibrated`, whether rows were taken."""

    calibrated: bool = False
    batch_size: int | None = None
    measure_latency: bool = True
    force: bool = False
    max_seconds: float | None = None
    compute: ComputeAsked = "on_the_fly"


@dataclass(eq=False)
class _Open:
    """A layer that an `AutoConfig` has still to choose for, and what there is to choose from."""

    number: int
    request: Request
    chooser: Chooser
    options: list[Option]


class Planner:
    """Decides on all requests; `decisions` has one for each, in their order."""

    def __init__(
        self,
        requests: Sequence[Request],
        inputs: Mapping[str, LayerInputs | None],
        owners: Mapping[int, Sequence[str]],
        options: Options,
        bars: ProgressBars,
    ) -> None:
        self._requests, self._inputs, self._owners, self._options = requests, inputs, owners, options
        open_ = [r for r in requests if r.refusal is None]
        solved = [r.found.layer for r in open_ if options.calibrated or not isinstance(r.config, DenseConfig)]
        automatic = any(isinstance(request.config, AutoConfig) for request in requests)
        self._seconds = _TimeShares(options.max_seconds, solved, _CLOSING if automatic else 0.0)
        self._progress = bars.parts("Solving", len(requests))
        self._bars = bars
        self._open: list[_Open] = []
        self._misfits: list[tuple[Config, ConfigError | None]] = []
        self._errors: dict[str, OutputError | None] = {}
        self.decisions: list[Decision] = []

    def run(self) -> list[Decision]:
        """Raises: ConfigError where a config's rank fits none of the layers that it is meant for."""
        for number, request in enumerate(self._requests):
            self.decisions.append(self._decided(number, request))
        for wanted, unfit in self._misfits:
            if unfit is not None and all(other is not None for config, other in self._misfits if config is wanted):
                raise unfit
        if self._open:
            self._comparing = self._bars.parts("Comparing", len(self._open))
        self._seconds = self._seconds.again([each.request.found.layer for each in self._open])
        for config in {id(each.request.config): each.request.config for each in self._open}.values():
            self._choose([each for each in self._open if each.request.config is config], config)
        return self.decisions

    def refined(
        self, model: nn.Module, batches: Sequence[Any], forward_fn: Call | None, seconds: float
    ) -> list[Decision]:
        """The decisions, with replacements that were trained to give the network's outputs; see `refinement.refine`."""
        replaced = {
            id(request.found.layer): (k, request, decision.replacement)
            for k, (request, decision) in enumerate(zip(self._requests, self.decisions, strict=True))
            if decision.replacement is not None
        }
        if not replaced:
            return self.decisions
        own = [key for key, (k, _, _) in replaced.items() if self.decisions[k].own_bias]
        modules = {key: module for key, (_, _, module) in replaced.items()}
        progress = self._bars.parts("Refining", 1)(0, "the network")

        def accept(changed: Mapping[int, CompressedBilinear]) -> bool:
            """Whether what was promised for single layers still holds."""
            return all(self._meets(replaced[key][1], module) for key, module in changed.items())

        found = refine(
            model,
            modules,
            batches,
            trained_bias=own,
            adapted={id(r.found.layer): r.found.adapted for r in self._requests if r.found.adapted is not None},
            forward_fn=forward_fn,
            seconds=max(seconds, 1e-3),
            progress=progress,
            accept=accept,
        )
        for key, (k, request, before) in replaced.items():
            module, decision = found.modules[key].train(request.found.layer.training), self.decisions[k]
            known: dict[str, Any] = {}
            if module is not before:
                fell = f"fell from {found.before:.3g} to {found.after:.3g}"
                note = Note("refined", f"refined: the network's error on held-out batches {fell}")
                if module.quantize is not None:
                    module.set_compute(before.compute, request.found.layer.weight.dtype)
                known = self._known_again(request.found, module)
                known["front"] = renewed(decision.report.front, known["weight_error"], known["output_error"])
            elif isinstance(module, DenseBilinear):
                note = Note("not_refined", "not refined, for it is dense")
            else:
                why = f"the network's error on held-out batches did not fall from {found.before:.3g}"
                note = Note("not_refined", f"not refined: {why}")
            before_it = [one for one in decision.report.notes if one != AS_CONFIGURED and one.code != "cancelling"]
            cancels = cancelling(known.get("amplification", decision.report.amplification))
            known["notes"] = (*before_it, *cancels, note)
            report = replace(decision.report, **known)
            self.decisions[k] = replace(decision, replacement=module, report=report)
        return self.decisions

    def _known_again(self, found: FoundLayer, module: CompressedBilinear) -> dict[str, Any]:
        """The figures of a report that its refined factors change."""
        measured = self._measured(found)
        known: dict[str, Any] = {"weight_error": weight_error(found.layer.weight.detach(), module)}
        known["output_error"] = None if measured is None else measured.of(module)
        if isinstance(module, CPBilinear):
            known["amplification"] = module.to_decomposition().amplification
        if module.quantize is not None:  # its parts are those of the factors before
            known |= {"truncation_error": None, "quantization_error": None}
        return known

    def _meets(self, request: Request, module: CompressedBilinear) -> bool:
        """Whether a replacement is within the error that its config allows, if any, or has been forced."""
        found, measured = request.found, self._measured(request.found)
        limit = self._limit(found, request.config)
        if limit is None or self._options.force:
            return True
        if limit.on == "weight" or measured is None:
            return weight_error(found.layer.weight.detach(), module) <= limit.error
        error = measured.of(module)
        return error is None or error <= limit.error

    def _decided(self, number: int, request: Request) -> Decision:
        """For a layer that is still to be chosen for, that it is kept."""
        found, wanted = request.found, request.config
        if request.refusal is not None:
            return keep(found, wanted, Note("not_replaceable", request.refusal))
        fitting = self._fitting(found)
        try:
            if found.adapted is not None:
                found.adapted.verify()
            with self._seconds.share(found.layer) as share:
                if isinstance(wanted, AutoConfig):
                    self._open.append(_Open(number, request, *self._tried(number, found, wanted, fitting, share)))
                    return keep(found, wanted, AS_CONFIGURED)
                progress = self._progress(number, found.label)
                candidate = solve(found.layer, wanted, share, progress, fitting)
        except ConfigError as error:
            misfit = ConfigError(str(error).replace("the weight", f"layer {found.label!r}"))
            self._misfits.append((wanted, misfit))
            return keep(found, wanted, Note("misfit", str(misfit)))
        except CompressionError as error:
            return keep(found, wanted, Note("infeasible", str(error)))
        self._misfits.append((wanted, None))
        measured = self._measured(found)
        candidate = self._computing(found, wanted, candidate, measured)
        return judge(
            found, wanted, candidate, measured, self._unreached(found), self._time_rows(found), self._options.force
        )

    def _computing(self, found: FoundLayer, config: Config, candidate: Candidate, on: OutputError | None) -> Candidate:
        """In the compute mode that was asked for, chosen on rows that the layer saw; the output error is of that."""
        asked, module = self._options.compute, candidate.module
        if asked == "on_the_fly" or module.quantize is None:
            return candidate
        objection, automatic = misses(self._limit(found, config), on), isinstance(config, AutoConfig)
        rows = seen_rows(found.layer, self._inputs.get(found.label), self._rows(found))
        timed = self._options.measure_latency
        # what a config of one rank misses is kept as it is; what was chosen to meet the limit goes on meeting it
        choice = choose_compute(module, asked, rows, timed=timed, objection=objection, strict=automatic)
        error = candidate.output_error
        if choice.compute == "int8" and error is not None and on is not None:
            error = on.of(module)
        return replace(candidate, compute_modes=choice.modes, output_error=error)

    def _limit(self, found: FoundLayer, config: Config) -> MaxError | None:
        """The error that a config allows the layer; None where it names none."""
        if isinstance(config, AutoConfig):
            seen = self._inputs.get(found.label)
            return config.limit(calibrated=seen is not None and seen.is_enough)
        rank = None if isinstance(config, DenseConfig) else config.rank
        return rank if isinstance(rank, MaxError) else None

    def _fitting(self, found: FoundLayer) -> Fitting | None:
        seen = self._inputs.get(found.label)
        if seen is None or not seen.is_enough:
            return None
        tied = found.layer.bias is not None and len(self._owners.get(id(found.layer.bias), ())) > 1
        # what is tied to the bias must not change with it
        return Fitting(found.layer, seen, fix_bias=not tied, held_out=lambda: self._measured(found))

    def _measured(self, found: FoundLayer) -> OutputError | None:
        """The error on held-out rows, whose exact outputs are computed once; None without rows."""
        if found.label not in self._errors:
            seen = self._inputs.get(found.label)
            self._errors[found.label] = None if seen is None else OutputError(found.layer, seen)
        return self._errors[found.label]

    def _unreached(self, found: FoundLayer) -> bool:
        return self._options.calibrated and self._inputs.get(found.label) is None

    def _rows(self, found: FoundLayer) -> int:
        seen = self._inputs.get(found.label)
        return self._options.batch_size or (min(seen.rows_per_call, _MOST_ROWS) if seen is not None else _DEFAULT_ROWS)

    def _time_rows(self, found: FoundLayer) -> int | None:
        return self._rows(found) if self._options.measure_latency else None

    def _tried(
        self, number: int, found: FoundLayer, config: AutoConfig, fitting: Fitting | None, share: float | None
    ) -> tuple[Chooser, list[Option]]:
        """The front of one layer, and who made it."""
        if not bool(found.layer.weight.detach().any()):
            raise InfeasibleError("its weight is all zero: nothing to decompose, and zero factors would never train")
        limit = config.limit(calibrated=fitting is not None)
        on_output = fitting is not None and not (limit is not None and limit.on == "weight")
        if limit is not None and limit.on == "output" and not on_output:
            raise InfeasibleError(f"{limit} needs calibration rows of the layer. Found too few or none.")
        chosen_by = fitting if on_output and fitting is not None else WeightFitting(found.layer)
        exact = config.prefer == "speed" and self._options.measure_latency  # it is made where it is measured faster
        chooser = Chooser(found.layer, chosen_by, share, self._progress(number, found.label), config.seed, exact)
        if limit is not None:
            chooser.within(limit.error, fast=config.prefer == "speed")
        else:
            assert config.fraction is not None
            chooser.sized(config.fraction, alone=self._count(config) == 1)
        return chooser, chooser.timed(self._rows(found)) if config.prefer == "speed" else chooser.options

    def _count(self, config: AutoConfig) -> int:
        return sum(request.config is config and request.refusal is None for request in self._requests)

    def _choose(self, layers: Sequence[_Open], config: Config) -> None:
        """One option for each of these layers, which an `AutoConfig` has in common."""
        assert isinstance(config, AutoConfig)
        fronts = {each.request.found.label: each.options for each in layers}
        limit = config.limit(calibrated=self._options.calibrated)
        try:
            if limit is not None:
                chosen = {name: best_within(options, limit.error, config.prefer) for name, options in fronts.items()}
            else:
                before = sum(stored_bytes(each.request.found.layer) for each in layers)
                chosen = allocate(fronts, int((config.fraction or 0) * before), config.prefer)
        except InfeasibleError as error:
            for each in layers:
                self._record(each, keep(each.request.found, config, Note("infeasible", str(error))), each.options[0])
            return
        for each in layers:
            self._settle(each, chosen[each.request.found.label], limit)

    def _settle(self, each: _Open, option: Option, limit: MaxError | None) -> None:
        found, config = each.request.found, each.request.config
        with self._seconds.share(found.layer) as share:
            better = each.chooser.assured(option, share, self._comparing(self._open.index(each), found.label))
        each.options[each.options.index(option)] = option = better
        if option.fitted is None or option.config is None:
            what = "faster" if isinstance(config, AutoConfig) and config.prefer == "speed" else "smaller"
            why = f"no {what} replacement meets the target" if limit else "the size allows to keep it"
            note = Note("out_of_reach" if limit else "within_size", f"{why} of {len(each.options) - 1} that were tried")
            decision = keep(found, config, note)
        else:
            candidate = as_candidate(found.layer, option.fitted)
            rows, unreached = self._time_rows(found), self._unreached(found)
            measured, force = self._measured(found), self._options.force
            candidate = self._computing(found, config, candidate, measured)
            decision = judge(found, option.config, candidate, measured, unreached, rows, force)
        self._record(each, decision, option)

    def _record(self, each: _Open, decision: Decision, chosen: Option) -> None:
        points = front(each.request.found.layer, each.options, chosen)
        self.decisions[each.number] = replace(decision, report=replace(decision.report, front=points))


class _TimeShares:
    """What is left of a time budget, shared among the layers that are left by the sizes of their weights."""

    def __init__(self, max_seconds: float | None, layers: Sequence[nn.Bilinear], reserve: float = 0.0) -> None:
        """`reserve` is the part of it that is kept for `again`."""
        self._reserve = None if max_seconds is None else reserve * max_seconds
        self._left = None if max_seconds is None or self._reserve is None else max_seconds - self._reserve
        self._sizes = {id(layer): layer.weight.numel() for layer in layers}

    def again(self, layers: Sequence[nn.Bilinear]) -> "_TimeShares":
        """What is left and the reserve, for these layers."""
        return _TimeShares(None if self._left is None or self._reserve is None else self._left + self._reserve, layers)

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
