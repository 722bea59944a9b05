"""A signal ends the run once, and never in the middle of what must not be forgotten."""

from __future__ import annotations

import signal

import pytest

from watch_tasks.scorecard.signals import Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_what_runs_and_a_second_does_not_cut_off_cleaning(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    done = []

    def run() -> None:
        with Signals():
            try:
                signal.raise_signal(number)
                done.append("the rest")
            finally:
                signal.raise_signal(number)
                done.append("cleaning")

    with pytest.raises(KeyboardInterrupt):
        run()

    assert done == ["cleaning"]
    assert signal.getsignal(number) is before


def test_a_signal_waits_for_what_is_being_started() -> None:
    done = []

    def run() -> None:
        with Signals() as signals:
            with signals.held():
                with signals.held():
                    signal.raise_signal(signal.SIGINT)
                done.append("start")
            done.append("the rest")

    with pytest.raises(KeyboardInterrupt):
        run()

    assert done == ["start"]


def test_without_a_signal_nothing_happens() -> None:
    with Signals() as signals, signals.held():
        pass
