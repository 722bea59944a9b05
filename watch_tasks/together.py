"""What became of messages that one process handles one after the other, recorded in one round trip."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Generic, TypeVar

from .errors import StorageUnavailableError
from .handlers import watchdog
from .pipeline import Pipeline
from .storage.protocol import Commit, Step
from .work import Settlement, Work

__all__ = ["Together", "settle_each"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
A = TypeVar("A")

#: Seconds that what is handled waits at most to be recorded together with others.
_TOGETHER: Final = 1.0


class Together(Generic[T, A]):
    """Keeps settlements until they are stored, in order.

    Args:
        pipeline: which the messages go through.
        settle: stores a group, and answers for each; as `Pipeline.settle`.
    """

    def __init__(self, pipeline: Pipeline, settle: Callable[[Sequence[Settlement]], Sequence[A]]) -> None:
        self._pipeline, self._settle = pipeline, settle
        #: Each ticket, with what storing its settlement came to.
        self.answers: list[tuple[T, A]] = []
        #: Those that are not stored yet.
        self._open: deque[tuple[T, Settlement]] = deque()
        #: Who stores.
        self._lock = threading.Lock()

    @contextmanager
    def for_a_while(self) -> Iterator[Callable[[], bool]]:
        """Handle messages for as long as what comes first may wait; then `settle`.

        Should a handler take longer, what was put before is stored meanwhile, in a thread of its own.

        Yields:
            what says whether there is time for another one.
        """
        until = time.monotonic() + _TOGETHER
        with watchdog.report(_TOGETHER, self._settle_early):
            yield lambda: time.monotonic() < until

    def put(self, ticket: T, settlement: Settlement) -> None:
        """Have this stored, with the next ones."""
        self._open.append((ticket, settlement))

    def settle(self) -> None:
        """Store what was put.

        Raises:
            Exception: as `settle` does; nothing is forgotten by it.
        """
        with self._lock:
            # More may be put meanwhile.
            part = list(self._open)
            answers = self._settle([settlement for _, settlement in part])
            self.answers += [(ticket, answer) for (ticket, _), answer in zip(part, answers, strict=True)]
            for _ in part:
                self._open.popleft()

    def give_back(self, works: Iterable[Work]) -> None:
        """Store what was put and give back what was not begun, in one go: this process is being ended.

        Never raises an error of the storage's: that would take the place of whatever ends the process.
        """
        commits = [settlement.commit for _, settlement in list(self._open) if not settlement.is_stored]
        commits += [work.commit(Step.RELEASED) for work in works if work.token is not None]
        try:
            self._pipeline.storage.commit_many(commits)
        except StorageUnavailableError:
            pass  # their leases end by themselves
        except Exception:
            logger.exception("could not store %d commits together, storing each alone", len(commits))
            self._give_back_each(commits)

    def _give_back_each(self, commits: Sequence[Commit]) -> None:
        for commit in commits:
            try:
                self._pipeline.storage.commit_many([commit])
            except StorageUnavailableError:
                return
            except Exception:
                logger.exception("could not store what became of message %s", commit.id)

    def _settle_early(self) -> None:
        try:
            self.settle()
        except Exception:
            logger.exception("could not record what was handled; it is tried again with what follows")


def settle_each(
    settle: Callable[[Sequence[Settlement]], Sequence[A]], settlements: Sequence[Settlement]
) -> Sequence[A | Exception]:
    """Store settlements together; and each alone where that fails, since one of them may be to blame.

    Returns:
        What `settle` answers for each, or the error that it raises for that one alone.
    """
    try:
        return settle(settlements)
    except Exception as exc:  # noqa: BLE001 - whoever takes it decides
        if len(settlements) == 1:
            return [exc]
        return [answer for settlement in settlements for answer in settle_each(settle, [settlement])]
