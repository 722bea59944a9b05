"""How many messages a worker takes in hand beyond those that run: as many as it will be done with in a moment.

Celery's prefetch limit is one number for all handlers. For quick ones it must be large, or each message waits for its
own way from the broker; for slow ones small, or messages wait in one worker while others have nothing to do. So what is
set holds for slow ones, and is raised for as long as all are quick.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

__all__ = ["FADE", "SPAN", "Appetite"]

#: Seconds of work that lies ready for each process.
SPAN: Final = 0.05
#: What part of the seconds of a slow message is expected of the next one.
FADE: Final = 0.98
#: Seconds that a quick message takes at most.
_QUICK: Final = 0.01
#: Seconds from which on one is so slow that nobody shall wait behind it.
_SLOW: Final = 1.0
#: Messages for each process at most, and bytes of all.
_MOST: Final = 100
_MOST_BYTES: Final = 8 * 1024 * 1024


class Appetite:
    """The raise of a consumer's prefetch limit.

    Args:
        qos: returns the limit, of kombu's kind; None: it is not to be changed.
    """

    def __init__(self, qos: Callable[[], Any]) -> None:
        self._qos = qos
        #: Seconds that the next message may take, and bytes: the most of late.
        self._pace, self._size = math.inf, 0.0
        #: By how much it is raised; and messages since then, each of which is worth one more.
        self._raised = self._earned = 0

    def told(self, seconds: float, size: int = 0) -> None:
        """Take note of how long a message took, or has taken so far, and of its bytes."""
        self._pace = seconds if self._pace == math.inf else max(seconds, self._pace * FADE)
        self._size = max(size, self._size * FADE)
        self._earned += 1

    def fit(self, at_once: int) -> None:
        """Raise the limit to what suits the pace, or lower it.

        Args:
            at_once: how many run at a time.
        """
        qos = self._qos()
        if qos is None or not qos.value:  # 0 is no limit
            return
        wanted = min(int(SPAN / self._pace), _MOST) * at_once if self._pace < _QUICK else 0
        # Not all at once: what comes next may be larger than what came before.
        wanted = min(wanted, int(_MOST_BYTES / max(self._size, 1)), self._raised + self._earned)
        if wanted > self._raised:
            before = qos.value
            # A limit of Celery's may keep it lower.
            self._raised += qos.increment_eventually(wanted - self._raised) - before
            self._earned = 0
        elif wanted < self._raised / 2:  # not for each little change
            qos.decrement_eventually(self._raised - wanted)
            qos.update()  # at once: what goes back now must not be fetched again
            self._raised, self._earned = wanted, 0

    def most_waiting(self, at_once: int) -> float:
        """Return how many may wait beside those that run: behind a slow one, no more than was set; else any number."""
        qos = self._qos()
        is_free = qos is None or not qos.value or self._pace < _SLOW or self._pace == math.inf
        return math.inf if is_free else max(int(qos.value) - at_once, 0)

    def let_go(self) -> None:
        """Begin anew: the connection was lost, and the limit of the next one is what was set."""
        self._raised = self._earned = 0
