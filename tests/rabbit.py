"""A real RabbitMQ that tests start, kill and start again, with a port mapper of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from signal import SIGKILL, SIGTERM

import pytest

from .servers import free_port, in_ci

#: Debian's wrapper in /usr/sbin changes user and folders; this is the server itself.
_DEBIAN = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")


class RabbitServer:
    """One RabbitMQ node on free ports of the loopback interface, its data in a folder of its own."""

    def __init__(self, folder: Path, binary: str) -> None:
        self.folder = folder
        self.binary = binary
        self.port, self._distribution, self._mapper = free_port(), free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def start(self) -> RabbitServer:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "rabbitmq.conf").write_text("disk_free_limit.absolute = 50MB\n")
        environment = {
            **os.environ,
            "HOME": str(self.folder),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._mapper),
            "RABBITMQ_NODENAME": f"watch{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "none.conf"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }
        with (self.folder / "server.log").open("ab") as log:
            self._epmd = subprocess.Popen(["epmd"], env=environment, stdout=log, stderr=log, start_new_session=True)
            self.process = subprocess.Popen(
                [self.binary], env=environment, stdout=log, stderr=log, start_new_session=True, cwd=self.folder
            )
        deadline = time.monotonic() + 60
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop(SIGKILL)
                raise RuntimeError((self.folder / "server.log").read_text(errors="replace")[-3000:])
            time.sleep(0.1)
        return self

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def stop(self, number: int = SIGTERM) -> None:
        """End it (SIGKILL: at once) and wait for that. Its data stays for the next `start`."""
        for process, how in ((self.process, number), (self._epmd, SIGKILL)):
            if process and process.poll() is None:
                os.killpg(process.pid, how)
                process.wait(40)
        self.process = self._epmd = None

    def _answers(self) -> bool:
        """Whether it greets: it listens only when its queues are back."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as probe:
                probe.sendall(b"AMQP\x00\x00\x09\x01")
                return bool(probe.recv(1))
        except OSError:
            return False


def find_rabbit() -> str:
    """Return the path of the server; skip the test where there is none, fail it in CI."""
    found = str(_DEBIAN) if _DEBIAN.exists() else shutil.which("rabbitmq-server")
    if found and shutil.which("epmd"):
        return found
    message = "no rabbitmq-server on this machine (Debian: apt-get install rabbitmq-server)"
    if in_ci():
        pytest.fail(message)
    pytest.skip(message)
