"""A job: a selected layer on its way through the pipeline."""

from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn

from ..config import AutoConfig, Config, MaxError
from ..modules import CompressedBilinear, FoundLayer
from ..report import LayerReport, Note
from ._calibrate import LayerInputs
from ._candidate import Candidate
from ._measure import OutputError

_DEFAULT_ROWS = 256  # of a timed call, where no calibration says how many rows come together
_MOST_ROWS = 2**15


@dataclass(eq=False, kw_only=True)
class Job:
    """A selected layer, its config, its inputs and the reason against it; each stage of the pipeline adds its part.

    Attributes:
        found: the layer and where the model has it.
        config: what the user wants for it.
        reason: why the layer is kept, as soon as that is known; None while it may be replaced.
        tied_bias: whether something else in the model has the same bias, which then must not change.
        inputs: what calibration saw of the layer; None without calibration or where no row reached it.
        calibrated: whether there was a calibration at all.
        candidates: what there is to choose from.
        chosen: one of these, or a better one of its size; None until then.
        notes: what else the report should say of the replacement.
        report: what became of the layer, and what that cost.
        fingerprint: of the weights that the replacement was made for.
    """

    found: FoundLayer
    config: Config
    reason: Note | None = None
    tied_bias: bool = False
    inputs: LayerInputs | None = None
    calibrated: bool = False
    candidates: list[Candidate] = field(default_factory=list)
    chosen: Candidate | None = None
    notes: tuple[Note, ...] = ()
    report: LayerReport | None = None
    fingerprint: tuple[object, ...] = ()

    @property
    def layer(self) -> nn.Bilinear:
        """The layer itself."""
        return self.found.layer

    @property
    def label(self) -> str:
        """Its name in messages."""
        return self.found.label

    @property
    def module(self) -> CompressedBilinear | None:
        """The chosen replacement; None where the layer is kept, or nothing is chosen yet."""
        return None if self.chosen is None else self.chosen.module

    @property
    def is_open(self) -> bool:
        """Whether the layer may still be replaced."""
        return self.reason is None

    @property
    def has_rows(self) -> bool:
        """Whether there are rows enough to fit to."""
        return self.inputs is not None and self.inputs.is_enough

    @property
    def limit(self) -> MaxError | None:
        """The error that the config allows; None where it names none."""
        if isinstance(self.config, AutoConfig):
            return self.config.limit(calibrated=self.has_rows)
        rank = getattr(self.config, "rank", None)
        return rank if isinstance(rank, MaxError) else None

    @cached_property
    def held_out(self) -> OutputError | None:
        """The error on held-out rows; their exact outputs are computed once. None without rows."""
        return None if self.inputs is None else OutputError(self.layer, self.inputs)

    def again(self, config: Config) -> "Job":
        """The same job, before anything was chosen, with another config."""
        other = replace(self, config=config)
        other.__dict__["held_out"] = self.held_out
        return other

    def rows(self, batch_size: int | None) -> int:
        """Rows of a timed call: as many as asked for, or as a call of the calibration had."""
        seen = None if self.inputs is None else min(self.inputs.rows_per_call, _MOST_ROWS)
        return batch_size or seen or _DEFAULT_ROWS

    def release(self) -> None:
        """Drop what only the pipeline needs: rows, exact outputs, and candidates that were not chosen."""
        self.inputs, self.candidates = None, []
        self.__dict__.pop("held_out", None)
        if self.chosen is not None:
            self.chosen = replace(self.chosen, fitted=None)
