"""A child that is forked while its parent writes to SQLite can write too."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from tests.workers import until
from watch_tasks.storage.protocol import Claim
from watch_tasks.storage.sql import SqlStorage, open_url
from watch_tasks.storage.sql.forks import ForkGate


def claim(storage: SqlStorage, id: str) -> None:
    storage.claim(
        Claim(
            topic="t",
            index=id,
            id=id,
            copy=0,
            once="message",
            worker="w",
            lease=5.0,
            digest="",
            retention=None,
            sent_at=0.0,
            nonce="",
        )
    )


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_children_that_are_forked_while_the_parent_writes_can_write(tmp_path: Path) -> None:
    """As a prefork worker replaces a child while its other thread renews leases."""
    stop = threading.Event()
    with open_url(f"sqlite:///{tmp_path}/watch.db") as storage:

        def write() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                claim(storage, f"parent{number}")

        threads = [threading.Thread(target=write) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            children = [fork(storage, number) for number in range(20)]
            left = set(children)

            def ended() -> bool:
                for pid in list(left):
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        assert status == 0
                        left.discard(pid)
                return not left

            try:
                until(ended, "every child has written", 12)
            finally:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def fork(storage: SqlStorage, number: int) -> int:
    pid = os.fork()
    if not pid:
        signal.alarm(15)  # one that hangs must not stay
        try:
            claim(storage, f"child{number}")
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def test_who_forks_does_not_wait_for_itself() -> None:
    closed: list[bool] = []
    gate = ForkGate(lambda: closed.append(True))
    with gate.used():
        gate.shut()
        gate.open()
    assert closed == [True]
