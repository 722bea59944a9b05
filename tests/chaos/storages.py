"""Storages that go away under load, each in its own ways, and come back with all they had."""

from __future__ import annotations

import random
import subprocess
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM

from ..postgres import PostgresServer
from ..servers import RedisServer

#: Another writer: has the file when it says so, until its input ends.
_HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
connection.execute("ROLLBACK")
"""


class FleetingStorage(ABC):
    """A storage that can be taken away from everybody, and given back."""

    url: str

    @abstractmethod
    def go_away(self, chance: random.Random) -> str:
        """Have nothing claimed or stored from when this returns; say which way was chosen."""

    @abstractmethod
    def come_back(self) -> None:
        """Answer again."""

    @abstractmethod
    def close(self) -> None:
        """End what was started, away or not."""


class FleetingServer(FleetingStorage):
    """A server of the test's own: stopped, killed or frozen.

    Args:
        server: running.
        ways: those to choose from, each once before any comes again.
    """

    def __init__(self, server: RedisServer | PostgresServer, ways: tuple[str, ...]) -> None:
        self._server, self._ways, self._way = server, ways, ""
        self._left: list[str] = []
        self.url = server.url

    def go_away(self, chance: random.Random) -> str:
        self._left = self._left or chance.sample(self._ways, len(self._ways))
        self._way = self._left.pop()
        if self._way == "frozen":
            self._server.signal(SIGSTOP)
        else:
            self._server.stop(SIGKILL if self._way == "killed" else SIGTERM)
        return self._way

    def come_back(self) -> None:
        if self._way == "frozen":
            self._server.signal(SIGCONT)
        else:
            self._server.start()

    def close(self) -> None:
        self._server.stop(SIGKILL)


class HeldSqlite(FleetingStorage):
    """A SQLite file that another process writes to for long, which then ends its transaction or is killed.

    Args:
        file: made by whoever comes first.
    """

    def __init__(self, file: Path) -> None:
        self.url = f"sqlite:///{file}"
        self._file = file
        self._holder: subprocess.Popen[bytes] | None = None
        self._is_killed = False

    def go_away(self, chance: random.Random) -> str:
        self._is_killed = chance.random() < 0.5
        self._holder = subprocess.Popen(
            [sys.executable, "-c", _HOLD, self._file], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._holder.stdout
        assert self._holder.stdout.readline() == b"held\n"
        return "held, killed" if self._is_killed else "held"

    def come_back(self) -> None:
        assert self._holder
        if self._is_killed:
            self._holder.kill()
        self._holder.communicate(timeout=20)
        self._holder = None

    def close(self) -> None:
        if self._holder:
            self._holder.kill()
            self._holder.communicate(timeout=20)
            self._holder = None
