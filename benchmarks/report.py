"""Writes what a run found as a page with charts: docs/benchmarks.md and docs/benchmarks/*.svg.

python -m benchmarks.report docs/benchmarks/results.json
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .charts import Bar, bar_chart, range_chart
from .contenders import CONTENDERS, STOCK, TRANSPORT, WATCH, WATCH_BULK
from .figures import PEERS, Comparison, Row, best, compare, of, ratio, rows
from .results import Results, read_results
from .scenarios import SCENARIOS, Kind, Scenario

#: Figure → what its column is called, and how its values are written.
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "rate": ("messages/s", lambda value: number(value)),
    "efficiency": ("efficiency", lambda value: f"{value:.0%}"),
    "p50": ("p50, ms", lambda value: number(value)),
    "p99": ("p99, ms", lambda value: number(value)),
    "max": ("max, ms", lambda value: number(value)),
    "idle": ("idle, MB", lambda value: number(value)),
    "peak": ("peak, MB", lambda value: number(value)),
    "growth": ("growth, bytes a message", lambda value: number(value)),
}
#: The figures that a table shows; spread and ratios are those of the first named second.
TABLES: dict[Kind, tuple[tuple[str, ...], str]] = {
    Kind.SEND: (("rate",), "rate"),
    Kind.HANDLE: (("rate", "efficiency"), "rate"),
    Kind.LATENCY: (("p50", "p99", "max"), "p99"),
    Kind.MEMORY: (("idle", "peak", "growth"), "peak"),
}

NOT_EQUAL = """\
- **What is done for a message differs**, as the table above says. watch_tasks claims each message in the storage and
  records it, which no other does; that is its price, and it is in every figure of it. Huey acks nothing, which is its
  saving, and in every figure of it.
- **Bulk.** `send_many` packs messages, and its workers take them packed. The others have no such thing: what they are
  compared by are single messages. Whoever sends one by one gets the figures of single messages here too. A packet is
  one to prefetch, so that is 4 for bulk, where it is 100 otherwise.
