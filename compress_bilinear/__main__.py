"""`python -m compress_bilinear`."""

from .cli import main

main()
