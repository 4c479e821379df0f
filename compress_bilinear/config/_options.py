"""The keywords of `plan` and `compress`: named, described, defaulted and checked here only."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias, TypedDict, get_args

from ..errors import ConfigError, nearest
from ._methods import Compute, check_one_of

Evaluate: TypeAlias = Callable[[Any], float]
"""The caller's own task metric of a model."""

ComputeAsked: TypeAlias = Compute | Literal["fastest"]
COMPUTE_CHOICES = ("fastest", *get_args(Compute))


class PlanOptions(TypedDict, total=False):
    """What `plan` and `compress` take besides the model and its configs.

    Attributes:
        calibration: an iterable of what the model takes (a tensor, or a tuple or dict of its arguments), without
            labels. Factors are then fitted to the layers' outputs (unless their config says otherwise), and the report
            has output errors, on rows that no fit has seen.
        forward_fn: how to run the model on any other batch, for instance one with labels:
            `lambda model, batch: model(batch[0])`.
        loss_fn: instead, a scalar loss of model and batch, which may use labels. Layers are then fitted where the loss
            is most sensitive to their outputs.
        refine: "network" afterwards trains the factors of all replacements together, without labels, to give the
            original network's outputs on calibration batches, for as long as `max_seconds` leaves, or a minute.
        evaluate: your task metric of a model. The report of `apply` has it before and after. An
            `AutoConfig(metric_drop=...)` limits how far it falls; more of it is then better.
        batch_size: rows in a timed call. None takes the mean of the calibration's calls, or 256.
        measure_latency: False leaves out latencies and speedups, which saves a second or so for each layer.
        compute: how quantized layers compute: see `set_compute`. "fastest" times the modes on rows that the layer saw,
            or on Gaussian ones. So does None where latencies are measured, there is time, and no `metric_drop` has been
            met, but for bitsandbytes, whose import takes seconds. A layer without the mode decodes on the fly.
            Latencies, speedups and output errors are those of the mode. The report's `compute_modes` has what each mode
            would have given.
        compute_error: how far the fastest mode may change the outputs: ‖y − ŷ‖/‖ŷ − b‖ against those on the fly.
        force: make the replacement whatever the verdict. The report still says what was lost.
        max_seconds: for all of this together: calibrating, which cannot be cut, fitting, choosing, measuring and
            timing; half of what calibrating leaves is for `refine`, if there is any. Layers share it by their sizes,
            and each gets the best that was found in its part; what there is no time for is not timed. With a limit,
            results depend on the machine's speed. None sets no limit.
        progress: True shows a progress bar on stderr. None shows it on a terminal only.
    """

    calibration: Iterable[Any] | None
    forward_fn: Callable[[Any, Any], object] | None
    loss_fn: Callable[[Any, Any], object] | None
    refine: Literal["network"] | None
    evaluate: Evaluate | None
    batch_size: int | None
    measure_latency: bool
    compute: ComputeAsked | None
    compute_error: float
    force: bool
    max_seconds: float | None
    progress: bool | None


COMPUTE_ERROR = 0.01
_DEFAULTS: PlanOptions = {"measure_latency": True, "compute_error": COMPUTE_ERROR, "force": False}  # the others: None

TEXT_OPTIONS = ("batch_size", "measure_latency", "compute", "compute_error", "force", "max_seconds", "refine")
"""The options that a file can hold."""


def completed(options: PlanOptions) -> PlanOptions:
    """The options with every default filled in.

    Raises:
        TypeError: a keyword that there is not.
        ConfigError: a value that no model could be planned with.
    """
    known = PlanOptions.__annotations__
    for name in options:
        if name not in known:
            raise TypeError(f"Found a keyword argument {name!r}, which `PlanOptions` lacks.{nearest(name, known)}")
    given: PlanOptions = {**dict.fromkeys(known), **_DEFAULTS, **options}  # type: ignore[typeddict-item]
    batches = given["calibration"]
    listed = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if batches is not None and (not listed or isinstance(batches, (str, Mapping))):
        raise ConfigError(
            "`calibration` should be an iterable of batches, such as a list of tensors, or of tuples or dicts of the "
            f"model's arguments. Found {type(batches).__name__}."
        )
    size = given["batch_size"]
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ConfigError(f"`batch_size` should be a positive int or None. Found {size!r}.")
    check_max_seconds(given["max_seconds"])
    check_one_of(given["refine"], (None, "network"), "`refine`")
    if given["evaluate"] is not None and not callable(given["evaluate"]):
        raise ConfigError(f"`evaluate` should be a function of a model. Found {given['evaluate']!r}.")
    for name in ("forward_fn", "loss_fn", "refine"):
        if given[name] is not None and given["calibration"] is None:  # type: ignore[literal-required]
            raise ConfigError(f"`{name}` needs `calibration`, batches to run the model on. Found none.")
    check_compute(given["compute"], None)
    check_compute_error(given["compute_error"])
    if given["compute"] == "fastest" and not given["measure_latency"]:
        raise ConfigError("`compute='fastest'` is chosen by latencies. Found `measure_latency=False`.")
    return given


def not_default(options: PlanOptions) -> dict[str, Any]:
    """The options that a file can hold and that differ from their defaults."""
    return {name: options.get(name) for name in TEXT_OPTIONS if options.get(name) != _DEFAULTS.get(name)}


def check_compute(compute: object, *others: object) -> None:
    """Raise ConfigError unless `compute` is "fastest", a mode, or one of the others."""
    if compute == "resident":
        raise ConfigError("`compute='resident'` is no longer a mode: `cb.dequantize(model)` stores the floats instead.")
    check_one_of(compute, (*COMPUTE_CHOICES, *others), "`compute`")


def check_compute_error(error: object) -> None:
    """Raise ConfigError unless `error` is a number of at least 0."""
    if isinstance(error, bool) or not isinstance(error, (int, float)) or not error >= 0:
        raise ConfigError(f"`compute_error` should be a number of at least 0. Found {error!r}.")


def check_max_seconds(max_seconds: object) -> None:
    """Raise `ConfigError` unless `max_seconds` is None or a positive number."""
    if max_seconds is None:
        return
    if isinstance(max_seconds, bool) or not isinstance(max_seconds, (int, float)) or not max_seconds > 0:
        raise ConfigError(f"`max_seconds` should be a positive number or None. Found {max_seconds!r}.")
