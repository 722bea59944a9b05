"""The heartbeat: it goes on while a worker makes progress, whatever its broker does, and stops with its main loop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from watch_tasks import heartbeat

from ..servers import RedisServer
from ..workers import Site, until

BUSY = """
busy = topic("busy")

@busy.handler
def work(message):
    note("work", message)
    time.sleep(message.data)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "heartbeat"


@pytest.fixture
def site(tmp_path: Path, own_valkey: RedisServer, file: Path) -> Iterator[Site]:
    site = Site(tmp_path / "site", own_valkey.url, BUSY, WATCH_HEARTBEAT=str(file))
    yield site
    site.close()


def is_fresh(file: Path) -> bool:
    return heartbeat.main(["--file", str(file), "--max-age", str(1.5 * heartbeat.EVERY)]) == 0


def until_next_beat(file: Path) -> None:
    last = file.stat().st_mtime
    until(lambda: file.stat().st_mtime > last, "another beat", 3 * heartbeat.EVERY)


def test_a_recent_beat_is_health_and_an_old_or_missing_one_is_not(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(heartbeat.VARIABLE, str(file))

    missing = heartbeat.main([])
    heartbeat.beat()
    recent = heartbeat.main([])
    os.utime(file, (time.time() - 31,) * 2)
    old = heartbeat.main([])

    assert (missing, recent, old) == (1, 0, 1)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("no heartbeat: ")
    assert said[1:] == ["the last heartbeat is 31 s old, more than 30 s"]


def test_a_check_that_knows_no_file_says_what_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        heartbeat.main([])

    assert "set WATCH_HEARTBEAT" in capsys.readouterr().err


def test_the_check_loads_neither_celery_nor_redis() -> None:
    code = "import sys, watch_tasks.heartbeat; print(sorted({'celery', 'kombu', 'redis'} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


@pytest.mark.worker
def test_a_file_that_cannot_be_written_is_a_complaint_at_start(site: Site, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere" / "heartbeat"

    done = site.run("-m", "celery", "-A", "watch_tasks", "worker", WATCH_HEARTBEAT=str(missing))

    assert done.returncode == 1
    assert (
        f"`WATCH_HEARTBEAT` must name a file that can be written: [Errno 2] No such file or directory: '{missing}'"
        in (done.stderr)
    )


@pytest.mark.worker
def test_it_goes_on_while_handlers_are_busy_and_while_the_broker_is_away(
    site: Site, own_valkey: RedisServer, file: Path
) -> None:
    worker = site.worker(concurrency=1)
    site.send("busy", 30)
    until(lambda: len(site.lines()) == 1, "the handler runs")

    until_next_beat(file)
    own_valkey.stop()
    until(lambda: "Cannot connect" in worker.text(), "the worker misses its broker", 20)

    until_next_beat(file)
    assert is_fresh(file)


@pytest.mark.worker
def test_it_stops_with_the_main_loop_of_a_process_that_is_still_there(site: Site, file: Path) -> None:
    worker = site.worker(concurrency=1)
    until_next_beat(file)

    worker.signal(signal.SIGSTOP)

    until(lambda: not is_fresh(file), "the check fails", 10 * heartbeat.EVERY)
    assert worker.is_running()
