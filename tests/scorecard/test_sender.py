"""A sender: how many go, in which steps, and that what was confirmed is written down."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from watch_tasks.scorecard.ledger import read_sent
from watch_tasks.scorecard.sender import arguments, main


class Broker:
    """Keeps what was sent, call by call."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def send(self, number: int, seconds: float) -> None:
        self.calls.append([number])

    def send_many(self, numbers: Iterable[int], seconds: float) -> None:
        self.calls.append(list(numbers))


@pytest.fixture
def broker() -> Broker:
    return Broker()


def run(broker: Broker, file: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[int]:
    """Run a sender in this process and return the numbers that it noted."""
    monkeypatch.setattr(sys, "argv", ["sender", *arguments(file, **options)])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    main(broker.send, broker.send_many)
    return sorted(read_sent(file))


def test_one_by_one(broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = run(broker, tmp_path / "sent", monkeypatch, first=5, count=3)

    assert noted == [5, 6, 7]
    assert broker.calls == [[5], [6], [7]]


def test_in_batches_after_the_first(broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = run(broker, tmp_path / "sent", monkeypatch, first=0, count=6, rate=10_000.0, batch=2)

    assert noted == list(range(6))
    assert broker.calls == [[0], [1, 2], [3, 4], [5]]


@pytest.mark.parametrize("batch", [0, 100])
def test_no_more_than_there_is_time_for(
    batch: int, broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = run(broker, tmp_path / "sent", monkeypatch, first=0, count=100, batch=batch, limit=-math.inf)

    assert noted == [number for call in broker.calls for number in call]
    assert noted == [0]
