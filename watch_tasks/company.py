"""Who handles messages in this process now: many side by side, or one alone."""

from __future__ import annotations

import threading
import time

__all__ = ["Company"]


class Company:
    """Lets many threads in at once, or one alone. As a context manager: in company."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._is_alone = False
        #: How many wait to be alone: until they were, nobody else comes in.
        self._waiting = 0

    def __enter__(self) -> None:
        with self._changed:
            while self._is_alone or self._waiting:
                self._changed.wait()
            self._inside += 1

    def __exit__(self, *exc_info: object) -> None:
        with self._changed:
            self._inside -= 1
            self._is_alone = False
            self._changed.notify_all()

    def stay_alone(self) -> bool:
        """Be alone from now on, if nobody else is inside; for who is inside."""
        with self._changed:
            self._is_alone = self._inside == 1
            return self._is_alone

    def enter_alone(self, seconds: float) -> bool:
        """Wait for the others to leave, and come in alone; `__exit__` leaves.

        Returns:
            False if they have not left in time: the caller is not inside.
        """
        end = time.monotonic() + seconds
        with self._changed:
            self._waiting += 1
            try:
                while self._inside:
                    left = end - time.monotonic()
                    if left <= 0:
                        return False
                    self._changed.wait(left)
                self._inside, self._is_alone = 1, True
                return True
            finally:
                self._waiting -= 1
                self._changed.notify_all()
