"""Counts down from 100 to 1 with a handler that always fails for multiples of 3: what retries and dead letters do.

    python -m watch_tasks.examples.countdown
    python -m watch_tasks.examples.countdown --celery --pool threads

67 numbers are handled at their first try; 33 are tried 4 times and become dead letters. Every retry goes to the tail
of the queue, so no number holds back another. Both ways end with the same line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from watch_tasks import Message, RetryPolicy, Storage, Topic, topic

START = 100
MAX_RETRIES = 3
#: Names the file to which the handler adds a line for each of its calls, in whatever process it runs.
CALLS = "COUNTDOWN_CALLS"
#: Seconds that a worker may take for all of it.
PATIENCE = 80.0

# Each message brings its own limit.
countdown: Topic[int] = topic("countdown", retry=RetryPolicy(max_retries=0))


@countdown.handler
def tell(message: Message[int]) -> None:
    """Write the number down, and fail if it is a multiple of 3."""
    calls = os.open(os.environ[CALLS], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(calls, f"{message.data}, retry {message.retries}\n".encode())
    finally:
        os.close(calls)
    if message.data % 3 == 0:
        raise ValueError(f"{message.data} is a multiple of 3")


def messages() -> Iterator[Message[int]]:
    """Yield the numbers from 100 to 1, as messages that are named by them."""
    for number in range(START, 0, -1):
        yield Message(number, countdown.name, index=f"number-{number}", max_retries=MAX_RETRIES)


def count(storage: Storage, sent: int, calls: Path) -> dict[str, int]:
    """Return what became of the messages, as the storage has it, and how often the handler was called."""
    return {
        "sent": sent,
        "handled": storage.len(countdown.name),
        "dead": sum(1 for _ in storage.dead(countdown.name)),
        "calls": len(calls.read_text().splitlines()) if calls.exists() else 0,
        "retries": storage.counters(countdown.name).retries,
    }


def run_in_process(folder: Path) -> dict[str, int]:
    """Run it with a Watcher, in the memory of this process."""
    from watch_tasks import MemoryQueue, MemoryStorage, TopicHandler, Watcher

    calls = folder / "calls"
    os.environ[CALLS] = str(calls)
    storage = MemoryStorage()
    sent = 0
    with Watcher(queue=MemoryQueue(START), storage=storage, handler=TopicHandler({"countdown": countdown})) as watcher:
        for message in messages():
            watcher.queue.push(message)
            sent += 1
        watcher.wait()
    return count(storage, sent, calls)


def run_on_celery(folder: Path, pool: str) -> dict[str, int]:
    """Run it with a Celery worker, on a Valkey server of its own."""
    from celery import Celery

    from watch_tasks import open_storage
    from watch_tasks.worker import install
    from watch_tasks.worker.embedded import EmbeddedServer

    calls = folder / "calls"
    server = EmbeddedServer(folder / "watch")
    url = server.start()
    try:
        with open_storage(url) as storage, _worker(folder, url, pool, calls):
            install(Celery("countdown", broker=url, set_as_current=False))
            sent = 0
            for message in messages():
                countdown.send(message)
                sent += 1
            deadline = time.monotonic() + PATIENCE
            result = count(storage, sent, calls)
            while result["handled"] + result["dead"] < sent and time.monotonic() < deadline:
                time.sleep(0.1)
                result = count(storage, sent, calls)
            return result
    finally:
        server.stop()


@contextmanager
def _worker(folder: Path, url: str, pool: str, calls: Path) -> Iterator[None]:
    """Run a worker for this module, as `celery worker` does, and stop it as an operator would."""
    ours = ("WATCH_", "CELERY_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {"CELERY_BROKER_URL": url, "WATCH_DIR": str(folder / "watch"), CALLS: str(calls)}
    command = ["-m", "celery", "-A", "watch_tasks", "worker", "-I", "watch_tasks.examples.countdown", "-P", pool]
    with (folder / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, *command, "--concurrency", "2", "--loglevel", "WARNING"],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield
        if worker.poll() is not None:
            sys.exit(f"the worker ended by itself:\n{(folder / 'worker.log').read_text()}")
    finally:
        worker.terminate()
        worker.wait(60)  # Celery's pool takes half a minute now and then


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example and print, as the last line, what it came to."""
    parser = argparse.ArgumentParser(prog="python -m watch_tasks.examples.countdown", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--celery", action="store_true", help="on Celery, with its own Valkey and worker")
    parser.add_argument("--pool", choices=("prefork", "threads", "solo"), default="prefork", help="of that worker")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="countdown-") as name:
        folder = Path(name)
        result: dict[str, Any]
        result = run_on_celery(folder, options.pool) if options.celery else run_in_process(folder)
        if not options.celery:
            print((folder / "calls").read_text(), end="")
    print(json.dumps(result, separators=(",", ":")))


if __name__ == "__main__":
    main()
