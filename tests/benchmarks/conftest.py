"""Results of a run that never was."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.results import Result, Results

#: Contender, round, figures or error.
Found = tuple[str, int, dict[str, float] | str]


@pytest.fixture
def results_of() -> Callable[..., Results]:
    """Return what makes results of one scenario."""

    def make(scenario: str, *found: Found, pool: str = "solo") -> Results:
        return Results(
            machine={
                "processor": "Z80",
                "cores": 2,
                "load": 0.1,
                "system": "Linux 6",
                "python": "3.11.7",
                "server": "valkey 9.1.2",
            },
            versions={"celery": "5.7.0"},
            begun="2026-01-02 03:04 UTC",
            rounds=max(number for _, number, _ in found),
            seconds=2.0,
            found=[
                Result(
                    scenario=scenario,
                    contender=contender,
                    pool=pool,
                    round=number,
                    count=1000,
                    figures={} if isinstance(told, str) else told,
                    error=told if isinstance(told, str) else None,
                )
                for contender, number, told in found
            ],
        )

    return make
