from __future__ import annotations

import pickle
from typing import Any

import pytest

import watch_tasks.outcome
from watch_tasks import (
    Busy,
    Dead,
    Discard,
    Duplicate,
    Fenced,
    Handled,
    Message,
    Outcome,
    Reason,
    Retry,
    Snooze,
    Snoozed,
    WatchTasksError,
)

#: What may become of a delivery: all that a driver has to act on.
OUTCOMES = {Busy, Dead, Duplicate, Fenced, Handled, Retry, Snoozed}


class TestOutcomes:
    def test_an_error_makes_no_difference_to_what_became_of_a_message(self) -> None:
        message = Message(1, "t")
        assert Dead(Reason.FATAL, ValueError()) == Dead(Reason.FATAL, KeyError())
        assert Retry(1.0, message, ValueError()) == Retry(1.0, message, KeyError())

    def test_data_stays_out_of_what_is_shown(self) -> None:
        secret: Message[Any] = Message("secret", "t")
        assert "secret" not in repr(Retry(1.0, secret, ValueError())) + repr(Snoozed(1.0, secret))

    def test_each_kind_is_an_outcome(self) -> None:
        kinds = [getattr(watch_tasks.outcome, name) for name in watch_tasks.outcome.__all__]
        assert {kind for kind in kinds if issubclass(kind, Outcome)} == {Outcome, *OUTCOMES}

    def test_they_are_values(self) -> None:
        assert Handled(1.0) == Handled(1.0)
        assert Busy(1.0) != Busy(2.0)


class TestReasons:
    def test_each_is_the_word_that_is_stored(self) -> None:
        assert {reason.value: str(reason) for reason in Reason} == {
            reason.name.lower(): reason.name.lower() for reason in Reason
        }


class TestVerdicts:
    @pytest.mark.parametrize("seconds", [0, 0.5, 10**6])
    def test_a_snooze_takes_seconds(self, seconds: float) -> None:
        assert Snooze(seconds).seconds == seconds

    @pytest.mark.parametrize("seconds", [-1, float("inf"), float("nan"), "5", None])
    def test_it_refuses_what_is_no_time(self, seconds: Any) -> None:
        with pytest.raises(ValueError, match="`seconds` must be 0 or more"):
            Snooze(seconds)

    @pytest.mark.parametrize("kind", [Snooze, Discard])
    def test_a_verdict_is_no_error(self, kind: type[Exception]) -> None:
        assert not kind.__name__.endswith("Error")
        assert not issubclass(kind, WatchTasksError)

    def test_they_survive_pickling(self) -> None:
        """A prefork child hands what a handler raised to its parent."""
        snooze, discard = pickle.loads(pickle.dumps((Snooze(2.5), Discard("not ours"))))
        assert (snooze.seconds, discard.reason) == (2.5, "not ours")
