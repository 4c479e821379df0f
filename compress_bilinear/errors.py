"""What can go wrong. All errors are `CompressionError`, which is a `ValueError`."""

import difflib
from collections import abc


class CompressionError(ValueError):
    """Something was asked for that cannot be done; the message says what was required and what was found."""


class ConfigError(CompressionError):
    """A configuration that is invalid in itself or does not fit the layer it is meant for."""


class MatchError(CompressionError):
    """A name pattern that matches no layer; the message lists what there is."""


class InfeasibleError(CompressionError):
    """No rank meets the target: the error cannot be reached, or the size is too small for even rank 1."""


class StalePlanError(CompressionError):
    """The model has changed since it was planned for."""


class CheckpointError(CompressionError):
    """A file that is truncated, foreign, damaged, or made for another network."""


class InputError(CompressionError, RuntimeError):
    """Inputs that a layer cannot take. Also a `RuntimeError`, which is what `nn.Bilinear` raises here."""


class AmplificationWarning(UserWarning):
    """The components of a CP cancel, so that rounding its factors is amplified."""


def nearest(name: object, known: abc.Iterable[str]) -> str:
    """The end of a message about a name that is unknown: which of those that are known it is most like, if any."""
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f" Did you mean {near[0]}?" if near else ""
