"""The command line: arguments and printing."""

import sys


def main() -> None:
    """Run the command line; see `_main.main`. Ctrl-C works from here on, while PyTorch is loaded too."""
    try:
        from ._main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("compress-bilinear: interrupted\n")
        raise SystemExit(130) from None
    run()
