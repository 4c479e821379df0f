"""The command line: argument parsing only."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; see `_main.main`. Ctrl-C is answered from here on, while PyTorch is being loaded too."""
    try:
        from ._main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("compress-bilinear: interrupted\n")
        raise SystemExit(130) from None
    run()
