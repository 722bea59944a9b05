"""Where contenders are measured: a temporary folder, a server, and processes of which none outlives the scorecard."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import redis

from ..errors import ConfigurationError, QueueUnavailableError
from ..worker.embedded import EmbeddedServer
from .contenders import BROKER
from .guard import Guard
from .ledger import LEDGER
from .signals import Signals

__all__ = ["ContenderError", "Process", "Stage", "count_keys", "open_stage"]

#: Environment variables that begin so are settings of the user's own program, and not for contenders.
_SETTINGS: Final = ("celery", "watch_", "dramatiq", "flower", "scorecard_")
#: Lines of a log that an error shows.
_LINES: Final = 15


class ContenderError(RuntimeError):
    """A contender that could not be measured: its process ended by itself, or it did not do what was waited for."""


class Process:
    """A worker or a sender, alone with its children in a process group."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], log: Path, guard: Guard) -> None:
        self.name = name
        self._popen = popen
        self._log = log
        self._guard = guard
        self._is_gone = False

    @property
    def group(self) -> int:
        """The number of its process group."""
        return self._popen.pid

    @property
    def is_running(self) -> bool:
        """Whether its main process runs."""
        return self._popen.poll() is None

    def stop(self, timeout: float) -> None:
        """Ask it to end, and wait for that."""
        if self.is_running:
            self._popen.terminate()
        self.wait(timeout)

    def wait(self, timeout: float) -> None:
        """Wait for it to end well.

        Raises:
            ContenderError: it did not, or not in time.
        """
        try:
            code = self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ContenderError(f"{self.name} did not end within {timeout:g} s{self.words()}") from None
        if code:
            raise ContenderError(f"{self.name} ended with code {code}{self.words()}")
        self._forget()

    def kill(self) -> None:
        """End it at once with all its children, as `kill -9` does. Twice is safe."""
        if self._is_gone:
            return  # its number may be somebody else's by now
        try:
            os.killpg(self.group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # all gone; macOS says so in the second way
        self._popen.wait()
        self._forget()

    def _forget(self) -> None:
        self._is_gone = True
        self._guard.remove(self.group)

    def words(self) -> str:
        """Return the end of its log, for an error."""
        lines = self._log.read_text(errors="replace").splitlines()[-_LINES:]
        return ". The end of its log:\n" + "\n".join(f"  {line}" for line in lines) if lines else ""


class Stage:
    """The folder, the server and what runs.

    Args:
        folder: for logs and ledgers.
        url: the server.
        guard: knows what runs.
        signals: kept while something is being started.
    """

    def __init__(self, folder: Path, url: str, guard: Guard, signals: Signals) -> None:
        self.folder = folder
        self.url = url
        self._guard = guard
        self._signals = signals
        self._running: list[Process] = []

    def start(self, name: str, arguments: list[str], ledger: Path) -> Process:
        """Start `python -m` with these arguments; what it does is written to the ledger."""
        own = {name: value for name, value in os.environ.items() if not name.lower().startswith(_SETTINGS)}
        log = self.folder / f"{name.replace(' ', '-')}.log"
        with log.open("ab") as output, self._signals.held():
            popen = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=self.folder,
                env={
                    **own,
                    BROKER: self.url,
                    LEDGER: str(ledger),
                    "WATCH_DIR": str(self.folder / "watch"),
                    "PYTHONWARNINGS": "ignore",
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            process = Process(name, popen, log, self._guard)
            self._running.append(process)
            self._guard.add(process.group)
        return process

    def server(self) -> str:
        """Return what the server is, with its version."""
        with _answering(self.url) as client:
            told: Any = client.info("server")
        if told.get("server_name") == "valkey":
            return f"Valkey {told.get('valkey_version')}"
        return f"Redis {told.get('redis_version')}"

    def clear(self) -> None:
        """End all processes, and empty the server.

        Raises:
            QueueUnavailableError: it does not answer any more.
        """
        while self._running:
            self._running.pop().kill()
        with _answering(self.url) as client:
            client.flushdb()


@contextmanager
def open_stage(signals: Signals, broker: str | None = None) -> Iterator[Stage]:
    """Set everything up, and take it away again: processes, server and folder.

    Args:
        signals: those that end the run.
        broker: the URL of a Redis or Valkey to use, whose database is emptied; None: an embedded one.

    Raises:
        ConfigurationError: no server can be embedded here.
        QueueUnavailableError: the embedded server ended at once, or the broker does not answer.
    """
    folder = Path(tempfile.mkdtemp(prefix="watch-scorecard-"))
    try:
        guard = Guard(folder)
        try:
            yield from _opened(folder, guard, signals, broker)
        finally:
            guard.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _opened(folder: Path, guard: Guard, signals: Signals, broker: str | None) -> Iterator[Stage]:
    server, pid = None if broker else EmbeddedServer(folder / "server"), None
    try:
        if server:
            with signals.held():
                broker = _start(server)
                if pid := server.pid:
                    guard.add(pid)
        stage = Stage(folder, str(broker), guard, signals)
        try:
            yield stage
        finally:
            stage.clear()
    finally:
        if server:
            server.stop()
            if pid:
                guard.remove(pid)


def _start(server: EmbeddedServer) -> str:
    try:
        return server.start()
    except ConfigurationError as exc:
        raise ConfigurationError(f"{exc}; for a scorecard, give the URL of an empty database as --broker") from exc


def count_keys(url: str) -> int:
    """Return how many keys the database of a URL holds.

    Raises:
        ConfigurationError: the URL cannot be read.
        QueueUnavailableError: the server does not answer, or does not let us in.
    """
    with _answering(url) as client:
        return int(client.dbsize())


@contextmanager
def _answering(url: str) -> Iterator[redis.Redis]:
    """Give a client of the server, whose errors are ours."""
    try:
        # The socket of the embedded server has a scheme of its own at redis-py.
        with redis.Redis.from_url(url.replace("redis+socket://", "unix://"), socket_connect_timeout=5) as client:
            yield client
    except ValueError as exc:
        raise ConfigurationError(f"`--broker` must be like redis://localhost:6379/9: {exc}") from exc
    except (redis.RedisError, OSError) as exc:
        raise QueueUnavailableError(f"the broker does not answer: {exc}") from exc
