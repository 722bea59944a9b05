"""What is done to workers and servers: each scenario on a server of its own, checked to its end."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..servers import RedisServer
from ..workers import Worker, until
from .harness import Place, Producer, StockPlace, Tally, check, leftovers, pass_time, settle, torture

MakePlace = Callable[[Path, str], Place]


@dataclass
class World:
    """A server, a place for workers on it, and a producer."""

    server: RedisServer
    place: Place
    producer: Producer
    tally: Tally = field(default_factory=Tally)

    def ready(self, *workers: Worker) -> None:
        for worker in workers:
            until(lambda worker=worker: "ready." in worker.text(), "the worker is ready", 60, worker.text)

    def begun(self) -> dict[str, list[dict[str, Any]]]:
        """Return the beginnings of runs, by id."""
        found: dict[str, list[dict[str, Any]]] = {}
        for line in self.place.lines():
            if line["handler"] == "begin":
                found.setdefault(line["id"], []).append(line)
        return found

    def finish(self, timeout: float = 60.0, in_flight: int = 0) -> Tally:
        """Wait until all is drained, end the workers, and check."""
        settle(self.place, self.server, self.producer, self.tally, timeout)
        self.place.end()
        check(self.place, self.producer, self.tally, in_flight)
        return self.tally


@contextmanager
def world(folder: Path, kind: MakePlace = Place) -> Iterator[World]:
    server = RedisServer.lasting(folder / "valkey").start()
    place = kind(folder / "site", server.url)
    producer = Producer(place, folder / "sent.jsonl")
    try:
        yield World(server, place, producer)
    finally:
        place.close()
        producer.close()
        server.signal(signal.SIGCONT)
        server.stop()


def kills(folder: Path, seed: str, count: int, pool: str, kind: MakePlace = Place) -> Tally:
    """F1: workers killed at random moments, and at every named point where it is our package, while messages flow."""
    ways = ["main", "child", "group"] if kind is StockPlace else None
    with world(folder, kind) as here:
        return torture(here.place, here.server, here.producer, random.Random(seed), count, pool, ways=ways)


def frozen_when_idle(folder: Path, rounds: int, kind: MakePlace = Place, width: int = 5) -> Tally:
    """F2: an idle worker is frozen, a message is sent, and the worker is killed without having woken."""
    with world(folder, kind) as here:
        queues = [f"q{number}" for number in range(width)]
        while (left := rounds - here.tally.killed) > 0:
            workers = [here.place.spawn("-Q", queue, concurrency=1) for queue in queues[:left]]
            here.ready(*workers)
            with here.server.client() as client:
                until(lambda client=client: not any(client.llen(queue) for queue in queues), "nothing waits")
            pass_time(0.5)
            for worker in workers:
                worker.signal(signal.SIGSTOP, children=True)
            for queue, _ in zip(queues, workers, strict=False):
                here.producer.send(0.0, queue)
            pass_time(0.1)
            for worker in workers:
                worker.kill()
            here.tally.kills["frozen"] += len(workers)
        here.ready(here.place.spawn("-Q", ",".join(queues)))
        return here.finish(in_flight=1)


def frozen_when_busy(folder: Path, pool: str, kind: MakePlace = Place) -> Tally:
    """F3: a busy worker is frozen for three leases and wakes when another has its message, which is killed then."""
    with world(folder, kind) as here:
        first = here.place.spawn(pool=pool, concurrency=1)
        here.ready(first)
        id = here.producer.send(20.0)
        until(lambda: id in here.begun(), "it runs")
        first.signal(signal.SIGSTOP, children=True)
        frozen = time.monotonic()
        second = here.place.spawn(pool=pool, concurrency=1)
        until(lambda: len(here.begun()[id]) == 2, "another took over", 30, here.place.report)
        pass_time(18 - (time.monotonic() - frozen))
        first.signal(signal.SIGCONT, children=True)

        def is_refused() -> bool:
            story = here.place.storage.explain("job", here.producer.intents[id])
            return any(event.event == "fenced" and (event.worker or "").startswith("w1@") for event in story)

        until(is_refused, "the first one's commit is refused", 20, here.place.report)
        pass_time(1)
        held = waiting(here)
        assert sum(held.values()) == 1, held
        second.kill()
        here.tally.kills["frozen"] += 1
        here.tally.kills["group"] += 1
        return here.finish(90, in_flight=1)


@dataclass
class LateAck:
    """What was left at the broker after a late ack, and how often the message was begun in the end."""

    left: int
    runs: int


def late_ack(folder: Path, kind: MakePlace) -> LateAck:
    """F3 without claims: a frozen worker wakes when another has its message, and acks; then the other is killed."""
    with world(folder, kind) as here:
        first = here.place.spawn(concurrency=1)
        here.ready(first)
        id = here.producer.send(10.0)
        until(lambda: id in here.begun(), "it runs")
        first.signal(signal.SIGSTOP, children=True)
        second = here.place.spawn(concurrency=1)
        until(lambda: len(here.begun()[id]) == 2, "another took over", 30, second.text)
        first.signal(signal.SIGCONT, children=True)
        until(lambda: "succeeded in" in first.text(), "the first one is done", 20, first.text)
        pass_time(1)
        left = sum(waiting(here).values())
        second.kill()
        here.ready(here.place.spawn(concurrency=1))
        until(lambda: not waiting(here), "nothing is left", 60)
        return LateAck(left, len(here.begun()[id]))


def frozen_server(folder: Path, kind: MakePlace = Place, seconds: float = 20.0) -> Tally:
    """The server stands still under load, for longer than any lease, and goes on."""
    with world(folder, kind) as here:
        workers = [here.place.spawn(pool=pool, concurrency=4) for pool in ("prefork", "threads", "prefork")]
        here.ready(*workers)
        longs = [here.producer.send(30.0) for _ in range(6)]
        until(lambda: all(id in here.begun() for id in longs), "they run")
        with here.producer.flowing(here.server, 0.02, lambda: 0.01):
            pass_time(2)
            here.server.signal(signal.SIGSTOP)
            pass_time(seconds)
            here.server.signal(signal.SIGCONT)
            pass_time(10)
        tally = here.finish(60)
        tally.complaints += [f"{worker.log.name} ended by itself" for worker in workers if worker.process.poll() != -9]
        return tally


@dataclass
class Recovery:
    """How long it took until a killed worker's messages ran elsewhere."""

    seconds: list[float]
    tally: Tally
    #: How often long tasks of the surviving worker were started.
    long_starts: list[int]


