"""From a config to candidates for one layer."""

from collections.abc import Sequence

from torch import nn

from ..config import AutoConfig, DenseConfig, LayerConfig, MaxError, MaxSize, PlanOptions
from ..decomposition import Budget
from ..errors import InfeasibleError
from ..modules import method_of
from ._candidate import Candidate
from ._fit_outputs import OutputFitting
from ._fit_weight import WeightFitting, check_not_zero
from ._held_out import FEWEST_ROWS
from ._job import Job
from ._measure import bias_bytes, stored_bytes
from ._search import Search, settle
from ._work import FIRST_SIZE


def fit(job: Job, budget: Budget, options: PlanOptions) -> Search | None:
    """Fill `job.candidates` with what its config asks for.

    Returns the search of an `AutoConfig`, which has predicted candidates and makes those that are picked.

    Raises:
        ConfigError: the config's rank does not fit the layer.
        InfeasibleError: no rank meets the target, or the weight is all zero.
        CompressionError: no factors are within the range of the layer's dtype.
    """
    outputs = None
    if job.inputs is not None and job.has_rows:
        outputs = OutputFitting(job.layer, job.inputs, fix_bias=not job.tied_bias, held_out=job.held_out)
    if not isinstance(job.config, AutoConfig):
        job.candidates = [solve(job.layer, job.config, budget, outputs, where=f"layer {job.label!r}")]
        return None
    config, limit = job.config, job.limit
    check_not_zero(job.layer)
    if limit is not None and limit.on == "output" and outputs is None:
        raise _too_few_rows(limit)
    by_weight = limit is not None and limit.on == "weight"
    fitting = WeightFitting(job.layer) if by_weight or outputs is None else outputs
    search = Search(fitting, budget, config.seed, exact=config.prefer == "speed" and options["measure_latency"])
    aim(search, job)
    return search


def aim(search: Search, job: Job) -> None:
    """Predict for the target of the job's `AutoConfig`; fills `job.candidates`."""
    assert isinstance(job.config, AutoConfig)
    fraction = job.config.fraction or (None if job.limit is not None else FIRST_SIZE)
    size = None if fraction is None else fraction * search.candidates[0].bytes
    search.predict(size, None if job.limit is None else job.limit.error)
    job.candidates = search.candidates


def solve(
    layer: nn.Bilinear,
    config: LayerConfig,
    budget: Budget | None = None,
    outputs: OutputFitting | None = None,
    where: str = "the weight",
) -> Candidate:
    """The candidate that a config asks for; `layer` is left as it is, and errors call it `where`.

    `outputs` fits candidates to the layer's outputs, where there are rows to fit to.

    Raises: as `fit`.
    """
    budget = budget or Budget()
    if isinstance(config, DenseConfig):
        return (outputs or WeightFitting(layer)).dense(config, budget)
    check_not_zero(layer)
    method_of(config).check(config.rank, layer.weight.shape, where)
    if isinstance(config.rank, MaxError):
        if config.rank.on == "weight":
            return WeightFitting(layer).within(config, config.rank.error, budget)
        if outputs is None:
            raise _too_few_rows(config.rank)
        return _smallest_on_output(config, config.rank.error, outputs, budget)
    fitting = WeightFitting(layer) if outputs is None or config.fit == "weight" else outputs
    rank = without_bias(config.rank, layer) if isinstance(config.rank, MaxSize) else config.rank
    return fitting.at(config, rank, budget)


def without_bias(target: MaxSize, layer: nn.Bilinear) -> MaxSize:
    """A layer's size as a fraction of its weight: the bias is stored as it is, and the weight has what is left."""
    bias, total = bias_bytes(layer), stored_bytes(layer)
    left = target.fraction * total - bias
    if left <= 0:
        raise InfeasibleError(
            f"MaxSize({target.fraction:g}) of the layer is too small beside its bias: the bias alone takes "
            f"{bias} bytes, and {int(target.fraction * total)} of the layer's {total} are allowed."
        )
    return MaxSize(min(left / (total - bias), 1 - 1e-9))


def _smallest_on_output(config: LayerConfig, limit: float, outputs: OutputFitting, budget: Budget) -> Candidate:
    """The smallest candidate of this method whose output error is at most `limit`."""
    search = Search(outputs, budget.child(0.8, (0.0, 0.8)), getattr(config, "seed", 0), only=config)
    search.predict(limit=limit)
    (found,) = settle([search], lambda lists: [smallest_within(candidates, limit) for candidates in lists])
    if found.config is None:
        others = [each for each in search.candidates if each.config is not None]
        made = [each for each in others if not each.predicted]
        what = "the lowest that was found is" if made else "the lowest that is predicted is about"
        raise InfeasibleError(
            f"An output error of {limit:g} is out of reach of a {method_of(config).name} that is smaller than the "
            f"layer, or was not met in time: {what} {min((each.error for each in made or others), default=1.0):.3g}."
        )
    return search.polish(found, budget.child(1.0, (0.8, 1.0)), more=False)


def smallest_within(candidates: Sequence[Candidate], limit: float) -> Candidate:
    """The smallest candidate whose error is at most `limit`; keeping the layer always is one."""
    return min((each for each in candidates if each.error <= limit), key=lambda each: (each.bytes, each.error))


def _too_few_rows(limit: object) -> InfeasibleError:
    return InfeasibleError(
        f"{limit} needs calibration rows of the layer, at least {FEWEST_ROWS}. Found too few or none."
    )
