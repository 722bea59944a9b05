"""From ledgers to figures: what is lost, handled twice or late is told, and nothing else."""

from __future__ import annotations

import math

import pytest

from watch_tasks.scorecard.figures import STEP, Kill, judge_kill, latencies, percentile, rate, sending_rate
from watch_tasks.scorecard.ledger import BEGUN, ENDED, Effect

#: The process groups of two workers, and when the first is killed.
DEAD, ALIVE, KILLED_AT = 1, 2, 100.0


def begun(number: int, at: float, group: int = ALIVE) -> Effect:
    return Effect(BEGUN, number, at, group)


def ended(number: int, at: float, group: int = ALIVE) -> Effect:
    return Effect(ENDED, number, at, group)


def run(number: int, at: float, group: int = ALIVE) -> list[Effect]:
    return [begun(number, at, group), ended(number, at + 0.05, group)]


def judged(sent: dict[int, float], effects: list[Effect]) -> Kill:
    """Return the figures for messages that were sent at these times."""
    return judge_kill(
        {number: (at, at) for number, at in sent.items()},
        effects,
        killed_at=KILLED_AT,
        group=DEAD,
        waited=30.0,
        before=1.0,
        after=2.0,
    )


class TestPercentile:
    @pytest.mark.parametrize(
        ("values", "share", "expected"),
        [
            ([5.0], 0.5, 5.0),
            ([5.0], 0.99, 5.0),
            ([4.0, 1.0, 3.0, 2.0], 0.5, 2.0),  # two of four are not above 2
            ([1.0, 2.0, 3.0], 0.5, 2.0),
            (list(range(1, 101)), 0.99, 99),
            (list(range(1, 101)), 1.0, 100),
            (list(range(1, 1001)), 0.99, 990),
            ([], 0.5, None),
        ],
    )
    def test_is_the_smallest_value_that_the_share_is_not_above(
        self, values: list[float], share: float, expected: float | None
    ) -> None:
        assert percentile(values, share) == expected


class TestRate:
    def test_counts_what_came_after_the_first(self) -> None:
        assert rate([13.0, 10.0, 11.0, 12.0]) == 1.0

    @pytest.mark.parametrize("times", [[], [1.0], [1.0, 1.0]])
    def test_is_unknown_where_no_time_went_by(self, times: list[float]) -> None:
        assert rate(times) is None


class TestSendingRate:
    def test_leaves_out_the_first_which_made_the_connection(self) -> None:
        assert sending_rate({1: (10.0, 12.0), 2: (12.0, 12.5), 3: (12.5, 13.0)}) == 2.0

    def test_counts_what_was_sent_by_one_call(self) -> None:
        assert sending_rate({1: (10.0, 12.0), 2: (12.0, 13.0), 3: (12.0, 13.0)}) == 2.0

    @pytest.mark.parametrize("sent", [{}, {1: (10.0, 11.0)}])
    def test_is_unknown_where_there_is_only_the_first(self, sent: dict[int, tuple[float, float]]) -> None:
        assert sending_rate(sent) is None


class TestLatencies:
    def test_run_from_the_call_to_the_first_end(self) -> None:
        sent = {1: (10.0, 10.2), 2: (11.0, 11.1)}

        assert latencies(sent, [begun(1, 10.1), ended(1, 10.5), ended(1, 12.0), ended(2, 11.25)]) == [0.5, 0.25]

    def test_leave_out_what_was_not_handled_and_what_others_sent(self) -> None:
        assert latencies({1: (10.0, 10.1)}, [begun(1, 10.2), ended(7, 10.3)]) == []


class TestAKill:
    def test_without_consequences_is_told_as_such(self) -> None:
        kill = judged({1: 99.0, 2: 101.0}, [*run(1, 99.1, DEAD), *run(2, 101.1)])

        assert (kill.sent, kill.in_hand, kill.not_handled, kill.duplicated, kill.begun_again) == (2, 0, 0, 0, 0)
        assert kill.recovery == 0.0

    def test_that_loses_a_message_shows_it(self) -> None:
        kill = judged({1: 99.0, 2: 99.9, 3: 101.0}, [*run(1, 99.1), begun(2, 99.95, DEAD), *run(3, 101.1)])

        assert (kill.sent, kill.in_hand, kill.not_handled) == (3, 1, 1)
        assert kill.recovery is None

    def test_shows_a_message_that_nobody_ever_began(self) -> None:
        assert judged({1: 99.0, 2: 99.9}, run(1, 99.1)).not_handled == 1

    def test_shows_one_that_was_sent_after_it_and_lost(self) -> None:
        kill = judged({1: 99.0, 2: 101.0}, run(1, 99.1))

        assert kill.not_handled == 1
        assert kill.recovery == 0.0

    def test_counts_what_came_after_the_wait_as_not_handled(self) -> None:
        assert judged({1: 99.9}, [begun(1, 99.95, DEAD), *run(1, 130.1)]).not_handled == 1

    def test_recovery_is_until_the_last_message_from_before_it(self) -> None:
        effects = [begun(1, 99.9, DEAD), begun(2, 99.9, DEAD), *run(1, 105.0), *run(2, 106.0), *run(3, 108.0)]

        kill = judged({1: 99.8, 2: 99.8, 3: 101.0}, effects)

        assert kill.recovery == pytest.approx(6.05)
        assert (kill.in_hand, kill.begun_again, kill.duplicated) == (2, 2, 0)

    def test_recovery_covers_what_was_in_hand_before_its_batch_was_confirmed(self) -> None:
        effects = [begun(1, 99.9, DEAD), *run(1, 106.0)]

        kill = judge_kill(
            {1: (99.8, 100.1)}, effects, killed_at=KILLED_AT, group=DEAD, waited=30.0, before=1.0, after=2.0
        )

        assert kill.recovery == pytest.approx(6.05)

    def test_tells_a_message_that_was_handled_twice(self) -> None:
        kill = judged({1: 99.8}, [*run(1, 99.9, DEAD), *run(1, 106.0)])

        assert (kill.duplicated, kill.begun_again, kill.not_handled) == (1, 1, 0)

    def test_does_not_count_what_was_never_confirmed(self) -> None:
        kill = judged({1: 99.0}, [*run(1, 99.1), *run(2, 99.2), *run(2, 99.4)])

        assert (kill.sent, kill.duplicated) == (1, 0)


class TestTimeline:
    def test_puts_each_message_where_it_was_handled_first(self) -> None:
        effects = [ended(1, 99.2), ended(2, 99.6), ended(3, 100.0), ended(3, 101.0), ended(4, 101.9)]

        timeline = judged({1: 99.0, 2: 99.0, 3: 99.0, 4: 101.0}, effects).timeline

        assert timeline.start == -1.0
        assert timeline.handled == (1, 1, 1, 0, 0, 1)
        assert sum(timeline.late) == 0

    def test_marks_what_was_sent_before_the_kill_and_handled_after_it(self) -> None:
        timeline = judged({1: 99.9, 2: 101.0}, [ended(1, 101.2), ended(2, 101.3)]).timeline

        assert timeline.handled == (0, 0, 0, 0, 2, 0)
        assert timeline.late == (0, 0, 0, 0, 1, 0)

    def test_reaches_as_far_as_the_recovery(self) -> None:
        timeline = judged({1: 99.9}, [ended(1, 106.1)]).timeline

        assert len(timeline.handled) == len(timeline.late) == 2 + math.floor(6.1 / STEP) + 1
        assert timeline.late[-1] == 1
