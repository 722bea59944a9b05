"""A storage in trouble."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from watch_tasks import MemoryStorage, StorageUnavailableError
from watch_tasks.storage.protocol import Claim, Commit, Granted, Refused
from watch_tasks.testing import ManualClock


class TroubledStorage(MemoryStorage):
    """Notes what it is asked, one entry a round trip. Is away for some of it, or answers it in vain.

    What is asked is called "claim", or by its commit's step: "mark", "handled", "dead", …
    """

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock=clock)
        self.log: list[str] = []
        #: Asked for these it is away: nothing is changed.
        self.away: set[str] = set()
        #: Asked for these it does it, and its answer is lost, once.
        self.loses: set[str] = set()

    def _claim(self, claims: Sequence[Claim]) -> list[Granted | Refused]:
        return self._trouble(["claim" for _ in claims], lambda: super(TroubledStorage, self)._claim(claims))

    def _commit(self, commits: Sequence[Commit]) -> list[bool]:
        return self._trouble([commit.step for commit in commits], lambda: super(TroubledStorage, self)._commit(commits))

    def _trouble(self, asked: list[str], answer: Callable[[], list[Any]]) -> list[Any]:
        self.log.append(" ".join(asked))
        if self.away.intersection(asked):
            raise StorageUnavailableError("away")
        answers = answer()
        if self.loses.intersection(asked):
            self.loses.clear()
            raise StorageUnavailableError("the answer was lost")
        return answers
