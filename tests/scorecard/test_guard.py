"""The process beside: what is left when its pipe ends goes with it, and nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from watch_tasks.scorecard.guard import Guard

WAITING = [sys.executable, "-c", "import sys; sys.stdin.read()"]


def test_what_is_left_is_killed_and_what_was_taken_back_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").touch()
    left, gone = (subprocess.Popen(WAITING, stdin=subprocess.PIPE, start_new_session=True) for _ in range(2))
    guard = Guard(folder)
    for process in (left, gone):
        guard.add(process.pid)
    guard.remove(gone.pid)

    guard.close()

    assert left.wait(20) == -signal.SIGKILL
    gone.communicate(timeout=20)
    assert gone.returncode == 0
    assert not folder.exists()
    if left.stdin:
        left.stdin.close()


def test_closing_twice_is_safe(tmp_path: Path) -> None:
    guard = Guard(tmp_path / "none")

    guard.close()
    guard.close()