def recovery(folder: Path, seed: int, rounds: int, long: float = 60.0, width: int = 2) -> Recovery:
    """Whole workers are killed while they run 1 s tasks, and long tasks run on a surviving one."""
    chance = random.Random(seed)
    seconds: list[float] = []
    with world(folder) as here:
        survivor = here.place.spawn("-Q", "celery,long", concurrency=10)
        here.ready(survivor)
        longs = [here.producer.send(long, "long") for _ in range(4)]
        until(lambda: all(id in here.begun() for id in longs), "the long tasks run")
        done = 0
        while done < rounds:
            if done == rounds // 2 and len(longs) == 4 and long < 10 * rounds:
                longs += [here.producer.send(long, "long") for _ in range(2)]
            workers = [here.place.spawn(concurrency=2) for _ in range(width)]
            here.ready(*workers)
            children = {pid for worker in workers for pid in worker.children()}
            victims = _keep_busy(here, children)
            pass_time(chance.uniform(0.0, 0.4))
            for worker in workers:
                os.killpg(worker.pid, signal.SIGKILL)
            killed = time.time()
            for worker in workers:
                worker.process.wait(20)
            here.tally.kills["group"] += width
            ended = {line["id"] for line in here.place.lines() if line["handler"] == "end"}
            left = {id for id in victims(killed) if id not in ended}
            done += bool(left)  # else everything had just ended
            until(lambda left=left: all(len(here.begun()[id]) > 1 for id in left), "they run elsewhere", 40)
            seconds += [here.begun()[id][-1]["at"] - killed for id in left]
        tally = here.finish(long + 30, in_flight=2)
        return Recovery(seconds, tally, [len(here.begun()[id]) for id in longs])


