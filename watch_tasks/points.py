"""Named points on a message's way where a process can be made to end at once, to see that nothing is lost by it.

    WATCH_CRASH_POINT=after_claim:n=3 celery -A watch_tasks worker

The variable names a point, and when: `n=3` the third time that a process comes by, `p=0.01:seed=7` by chance. With
`main` it takes the whole worker along: the main process and all its children. Several are parted by commas. It is read
when a worker starts, by nobody else; without it a point costs a call of nothing.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from .errors import ConfigurationError, did_you_mean

__all__ = ["POINTS", "VARIABLE", "Crash", "Trigger", "arm", "disarm", "reach", "read"]

#: Environment variable that arms points.
VARIABLE: Final = "WATCH_CRASH_POINT"

#: In the order in which a message comes by them. The first and the last are the main process's.
POINTS: Final = ("after_fetch", "after_claim", "in_handler", "after_effect", "after_commit", "before_ack")


class Crash(BaseException):
    """What a point raises instead of ending its process, in a test that runs in one process."""


@dataclass(frozen=True)
class Trigger:
    """Says at which of its visits a point acts."""

    point: str
    #: The number of the visit, or None: by chance.
    n: int | None = 1
    p: float = 1.0
    seed: int = 0
    #: Whether it ends the whole worker.
    main: bool = False
    _visits: itertools.count[int] = field(default_factory=lambda: itertools.count(1), compare=False, repr=False)
    _chance: list[random.Random] = field(default_factory=list, compare=False, repr=False)

    def is_due(self) -> bool:
        """Count a visit, and say whether this is the one."""
        if self.n is not None:
            return next(self._visits) == self.n
        if not self._chance:
            self._chance.append(random.Random(self.seed))  # noqa: S311 - no secret
        return self._chance[0].random() < self.p


def _off(point: str) -> None:
    """Do nothing."""


#: Called at each point with its name. Call it as `points.reach(…)`: what stands here changes when points are armed.
reach: Callable[[str], None] = _off


def read(text: str) -> list[Trigger]:
    """Return what the variable arms.

    Raises:
        ConfigurationError: it names no point, or says not when.
    """
    complaints: list[str] = []
    triggers = [trigger for part in text.split(",") if part.strip() and (trigger := _read(part.strip(), complaints))]
    if complaints:
        raise ConfigurationError(*complaints)
    return triggers


def _read(text: str, complaints: list[str]) -> Trigger | None:
    point, *options = text.split(":")
    if point not in POINTS:
        hint = did_you_mean(point, POINTS) or f"; there are {', '.join(POINTS)}"
        complaints.append(f"`{VARIABLE}` names no crash point `{point}`{hint}")
        return None
    n: int | None = None
    p: float | None = None
    seed, main = 0, False
    for option in options:
        name, _, value = option.partition("=")
        try:
            if name == "n" and int(value) > 0:
                n = int(value)
            elif name == "p" and 0 < float(value) <= 1:
                p = float(value)
            elif name == "seed":
                seed = int(value)
            elif option == "main":
                main = True
            else:
                raise ValueError
        except ValueError:
            complaints.append(
                f"`{VARIABLE}`: `{option}` of `{point}` is none of n=VISIT, p=CHANCE, seed=NUMBER and main"
            )
    if n is not None and p is not None:
        complaints.append(f"`{VARIABLE}`: `{point}` takes n or p, not both")
    if n is None and p is None:
        n = 1
    return Trigger(point, n, 1.0 if p is None else p, seed, main)


def arm(environ: Mapping[str, str] = os.environ, act: Callable[[Trigger], None] | None = None) -> None:
    """Arm the points that the environment names, in this process and those that it forks from now on.

    Args:
        environ: the environment.
        act: what a point does; by default it ends its process.

    Raises:
        ConfigurationError: the variable cannot be read.
    """
    global reach
    text = environ.get(VARIABLE)
    if not text:
        return
    triggers = read(text)
    main = os.getpid()
    do = act or (lambda trigger: _die(trigger, main))

    def armed(point: str) -> None:
        for trigger in triggers:
            if trigger.point == point and trigger.is_due():
                do(trigger)

    reach = armed


def disarm() -> None:
    """Turn all points off in this process."""
    global reach
    reach = _off


def _die(trigger: Trigger, main: int) -> None:
    """End this process, or the whole worker, as `kill -9` does; the standard error tells of it."""
    whole = " with its worker" if trigger.main else ""
    os.write(2, f"watch_tasks: crash point {trigger.point} ends process {os.getpid()}{whole}\n".encode())
    if trigger.main and main != os.getpid():
        # Stopped first, or it would replace the children that end before it.
        os.kill(main, signal.SIGSTOP)
    if trigger.main:
        for child in _children(main):
            if child != os.getpid():
                os.kill(child, signal.SIGKILL)
        os.kill(main, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _children(pid: int) -> list[int]:
    """Return the children of a process, where the system tells; others end by themselves without their parent."""
    try:
        files = list(Path(f"/proc/{pid}/task").glob("*/children"))
        return [int(child) for file in files for child in file.read_text().split()]
    except OSError:
        return []
