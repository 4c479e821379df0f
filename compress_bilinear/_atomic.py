"""Writing files: whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import CompressionError


@contextmanager
def written_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`, to be written inside the block; it is renamed to `path` when the block ends well.

    Whatever fails, `path` is as it was and the temporary file is gone.

    Raises: CompressionError where the folder does not exist, or `path` is no regular file.
    """
    target = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    check_target(target)
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, mode)  # mkstemp and some writers make files that only their owner can read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def check_target(target: Path) -> None:
    """Raise CompressionError where the folder of a file to write does not exist, or the file is no regular one."""
    if not target.parent.is_dir():
        raise CompressionError(f"The folder of {str(target)!r} should exist. Found no folder {str(target.parent)!r}.")
    if target.exists() and not target.is_file():
        found = "a folder" if target.is_dir() else "a device, pipe or socket"
        raise CompressionError(f"{str(target)!r} should be a file to write. Found {found}.")


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
