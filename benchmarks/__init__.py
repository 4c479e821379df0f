"""Cases, contestants and timed runs; nothing here is part of the package."""
