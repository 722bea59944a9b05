"""The four measurements. Each is of one line, on a server that holds nothing else, and ends what it started."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import redis

from .contenders import Pool
from .counting import Tally, rate
from .processes import MeasurementError, Sender, Workers
from .scenarios import Kind, Line

#: Seconds that a measurement may take to start its workers, and again to be done, besides ten times what is expected.
PATIENCE = 60.0
#: Messages that workers handle before their memory or latency is taken.
WARM_UP = 100
#: How often a measurement is made anew, each time with four times the messages, until all processes handle this part
#: of them at the same time.
TRIES, TOGETHER = 4, 0.4
#: Seconds between two looks at the memory of workers under load.
LOOK = 0.5


def measure(
    line: Line, url: str, count: int, *, latency_rate: float | None = None, empty: bool = True
) -> dict[str, float]:
    """Measure a line once with so many messages; return its figures by name.

    Every kind gives `rate`: messages a second.

    Args:
        line: what to measure.
        url: the server, which nothing else uses meanwhile.
        count: how many messages.
        latency_rate: messages a second that are sent where latency is measured.
        empty: whether to delete everything on the server first.

    Raises:
        MeasurementError: the contender failed, or did not do it in time.
    """
    if empty:
        with redis.Redis.from_url(url, socket_timeout=PATIENCE) as client:
            client.flushall()
    if line.scenario.kind is Kind.HANDLE:
        return _handle_enough(line, url, count)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        one = _Measurement(line, url, Path(folder), count)
        match line.scenario.kind:
            case Kind.SEND:
                return one.send()
            case Kind.LATENCY:
                if latency_rate is None:
                    raise MeasurementError("there is no rate to measure latency at: stock Celery failed")
                return one.latency(latency_rate)
            case Kind.MEMORY:
                return one.memory()
    raise ValueError(f"{line} is of no kind that is known")


def _handle_enough(line: Line, url: str, count: int) -> dict[str, float]:
    """Measure with more messages until all processes were at work for a good part of them.

    The first process to start may be done before another begins: its rate would be taken for that of all.
    """
    if line.pool is None:
        raise ValueError(f"{line} needs a pool")
    for _ in range(TRIES):
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            figures = _Measurement(line, url, Path(folder), count).handle()
        if figures["processes"] >= line.pool.processes and figures["together"] >= TOGETHER:
            return figures
        count = min(count * 4, line.scenario.most)
    raise MeasurementError(
        f"{figures['processes']:.0f} of {line.pool.processes} processes handled messages, "
        f"and all of them at once {figures['together']:.0%} of {figures['messages']:,.0f}"
    )


class _Measurement:
    def __init__(self, line: Line, url: str, folder: Path, count: int) -> None:
        self.line = line
        self.count = count
        self.folder = folder
        (folder / "counts").mkdir()
        self.tally = Tally(folder / "counts")
        self.environment = {
            **os.environ,
            "BROKER": url,
            "RESULT": str(folder / "counts"),
            "PYTHONWARNINGS": "ignore",
        }

    @property
    def pool(self) -> Pool:
        if self.line.pool is None:
            raise ValueError(f"{self.line} needs a pool")
        return self.line.pool

    def send(self) -> dict[str, float]:
        with ExitStack() as stack:
            sender = self._sender(stack, self.count, in_bulk=self.line.scenario.in_bulk)
            return sender.result(PATIENCE + self.count / 20)

    def handle(self) -> dict[str, float]:
        self._fill()
        with Workers(self.pool, self.environment, self.folder) as workers:
            self._wait(workers, self.count)
        found, together = rate(self.tally.handled)
        figures = {
            "rate": found,
            "processes": len({one.process for one in self.tally.handled}),
            "together": together,
            "messages": self.count,
        }
        if self.line.scenario.work == "cpu":
            figures["efficiency"] = found * 0.001 / self.pool.processes
        return figures | self._repeated()

    def latency(self, at: float) -> dict[str, float]:
        with Workers(self.pool, self.environment, self.folder) as workers, ExitStack() as stack:
            self._warm_up(workers, stack)
            sender = self._sender(stack, self.count, rate=at)
            self._wait(workers, self.count, self.count / at)
            sent = sender.result(PATIENCE)
        later = sorted(self.tally.handled, key=lambda one: one.value)[self.count // 10 :]
        parts = statistics.quantiles([(one.at - one.value) * 1e3 for one in later], n=100, method="inclusive")
        return {
            "rate": sent["rate"],
            "p50": parts[49],
            "p99": parts[98],
            "max": max(one.at - one.value for one in later) * 1e3,
            **self._repeated(),
        }

    def memory(self) -> dict[str, float]:
        with Workers(self.pool, self.environment, self.folder) as workers, ExitStack() as stack:
            self._warm_up(workers, stack)
            time.sleep(1.0)
            idle = peak = workers.memory()
            half, looked = idle, time.monotonic()
            start = time.monotonic()
            self._sender(stack, self.count, in_bulk=self.line.contender.fills_in_bulk)

            def look() -> bool:
                nonlocal half, peak, looked
                done = self.tally.update()
                if time.monotonic() > looked + LOOK:
                    now, looked = workers.memory(), time.monotonic()
                    peak = max(peak, now)
                    if done <= self.count / 2:
                        half = now
                return done >= self.count and self.tally.distinct() >= self.count

            self._wait(workers, self.count, is_over=look)
            took = time.monotonic() - start
            time.sleep(1.0)
            after = workers.memory()
        return {
            "rate": self.count / took,
            "messages": self.count,
            "idle": idle,
            "peak": max(peak, after),
            "after": after,
            "growth": (after - half) * 1e3 / (self.count / 2) * 1e3,
            **self._repeated(),
        }

    # -- parts

    def _sender(
        self,
        stack: ExitStack,
        count: int,
        *,
        first: int = 0,
        in_bulk: bool = False,
        rate: float | None = None,
    ) -> Sender:
        scenario = self.line.scenario
        sender = Sender(
            self.line.contender,
            self.environment,
            work=scenario.work,
            payload=scenario.payload,
            count=count,
            first=first,
            in_bulk=in_bulk,
            rate=rate,
        )
        stack.callback(sender.end)
        return sender

    def _fill(self) -> None:
        """Send all messages before any worker runs: where it takes time, by two processes."""
        in_bulk = self.line.contender.fills_in_bulk
        parts = [self.count] if in_bulk else [self.count // 2, self.count - self.count // 2]
        with ExitStack() as stack:
            senders = [self._sender(stack, part, first=sum(parts[:n]), in_bulk=in_bulk) for n, part in enumerate(parts)]
            for sender in senders:
                sender.result(PATIENCE + self.count / 20)

    def _warm_up(self, workers: Workers, stack: ExitStack) -> None:
        """Let workers handle some messages, which are not counted: their connections are made by then."""
        sender = self._sender(stack, WARM_UP, first=-WARM_UP)
        self._wait(workers, WARM_UP)
        sender.result(PATIENCE)
        self.tally.clear()

    def _wait(
        self, workers: Workers, count: int, expected: float = 0.0, is_over: Callable[[], bool] | None = None
    ) -> None:
        """Wait until so many different messages are handled."""

        def all_handled() -> bool:
            return self.tally.update() >= count and self.tally.distinct() >= count

        def told() -> str:
            return f"{self.tally.distinct()} of {count} messages were handled"

        workers.wait_until(is_over or all_handled, PATIENCE + count / 50 + 3 * expected, told)

    def _repeated(self) -> dict[str, float]:
        """Return how many messages were handled more than once, if any."""
        again = self.tally.update() - self.tally.distinct()
        return {"repeated": again} if again else {}


__all__ = ["MeasurementError", "measure"]
