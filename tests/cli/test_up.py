"""`watch-tasks up`: real processes, kept running, found by the other commands, and gone when it is."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from watch_tasks.worker.embedded import url_of

pytestmark = pytest.mark.worker

MODULE = """
import time
from pathlib import Path
from watch_tasks import Message, topic

note = topic("note", index=lambda data: str(data["n"]))

@note.handler
def write(message: Message[dict]) -> None:
    (Path.cwd() / f"begun-{message.index}").touch()
    time.sleep(message.data.get("seconds", 0))
    (Path.cwd() / f"done-{message.index}").touch()
"""


class Up:
    """One `watch-tasks up` in a folder of its own, in a session of its own as under a terminal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.watch_dir = folder / ".watch"
        (folder / "celeryconfig.py").touch()
        (folder / "notes.py").write_text(MODULE)
        self.environment = {name: value for name, value in os.environ.items() if name != "WATCH_DIR"}
        self.printed: list[str] = []
        self.process: subprocess.Popen[str] | None = None

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "watch_tasks", *args]

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command("up", "notes", "--concurrency", "1"),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            self.printed.extend(process.stdout)

    def text(self) -> str:
        return "".join(self.printed)

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*args), cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=30
        )

    def pid(self, name: str) -> int:
        return int((self.watch_dir / f"{name}.pid").read_text())

    def is_done(self, index: str) -> Callable[[], bool]:
        return (self.folder / f"done-{index}").exists

    def stop(self, number: int) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(60)

    def is_gone(self) -> bool:
        """Whether no process of it is left: each holds a lock as long as it lives."""
        locks = [str(path) for path in self.watch_dir.glob("*.lock")]
        script = "import sys, fcntl; [fcntl.flock(open(p), fcntl.LOCK_EX | fcntl.LOCK_NB) for p in sys.argv[1:]]"
        held = subprocess.run([sys.executable, "-c", script, *locks], capture_output=True).returncode
        return not held and url_of(self.watch_dir) is None


def wait_for(what: Callable[[], object], seconds: float = 25.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    up = Up(tmp_path)
    up.start()
    wait_for(lambda: "Ctrl-C to stop" in up.text() or (up.process and up.process.poll()))
    yield up
    if up.process and up.process.poll() is None:
        up.stop(signal.SIGTERM)


def test_everything_runs_is_found_is_restarted_and_ends_on_ctrl_c(up: Up) -> None:
    found = re.search(r"http://\S+", up.text())
    assert found
    with urllib.request.urlopen(found[0], timeout=10) as page:
        assert page.status == 200

    hint = re.search(r"watch-tasks (send note) '(.*)'", up.text())
    assert hint
    assert json.loads(hint[2])
    sent = up.run("send", "note", '{"n": 1}')
    assert (sent.returncode, sent.stderr) == (0, "")
    wait_for(up.is_done("1"))
    assert json.loads(up.run("topics", "--json").stdout)["handlers"] == ["write"]

    second = up.run("up", "notes")
    assert second.returncode == 1
    assert f"process {up.process.pid}" in second.stderr  # type: ignore[union-attr]

    os.kill(up.pid("worker"), signal.SIGKILL)
    assert up.run("send", "note", '{"n": 2}').returncode == 0
    wait_for(up.is_done("2"))
    assert "worker was ended by SIGKILL; again in 1 s" in up.text()

    assert up.stop(signal.SIGINT) == 130
    assert up.is_gone()


def test_handler_in_hand_is_finished_on_term(up: Up) -> None:
    up.run("send", "note", '{"n": 1, "seconds": 2}')
    wait_for((up.folder / "begun-1").exists)

    assert up.stop(signal.SIGTERM) == 0

    assert up.is_done("1")()
    assert up.is_gone()


def test_handler_is_not_waited_for_after_a_third_ctrl_c(up: Up) -> None:
    up.run("send", "note", '{"n": 1, "seconds": 60}')
    wait_for((up.folder / "begun-1").exists)
    assert up.process is not None

    for said in ("stopping:", "not waiting:", "killing what is left"):
        up.process.send_signal(signal.SIGINT)
        wait_for(lambda said=said: said in up.text() or up.process.poll() is not None)

    assert up.process.wait(10) == 130
    assert up.is_gone()


def test_what_a_killed_up_left_behind_is_ended_by_the_next(up: Up) -> None:
    worker = up.pid("worker")
    assert up.stop(signal.SIGKILL) == -signal.SIGKILL
    assert url_of(up.watch_dir)

    up.printed.clear()
    up.start()
    wait_for(lambda: "Ctrl-C to stop" in up.text())

    assert "ending the worker that a killed `up` left behind" in up.text()
    assert up.pid("worker") != worker
    up.run("send", "note", '{"n": 1}')
    wait_for(up.is_done("1"))
    assert up.stop(signal.SIGTERM) == 0
    assert up.is_gone()


def test_module_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    up = Up(tmp_path)

    result = up.run("up", "nowhere")

    assert result.returncode == 2
    assert "the module `nowhere` cannot be loaded: ModuleNotFoundError" in result.stderr
    assert "Traceback" not in result.stderr
    assert url_of(up.watch_dir) is None
