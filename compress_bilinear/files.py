"""Writing files: whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import CompressionError


@contextmanager
def written_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`, to be written inside the block; it is renamed to `path` when the block ends well.

    Whatever fails, `path` is as it was and the temporary file is gone.

    Raises: CompressionError where the folder does not exist, or `path` is a folder.
    """
    target = Path(path)
    check_target(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = (target if target.exists() else temporary).stat().st_mode & 0o777
        yield temporary
        os.chmod(temporary, mode)  # some writers make files that only their owner can read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def check_target(target: Path) -> None:
    """Raise CompressionError where the folder of a file to write does not exist, or the file is a folder."""
    if not target.parent.is_dir():
        raise CompressionError(f"The folder of {str(target)!r} should exist. Found no folder {str(target.parent)!r}.")
    if target.is_dir():
        raise CompressionError(f"{str(target)!r} should be a file to write. Found a folder.")
