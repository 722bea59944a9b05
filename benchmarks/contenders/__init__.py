"""Who is measured, how the workers of each are started, and what each promises meanwhile.

A contender's module holds its app and two functions, which send messages one by one and in the best way the library
has for many: `send(work, bodies)` and `send_many(work, bodies)`. Nothing here imports it: it is run in processes of its
own, with the server's URL in `BROKER` and the folder to count in in `RESULT`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

BROKER = os.environ.get("BROKER", "redis://127.0.0.1:6379/0")


def chunks(bodies: Iterable[list[Any]], size: int = 100) -> Iterator[list[list[Any]]]:
    """Yield the bodies in lists of at most `size`."""
    left = iter(bodies)
    while chunk := list(islice(left, size)):
        yield chunk


@dataclass(frozen=True)
class Pool:
    """How workers are started."""

    #: What the report calls it.
    label: str
    #: One for each worker that is started.
    commands: tuple[tuple[str, ...], ...]
    #: How many processes handle messages.
    processes: int = 1


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A library, or a way of using one."""

    name: str
    #: The module that holds its app.
    module: str
    #: What it does for a message besides calling the handler, and when it acks.
    keeps: str
    #: How `send_many` sends.
    bulk: str
    #: One process, which handles one message at a time where that is the fastest it can.
    one: tuple[Pool, ...]
    #: Two processes.
    two: tuple[Pool, ...]
    #: One process that handles a hundred messages at a time, where it can.
    hundred: tuple[Pool, ...]
    #: Whether it is a library beside Celery.
    is_peer: bool = False
    #: Whether its queue is filled by `send_many` before its workers are measured. Only where what they get is the same
    #: as if sent one by one, or else that is what this contender is about.
    fills_in_bulk: bool = True
    #: Messages that are handled in one measurement at least.
    least: int = 100


def _run(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", *words)


def _celery(module: str, pool: str, concurrency: int, prefetch: int, name: str = "bench") -> tuple[str, ...]:
    """Return the command of a worker without what only groups of workers need."""
    return _run(
        *("celery", "-A", f"benchmarks.contenders.{module}:app", "worker", "-n", f"{name}@%h", "-l", "ERROR"),
        *("-P", pool, "-c", str(concurrency), "--prefetch-multiplier", str(prefetch)),
        *("--without-gossip", "--without-mingle", "--without-heartbeat"),
    )


def _of_celery(module: str, prefetch: int = 100) -> dict[str, tuple[Pool, ...]]:
    solo = [_celery(module, "solo", 1, prefetch, name) for name in ("first", "second")]
    prefork = _celery(module, "prefork", 2, prefetch // 2)
    return {
        "one": (Pool(f"solo, prefetch {prefetch}", (solo[0],)),),
        "two": (
            Pool(f"prefork, 2 processes, prefetch {prefetch}", (prefork,), 2),
            Pool(f"2 workers, solo, prefetch {prefetch} each", tuple(solo), 2),
        ),
        "hundred": (Pool("threads, 100, prefetch 200", (_celery(module, "threads", 100, 2),)),),
    }


def _dramatiq(processes: int, threads: int) -> tuple[Pool, ...]:
    command = _run("dramatiq", "-p", str(processes), "-t", str(threads), "benchmarks.contenders.dramatiq_")
    return (Pool(f"{_processes(processes)}, {threads} threads{_each(processes)}", (command,), processes),)


def _taskiq(processes: int) -> tuple[Pool, ...]:
    command = _run(
        *("taskiq", "worker", "-w", str(processes), "--max-async-tasks", "100", "--no-parse"),
        *("--log-level", "ERROR", "benchmarks.contenders.taskiq_:broker"),
    )
    return (Pool(f"{_processes(processes)}, asyncio, 100 tasks{_each(processes)}", (command,), processes),)


def _huey(kind: str, workers: int) -> tuple[Pool, ...]:
    command = _run(
        *("huey.bin.huey_consumer", "benchmarks.contenders.huey_.huey", "-k", kind, "-w", str(workers)),
        *("-n", "-q"),
    )
    label = _processes(workers) if kind == "process" else f"1 process, {workers} thread{'s' * (workers > 1)}"
    return (Pool(label, (command,), workers if kind == "process" else 1),)


def _rq(processes: int) -> tuple[Pool, ...]:
    kind = ("-w", "rq.worker.SimpleWorker", "-u", "{broker}")
    if processes == 1:
        return (Pool("SimpleWorker", (_run("rq.cli", "worker", *kind, "-q", "bench"),)),)
    command = _run("rq.cli", "worker-pool", *kind, "-n", str(processes), "-q", "bench")
    return (Pool(f"pool of {processes} SimpleWorkers", (command,), processes),)


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _each(count: int) -> str:
    return "" if count == 1 else " each"


STOCK = Contender(
    name="stock Celery",
    module="stock",
    keeps="acks when the task has returned; no record",
    bulk="kombu's `Producer.batch`, pipelines of 100",
    **_of_celery("stock"),
)
TRANSPORT = Contender(
    name="Celery on our transport",
    module="transport",
    keeps="as stock Celery; a message is moved and noted as taken in one step",
    bulk="as stock Celery",
    **_of_celery("transport"),
)
WATCH = Contender(
    name="watch_tasks",
    module="watch",
    keeps="claims, handles under the claim, records that the index was handled, then acks",
    bulk="`send_many`",
    # What `send_many` packs is not what `send` sends.
    fills_in_bulk=False,
    **_of_celery("watch"),
)
WATCH_BULK = Contender(
    name="watch_tasks, bulk",
    module="watch",
    keeps="as watch_tasks, for each message of what `send_many` sent",
    bulk="`send_many`",
    # So many packets that the first and the last of them hardly count: they take up to 500.
    least=20_000,
    # Of packets: with a hundred of them one worker would take what is there for two.
    **_of_celery("watch", prefetch=4),
)
DRAMATIQ = Contender(
    name="Dramatiq",
    module="dramatiq_",
    keeps="acks when the actor has returned; no record",
    bulk="`group`, which sends one by one",
    one=_dramatiq(1, 8),
    two=_dramatiq(2, 8),
    hundred=_dramatiq(1, 100),
    is_peer=True,
)
TASKIQ = Contender(
    name="Taskiq (streams)",
    module="taskiq_",
    keeps="acks when the task has returned; no record",
    bulk="`asyncio.gather` of 10",
    one=_taskiq(1),
    two=_taskiq(2),
    hundred=_taskiq(1),
    is_peer=True,
)
HUEY = Contender(
    name="Huey",
    module="huey_",
    keeps="takes the message off the queue first: what a worker had in hand when it died is lost; no record",
    bulk="`map`, which sends one by one",
    one=_huey("thread", 1),
    two=_huey("process", 2),
    hundred=_huey("thread", 100),
    is_peer=True,
)
RQ = Contender(
    name="RQ",
    module="rq_",
    keeps="the job is kept until it is done, in a registry of what is under way; no record",
    bulk="`enqueue_many`, pipelines of 100",
    one=_rq(1),
    two=_rq(2),
    # It has no way to handle more than one at a time in a process.
    hundred=_rq(1),
    is_peer=True,
)

CONTENDERS: tuple[Contender, ...] = (STOCK, TRANSPORT, WATCH, WATCH_BULK, DRAMATIQ, TASKIQ, HUEY, RQ)
