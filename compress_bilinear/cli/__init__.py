"""The command line: argument parsing only."""

from ._main import main

__all__ = ["main"]
