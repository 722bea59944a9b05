"""A pytest plugin for those who want to see their own workers killed at the worst moments.

    # conftest.py
    pytest_plugins = ["watch_tasks.testing.plugin"]

It brings one fixture, `crash_point`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .. import points

__all__ = ["CrashPoints", "crash_point"]


class CrashPoints:
    """Makes processes end at a named point: other processes by their environment, or this one by an exception."""

    def __call__(
        self, point: str, *, n: int | None = None, p: float | None = None, seed: int | None = None, main: bool = False
    ) -> dict[str, str]:
        """Return what a worker's environment needs so that the point kills it, as `kill -9` does.

        Args:
            point: one of `watch_tasks.points.POINTS`.
            n: the visit at which it acts, counted in each process; the first one unless `p` is given.
            p: the chance of each visit instead.
            seed: of that chance.
            main: take the whole worker along, not only the process that comes by.

        Raises:
            ConfigurationError: there is no such point, or the numbers cannot be.
        """
        options = {"n": n, "p": p, "seed": seed}
        words = [point, *(f"{name}={value}" for name, value in options.items() if value is not None)]
        text = ":".join([*words, *(["main"] if main else [])])
        points.read(text)
        return {points.VARIABLE: text}

    def raises(self, point: str, *, n: int = 1) -> None:
        """Have the point raise `points.Crash` in this process, once, at its n-th visit; until the test ends.

        What calls the pipeline sees it, as it would see nothing of a process that is gone: no handler, no commit and
        no ack comes after it.
        """

        def act(trigger: points.Trigger) -> None:
            raise points.Crash(trigger.point)

        points.arm(self(point, n=n), act)


@pytest.fixture
def crash_point() -> Iterator[CrashPoints]:
    """Named points at which processes end."""
    yield CrashPoints()
    points.disarm()
