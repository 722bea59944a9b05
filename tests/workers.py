"""A place where real workers run: topics in a module of their own, real processes, a ledger outside the system."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import Celery

from watch_tasks.storage import Storage, open_storage

#: What every module of topics in these tests begins with: `note` writes one line to the ledger, in one write.
PRELUDE = '''
import json, os, signal, sys, time
from watch_tasks import Discard, Message, RetryPolicy, Snooze, topic

def note(name, message, **more):
    line = {"handler": name, "topic": message.topic, "index": message.index, "id": message.id,
            "retries": message.retries, "token": message.token, "pid": os.getpid(), "at": time.time(), **more}
    handle = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, (json.dumps(line) + "\\n").encode())
    os.close(handle)

def wait_for(name):
    """Wait until the test makes the file."""
    while not os.path.exists(os.path.join(os.environ["SITE"], name)):
        time.sleep(0.02)
'''


class Worker:
    """One `celery worker` process, and the children it has."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def is_running(self) -> bool:
        return self.process.poll() is None

    def children(self) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def memory(self, *, peak: bool = False) -> float:
        """Return the resident MiB of the main process, now or at their most."""
        name = "VmHWM:" if peak else "VmRSS:"
        return int(Path(f"/proc/{self.pid}/status").read_text().split(name)[1].split()[0]) / 1024

    def signal(self, number: int, *, children: bool = False) -> None:
        for pid in [*(self.children() if children else []), self.pid]:
            os.kill(pid, number)

    def kill(self) -> None:
        """End it at once, with its children: nothing gets to clean up."""
        os.killpg(self.pid, signal.SIGKILL)
        self.process.wait(20)

    def stop(self, timeout: float = 60) -> int:
        """Stop it as an operator would, and return its exit code."""
        if self.is_running():
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        return self.process.returncode


class Site:
    """A folder with a module `topics_here`, a broker and storage, and what the handlers wrote."""

    def __init__(self, folder: Path, url: str, topics: str, config: str = "", **environment: str) -> None:
        self.folder = folder
        self.url = url
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "topics_here.py").write_text(PRELUDE + topics)
        (folder / "celeryconfig.py").write_text('imports = ("topics_here",)\n' + config)
        self.ledger = folder / "ledger.jsonl"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("WATCH_", "CELERY_"))},
            "CELERY_BROKER_URL": url,
            "WATCH_DIR": str(folder / "watch"),
            "LEDGER": str(self.ledger),
            "SITE": str(folder),
            "PYTHONWARNINGS": "ignore",
            **environment,
        }
        #: Knows the broker and nothing else, as a producer that never heard of this package.
        self.bare = Celery("bare", broker=url, set_as_current=False)
        self._workers: list[Worker] = []
        self._storage: Storage | None = None

    @property
    def storage(self) -> Storage:
        if self._storage is None:
            self._storage = open_storage(self.environment.get("WATCH_STORAGE_BACKEND", self.url))
        return self._storage

    def worker(
        self, *options: str, app: str = "watch_tasks", pool: str = "prefork", concurrency: int = 2, **environment: str
    ) -> Worker:
        """Start a worker and return it when it is ready."""
        number = len(self._workers) + 1
        log = self.folder / f"worker{number}.log"
        command = [sys.executable, "-m", "celery", "-A", app, "worker", "-P", pool, "-l", "INFO"]
        command += ["-c", str(concurrency), "-n", f"w{number}@test", "--without-gossip", "--without-mingle", *options]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**self.environment, **environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        worker = Worker(process, log)
        self._workers.append(worker)
        until(lambda: not worker.is_running() or "ready." in worker.text(), "the worker is ready", 30)
        assert "ready." in worker.text(), worker.text()
        return worker

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run this Python here with some arguments, to its end."""
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def send(self, topic: str, data: Any, **options: Any) -> str:
        """Send as a bare producer; keywords `index`, `max_retries` and `once` go to the topic. Return the id."""
        keywords = {name: options.pop(name) for name in ("index", "max_retries", "once") if name in options}
        return str(self.bare.send_task(f"watch.{topic}", [data], keywords, **options).id)

    def touch(self, name: str) -> None:
        """Let go of handlers that `wait_for(name)`."""
        (self.folder / name).touch()

    def lines(self) -> list[dict[str, Any]]:
        """What the handlers wrote."""
        text = self.ledger.read_text() if self.ledger.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def calls(self, key: str = "handler") -> Counter[Any]:
        """How often each handler (or each value of another key) was called."""
        return Counter(line[key] for line in self.lines())

    def handled(self, topic: str | None = None) -> int:
        return self.storage.len(topic)

    def dead(self, topic: str | None = None) -> list[Any]:
        return list(self.storage.dead(topic))

    def until_handled(self, count: int, timeout: float = 30, topic: str | None = None) -> None:
        until(lambda: self.handled(topic) >= count, f"{count} handled", timeout, lambda: self.report())

    def until_dead(self, count: int, timeout: float = 30) -> None:
        until(lambda: len(self.dead()) >= count, f"{count} dead", timeout, lambda: self.report())

    def report(self) -> str:
        """Everything one wants to see of a failure."""
        logs = "\n".join(f"--- {worker.log.name}\n{worker.text()[-6000:]}" for worker in self._workers)
        return f"calls {dict(self.calls())}, handled {self.handled()}, dead {len(self.dead())}\n{logs}"

    def close(self) -> None:
        for worker in self._workers:
            if worker.is_running():
                worker.kill()
        self.bare.close()
        if self._storage:
            self._storage.close()


def until(
    condition: Callable[[], bool], what: str, timeout: float = 20, report: Callable[[], str] = lambda: ""
) -> None:
    """Wait for something that happens in another process, where there is no event to wait on."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what}\n{report()}")
        time.sleep(0.05)
