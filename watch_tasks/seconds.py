"""Whether what somebody gave is a number of seconds."""

from __future__ import annotations

import math

__all__ = ["CENTURY", "is_seconds"]

#: Seconds in a hundred years: what is later than that is no time any more to a calendar.
CENTURY = 36525 * 86400.0


def is_seconds(value: object, least: float = 0.0) -> bool:
    """Say whether this is a finite number, `least` or more. A bool is none, nor is a string of digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and value >= least
