"""How fast one worker process empties a queue of messages that need nothing done, beside others, in the same run.

    python -m benchmarks.drain --rounds 10 --count 5000

Each round starts a worker of each library, in turn, over an empty server that has all messages waiting, and takes the
time from its first to its last. Rounds alternate, so that what else the machine does falls on all of them; what is told
are the medians, and the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import redis

from tests.servers import RedisServer

WORKER = [sys.executable, "-m"]
CELERY = ["celery", "-A", "benchmarks.contenders.{0}:app", "worker", "-P", "solo", "-l", "ERROR"]
CELERY += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
#: Name → the module that sends, and the command of its worker, with the pool that the table names.
CONTENDERS: dict[str, tuple[str, list[str], str]] = {
    "stock Celery": ("stock", [word.format("stock") for word in CELERY], "solo, prefetch 100"),
    "our transport": ("transport", [word.format("transport") for word in CELERY], "solo, prefetch 100"),
    "watch_tasks, claimed and recorded": ("watch", [word.format("watch") for word in CELERY], "solo, prefetch 100"),
    "Dramatiq": (
        "dramatiq_",
        ["dramatiq", "-p", "1", "-t", "8", "benchmarks.contenders.dramatiq_"],
        "1 process, 8 threads",
    ),
    "Taskiq (streams)": (
        "taskiq_",
        ["taskiq", "worker", "-w", "1", "--log-level", "ERROR", "benchmarks.contenders.taskiq_:broker"],
        "1 process, asyncio",
    ),
}
#: The others, of which the faster counts.
PEERS = ("Dramatiq", "Taskiq (streams)")


def drain(name: str, url: str, count: int) -> float:
    """Return the messages a second of one run."""
    module, command, _ = CONTENDERS[name]
    with redis.Redis.from_url(url) as client:
        client.flushall()
    result = Path(tempfile.mkdtemp()) / "seconds"
    environment = {**os.environ, "BROKER": url, "COUNT": str(count), "RESULT": str(result), "PYTHONWARNINGS": "ignore"}
    sender = f"from benchmarks.contenders.{module} import send; send({count})"
    subprocess.run([sys.executable, "-c", sender], env=environment, check=True)
    worker = subprocess.Popen(
        [*WORKER, *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 120
        while not (result.exists() and result.read_text()):
            if time.monotonic() > end or worker.poll() is not None:
                raise RuntimeError(f"{name}: the worker did not handle all messages")
            time.sleep(0.05)
        return (count - 1) / float(result.read_text())
    finally:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def _ratio(found: list[float], base: list[float] | None) -> str:
    """Return the median of the ratios within a round."""
    return f"{statistics.median(one / other for one, other in zip(found, base, strict=True)):.2f}" if base else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), help="names of those to run")
    chosen = parser.parse_args()
    rates: dict[str, list[float]] = {name: [] for name in chosen.only}
    server = RedisServer(Path(tempfile.mkdtemp())).start()
    try:
        for number in range(chosen.rounds):
            for name in rates:
                rates[name].append(drain(name, server.url, chosen.count))
                print(f"round {number + 1}: {name}: {rates[name][-1]:.0f}/s", file=sys.stderr, flush=True)
    finally:
        server.stop()
    print("| | pool | messages/s, median | spread | ÷ stock Celery | ÷ the faster of Dramatiq and Taskiq |")
    print("|---|---|---|---|---|---|")
    peers = [max(both) for both in zip(*(rates[name] for name in PEERS if name in rates), strict=True)]
    for name, found in rates.items():
        spread = f"{min(found):.0f} to {max(found):.0f}"
        ratios = " | ".join(_ratio(found, base) for base in (rates.get("stock Celery"), peers))
        print(f"| {name} | {CONTENDERS[name][2]} | {statistics.median(found):.0f} | {spread} | {ratios} |")
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
