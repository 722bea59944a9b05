"""Who is measured. Each has a module that a worker loads, and that sends when it is run as a program.

All of them get the same: as many processes that handle one message each at a time, late acks, no results, no events.
What else there is to set stands as they come.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Final

__all__ = ["ALL", "BROKER", "Contender", "broker_url"]

#: Names the server for a contender's module.
BROKER: Final = "SCORECARD_BROKER"

_CELERY: Final = ("celery", "-A", "{module}", "worker", "-P", "prefork", "-c", "{processes}", "-l", "WARNING")
_QUIET: Final = ("-n", "{name}@scorecard", "--without-gossip", "--without-mingle")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One library in one way of using it."""

    #: By which it is asked for, and known in JSON.
    name: str
    #: What heads its column in a table.
    title: str
    #: The same, standing alone.
    label: str
    #: The distribution whose version counts.
    distribution: str
    #: Below this package.
    module: str
    #: A worker of it, as arguments of `python -m`.
    command: tuple[str, ...]
    #: Whether it sends many at a time.
    is_bulk: bool = False
    #: When others get what a killed worker held, where that takes longer than anybody waits here.
    comes_back: str | None = None

    @property
    def path(self) -> str:
        """The module's full name."""
        return f"{__name__}.{self.module}"

    @property
    def is_installed(self) -> bool:
        """Whether it can run here."""
        return find_spec(self.distribution.replace("-", "_")) is not None

    @property
    def version(self) -> str:
        """The version that is installed."""
        return version(self.distribution)

    def worker(self, name: str, processes: int) -> list[str]:
        """Return the arguments of `python -m` for a worker of this name."""
        return [word.format(module=self.path, processes=processes, name=name) for word in self.command]


ALL: Final = (
    Contender(
        name="watch_tasks",
        title="watch_tasks",
        label="watch_tasks",
        distribution="watch-tasks",
        module="watch",
        command=(*_CELERY, *_QUIET),
    ),
    Contender(
        name="bulk",
        title="in bulk",
        label="watch_tasks, in bulk",
        distribution="watch-tasks",
        module="watch",
        command=(*_CELERY, *_QUIET),
        is_bulk=True,
    ),
    Contender(
        name="celery",
        title="Celery",
        label="Celery",
        distribution="celery",
        module="stock",
        command=(*_CELERY, *_QUIET),
        comes_back="when its visibility timeout is over, 1 h by default; not what was fetched and not yet noted",
    ),
    Contender(
        name="dramatiq",
        title="Dramatiq",
        label="Dramatiq",
        distribution="dramatiq",
        module="dramatiq_",
        command=("dramatiq", "{module}", "--processes", "{processes}", "--threads", "1"),
        comes_back="when its heartbeat timeout is over, 1 min by default, and another worker tidies up",
    ),
)


def broker_url() -> str:
    """Return the URL of the server, for a contender's module."""
    return os.environ[BROKER]
