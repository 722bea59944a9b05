"""Real processes in the place of containers: what pytest-celery's nodes ask of one."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from ..servers import RedisServer
from ..workers import until


class WorkerProcess:
    """A worker and its children, as a container would hold them."""

    def __init__(self, name: str, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.name = self.id = name
        self._log = folder / f"{name}.log"
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    @property
    def status(self) -> str:
        return "running" if self._process.poll() is None else "exited"

    def ready(self) -> bool:
        until(lambda: "ready." in self.logs() or self.status == "exited", f"{self.name} is ready", 30, self.logs)
        return self.status == "running"

    def logs(self) -> str:
        return self._log.read_text(errors="replace")

    def kill(self, signal: str | int = "SIGKILL") -> None:
        """Signal the main process; SIGKILL ends its children too, as it would in a container."""
        number = _number(signal)
        if number == _number("SIGKILL"):
            os.killpg(self._process.pid, number)
            self._process.wait(20)
        else:
            self._process.send_signal(number)

    def pause(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)

    def unpause(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    def reload(self) -> None:
        """Nothing is remembered here."""

    def teardown(self) -> None:
        if self.status == "running":
            self.kill()


class ServerProcess:
    """A running Valkey, as a container would hold it."""

    name = id = "valkey"
    status = "running"

    def __init__(self, server: RedisServer) -> None:
        self._server = server

    @property
    def celeryconfig(self) -> dict[str, Any]:
        return {"url": self._server.url, "host_url": self._server.url}

    def ready(self) -> bool:
        return True

    def logs(self) -> str:
        return (self._server.folder / "server.log").read_text(errors="replace")

    def restart(self, timeout: float) -> None:
        self._server.stop()
        self._server.start()

    def reload(self) -> None:
        """Nothing is remembered here."""

    def teardown(self) -> None:
        """The server ends with the fixture that started it."""


def _number(name: str | int) -> int:
    return name if isinstance(name, int) else int(signal.Signals[name])
