"""The last try of a message that took workers down runs alone in its process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from watch_tasks import Busy, Handled, Message, Snoozed
from watch_tasks import pipeline as pipeline_module
from watch_tasks.company import Company
from watch_tasks.outcome import Snooze
from watch_tasks.pipeline import Pipeline
from watch_tasks.testing import ManualClock

from .driver import LEASE, done


class Handler:
    """Runs until it is let go, and knows with whom it ran."""

    def __init__(self) -> None:
        self.inside: set[Any] = set()
        self.met: dict[Any, set[Any]] = {}
        self.gates: dict[Any, threading.Event] = {}
        self.entered: dict[Any, threading.Event] = {}
        for data in ("neighbour", "killer", "later"):
            self.gates[data], self.entered[data] = threading.Event(), threading.Event()

    def __call__(self, message: Message[Any]) -> None:
        data = message.data
        self.inside.add(data)
        for one in self.inside:
            self.met.setdefault(one, set()).update(self.inside)
        self.entered[data].set()
        self.gates[data].wait(10)
        self.inside.discard(data)


def crash(pipe: Callable[..., Pipeline], message: Message[Any], clock: ManualClock, times: int) -> None:
    for number in range(times):
        pipe(done, worker=f"dead{number}").begin([message])
        clock.advance(LEASE + 1)


def test_it_waits_for_those_who_run_and_keeps_out_who_comes(pipe: Callable[..., Pipeline], clock: ManualClock) -> None:
    handler = Handler()
    pipeline = pipe(handler)
    killer = Message("killer", "t")
    crash(pipe, killer, clock, times=2)
    with ThreadPoolExecutor(3) as pool:
        neighbour = pool.submit(pipeline.handle, Message("neighbour", "t"))
        assert handler.entered["neighbour"].wait(10)
        last_try = pool.submit(pipeline.handle, killer)
        assert not handler.entered["killer"].wait(0.3)
        handler.gates["neighbour"].set()
        assert handler.entered["killer"].wait(10)
        later = pool.submit(pipeline.handle, Message("later", "t"))
        assert not handler.entered["later"].wait(0.3)
        handler.gates["killer"].set()
        handler.gates["later"].set()
        assert all(isinstance(future.result(10), Handled) for future in (neighbour, last_try, later))
    assert handler.met["killer"] == {"killer"}


def test_an_earlier_try_has_company(pipe: Callable[..., Pipeline], clock: ManualClock) -> None:
    handler = Handler()
    pipeline = pipe(handler)
    killer = Message("killer", "t")
    crash(pipe, killer, clock, times=1)
    with ThreadPoolExecutor(2) as pool:
        pool.submit(pipeline.handle, Message("neighbour", "t"))
        assert handler.entered["neighbour"].wait(10)
        pool.submit(pipeline.handle, killer)
        assert handler.entered["killer"].wait(10)
        for gate in handler.gates.values():
            gate.set()


def test_who_cannot_be_alone_in_time_comes_again_at_no_cost(
    pipe: Callable[..., Pipeline], clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "_ALONE", 0.2)
    handler = Handler()
    pipeline = pipe(handler)
    killer = Message("killer", "t")
    crash(pipe, killer, clock, times=2)
    with ThreadPoolExecutor(2) as pool:
        neighbour = pool.submit(pipeline.handle, Message("neighbour", "t"))
        assert handler.entered["neighbour"].wait(10)
        assert pipeline.handle(killer) == Busy(0.2)
        handler.gates["neighbour"].set()
        assert isinstance(neighbour.result(10), Handled)
    handler.gates["killer"].set()
    assert isinstance(pipeline.handle(killer), Handled)


def test_many_at_once_are_handled_before_it(pipe: Callable[..., Pipeline], clock: ManualClock) -> None:
    order: list[Any] = []
    killer = Message("killer", "t")
    crash(pipe, killer, clock, times=2)

    def handler(message: Message[Any]) -> None:
        order.append(message.data)
        if message.data == 2:
            raise Snooze(5)

    outcomes = pipe(handler).handle_many([killer, Message(1, "t"), Message(2, "t")])

    assert order == [1, 2, "killer"]
    assert [type(outcome) for outcome in outcomes] == [Handled, Handled, Snoozed]


def test_one_who_is_alone_already_stays() -> None:
    company = Company()
    with company:
        assert company.stay_alone()
        entered = threading.Event()

        def come() -> None:
            with company:
                entered.set()

        thread = threading.Thread(target=come)
        thread.start()
        assert not entered.wait(0.1)
    assert entered.wait(10)
    thread.join()
    assert company.enter_alone(0)
