"""What each contender goes through, the same for all: a heap of messages, a steady rate, and a `kill -9`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from .contenders import Contender
from .figures import Kill, judge_kill, latencies, percentile, rate, sending_rate
from .ledger import BEGUN, Ledger, now, read_sent
from .sender import arguments
from .stage import ContenderError, Process, Stage

__all__ = ["Score", "Sizes", "try_out"]

#: Numbers of messages begin here in each part, so that parts are told apart.
_PART: Final = 10_000_000
#: Seconds that something may take that is no figure: a start, a connection, the last messages of a part.
PATIENCE: Final = 60.0
#: Seconds that the worker to be killed has to get work into all its hands.
FILLING: Final = 2.0
#: Messages that one call of `send_many` takes while messages flow.
BATCH: Final = 6


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything."""

    #: Processes of a worker.
    processes: int = 2
    #: Messages of the heap, in bulk ten times as many; but no more than are sent in so many seconds.
    messages: int = 2000
    limit: float = 3.0
    #: Messages a second, and seconds, from which latency is taken.
    rate: float = 100.0
    seconds: float = 4.0
    #: Messages a second around the kill for each process of a worker, and seconds that handling one takes: less than
    #: half of what two workers can do, so that one of them can do it alone.
    kill_rate: float = 15.0
    work: float = 0.05
    #: Seconds that messages flow before the kill and after it.
    before: float = 3.0
    after: float = 9.0
    #: Seconds after the kill for which messages are waited for.
    wait: float = 30.0

    def scaled(self, scale: float) -> Sizes:
        """Return sizes for a run that measures for longer or shorter; the wait stays."""
        least = min(scale, 1.0)
        return replace(
            self,
            messages=max(round(self.messages * scale), 10),
            limit=max(self.limit * scale, 1.0),
            seconds=max(self.seconds * scale, 0.2),
            before=max(self.before * least, 0.5),
            after=max(self.after * least, 0.5),
        )


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one contender came to; None where there was too little to tell."""

    contender: Contender
    #: Messages a second: of the sender, and of the worker from the first to the last.
    sent_per_second: float | None
    handled_per_second: float | None
    #: Messages a second that were sent meanwhile, and seconds from the call that sent one to its handler's end.
    latency_rate: float
    latency_p50: float | None
    latency_p99: float | None
    kill: Kill


def try_out(contender: Contender, stage: Stage, sizes: Sizes, say: Callable[[str], None]) -> Score:
    """Measure one contender. Leaves no process, and an empty server.

    Args:
        contender: who.
        stage: where.
        sizes: how much of everything.
        say: told what is going on.

    Raises:
        ContenderError: it could not be measured.
    """
    try:
        return _Trial(contender, stage, sizes, say).run()
    finally:
        stage.clear()


class _Trial:
    def __init__(self, contender: Contender, stage: Stage, sizes: Sizes, say: Callable[[str], None]) -> None:
        self._contender = contender
        self._stage = stage
        self._sizes = sizes
        self._say: Callable[[str], None] = lambda doing: say(f"{contender.label}: {doing}")
        self._ledger = Ledger(stage.folder / f"{contender.name}.ledger")

    def run(self) -> Score:
        sizes, contender = self._sizes, self._contender
        self._say(f"a heap of messages, then a worker of {sizes.processes} processes")
        sent, worker, handled = self._drain()
        self._say(f"{sizes.rate:g} messages a second for {sizes.seconds:g} s")
        delays = self._keep_pace(worker)
        self._say(f"{self._stream:g} messages a second, two workers, and kill -9 for one of them")
        kill = self._kill(worker)
        return Score(
            contender=contender,
            sent_per_second=sent,
            handled_per_second=handled,
            latency_rate=sizes.rate,
            latency_p50=percentile(delays, 0.5),
            latency_p99=percentile(delays, 0.99),
            kill=kill,
        )

    @property
    def _stream(self) -> float:
        """Messages a second around the kill."""
        return self._sizes.kill_rate * self._sizes.processes

    def _drain(self) -> tuple[float | None, Process, float | None]:
        """Send a heap, then let a worker handle it."""
        file, sizes = self._file("heap"), self._sizes
        count = sizes.messages * (10 if self._contender.is_bulk else 1)
        batch = count * self._contender.is_bulk
        sender = self._sender("heap", arguments(file, first=0, count=count, batch=batch, limit=sizes.limit))
        sender.wait(sizes.limit + PATIENCE)
        sent = read_sent(file)
        worker = self._worker("a")
        # Handling may take a few times as long as sending. Looked at seldom: it takes from what is measured.
        patience = PATIENCE + 10 * sizes.limit

        def all_handled() -> bool:
            return sent.keys() <= self._ledger.read().handled

        self._until(all_handled, "the heap is handled", worker, every=0.25, patience=patience)
        return sending_rate(sent), worker, rate(effect.at for effect in self._ledger.effects)

    def _keep_pace(self, worker: Process) -> list[float]:
        """Send at a steady rate to a worker with nothing else to do."""
        file, sizes = self._file("pace"), self._sizes
        count = max(round(sizes.rate * sizes.seconds), 2)
        asked = arguments(file, first=_PART, count=count, rate=sizes.rate, batch=BATCH * self._contender.is_bulk)
        self._sender("pace", asked).wait(sizes.seconds + PATIENCE)
        sent = read_sent(file)
        self._until(lambda: sent.keys() <= self._ledger.read().handled, "what was sent is handled", worker)
        del sent[min(sent)]  # its sender made its connection for that one
        return latencies(sent, self._ledger.effects)

    def _kill(self, survivor: Process) -> Kill:
        """Let two workers handle a stream, and kill the second with work in its hands."""
        file, sizes, first = self._file("kill"), self._sizes, 2 * _PART
        victim, seen = self._worker("b"), len(self._ledger.read().effects)
        batch = BATCH * self._contender.is_bulk
        asked = arguments(file, first=first, rate=self._stream, batch=batch, work=sizes.work)
        sender = self._sender("kill", asked)
        groups = {survivor.group, victim.group}

        def all_work() -> bool:
            return groups <= {effect.group for effect in self._ledger.read().effects[seen:]}

        self._until(all_work, "both workers handle messages", survivor, victim, sender)
        time.sleep(sizes.before)
        fill_until = now() + FILLING

        def is_time() -> bool:
            """Whether all its processes are at work; or one of them, if that is long in coming."""
            return self._in_hand(victim, seen) >= (sizes.processes if now() < fill_until else 1)

        self._until(is_time, "the worker to be killed has begun something", victim, every=0.002)
        killed_at = now()
        victim.kill()
        time.sleep(max(0.0, killed_at + min(sizes.after, sizes.wait) - now()))
        sender.stop(PATIENCE)
        sent = read_sent(file)
        while not sent.keys() <= self._ledger.read().handled and now() < killed_at + sizes.wait:
            if not survivor.is_running:
                raise ContenderError(f"{survivor.name} ended by itself{survivor.words()}")
            time.sleep(0.05)
        return judge_kill(
            sent,
            self._ledger.effects,
            killed_at=killed_at,
            group=victim.group,
            waited=sizes.wait,
            before=sizes.before,
            after=min(sizes.after, sizes.wait),
        )

    def _in_hand(self, worker: Process, seen: int) -> int:
        """Return how many messages a worker has begun and not ended, by what was written after the first `seen`."""
        last: dict[int, str] = {}
        for effect in self._ledger.read().effects[seen:]:
            if effect.group == worker.group:
                last[effect.number] = effect.kind
        return sum(1 for kind in last.values() if kind == BEGUN)

    def _worker(self, name: str) -> Process:
        arguments = self._contender.worker(name, self._sizes.processes)
        return self._stage.start(f"{self._contender.name} worker {name}", arguments, self._ledger.path)

    def _sender(self, part: str, arguments: list[str]) -> Process:
        command = [self._contender.path, *arguments]
        return self._stage.start(f"{self._contender.name} sender {part}", command, self._ledger.path)

    def _file(self, part: str) -> Path:
        return self._stage.folder / f"{self._contender.name}.{part}"

    def _until(
        self,
        condition: Callable[[], bool],
        what: str,
        *processes: Process,
        every: float = 0.02,
        patience: float = PATIENCE,
    ) -> None:
        """Wait for what the processes are to bring about.

        Raises:
            ContenderError: it does not come, or one of them ended.
        """
        deadline = now() + patience
        while not condition():
            for process in processes:
                if not process.is_running:
                    raise ContenderError(f"{process.name} ended by itself{process.words()}")
            if now() > deadline:
                raise ContenderError(f"not within {patience:g} s: {what}{processes[0].words()}")
            time.sleep(every)
