"""The retry policy of a topic: a value, and one pure decision."""

from __future__ import annotations

import random as _random
from collections.abc import Callable
from dataclasses import dataclass

from .seconds import is_seconds

__all__ = ["RetryPolicy"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a failed message is tried again, and when it is given up.

    Raises:
        ValueError: what should be a number is none, negative or not finite.
        TypeError: `retry_for` or `give_up_for` is no tuple of exception classes.
    """

    #: Tries after the first one: 0 never, None for ever.
    max_retries: int | None = 3
    #: Errors worth another try. Everything else is fatal.
    retry_for: tuple[type[BaseException], ...] = (Exception,)
    #: Errors that are fatal although `retry_for` holds them.
    give_up_for: tuple[type[BaseException], ...] = ()
    #: Seconds: 0 tries again at once, at the tail of the queue; otherwise the longest
    #: wait before the first retry, doubled for each further one.
    backoff: float = 0.0
    #: Seconds that no wait exceeds. Default ten minutes, as Celery's `retry_backoff_max`.
    backoff_max: float = 600.0
    #: Spread each wait evenly between 0 and its length, so that what failed together does not return together.
    jitter: bool = True

    def __post_init__(self) -> None:
        if self.max_retries is not None and (
            isinstance(self.max_retries, bool) or not isinstance(self.max_retries, int) or self.max_retries < 0
        ):
            raise ValueError(
                f"`max_retries` must be 0 (never), a positive number, or None (for ever), got {self.max_retries!r}"
            )
        for name in ("backoff", "backoff_max"):
            seconds = getattr(self, name)
            if not is_seconds(seconds):
                raise ValueError(f"`{name}` must be seconds, 0 or more, got {seconds!r}")
        for name in ("retry_for", "give_up_for"):
            kinds = getattr(self, name)
            # A list would pass here and fail at the first error: `isinstance` wants a tuple.
            if not isinstance(kinds, tuple):
                raise TypeError(f"`{name}` must be a tuple of exception classes, got {kinds!r}")
            for kind in kinds:
                if not (isinstance(kind, type) and issubclass(kind, BaseException)):
                    raise TypeError(f"`{name}` must be a tuple of exception classes, it holds {kind!r}")

    def decide(
        self,
        error: BaseException,
        retries: int,
        max_retries: int | None = None,
        *,
        random: Callable[[], float] = _random.random,
    ) -> float | None:
        """Return the seconds to wait before the next try, or None to give up.

        Args:
            error: what the handler raised.
            retries: retries made so far: 0 when the first try failed.
            max_retries: the message's own limit; None: this policy's.
            random: a number in [0, 1), for the jitter.
        """
        limit = self.max_retries if max_retries is None else max_retries
        if not self.is_retryable(error) or (limit is not None and retries >= limit):
            return None
        return self.delay(retries, random=random)

    def is_retryable(self, error: BaseException) -> bool:
        """Whether another try might end differently."""
        return isinstance(error, self.retry_for) and not isinstance(error, self.give_up_for)

    def delay(self, retries: int, *, random: Callable[[], float] = _random.random) -> float:
        """Return the seconds to wait after `retries` retries: `backoff` doubled that often, capped, spread.

        Source of the full jitter: M. Brooker, "Exponential Backoff And Jitter", AWS, 2015.
        """
        # 2 ** 64 seconds outlast any cap, and a float overflows past 2 ** 1023.
        longest = min(self.backoff_max, self.backoff * 2.0 ** min(retries, 64))
        return longest * random() if self.jitter else longest
