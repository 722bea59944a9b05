from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watch_tasks import RetryPolicy


def always(value: float) -> Any:
    """A jitter that falls the same way each time."""
    return lambda: value


class TestDecision:
    @pytest.mark.parametrize(
        ("policy", "own", "tries"),
        [
            (3, None, 4),
            (0, None, 1),
            (3, 0, 1),  # the message's own limit wins, in both directions
            (3, 5, 6),
            (None, 2, 3),
        ],
    )
    def test_a_message_is_tried_once_and_then_retried_up_to_the_limit(
        self, policy: int | None, own: int | None, tries: int
    ) -> None:
        rule, retries = RetryPolicy(policy), 0
        while rule.decide(ValueError(), retries, own) is not None:
            retries += 1
        assert retries + 1 == tries

    def test_without_a_limit_it_is_tried_for_ever(self) -> None:
        assert RetryPolicy(None).decide(ValueError(), 10**9) == 0.0

    def test_an_error_that_is_not_named_is_fatal(self) -> None:
        policy = RetryPolicy(retry_for=(OSError,))
        assert policy.decide(ConnectionError(), 0) == 0.0  # a subclass of OSError
        assert policy.decide(ValueError(), 0) is None

    def test_giving_up_goes_before_retrying(self) -> None:
        policy = RetryPolicy(retry_for=(Exception,), give_up_for=(KeyError,))
        assert policy.decide(LookupError(), 0) == 0.0
        assert policy.decide(KeyError(), 0) is None

    def test_a_base_exception_is_no_reason_to_retry_unless_named(self) -> None:
        assert not RetryPolicy().is_retryable(KeyboardInterrupt())
        assert RetryPolicy(retry_for=(BaseException,)).is_retryable(KeyboardInterrupt())


class TestDelay:
    def test_no_backoff_means_at_once(self) -> None:
        assert RetryPolicy().delay(5) == 0.0

    @pytest.mark.parametrize(
        ("retries", "seconds"),
        [
            (0, 0.5),
            (1, 1.0),  # 0.5 * 2
            (3, 4.0),  # 0.5 * 2 ** 3
            (5, 10.0),  # 16, capped
            (10**6, 10.0),
        ],
    )
    def test_it_doubles_up_to_the_cap(self, retries: int, seconds: float) -> None:
        assert RetryPolicy(backoff=0.5, backoff_max=10.0, jitter=False).delay(retries) == seconds

    def test_jitter_spreads_it_over_its_whole_length(self) -> None:
        policy = RetryPolicy(backoff=8.0)
        assert [policy.delay(0, random=always(part)) for part in (0.0, 0.25, 1.0)] == [0.0, 2.0, 8.0]

    def test_a_decision_uses_the_jitter_it_is_given(self) -> None:
        assert RetryPolicy(backoff=8.0).decide(ValueError(), 1, random=always(0.5)) == 8.0  # 8 * 2 / 2

    @given(st.floats(0, 1e300), st.floats(0, 1e300), st.integers(0, 10**9), st.floats(0, 1, exclude_max=True))
    def test_no_wait_is_negative_or_longer_than_the_cap(
        self, backoff: float, cap: float, retries: int, part: float
    ) -> None:
        delay = RetryPolicy(backoff=backoff, backoff_max=cap).delay(retries, random=always(part))
        assert 0 <= delay <= cap


class TestArguments:
    @pytest.mark.parametrize("limit", [-1, 1.5, "3", True])
    def test_a_limit_that_is_none_is_refused(self, limit: Any) -> None:
        with pytest.raises(ValueError, match="`max_retries`"):
            RetryPolicy(max_retries=limit)

    @pytest.mark.parametrize("name", ["backoff", "backoff_max"])
    @pytest.mark.parametrize("seconds", [-0.1, float("inf"), float("nan"), "5", None, True])
    def test_seconds_that_are_none_are_refused(self, name: str, seconds: Any) -> None:
        with pytest.raises(ValueError, match=f"`{name}` must be seconds, 0 or more, got"):
            RetryPolicy(**{name: seconds})

    @pytest.mark.parametrize("name", ["retry_for", "give_up_for"])
    @pytest.mark.parametrize("kinds", [[ValueError], ValueError, ("ValueError",), (int,), (ValueError(),), None])
    def test_what_is_no_tuple_of_exceptions_is_refused_when_it_is_made(self, name: str, kinds: Any) -> None:
        with pytest.raises(TypeError, match=f"`{name}` must be a tuple of exception classes"):
            RetryPolicy(**{name: kinds})

    def test_it_is_a_value(self) -> None:
        assert RetryPolicy(3, backoff=1) == RetryPolicy(3, backoff=1.0)
        assert len({RetryPolicy(), RetryPolicy(3)}) == 1
