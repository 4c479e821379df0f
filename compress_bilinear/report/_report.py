"""The report as users hold it: data that can be read, written and shown."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .._io import read_plain, written_atomically
from ..errors import CompressionError
from ._data import AS_CONFIGURED, Note, ReportData
from ._html import render_html
from ._text import render_markdown, render_text

SCHEMA_VERSION = 3
_DERIVED = ("schema_version", "reason")  # what no record has
_DROPPED = (*_DERIVED, "call", "backend", "compared", "resident_bytes")  # and what older schemas had


@dataclass(frozen=True, kw_only=True)
class Report(ReportData):
    """What compressing a model did, layer by layer.

    Attributes:
        layers: one `LayerReport` for each layer that was selected, in the model's order.
        model_bytes_before, model_bytes_after: parameters and buffers of the whole model.
        environment: device, dtype, threads and versions that the figures hold for.
        metric_before, metric_after: the caller's own task metric of the whole model; None where none was given.
        seconds: what each stage took: "calibrate", "fit", "choose", "judge" and "distil"; not part of equality.
        config: the recipe, as a recipe file has it (`config.parse_recipe`); empty where it is not known.
    """

    def __str__(self) -> str:
        return render_text(self, title="Compression report")

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; a figure that is not finite becomes None."""
        own = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        own["layers"] = [dataclasses.asdict(layer) | {"reason": layer.reason} for layer in self.layers]
        text = json.dumps({"schema_version": SCHEMA_VERSION, **own})
        plain: dict[str, Any] = json.loads(text, parse_constant=lambda name: None)  # NaN and Infinity
        return plain

    def to_json(self) -> str:
        """`to_dict()` as JSON; `schema_version` says how to read it."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Report":
        """The inverse of `to_dict()`; it reads older schemas too.

        Raises: CompressionError for a newer schema, or where a field is missing, unknown, or not of its type.
        """
        version = data.get("schema_version") if isinstance(data, Mapping) else None
        if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
            raise CompressionError(
                f"`schema_version` of a report should be an int from 1 to {SCHEMA_VERSION}. Found {version!r}."
            )
        return read_plain(cls, _current(data, version))

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The inverse of `to_json()`. Raises: CompressionError where the text is not such a report."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CompressionError(f"A report in JSON is required. Found text that is not JSON: {error}.") from error
        return cls.from_dict(data)

    def to_markdown(self) -> str:
        """A Markdown table, the reasons of kept layers, and the environment."""
        return render_markdown(self)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """A self-contained page below 2 MB that needs no network: summary, table, plots, environment and config.

        Args:
            path: a file to write the page to, whole or not at all.

        Raises: CompressionError where `path` cannot be a file.
        """
        if path is None:
            return render_html(self)
        with written_atomically(path) as temporary:  # checks the path before anything is drawn
            text = render_html(self)
            temporary.write_text(text, encoding="utf-8")
        return text


def _current(data: Mapping[str, Any], version: int) -> dict[str, Any]:
    """A report's dict, or a layer's in it, as the present schema has it. `reason` goes: `notes` are its source."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if key not in (_DROPPED if version < SCHEMA_VERSION else _DERIVED):
            is_list = isinstance(value, (list, tuple))
            found[key] = (
                [_current(one, version) if isinstance(one, Mapping) else one for one in value] if is_list else value
            )
    if version < SCHEMA_VERSION and "reason" in data:
        known = data["reason"] == AS_CONFIGURED.text
        found["notes"] = [dataclasses.asdict(AS_CONFIGURED if known else Note("text", data["reason"]))]
    return found