- **Pools.** "Two processes" are two that handle messages. Dramatiq, Taskiq, Huey and RQ's pool have a main process
  beside them that only watches over them (RQ's a scheduler as well); the main process of Celery's prefork pool fetches
  and acks. Two solo workers have none.
- **Threads and coroutines.** A hundred at a time are threads, but coroutines in Taskiq, which is what it is for.
  gevent, which Celery, Dramatiq and Huey can use, is not measured. RQ handles one at a time in a process: its line is
  that. Where one process needs no more, Dramatiq has its 8 threads by default, and Taskiq up to 100 tasks at a time;
  Celery (solo), Huey and RQ handle one at a time.
- **RQ** runs here in `SimpleWorker`, the fastest it has: its default worker forks for every job. It keeps jobs for
  500 s, as it does by default, since to keep none is slower.
- **Celery** workers, ours included, run without gossip, mingle, heartbeat and events, and with the same prefetch; in
  prefork, that of watch_tasks raises itself while messages are quick, by 100 for each process at most. No events and a
  prefetch of several are Celery's defaults; this package's own feed Flower's live view, and begin with no more than
  what runs, which is slower.
- **Taskiq** runs with `--no-parse`, since nobody else checks arguments; **Huey** without results and periodic tasks.
- **watch_tasks keeps the data in the record**, its default: with large payloads that is written once more.
  `keep_data=False` would spare it.
- **What is serialised**: JSON by Celery, Dramatiq, Taskiq and watch_tasks, pickle by Huey and RQ; their defaults.
- **Filling the queue** before workers are measured is not part of any figure. It is done in bulk, but for watch_tasks,
  whose single messages are sent one by one.
- The server is the same for all, with the append-only file written every second; its own memory is not compared.
  Taskiq's stream keeps what was acked, RQ its jobs for 500 s, and our records last for a week.
- Sender, workers and server share the machine, so a client that costs less leaves more to the others."""

HOW = """\
`make bench` does it all; `python -m benchmarks --help` tells how to run a part. Every round measures each line once,
over a server of its own that is emptied between; the contender that begins changes from round to round. A line gets as
many messages as took it {seconds:g} s in the round before (twice that for latency and memory); a first round finds out
how many, and is not counted. Ratios are medians of the ratios within a round. Where a contender has several pools, the
base of ratios is its better one in that round.

Every handler writes the number of its message and the time into memory that is mapped from a file of its process, so
that nothing is sampled: a rate is of all messages from the moment when every process was at work to the last message.
Where that is less than two fifths of them, since one process started late, it is measured anew with more. A measurement
fails unless every message was handled. Latency is from just before the call that sends to the
handler. Every failure is told below the table it belongs to."""


def write_report(results: Results, docs: Path) -> Path:
    """Write the page and its charts; return the page."""
    charts = docs / "benchmarks"
    charts.mkdir(parents=True, exist_ok=True)
    shown = [scenario for scenario in SCENARIOS if any(results.of(scenario.name))]
    for scenario in SCENARIOS:
        path = charts / f"{scenario.name}.svg"
        if scenario in shown:
            path.write_text(chart(results, scenario))
        else:
            path.unlink(missing_ok=True)
    page = docs / "benchmarks.md"
    page.write_text(render(results))
    return page


def render(results: Results) -> str:
    """Return the page as Markdown."""
    shown = [scenario for scenario in SCENARIOS if any(results.of(scenario.name))]
    parts = [
        "# Benchmarks",
        "Written by `python -m benchmarks`, as `make bench` calls it; do not edit. Everything ran in turn on one "
        "machine, in one run. Ratios hold better on another machine than times do.",
        about(results),
        "## Who is measured",
        who(),
        "## Where a peer wins",
        where_a_peer_wins(results, shown),
        "## What is not equal",
        NOT_EQUAL,
    ]
    for scenario in shown:
        parts += [f"## {scenario.title}", *section(results, scenario)]
    parts += ["## How it is measured", HOW.format(seconds=results.seconds)]
    return "\n\n".join(part for part in parts if part) + "\n"


def about(results: Results) -> str:
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    took = f", {results.minutes:g} minutes" if results.minutes else ""
    return "\n".join(
        [
            "| | |",
            "|---|---|",
            f"| begun | {results.begun}{took} |",
            f"| rounds | {results.rounds}, of about {results.seconds:g} s a line |",
            f"| machine | {machine['cores']} cores, {machine['processor']}, {machine['system']} |",
            f"| load when it began | {machine['load']:g} |",
            f"| server | {machine['server']}, on the same machine, append-only file |",
            f"| Python | {machine['python']} |",
            f"| versions | {versions} |",
        ]
    )


def who() -> str:
    lines = ["| | for each message | sends many by |", "|---|---|---|"]
    lines += [f"| {one.name} | {one.keeps} | {one.bulk} |" for one in CONTENDERS]
    return "\n".join(lines)


def where_a_peer_wins(results: Results, scenarios: Sequence[Scenario]) -> str:
    """Return every figure in which another library is ahead of ours, and those in which none is."""
    compared = compare(results, scenarios)
    lost = [one for one in compared if one.is_lost]
    if lost:
        head = ["", "figure", "ahead", "its median", "ours", "of ours", "times as good", "ahead in rounds"]
        parts = [
            "Every figure in which another library is ahead of watch_tasks, each in its better pool:",
            "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *map(_lost, lost)]),
        ]
    else:
        parts = ["In no figure of this run is another library ahead of watch_tasks."]
    kept = dict.fromkeys((one.scenario.title, one.figure, one.ours) for one in compared)
    for one in lost:
        kept.pop((one.scenario.title, one.figure, one.ours), None)
    if kept and lost:
        won = "; ".join(f"{title}, {COLUMNS[figure][0]} ({ours})" for title, figure, ours in kept)
        parts.append(f"No other library is ahead in: {won}.")
    return "\n\n".join([*parts, *_failures(results, scenarios)])


def _lost(one: Comparison) -> str:
    name, write = COLUMNS[one.figure]
    times = "" if one.times is None else number(one.times)
    cells = [one.scenario.title, name, one.other, write(one.other_value), write(one.our_value), one.ours, times]
    return f"| {' | '.join(cells)} | {one.ahead_in} of {one.rounds} |"


def section(results: Results, scenario: Scenario) -> Iterator[str]:
    table = rows(results.of(scenario.name))
    yield scenario.text
    if scenario.kind is Kind.LATENCY and results.latency_rate:
        yield (
            f"One process sends {results.latency_rate:,.0f} messages a second, one by one, half of what stock Celery "
            "handles in one process of this machine. Percentiles are of each round, without its first tenth; told is "
            "the median over the rounds."
        )
    yield f"![{scenario.title}](benchmarks/{scenario.name}.svg)"
    yield render_table(table, scenario.kind)
    yield "\n".join(_notes(results, scenario, table))


def render_table(table: Sequence[Row], kind: Kind) -> str:
    """Return a row for each contender and pool: medians, spread, and ratios to stock Celery and the best peer."""
    figures, main = TABLES[kind]
    figures = tuple(name for name in figures if any(row.values(name) for row in table))
    stock, peer = (best(of(table, names), main) for names in ([STOCK.name], PEERS))
    label = COLUMNS[main][0].partition(",")[0]
    against = "fastest peer" if kind in (Kind.SEND, Kind.HANDLE) else "best peer"
    head = ["", "how" if kind is Kind.SEND else "pool", *(COLUMNS[name][0] for name in figures)]
    head += [f"spread of {label}", f"÷ {STOCK.name}", f"÷ {against}", "messages a round"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in table:
        cells = [row.contender, row.pool]
        for name in figures:
            median = row.median(name)
            cells.append("failed" if median is None else COLUMNS[name][1](median))
        spread = row.spread(main)
        cells.append(" to ".join(COLUMNS[main][1](value) for value in spread) if spread else "")
        for base in (stock, peer):
            times = ratio(row.values(main), base)
            cells.append("" if times is None else f"{times:.2f}")
        cells.append(f"{statistics.median(row.counts):,.0f}" if row.counts else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _notes(results: Results, scenario: Scenario, table: Sequence[Row]) -> Iterator[str]:
    for row in table:
        who = f"- {row.contender} ({row.pool})"
        for error, numbers in row.errors.items():
            told = ", ".join(map(str, numbers))
            yield f"{who} failed in round{'s' * (len(numbers) > 1)} {told} of {results.rounds}: {error}"
        repeated = sum(row.values("repeated").values())
        if repeated:
            yield f"{who} handled {repeated:,.0f} messages more than once"
        rate = row.median("rate")
        if scenario.kind is Kind.LATENCY and rate and results.latency_rate and rate < 0.95 * results.latency_rate:
            yield f"{who} sent only {rate:,.0f} messages/s: its sender did not keep up"


def _failures(results: Results, scenarios: Sequence[Scenario]) -> Iterator[str]:
    titles = {scenario.name: scenario.title for scenario in scenarios}
    failed = [f"{one.contender} ({one.pool}) in {titles[one.scenario]}" for one in results.found if one.error]
    if failed:
        yield (
            f"Measurements failed, and are in no figure: {', '.join(dict.fromkeys(failed))}. "
            "What went wrong stands below the tables."
        )


def chart(results: Results, scenario: Scenario) -> str:
    table = rows(results.of(scenario.name))
    if scenario.kind is Kind.LATENCY:
        bars = [_bar(row, "p99", ("p50", "max")) for row in table]
        return range_chart(scenario.title, "ms, logarithmic: from p50 over p99 (dot) to the longest", bars)
    main = TABLES[scenario.kind][1]
    unit = "MB at most, under load" if scenario.kind is Kind.MEMORY else COLUMNS[main][0]
    return bar_chart(scenario.title, unit, [_bar(row, main) for row in table])


def _bar(row: Row, name: str, ends: tuple[str, str] | None = None) -> Bar:
    if row.contender in (WATCH.name, WATCH_BULK.name):
        role = "ours"
    else:
        role = "base" if row.contender in (STOCK.name, TRANSPORT.name) else "beside"
    value = row.median(name)
    if value is None:
        return Bar(name=row.contender, detail=row.pool, role=role, value=None, told="failed")
    low, high = [row.median(end) or value for end in ends] if ends else row.spread(name) or (value, value)
    return Bar(name=row.contender, detail=row.pool, role=role, value=value, low=low, high=high, told=number(value))


def number(value: float) -> str:
    """Return a figure with as many digits as can be told apart: three, and no fewer before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[1] / "docs")
    chosen = parser.parse_args()
    print(write_report(read_results(chosen.results), chosen.docs))


if __name__ == "__main__":
    main()
