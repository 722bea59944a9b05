"""From what was written down to figures. Nothing here reads a clock, a file or a server."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from .ledger import BEGUN, ENDED, Effect

__all__ = ["STEP", "Kill", "Timeline", "judge_kill", "latencies", "percentile", "rate", "sending_rate"]

#: Seconds that one bar of a timeline stands for.
STEP: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Messages handled around a kill, for every STEP; a message counts when it was handled first."""

    #: Seconds from the kill to the first bar's beginning: below 0.
    start: float
    #: How many were handled within each bar.
    handled: tuple[int, ...]
    #: How many of these had been sent before the kill and were handled after it.
    late: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Kill:
    """What killing a worker came to."""

    #: Messages whose sending was confirmed, before the kill and after it.
    sent: int
    #: Messages that the killed worker had begun and not ended.
    in_hand: int
    #: Seconds from the kill for which messages were waited for.
    waited: float
    #: Messages that were sent and not handled in that time, by anybody.
    not_handled: int
    #: Messages that were handled more than once, to the end.
    duplicated: int
    #: Messages that were begun more than once. An effect in the middle of a handler happens twice only with these.
    begun_again: int
    #: Seconds from the kill until each message sent before it was handled; None: that did not come to pass.
    recovery: float | None
    timeline: Timeline


def percentile(values: Iterable[float], share: float) -> float | None:
    """Return the smallest of the values that at least this share of them is not above; None of no values.

    Args:
        values: in any order.
        share: above 0, at most 1.
    """
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1] if ordered else None


def rate(times: Iterable[float]) -> float | None:
    """Return how many a second from the first of some moments to the last; None of fewer than two moments."""
    ordered = sorted(times)
    if len(ordered) < 2 or ordered[0] == ordered[-1]:
        return None
    return (len(ordered) - 1) / (ordered[-1] - ordered[0])


def sending_rate(sent: Mapping[int, tuple[float, float]]) -> float | None:
    """Return how many a second were sent after the first, for which the sender made its connection; None: no others.

    Args:
        sent: for each number, when its sending was asked for, and when it was confirmed.
    """
    if len(sent) < 2:
        return None
    begin, end = sent[min(sent)][1], max(confirmed for _, confirmed in sent.values())
    return (len(sent) - 1) / (end - begin) if end > begin else None


def latencies(sent: Mapping[int, tuple[float, float]], effects: Iterable[Effect]) -> list[float]:
    """Return the seconds from the call that sent each message to its handler's end, of those that were handled."""
    first = _first_ends(effects)
    return [first[number] - before for number, (before, _) in sent.items() if number in first]


def judge_kill(
    sent: Mapping[int, tuple[float, float]],
    effects: Sequence[Effect],
    *,
    killed_at: float,
    group: int,
    waited: float,
    before: float,
    after: float,
) -> Kill:
    """Join what was sent with what was handled, by number.

    Args:
        sent: for each number, when its sending was asked for, and when it was confirmed.
        effects: of all workers.
        killed_at: when the worker was killed.
        group: the killed worker's.
        waited: seconds from then that count.
        before: seconds of the timeline ahead of the kill.
        after: seconds of it behind the kill, if nothing happened later.
    """
    counted = [effect for effect in effects if effect.number in sent and effect.at <= killed_at + waited]
    begun = Counter(effect.number for effect in counted if effect.kind == BEGUN)
    ended = Counter(effect.number for effect in counted if effect.kind == ENDED)
    first = _first_ends(counted)
    early = {effect.number for effect in counted if effect.at <= killed_at}  # a batch is confirmed as a whole
    old = {number for number, (_, confirmed) in sent.items() if confirmed <= killed_at or number in early}
    late = {number: at for number, at in first.items() if number in old and at > killed_at}
    theirs = [effect for effect in counted if effect.group == group]
    in_hand = {effect.number for effect in theirs if effect.kind == BEGUN} - {
        effect.number for effect in theirs if effect.kind == ENDED
    }
    return Kill(
        sent=len(sent),
        in_hand=len(in_hand),
        waited=waited,
        not_handled=len(sent.keys() - ended.keys()),
        duplicated=sum(1 for times in ended.values() if times > 1),
        begun_again=sum(1 for times in begun.values() if times > 1),
        recovery=max(late.values(), default=killed_at) - killed_at if old <= ended.keys() else None,
        timeline=_timeline(first, late, killed_at, before, after),
    )


def _timeline(
    first: Mapping[int, float], late: Mapping[int, float], killed_at: float, before: float, after: float
) -> Timeline:
    last = max(late.values(), default=killed_at) - killed_at
    ahead, behind = math.ceil(before / STEP), max(math.ceil(after / STEP), math.floor(last / STEP) + 1)

    def bars(times: Iterable[float]) -> tuple[int, ...]:
        filled = Counter(math.floor((at - killed_at) / STEP) for at in times)
        return tuple(filled[place] for place in range(-ahead, behind))

    return Timeline(start=-ahead * STEP, handled=bars(first.values()), late=bars(late.values()))


def _first_ends(effects: Iterable[Effect]) -> dict[int, float]:
    first: dict[int, float] = {}
    for effect in effects:
        if effect.kind == ENDED:
            first[effect.number] = min(effect.at, first.get(effect.number, math.inf))
    return first
