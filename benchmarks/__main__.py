"""Measures this package beside stock Celery, Dramatiq, Taskiq, Huey and RQ, and writes a report.

    python -m benchmarks                                    # all of it, then docs/benchmarks.md
    python -m benchmarks --only handle-one latency --contenders watch_tasks "stock Celery"
    python -m benchmarks --scale 0.1 --rounds 1 --results /tmp/results.json --no-report    # whether everything runs

Each round measures every line of every scenario once, contenders in turn, so that what else the machine does falls on
all of them. The messages of a line are as many as took it `--seconds` in the round before; the first round finds out
how many those are, and is not counted. A measurement that fails or hangs is told, and the others go on.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import redis

from tests.servers import RedisServer

from .contenders import CONTENDERS, STOCK
from .measure import MeasurementError, measure
from .report import write_report
from .results import Result, Results, begin
from .scenarios import SCENARIOS, Kind, Line

ROOT = Path(__file__).parents[1]
#: Seconds that a measurement takes besides what is measured: starting processes, filling the queue.
OVERHEAD = {Kind.SEND: 1.2, Kind.HANDLE: 3.0, Kind.LATENCY: 4.0, Kind.MEMORY: 5.0}
#: How many times as long is measured.
LONGER = {Kind.LATENCY: 2, Kind.MEMORY: 2}
#: The file is not rewritten meanwhile: that would fall on one contender and not on another.
SERVER = {"auto-aof-rewrite-percentage": "0"}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    scenarios, contenders = [one.name for one in SCENARIOS], [one.name for one in CONTENDERS]
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to measure (default: 2)")
    parser.add_argument("--scale", type=float, default=1.0, help="of seconds and of first counts, for a trial")
    parser.add_argument("--only", nargs="+", choices=scenarios, default=scenarios, metavar="SCENARIO")
    parser.add_argument("--contenders", nargs="+", choices=contenders, default=contenders, metavar="NAME")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/benchmarks/results.json", help="the JSON file")
    parser.add_argument("--no-report", action="store_true", help="leave docs/benchmarks.md as it is")
    chosen = parser.parse_args()
    if chosen.rounds < 1 or chosen.seconds <= 0 or chosen.scale <= 0:
        parser.error("rounds, seconds and scale must be above 0")
    # Ended by SIGTERM, it ends what it started, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    seconds = chosen.seconds * chosen.scale
    lines = [[*scenario.lines(chosen.contenders)] for scenario in SCENARIOS if scenario.name in chosen.only]
    minutes = estimate(lines, chosen.rounds, seconds) / 60
    tell(f"{sum(map(len, lines))} lines, {chosen.rounds} rounds and one to begin with: about {minutes:.0f} minutes")
    with server() as url:
        results = begin(url, chosen.rounds, seconds)
    start = time.monotonic()
    try:
        run(results, lines, chosen.scale)
    finally:
        # What was found until it was interrupted can be told too.
        results.minutes = round((time.monotonic() - start) / 60, 1)
        results.write(chosen.results)
    if not chosen.no_report:
        tell(f"report: {write_report(results, ROOT / 'docs')}")
    failed = sum(one.error is not None for one in results.found)
    if failed:
        sys.exit(f"{failed} of {len(results.found)} measurements failed; see {chosen.results}")


def estimate(lines: list[list[Line]], rounds: int, seconds: float) -> float:
    """Return about how many seconds it takes, on a machine that does nothing else."""
    total = 0.0
    for line in (line for scenario in lines for line in scenario):
        kind = line.scenario.kind
        # The round to begin with measures for about a second.
        total += (rounds + 1) * OVERHEAD[kind] + rounds * seconds * LONGER.get(kind, 1) + 1
    return total


def run(results: Results, lines: list[list[Line]], scale: float) -> None:
    """Measure everything, and add it to the results."""
    if any(line.scenario.kind is Kind.LATENCY for scenario in lines for line in scenario):
        results.latency_rate = latency_rate(results.seconds, scale)
    rates: dict[Line, float] = {}
    for number in range(results.rounds + 1):
        for scenario in lines:
            with server() as url:
                # Whoever comes first would always come first after whatever was before.
                turn = number % len(scenario) if scenario else 0
                for line in scenario[turn:] + scenario[:turn]:
                    result = once(line, url, number, count_of(line, results, rates.get(line), scale), results)
                    if result.error is None:
                        rates[line] = result.figures["rate"]
                    if number or result.error:
                        results.found.append(result)


def count_of(line: Line, results: Results, rate: float | None, scale: float) -> int:
    """Return how many messages last as long as is to be measured."""
    scenario = line.scenario
    if scenario.kind is Kind.LATENCY and results.latency_rate:
        return max(100, int(results.latency_rate * results.seconds * LONGER[scenario.kind]))
    least = max(100, int(line.least * scale))
    first = max(least, int(scenario.first * scale))
    if rate is None:
        return first
    return min(max(int(rate * results.seconds * LONGER.get(scenario.kind, 1)), least), scenario.most, first * 100)


def once(line: Line, url: str, number: int, count: int, results: Results) -> Result:
    """Measure a line, and tell what came of it."""
    figures: dict[str, float] = {}
    error = None
    try:
        figures = measure(line, url, count, latency_rate=results.latency_rate)
    except (MeasurementError, ValueError, OSError, redis.RedisError, psutil.Error) as exc:
        error = f"{type(exc).__name__}: {exc}" if not isinstance(exc, MeasurementError) else str(exc)
    figure = error or ", ".join(f"{name} {value:,.4g}" for name, value in figures.items())
    tell(f"round {number}{'' if number else ' (not counted)'}: {line}: {count} messages: {figure}")
    return Result(
        scenario=line.scenario.name,
        contender=line.contender.name,
        pool=line.where,
        round=number,
        count=count,
        figures=figures,
        error=error,
    )


def latency_rate(seconds: float, scale: float) -> float | None:
    """Return half of what stock Celery handles in one process, the median of three; None where that failed."""
    scenario = next(one for one in SCENARIOS if one.name == "handle-one")
    line = next(scenario.lines([STOCK.name]))
    with server() as url:
        count = max(100, int(scenario.first * scale))
        found = []
        for _ in range(3):
            try:
                found.append(measure(line, url, count)["rate"])
            except (MeasurementError, ValueError) as exc:
                tell(f"{line}: {exc}")
                return None
            count = max(100, int(found[-1] * seconds))
    tell(f"stock Celery handles {statistics.median(found):.0f} messages/s: latency is measured at half of that")
    return statistics.median(found) / 2


@contextmanager
def server() -> Iterator[str]:
    """Run a server with nothing in it."""
    with tempfile.TemporaryDirectory(prefix="bench-server-") as folder:
        started = RedisServer(Path(folder), **SERVER).start()
        try:
            yield started.url
        finally:
            started.stop(signal.SIGKILL)


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
