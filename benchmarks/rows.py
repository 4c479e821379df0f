"""Rows of results, and the CSV files that they are committed in."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress_bilinear._io import written_atomically

Row = dict[str, Any]


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[Row], facts: Mapping[str, Any], keys: Sequence[str] = ()) -> list[Row]:
    """Write the rows, each with the facts about where it was measured; the file is whole at any time.

    Args:
        keys: rows that the file has already, and that differ from every new one in these columns, stay, before them.

    Returns: all rows of the file.
    """
    new = {tuple(str(row[key]) for key in keys) for row in rows}
    kept: list[Row] = [row for row in read(path) if tuple(row[key] for key in keys) not in new] if keys else []
    whole = [*kept, *(row | dict(facts) for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        columns = dict.fromkeys(key for row in whole for key in row if key not in facts)
        writer = csv.DictWriter(file, [*columns, *facts], restval="")
        writer.writeheader()
        writer.writerows(whole)
    return whole
