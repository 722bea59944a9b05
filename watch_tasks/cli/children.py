"""The processes that `watch-tasks up` keeps running: each in a session of its own, restarted when it ends.

A child holds a lock in the folder as long as any process of its session lives. So what a killed `up` left behind is
found and ended by the next.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ..worker.folder import FolderLock

__all__ = ["Child"]

#: Seconds that a child has to run for its end to count as a first one again.
STEADY: Final = 30.0
#: Seconds between an end and the restart: at first, and at most.
DELAY: Final = 1.0
DELAY_MAX: Final = 30.0
#: Seconds that what a killed `up` left behind has to end in good order.
GRACE: Final = 15.0
_STEP: Final = 0.05


class Child:
    """One process that is to run.

    Args:
        name: also that of its files in the folder: `<name>.log`, `<name>.pid`, `<name>.lock`.
        command: called at each start.
        folder: the watch folder.
        lock: the lock of that name.
        say: tells the person at the terminal.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        folder: Path,
        lock: FolderLock,
        say: Callable[[str], None],
    ) -> None:
        self.name = name
        self.log_file = folder / f"{name}.log"
        self._pid_file = folder / f"{name}.pid"
        self._folder = folder
        self._command = command
        self._lock = lock
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._due = 0.0
        self._failures = 0

    @property
    def is_running(self) -> bool:
        """Whether it runs now."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it, after ending what a killed `up` left of it."""
        if self._lock.is_held():
            self._say(f"ending the {self.name} that a killed `up` left behind")
            self._end_orphan()
        self._lock.acquire()
        with self.log_file.open("ab") as output:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "WATCH_DIR": str(self._folder)},
                # Ctrl-C in the terminal is for `up`, which lets its children finish what they have in hand.
                start_new_session=True,
                pass_fds=(self._lock.fileno(),),
            )
        self._lock.release()
        self._pid_file.write_text(str(self._process.pid))
        self._started = time.monotonic()

    def watch(self) -> bool:
        """Start it again if it ended and its pause is over; return whether it was started."""
        if self._process is None:
            if time.monotonic() < self._due:
                return False
            self.start()
            return True
        code = self._process.poll()
        if code is not None:
            self._pause(code)
        return False

    def signal(self, number: int) -> None:
        """Send a signal to its main process; with SIGKILL, to all of its session."""
        if self._process is None:
            return
        try:
            if number == signal.SIGKILL:
                os.killpg(self._process.pid, number)
            elif self._process.poll() is None:
                os.kill(self._process.pid, number)
        except ProcessLookupError:
            return  # it ended by itself

    def close(self) -> None:
        """End what is left of its session, and forget it."""
        if self._process and self._lock.is_held():
            self.signal(signal.SIGKILL)
        if self._process:
            self._process.wait()
        self._process = None
        self._pid_file.unlink(missing_ok=True)

    def _pause(self, code: int) -> None:
        lived = time.monotonic() - self._started
        self._failures = 1 if lived > STEADY else self._failures + 1
        delay = min(DELAY * 2 ** (self._failures - 1), DELAY_MAX)
        self._due = time.monotonic() + delay
        ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        self._say(f"{self.name} {ended}; again in {delay:g} s; see {self.log_file}")
        self.close()

    def _end_orphan(self) -> None:
        number, deadline = signal.SIGTERM, time.monotonic() + GRACE
        while self._lock.is_held():
            try:
                pid = int(self._pid_file.read_text())
                # Its children may have outlived it; then only their group is left.
                (os.kill if number is signal.SIGTERM else os.killpg)(pid, number)
            except (OSError, ValueError):
                number = signal.SIGKILL
            while self._lock.is_held() and time.monotonic() < deadline:
                time.sleep(_STEP)
            if time.monotonic() >= deadline + GRACE:
                return
            number, deadline = signal.SIGKILL, max(deadline, time.monotonic()) + 1.0
