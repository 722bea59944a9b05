"""For the tests of those who use or extend this package: conformance suites and a clock.

A backend of your own passes the suite of its kind: subclass it, give it one fixture. The suites need pytest and
Hypothesis, which are imported with them only.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .clock import ManualClock

if TYPE_CHECKING:
    from .queue import QueueSuite as QueueSuite
    from .storage import StorageSuite as StorageSuite

__all__ = ["ManualClock", "QueueSuite", "StorageSuite"]

_SUITES = {"QueueSuite": ".queue", "StorageSuite": ".storage"}


def __getattr__(name: str) -> Any:
    if name in _SUITES:
        return getattr(import_module(_SUITES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
