"""Ends what a scorecard started, when the scorecard itself was killed and cannot.

A process beside it, `python -m watch_tasks.scorecard.guard FOLDER`: reads from its standard input which process groups
live, `+GROUP` and `-GROUP`, and at its end kills those that are left and removes the folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["Guard"]


class Guard:
    """The process beside, from here. Ends with this process, in whatever way."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def add(self, group: int) -> None:
        """Tell of a process group that lives."""
        self._tell(f"+{group}")

    def remove(self, group: int) -> None:
        """Tell of one that is gone."""
        self._tell(f"-{group}")

    def close(self) -> None:
        """Let it end whatever is left. Twice is safe."""
        if self._process.stdin and not self._process.stdin.closed:
            try:
                self._process.stdin.close()
            except OSError:
                pass  # it is gone already
        self._process.wait()

    def _tell(self, line: str) -> None:
        if self._process.stdin:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()


def watch(lines: Iterable[str], folder: str) -> None:
    """Follow the lines to their end, then kill what is left and remove the folder."""
    groups: set[int] = set()
    for line in lines:
        (groups.add if line.startswith("+") else groups.discard)(int(line[1:]))
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except OSError:
            continue  # it ended by itself
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    watch(sys.stdin, sys.argv[1])
