"""The processes of a measurement: workers, and those that send to them. Each measurement ends all that it started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil

from .contenders import Contender, Pool


class MeasurementError(Exception):
    """A contender did not do what was measured: its text says what, with the end of its worker's log."""


class Workers:
    """The workers of a pool, with all the processes that they start."""

    def __init__(self, pool: Pool, environment: dict[str, str], folder: Path) -> None:
        self.pool = pool
        self._environment = environment
        self._log = folder / "worker.log"
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Workers:
        with self._log.open("ab") as log:
            for command in self.pool.commands:
                words = [word.replace("{broker}", self._environment["BROKER"]) for word in command]
                self._started.append(
                    subprocess.Popen(words, env=self._environment, stdout=log, stderr=log, start_new_session=True)
                )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        running = self._all()
        for worker in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for worker in self._started:
            worker.wait()
        psutil.wait_procs(running, timeout=5)

    def memory(self) -> float:
        """Return MB that all of them take, what they share counted once (the sum of their PSS)."""
        total = 0.0
        for process in self._all():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().pss / 1e6
        return total

    def wait_until(self, is_over: Callable[[], bool], seconds: float, told: Callable[[], str]) -> None:
        """Wait until something is over.

        Raises:
            MeasurementError: a worker ended, or the time is over.
        """
        end = time.monotonic() + seconds
        while not is_over():
            if any(worker.poll() is not None for worker in self._started):
                raise MeasurementError(f"a worker ended: {told()}{self._last_words()}")
            if time.monotonic() > end:
                raise MeasurementError(f"not done after {seconds:.0f} s: {told()}{self._last_words()}")
            time.sleep(0.02)

    def _all(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for worker in self._started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(worker.pid)
                found += [process, *process.children(recursive=True)]
        return found

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"; its log ends: {lines[-1][:200]}" if lines else ""


class Sender:
    """A process that sends messages numbered from `first` on, or, at a `rate`, that carry when they were sent."""

    def __init__(
        self,
        contender: Contender,
        environment: dict[str, str],
        *,
        work: str,
        count: int,
        first: int = 0,
        in_bulk: bool = False,
        payload: int = 0,
        rate: float | None = None,
    ) -> None:
        words = [sys.executable, "-m", "benchmarks.send", contender.module, work, str(count), "--first", str(first)]
        words += ["--payload", str(payload)]
        words += ["--in-bulk"] if in_bulk else []
        words += ["--rate", str(rate)] if rate else []
        self._process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def is_over(self) -> bool:
        return self._process.poll() is not None

    def result(self, seconds: float) -> dict[str, float]:
        """Return what it tells at its end.

        Raises:
            MeasurementError: it failed, or the time was over, which ends it.
        """
        try:
            out, err = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.end()
            raise MeasurementError(f"sending was not done after {seconds:.0f} s") from None
        if self._process.returncode:
            words = err.decode(errors="replace").strip().splitlines()
            raise MeasurementError(f"sending failed: {words[-1][:200] if words else self._process.returncode}")
        told: dict[str, float] = json.loads(out.splitlines()[-1])
        return told

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
