"""`watch-tasks up`: a broker, a worker and Flower, from one command, until Ctrl-C."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

import click

from ..errors import QueueUnavailableError
from .children import Child
from .codes import FAILED, INTERRUPTED, Command, CommandError
from .output import clean, listed
from .program import Program, examples, with_program
from .sample import send_command

if TYPE_CHECKING:
    from ..worker.embedded import EmbeddedServer
    from ..worker.folder import FolderLock

__all__ = ["up"]

#: Where Flower listens where nobody says otherwise; its own default.
PORT: Final = 5555
#: Seconds between two looks at the children.
STEP: Final = 0.2
#: Seconds that Flower may take before the person at the terminal is told where to look.
PATIENCE: Final = 30.0

#: What children get at the first, the second and the third signal, and what is said of it.
_STOPS: Final = (
    (signal.SIGTERM, "stopping: handlers finish what they have in hand; Ctrl-C again not to wait for them"),
    (signal.SIGQUIT, "not waiting: what handlers have in hand will be handled again; Ctrl-C again to kill them"),
    (signal.SIGKILL, "killing what is left"),
)


@click.command(
    cls=Command,
    epilog=examples("watch-tasks up alerts", "watch-tasks up alerts orders --concurrency 4 --pool threads"),
)
@click.argument("modules", metavar="[MODULE]...", nargs=-1)
@click.option("--pool", metavar="POOL", help="How the worker runs handlers: prefork (default), threads, solo.")
@click.option("--concurrency", type=click.IntRange(min=1), help="How many messages it handles at a time.")
@click.option(
    "--port", type=click.IntRange(1, 65535), default=PORT, show_default=True, help="Flower's; else a free one."
)
@with_program
def up(program: Program, modules: tuple[str, ...], pool: str | None, concurrency: int | None, port: int) -> None:
    """Run broker, worker and Flower for MODULEs.

    The broker is an embedded Valkey, unless one is configured.

    All of it lives in WATCH_DIR (./.watch): data, logs, and what the other commands need to find it. What ends is
    started again. Ctrl-C lets handlers finish; a second one does not wait for them.
    """
    from ..worker.folder import FolderLock, private_folder
    from ..worker.settings import watch_dir

    program.include = (*modules, *program.include)
    program.require_broker_url()
    folder = watch_dir(program.app.conf)
    private_folder(folder)
    lock = FolderLock(folder / "up.lock")
    if not lock.acquire():
        raise CommandError(f"`watch-tasks up` runs in {folder} already{_who(folder)}; stop it first", FAILED)
    options = [*(("--pool", pool) if pool else ()), *(("--concurrency", str(concurrency)) if concurrency else ())]
    try:
        with _asked() as asked:
            _Services(program, folder, options, port, asked).run()
    finally:
        lock.release()
    if asked and asked[0] == signal.SIGINT:
        raise click.exceptions.Exit(INTERRUPTED)


class _Services:
    """The server, the worker and Flower of one folder.

    Args:
        program: whose topics run.
        folder: where.
        options: for the worker.
        port: that Flower should have.
        asked: signals that arrived so far.
    """

    def __init__(self, program: Program, folder: Path, options: list[str], port: int, asked: list[int]) -> None:
        from ..worker.embedded import EmbeddedServer
        from ..worker.folder import FolderLock

        self._program = program
        self._folder = folder
        self._options = options
        self._port = port
        self._asked = asked
        self._server: EmbeddedServer | None = EmbeddedServer(folder) if program.embedded_folder else None

        def lock(name: str) -> FolderLock:
            return FolderLock(folder / f"{name}.lock")

        self._worker = Child("worker", self._worker_command, folder, lock("worker"), _say)
        self._flower = Child("flower", self._flower_command, folder, lock("flower"), _say)
        self._children = (self._worker, self._flower)
        self._announced = False
        self._waiting_since = 0.0

    def run(self) -> None:
        """Start them, keep them running until a signal arrives, and stop them, the server last."""
        from ..worker.running import forget_running, tell_running

        topics = self._program.load_topics()
        if not topics:
            _say("Warning: no topics are loaded; name their modules, as in `watch-tasks up alerts`")
        try:
            if self._server:
                self._server.start()
                _say(f"broker: Valkey in {self._folder}{'' if self._server.started else ', of another process'}")
            else:
                from .check import mask

                _say(f"broker: {mask(self._program.app.conf.broker_url)}")
            tell_running(self._folder, self._program.include)
            self._waiting_since = time.monotonic()
            for child in self._children:
                child.start()
            _say(f"worker: {listed([topic.name for topic in topics]) or 'no topics'}; log in {self._worker.log_file}")
            self._watch(f"\n\nSend a message:\n  {send_command(topics)}" if topics else "")
        finally:
            self._stop()
            forget_running(self._folder)

    def _watch(self, hint: str) -> None:
        while not self._asked:
            if self._server and not self._server.is_running():
                self._restart_server(self._server)
            self._worker.watch()
            if self._flower.watch():
                self._announced, self._waiting_since = False, time.monotonic()
            if not self._announced and self._flower.is_running and self._is_answering():
                self._announced = True
                _say(f"Flower: http://127.0.0.1:{self._port}/{hint}\n\nCtrl-C to stop.")
                hint = ""
            elif not self._announced and time.monotonic() - self._waiting_since > PATIENCE:
                self._waiting_since = float("inf")
                _say(f"Flower does not answer yet; see {self._flower.log_file}")
            time.sleep(STEP)

    def _restart_server(self, server: EmbeddedServer) -> None:
        _say(f"the server ended; starting it again; see {server.log_file}")
        try:
            server.start()
        except QueueUnavailableError as exc:
            _say(str(exc))
            time.sleep(PATIENCE / 10)

    def _stop(self) -> None:
        """Let the children finish; each further signal makes it harder. The server goes last."""
        number = 0
        running = [child for child in self._children if child.is_running]
        while running:
            if number < min(max(1, len(self._asked)), len(_STOPS)):
                kind, said = _STOPS[number]
                number += 1
                _say(said)
                for child in running:
                    child.signal(kind)
            time.sleep(STEP / 4)
            running = [child for child in running if child.is_running]
        for child in self._children:
            child.close()
        if self._server:
            self._server.stop()
        if number:
            _say("stopped")

    def _worker_command(self) -> list[str]:
        include = ["--include", ",".join(self._program.include)] if self._program.include else []
        options = ["--loglevel=INFO", "--hostname=up@%h", *include, *self._options]
        return [sys.executable, "-m", "celery", "-A", self._program.name, "worker", *options]

    def _flower_command(self) -> list[str]:
        self._port = _free_port(self._port)
        options = ["--address=127.0.0.1", f"--port={self._port}"]
        return [sys.executable, "-m", "celery", "-A", self._program.name, "flower", *options]

    def _is_answering(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/healthcheck", timeout=1) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError:
            return True  # behind a login, or under a prefix: it answers
        except OSError:
            return False


@contextmanager
def _asked() -> Iterator[list[int]]:
    """Collect the signals by which a person or a supervisor asks this process to end, instead of ending."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port(wanted: int) -> int:
    for port in (wanted, 0):
        with socket.socket() as probe, suppress(OSError):
            # As Flower's server does: a port whose last connections have not yet timed out is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise CommandError("no free port on 127.0.0.1 for Flower")


def _who(folder: Path) -> str:
    try:
        return f" (process {json.loads((folder / 'up.json').read_text())['pid']})"
    except (OSError, ValueError, KeyError):
        return ""


def _say(text: str) -> None:
    with suppress(OSError):  # a terminal that was closed must not keep the children from being stopped
        click.echo("\n".join(clean(line) for line in text.split("\n")))
