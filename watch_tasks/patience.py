"""Asking a storage that is away again and again, until it answers or the worker is asked to stop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, TypeVar

from .errors import StorageUnavailableError

__all__ = ["Patience"]

logger = logging.getLogger(__name__)

R = TypeVar("R")

#: Seconds between two tries: the first, doubled up to the last.
_PAUSES: Final = (0.05, 2.0)


class Patience:
    """Calls until the storage answers.

    Args:
        stopping: whether the worker is asked to stop.
        pause: waits for some seconds.
    """

    def __init__(self, stopping: Callable[[], bool], pause: Callable[[float], object]) -> None:
        self._stopping, self._pause = stopping, pause

    def __call__(self, call: Callable[[], R]) -> R:
        """Return what the call returns.

        Raises:
            StorageUnavailableError: the storage does not answer, and the worker is asked to stop.
        """
        pause, longest = _PAUSES
        while True:
            try:
                return call()
            except StorageUnavailableError as exc:
                if self._stopping():
                    raise
                logger.warning("the storage is away, trying again in %.2g s: %s", pause, exc)
                self._pause(pause)
                pause = min(pause * 2, longest)
