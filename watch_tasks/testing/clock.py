"""A clock that stands still until a test moves it."""

from __future__ import annotations

__all__ = ["ManualClock"]


class ManualClock:
    """Seconds since the epoch; calling it tells the time.

    Args:
        start: the time it shows first; 2027-01-15 08:00 UTC by default.
    """

    def __init__(self, start: float = 1_800_000_000.0) -> None:
        self.now = start

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass; negative: set the clock back, as servers sometimes do."""
        self.now += seconds
