"""What the figures of a run come to: medians, spread, ratios within a round, and who is ahead."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .contenders import CONTENDERS, STOCK, WATCH, WATCH_BULK
from .results import Result, Results
from .scenarios import Kind, Scenario

PEERS = tuple(one.name for one in CONTENDERS if one.is_peer)
#: Who does not stand on Celery with our transport.
OTHERS = (STOCK.name, *PEERS)
#: Figures of which more is better; of all others, less is.
MORE_IS_BETTER = ("rate", "efficiency")
#: By what contenders are compared.
COMPARED = {
    Kind.SEND: ("rate",),
    Kind.HANDLE: ("rate",),
    Kind.LATENCY: ("p50", "p99"),
    Kind.MEMORY: ("idle", "peak", "growth"),
}


@dataclass
class Row:
    """A contender in one of its pools, over all rounds."""

    contender: str
    pool: str
    #: Round → figures by name.
    rounds: dict[int, dict[str, float]] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)
    #: What went wrong → the rounds in which it did.
    errors: dict[str, list[int]] = field(default_factory=dict)

    def values(self, name: str) -> dict[int, float]:
        return {number: figures[name] for number, figures in self.rounds.items() if name in figures}

    def median(self, name: str) -> float | None:
        return statistics.median(found) if (found := self.values(name).values()) else None

    def spread(self, name: str) -> tuple[float, float] | None:
        return (min(found), max(found)) if (found := self.values(name).values()) else None


def rows(results: Iterable[Result]) -> list[Row]:
    """Return a row for each contender and pool, in the order of contenders."""
    made: dict[tuple[str, str], Row] = {}
    for one in results:
        row = made.setdefault((one.contender, one.pool), Row(one.contender, one.pool))
        if one.error is None:
            row.rounds[one.round] = one.figures
            row.counts.append(int(one.figures.get("messages", one.count)))
        else:
            row.errors.setdefault(one.error, []).append(one.round)
    order = [one.name for one in CONTENDERS]
    return sorted(made.values(), key=lambda row: (order.index(row.contender), row.pool))


def best(rows: Iterable[Row], name: str) -> dict[int, float]:
    """Return the best value of each round among those rows."""
    choose: Callable[[float, float], float] = max if name in MORE_IS_BETTER else min
    found: dict[int, float] = {}
    for row in rows:
        for number, value in row.values(name).items():
            found[number] = choose(value, found.get(number, value))
    return found


def ratio(found: dict[int, float], base: dict[int, float]) -> float | None:
    """Return the median of the ratios within a round; None where no round has both, or a base is not above 0."""
    both = [number for number in found if number in base]
    if not both or any(base[number] <= 0 for number in both):
        return None
    return statistics.median(found[number] / base[number] for number in both)


def of(rows: Iterable[Row], contenders: Iterable[str]) -> list[Row]:
    names = tuple(contenders)
    return [row for row in rows if row.contender in names]


@dataclass(frozen=True)
class Comparison:
    """Another library beside ours in one figure of a scenario, each in the pool it is better in."""

    scenario: Scenario
    figure: str
    ours: str
    other: str
    #: Medians over the rounds.
    our_value: float
    other_value: float
    #: How many times as good the other one is: above 1 it is ahead. None where that cannot be said, as of growth
    #: that is below zero.
    times: float | None
    #: In how many of the rounds that both have the other one was better.
    ahead_in: int
    rounds: int

    @property
    def is_lost(self) -> bool:
        """Whether the other one is ahead of ours, by its median or within the rounds."""
        if self.times is not None and self.times > 1:
            return True
        if self.figure in MORE_IS_BETTER:
            return self.other_value > self.our_value
        return self.other_value < self.our_value


def compare(results: Results, scenarios: Iterable[Scenario]) -> list[Comparison]:
    """Compare ours with every other library, figure by figure; what failed in all rounds is left out.

    Where messages in bulk were measured too, those are compared as well.
    """
    made = []
    for scenario in scenarios:
        table = rows(results.of(scenario.name))
        for figure in COMPARED[scenario.kind]:
            for ours in (WATCH.name, WATCH_BULK.name):
                mine = best(of(table, [ours]), figure)
                for other in OTHERS:
                    theirs = best(of(table, [other]), figure)
                    both = [number for number in mine if number in theirs]
                    if not both:
                        continue
                    more = figure in MORE_IS_BETTER
                    made.append(
                        Comparison(
                            scenario=scenario,
                            figure=figure,
                            ours=ours,
                            other=other,
                            our_value=statistics.median(mine[number] for number in both),
                            other_value=statistics.median(theirs[number] for number in both),
                            times=ratio(theirs, mine) if more else ratio(mine, theirs),
                            ahead_in=sum((theirs[n] > mine[n]) if more else (theirs[n] < mine[n]) for n in both),
                            rounds=len(both),
                        )
                    )
    return made