def _keep_busy(here: World, pids: set[int]) -> Callable[[float], set[str]]:
    """Send 1 s tasks until one runs in one of these processes; return what tells which those are."""

    def runs(before: float = float("inf")) -> set[str]:
        return {id for id, lines in here.begun().items() if lines[-1]["pid"] in pids and lines[-1]["at"] < before}

    def taken() -> bool:
        if not runs():
            for _ in range(6):
                here.producer.send(1.0)
            pass_time(0.3)
        return bool(runs())

    until(taken, "they work")
    return runs


@dataclass
class Stops:
    """How long warm stops took."""

    seconds: list[float]
    tally: Tally


def stops(folder: Path, seed: int, rounds: int, width: int = 6) -> Stops:
    """F16: workers are asked to stop while they run 1 s tasks, and replaced."""
    chance = random.Random(seed)
    seconds: list[float] = []
    with world(folder) as here:
        slots: list[tuple[Worker, float, float]] = []  # worker, when to stop it, when it was asked to
        with here.producer.flowing(here.server, 0.12, lambda: 1.0, most=40):
            while len(seconds) < rounds and not here.tally.complaints:
                slots += [(here.place.spawn(), 0.0, 0.0) for _ in range(width - len(slots))]
                slots = [slot for slot in (_stop(here, *slot, chance, seconds) for slot in slots) if slot]
                pass_time(0.02)
        here.ready(here.place.spawn(concurrency=8))
        for worker, _, _ in slots:
            if worker.is_running():
                worker.stop(90)
        return Stops(seconds, here.finish(120))


def _stop(
    here: World, worker: Worker, due: float, asked: float, chance: random.Random, seconds: list[float]
) -> tuple[Worker, float, float] | None:
    now = time.monotonic()
    if not worker.is_running():
        if asked:
            seconds.append(now - asked)
        if not asked or worker.process.returncode != 0:
            here.tally.complaints.append(f"ended with {worker.process.returncode}: {worker.text()[-2000:]}")
        return None
    if not due and "ready." in worker.text():
        due = now + chance.uniform(0.5, 2.5)
    if due and now >= due and not asked:
        worker.process.terminate()
        asked = now
    return worker, due, asked


def server_kills(folder: Path, seed: int, rounds: int, pause: float = 3.0) -> Tally:
    """F4: the server is killed under load and comes back with its append-only file."""
    chance = random.Random(seed)
    with world(folder) as here:
        workers = [here.place.spawn(pool=pool) for pool in ("prefork", "threads")]
        here.ready(*workers)
        with here.producer.flowing(here.server, 0.01, lambda: chance.choice((0.0, 0.02))):
            for _ in range(rounds):
                pass_time(chance.uniform(1.0, pause))
                here.server.stop(signal.SIGKILL)
                pass_time(chance.uniform(0.0, 1.0))
                here.server.start()
                here.tally.kills["server"] += 1
            pass_time(pause)
        tally = here.finish(in_flight=8)
        tally.complaints += [f"{worker.log.name} ended by itself" for worker in workers if worker.process.poll() != -9]
        return tally


def shifted(shift: str) -> dict[str, str]:
    """Return the environment of a process whose clock is off by so much; its monotonic clock is not."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    return {"LD_PRELOAD": str(library), "FAKETIME": shift, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


def has_faketime() -> bool:
    return shutil.which("faketime") is not None


def server_ahead(server: RedisServer, folder: Path, shift: str) -> None:
    """Have the server start with its clock off by so much from now on."""
    wrapper = folder / "server-ahead"
    variables = " ".join(f"{name}='{value}'" for name, value in shifted(shift).items())
    wrapper.write_text(f'#!/bin/sh\nexec env {variables} {server.binary} "$@"\n')
    wrapper.chmod(0o755)
    server.binary = str(wrapper)


def waiting(here: World) -> Counter[str]:
    with here.server.client() as client:
        return Counter(leftovers(client))
