"""Batch handlers: many messages in one call, each with an outcome of its own, and the bad ones found by halving."""

from __future__ import annotations

import copy
import gc
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from watch_tasks import (
    BatchAnswer,
    Busy,
    Dead,
    Discard,
    Duplicate,
    Fenced,
    Handled,
    HandlerAnswerError,
    HandlerTimeoutError,
    MemoryStorage,
    Message,
    Outcome,
    Reason,
    Retry,
    RetryPolicy,
    Snooze,
    Snoozed,
)
from watch_tasks.members import Members, Taken
from watch_tasks.packets import Packet, member_of
from watch_tasks.pipeline import Pipeline
from watch_tasks.schema import dump
from watch_tasks.storage import Storage
from watch_tasks.testing import ManualClock
from watch_tasks.topics import Topic
from watch_tasks.work import Work

from .driver import LEASE, done
from .trouble import TroubledStorage

Batch = list[Message[Any]]

#: How far halving goes: two calls for each of the 8 times that 256 can be halved.
FURTHER = 16


class Calls:
    """A batch handler that notes what each call gets, and raises where that holds something bad."""

    def __init__(self, *bad: Any, error: Exception | None = None) -> None:
        self.bad, self.error = set(bad), error or ValueError("no luck")
        self.seen: list[list[Any]] = []

    def __call__(self, messages: Batch) -> None:
        assert type(messages) is list
        self.seen.append([message.data for message in messages])
        if self.bad.intersection(self.seen[-1]):
            raise self.error

    @property
    def sizes(self) -> list[int]:
        return [len(seen) for seen in self.seen]


def batch_pipeline(
    storage: Storage,
    function: Callable[[Batch], Any],
    *,
    size: int = 256,
    settings: dict[str, Any] | None = None,
    worker: str = "w",
    **options: Any,
) -> Pipeline:
    topic: Topic[Any] = Topic("t", **options)
    topic.batch_handler(size=size, name="store")(function)
    return Pipeline(storage, {"t": topic}.get, worker=worker, lease=LEASE, **(settings or {}))


@pytest.fixture
def pipe(storage: Storage) -> Callable[..., Pipeline]:
    """Makes a pipeline for a topic `t` with this batch handler, called `store`; options are the topic's."""

    def make(function: Callable[[Batch], Any], **options: Any) -> Pipeline:
        return batch_pipeline(storage, function, **options)

    return make


def many(count: int, **options: Any) -> list[Message[Any]]:
    return [Message(number, "t", index=f"i{number}", id=f"m{number}", **options) for number in range(count)]


def kinds(outcomes: Sequence[Outcome]) -> list[type[Outcome]]:
    return [type(outcome) for outcome in outcomes]


class TestOneCall:
    def test_all_are_claimed_handled_and_settled_in_one_round_trip_each(
        self, pipe: Callable[..., Pipeline], storage: TroubledStorage
    ) -> None:
        calls = Calls()

        outcomes = pipe(calls).handle_many(many(5))

        assert kinds(outcomes) == [Handled] * 5
        assert calls.seen == [[0, 1, 2, 3, 4]]
        assert storage.log == [" ".join(["claim"] * 5), " ".join(["handled"] * 5)]
        assert storage.len() == 5

    def test_a_call_gets_no_more_than_size_and_each_is_settled_before_the_next(
        self, pipe: Callable[..., Pipeline], storage: TroubledStorage
    ) -> None:
        calls = Calls()

        pipe(calls, size=2).handle_many(many(5))

        assert calls.sizes == [2, 2, 1]
        assert storage.log == ["claim claim", "handled handled"] * 2 + ["claim", "handled"]

    def test_only_what_is_to_be_handled_is_in_it(self, pipe: Callable[..., Pipeline], storage: Storage) -> None:
        calls, messages = Calls(), many(4)
        pipeline = pipe(calls)
        pipeline.handle(messages[1])
        pipe(calls, worker="other").begin([messages[2]])

        outcomes = pipeline.handle_many(messages)

        assert kinds(outcomes) == [Handled, Duplicate, Busy, Handled]
        assert calls.seen == [[1], [0, 3]]

    def test_an_async_handler_may_answer_too(self, pipe: Callable[..., Pipeline]) -> None:
        async def store(messages: Batch) -> BatchAnswer:
            return {messages[1].id: Snooze(5)}

        assert kinds(pipe(store).handle_many(many(3))) == [Handled, Snoozed, Handled]

    def test_a_message_tells_what_it_tells_plain_handlers(self, pipe: Callable[..., Pipeline]) -> None:
        got: Batch = []

        pipe(got.extend, timeout=30).handle_many(many(2))

        assert [message.idempotency_key for message in got] == ["m0:store", "m1:store"]
        assert all(message.deadline for message in got)
        tokens = [message.token for message in got]
        assert None not in tokens
        assert len(set(tokens)) == 2

    def test_other_topics_beside_it_are_handled_as_ever(self, storage: TroubledStorage) -> None:
        calls, plain = Calls(), []
        topics = {name: Topic[Any](name) for name in ("t", "u", "v")}
        topics["t"].batch_handler(calls)
        topics["u"].handler(name="u")(lambda message: plain.append(message.data))
        topics["v"].batch_handler(calls)
        pipeline = Pipeline(storage, topics.get, worker="w", lease=LEASE)
        names = ["t", "u", "v", "t", "u"]

        outcomes = pipeline.handle_many([Message(number, name) for number, name in enumerate(names)])

        assert kinds(outcomes) == [Handled] * 5
        assert (calls.seen, plain) == ([[0, 3], [2]], [1, 4])

    def test_without_claims_it_runs_all_the_same(self, pipe: Callable[..., Pipeline], storage: TroubledStorage) -> None:
        calls, messages = Calls(1), many(2)
        pipeline = pipe(calls, once="none")

        assert kinds(pipeline.handle_many(messages)) == [Handled, Retry]
        assert kinds(pipeline.handle_many(messages[:1])) == [Handled]
        assert calls.seen == [[0, 1], [0], [1], [0]]
        assert not any("claim" in entry for entry in storage.log if entry)

    def test_what_was_handled_where_it_could_not_be_stored_is_not_handled_again(
        self, pipe: Callable[..., Pipeline], storage: TroubledStorage
    ) -> None:
        calls, stopping = Calls(), []
        pipeline = pipe(calls, settings={"stopping": lambda: bool(stopping)})
        storage.away = {"handled"}

        def store(messages: Batch) -> None:
            calls(messages)
            stopping.append(True)

        outcomes = pipe(store, settings={"stopping": lambda: bool(stopping)}).handle_many(many(2))

        assert kinds(outcomes) == [Snoozed, Snoozed]
        storage.away, stopping = set(), []
        carried = [outcome.message for outcome in outcomes if isinstance(outcome, Snoozed)]
        assert kinds(pipeline.handle_many(carried)) == [Handled, Handled]
        assert calls.seen == [[0, 1]]

    def test_nothing_is_claimed_ahead_of_its_call(self, pipe: Callable[..., Pipeline]) -> None:
        """What is claimed ahead is run alone, as plain handlers are."""
        assert pipe(Calls()).begin_ahead(many(2)) == [None, None]

    def test_an_overtaken_message_is_fenced_and_its_neighbours_are_not(
        self, pipe: Callable[..., Pipeline], clock: ManualClock
    ) -> None:
        messages = many(3)

        def store(batch: Batch) -> None:
            clock.advance(LEASE + 1)
            pipe(lambda _: None, worker="other").begin([messages[1]])

        assert kinds(pipe(store).handle_many(messages)) == [Handled, Fenced, Handled]

    def test_its_story_is_that_of_any_message(self, pipe: Callable[..., Pipeline], storage: Storage) -> None:
        pipe(lambda messages: {"m1": ValueError("no")}).handle_many(many(2))

        stories = [[(event.event, event.handler) for event in storage.explain("t", f"i{n}")] for n in range(2)]
        assert stories == [
            [("sent", None), ("attempt", None), ("handler", "store"), ("handled", None)],
            [("sent", None), ("attempt", None), ("retry", "store")],
        ]


class TestAnswers:
    def test_a_sequence_answers_for_each(self, pipe: Callable[..., Pipeline], storage: Storage) -> None:
        def store(messages: Batch) -> BatchAnswer:
            return [None, ValueError("no"), Snooze(7), Discard("never"), KeyError("fatal")]

        policy = RetryPolicy(max_retries=2, give_up_for=(KeyError,))
        outcomes = pipe(store, retry=policy).handle_many(many(5))

        assert kinds(outcomes) == [Handled, Retry, Snoozed, Dead, Dead]
        retry, snoozed, discarded, fatal = outcomes[1:]
        assert isinstance(retry, Retry)
        assert (retry.message.id, retry.message.copy, retry.message.retries) == ("m1", 1, 1)
        assert isinstance(snoozed, Snoozed)
        assert (snoozed.delay, snoozed.message.retries) == (7, 0)
        assert (discarded, fatal) == (Dead(Reason.DISCARDED), Dead(Reason.FATAL))
        assert {letter.id: letter.handler for letter in storage.dead()} == {"m3": "store", "m4": "store"}

    def test_a_mapping_answers_for_those_that_failed(self, pipe: Callable[..., Pipeline]) -> None:
        answer = {"m2": ValueError("no"), "m0": None}
        assert kinds(pipe(lambda messages: answer).handle_many(many(4))) == [Handled, Handled, Retry, Handled]

    def test_answered_failures_are_not_called_again(self, pipe: Callable[..., Pipeline]) -> None:
        calls = Calls()

        def store(messages: Batch) -> BatchAnswer:
            calls(messages)
            return [ValueError("no")] * len(messages)

        assert kinds(pipe(store).handle_many(many(8))) == [Retry] * 8
        assert calls.sizes == [8]

    @pytest.mark.parametrize(
        ("answer", "told"),
        [
            ([None], "returned 1 answers"),
            ((), "returned 0 answers"),
            ({"nobody": ValueError()}, "answered for 'nobody', which is the id of none of them"),
            (True, "returned True (bool)"),
            ("ok", "returned 'ok' (str)"),
            (iter([None, None]), "list_iterator"),
            ([None, "no"], "answered 'no' (str) for message m1"),
            ([None, ValueError], "(type) for message m1"),
            ({"m0": False}, "answered False (bool) for message m0"),
            ([KeyboardInterrupt(), None], "(KeyboardInterrupt) for message m0"),
        ],
    )
    def test_a_wrong_answer_fails_the_call_and_says_what_was_expected(
        self, pipe: Callable[..., Pipeline], caplog: pytest.LogCaptureFixture, answer: Any, told: str
    ) -> None:
        outcomes = pipe(lambda messages: answer if len(messages) == 2 else 1).handle_many(many(2))

        assert kinds(outcomes) == [Retry, Retry]
        assert told in caplog.text
        assert "return None when all are handled; or a sequence with None or an exception for each" in caplog.text
        assert all(isinstance(outcome, Retry) and "returned 1 (int)" in str(outcome.error) for outcome in outcomes)

    def test_the_text_names_what_came(self, pipe: Callable[..., Pipeline]) -> None:
        (outcome,) = pipe(lambda messages: [None, None]).handle_many(many(1))
        assert isinstance(outcome, Retry)
        assert isinstance(outcome.error, HandlerAnswerError)
        assert str(outcome.error).startswith(
            "batch handler `store` of topic `t`, given 1 messages, returned 2 answers: "
        )

    def test_a_generator_is_refused_where_it_is_declared(self) -> None:
        def store(messages: Batch) -> Iterator[None]:
            yield None

        with pytest.raises(TypeError, match="must not yield"):
            Topic[Any]("t").batch_handler(store)  # type: ignore[type-var]


class TestHalving:
    @pytest.mark.parametrize("bad", [0, 1, 100, 127, 128, 255])
    def test_one_bad_message_of_256_is_found_and_the_others_are_handled(self, storage: Storage, bad: int) -> None:
        calls = Calls(bad)

        outcomes = batch_pipeline(storage, calls, retry=RetryPolicy(max_retries=0)).handle_many(many(256))

        assert len(calls.seen) - 1 <= FURTHER
        assert kinds(outcomes) == [Dead if number == bad else Handled for number in range(256)]
        assert storage.len() == 255
        assert [letter.id for letter in storage.dead()] == [f"m{bad}"]

    def test_it_is_found_in_16_further_calls_wherever_it_stands(self, storage: Storage) -> None:
        calls = Calls()
        pipeline = batch_pipeline(storage, calls)
        pipeline._batches.settle = lambda settlements: [settlement.outcome for settlement in settlements]
        works = [work for work in pipeline.begin(many(256)) if isinstance(work, Work)]

        for bad in range(256):
            calls.bad, calls.seen = {bad}, []
            outcomes = pipeline._batches.handle([copy.copy(work) for work in works])
            assert len(calls.seen) - 1 <= FURTHER
            assert kinds(outcomes) == [Retry if number == bad else Handled for number in range(256)]

    def test_that_is_two_calls_for_each_time_it_is_halved(self, pipe: Callable[..., Pipeline]) -> None:
        calls = Calls(255)
        pipe(calls).handle_many(many(256))
        assert calls.sizes == [256, 128, 128, 64, 64, 32, 32, 16, 16, 8, 8, 4, 4, 2, 2, 1, 1]

    @pytest.mark.parametrize("count", [2, 3, 5, 7, 100, 129, 255])
    def test_any_number_can_be_halved(self, count: int) -> None:
        for bad in (0, count // 2, count - 1):
            calls = Calls(bad)
            outcomes = batch_pipeline(MemoryStorage(), calls).handle_many(many(count))
            assert kinds(outcomes) == [Retry if number == bad else Handled for number in range(count)]
            assert len(calls.seen) - 1 <= 2 * (count - 1).bit_length()

    @pytest.mark.parametrize("bad", [(0, 1), (3, 100), (130, 255), (5, 64, 70, 127)])
    def test_several_in_one_half_are_found_each(self, bad: tuple[int, ...]) -> None:
        calls = Calls(*bad)

        outcomes = batch_pipeline(MemoryStorage(), calls).handle_many(many(256))

        assert kinds(outcomes) == [Retry if number in bad else Handled for number in range(256)]
        assert len(calls.seen) - 1 <= FURTHER * len(bad)

    def test_what_a_half_handled_is_settled_before_the_next_call(
        self, pipe: Callable[..., Pipeline], storage: TroubledStorage
    ) -> None:
        calls = Calls(3)

        def store(messages: Batch) -> None:
            storage.log.append(f"{len(messages)} run")
            calls(messages)

        pipe(store).handle_many(many(4))

        assert storage.log[1:] == ["4 run", "2 run", "handled handled", "2 run", "1 run", "handled", "1 run", "retry"]

    def test_a_batch_of_one_fails_like_a_single(self, pipe: Callable[..., Pipeline], storage: Storage) -> None:
        calls = Calls(0)
        outcomes = pipe(calls, retry=RetryPolicy(max_retries=0)).handle_many(many(1))
        assert (calls.sizes, kinds(outcomes)) == ([1], [Dead])

    def test_a_dead_api_costs_three_calls_and_one_retry_each(self, pipe: Callable[..., Pipeline]) -> None:
        calls = Calls(*range(256), error=ConnectionError("down"))

        outcomes = pipe(calls, retry=RetryPolicy(max_retries=3)).handle_many(many(256))

        assert calls.sizes == [256, 128, 128]
        assert kinds(outcomes) == [Retry] * 256
        assert {outcome.message.retries for outcome in outcomes if isinstance(outcome, Retry)} == {1}

    def test_one_in_each_half_and_all_are_retried_until_no_retry_is_left(self, storage: Storage) -> None:
        calls = Calls(0, 255)
        pipeline = batch_pipeline(storage, calls, retry=RetryPolicy(max_retries=2))
        messages, dead = many(256), []

        for _ in range(3):
            outcomes = pipeline.handle_many(messages)
            dead += [outcome for outcome in outcomes if isinstance(outcome, Dead)]
            messages = [outcome.message for outcome in outcomes if isinstance(outcome, Retry)]

        assert (len(dead), storage.len(), messages) == (2, 254, [])
        assert {letter.id for letter in storage.dead()} == {"m0", "m255"}

    @pytest.mark.parametrize("error", [ValueError("fatal"), Discard("never")])
    def test_nobody_is_buried_for_what_a_neighbour_did(self, storage: Storage, error: Exception) -> None:
        calls = Calls(0, 255, error=error)
        policy = RetryPolicy(max_retries=5, give_up_for=(ValueError,))

        outcomes = batch_pipeline(storage, calls, retry=policy).handle_many(many(256))

        assert kinds(outcomes) == [Dead, *[Handled] * 254, Dead]
        assert calls.sizes == [256, 128, 128] + [1] * 256

    def test_retries_of_one_batch_differ_by_message(self, storage: Storage) -> None:
        calls = Calls(*range(4))
        messages = [*many(2, max_retries=0), *many(4, max_retries=9)[2:]]
        outcomes = batch_pipeline(storage, calls).handle_many(messages)
        assert kinds(outcomes) == [Dead, Dead, Retry, Retry]
        assert calls.sizes == [4, 2, 2, 1, 1]

    def test_an_error_that_passes_is_no_bad_message(self, pipe: Callable[..., Pipeline]) -> None:
        errors = [ConnectionError("down"), None, None]

        def store(messages: Batch) -> None:
            if error := errors.pop(0):
                raise error

        assert kinds(pipe(store).handle_many(many(6))) == [Handled] * 6

    def test_snooze_raised_is_a_verdict_on_the_whole_call(self, pipe: Callable[..., Pipeline]) -> None:
        calls = Calls(1, error=Snooze(30))
        outcomes = pipe(calls).handle_many(many(4))
        assert (calls.sizes, kinds(outcomes)) == ([4], [Snoozed] * 4)

    def test_discard_raised_is_found_like_any_failure(self, pipe: Callable[..., Pipeline], storage: Storage) -> None:
        outcomes = pipe(Calls(1, error=Discard("never"))).handle_many(many(4))
        assert kinds(outcomes) == [Handled, Dead, Handled, Handled]
        assert [letter.reason for letter in storage.dead()] == [Reason.DISCARDED]

    def test_exiting_is_a_failure(self, pipe: Callable[..., Pipeline]) -> None:
        def store(messages: Batch) -> None:
            if any(message.data == 2 for message in messages):
                raise SystemExit(3)

        assert kinds(pipe(store).handle_many(many(4))) == [Handled, Handled, Retry, Handled]


class TestTimeout:
    def test_it_is_that_of_one_call(self, pipe: Callable[..., Pipeline]) -> None:
        def store(messages: Batch) -> None:
            time.sleep(0.15)

        assert kinds(pipe(store, timeout=0.25, size=1).handle_many(many(3))) == [Handled] * 3

    def test_a_call_that_runs_past_it_is_halved(self, pipe: Callable[..., Pipeline]) -> None:
        sizes: list[int] = []

        def store(messages: Batch) -> None:
            sizes.append(len(messages))
            if any(message.data == 3 for message in messages):
                time.sleep(20)

        outcomes = pipe(store, timeout=0.1).handle_many(many(4))

        assert kinds(outcomes) == [Handled, Handled, Handled, Retry]
        assert sizes == [4, 2, 2, 1, 1]
        assert isinstance(outcomes[3], Retry)
        assert isinstance(outcomes[3].error, HandlerTimeoutError)

    def test_in_a_thread_it_counts_when_the_call_returns(self, pipe: Callable[..., Pipeline]) -> None:
        def store(messages: Batch) -> None:
            time.sleep(0.2)

        with ThreadPoolExecutor(1) as pool:
            outcomes = pool.submit(pipe(store, timeout=0.1).handle_many, many(2)).result(10)
        assert kinds(outcomes) == [Retry, Retry]


class TestStopping:
    def test_between_calls_it_ends_and_the_rest_is_released_at_no_cost(
        self, pipe: Callable[..., Pipeline], storage: TroubledStorage
    ) -> None:
        stopping: list[bool] = []
        calls = Calls(3)

        def store(messages: Batch) -> None:
            if len(calls.seen) == 1:
                stopping.append(True)
            calls(messages)

        pipeline = pipe(store, settings={"stopping": lambda: bool(stopping)})
        outcomes = pipeline.handle_many(many(4))

        assert calls.sizes == [4, 2]
        assert outcomes[2:] == [Busy(0.0), Busy(0.0)]
        stopping.clear()
        again = pipe(calls, worker="other").handle_many(many(4))
        assert kinds(again) == [Duplicate, Duplicate, Handled, Retry]
        assert isinstance(again[3], Retry)
        assert again[3].message.retries == 1, "the failed call before the stop cost nothing"

    def test_no_further_batch_is_claimed(self, pipe: Callable[..., Pipeline], storage: TroubledStorage) -> None:
        stopping: list[bool] = []
        settings = {"stopping": lambda: bool(stopping)}
        outcomes = pipe(lambda messages: stopping.append(True), size=2, settings=settings).handle_many(many(6))
        assert kinds(outcomes) == [Handled] * 2 + [Busy] * 4
        assert storage.log == ["claim claim", "handled handled"]

    def test_whoever_ends_the_process_in_a_call_costs_nothing(
        self, pipe: Callable[..., Pipeline], storage: TroubledStorage
    ) -> None:
        stopping: list[bool] = []

        def store(messages: Batch) -> None:
            if messages[0].data == 2:
                stopping.append(True)
                raise SystemExit(-241)
            if len(messages) > 2:
                raise ValueError("no")

        settings = {"stopping": lambda: bool(stopping), "interrupts": lambda error: isinstance(error, SystemExit)}
        with pytest.raises(SystemExit):
            pipe(store, settings=settings).handle_many(many(4))

        assert storage.log[-1] == "released released"
        begun = pipe(store, worker="other").begin(many(4))
        assert [getattr(work, "crashes", None) for work in begun] == [None, None, 0, 0]


class TestCrashes:
    """A message that took a worker down is called alone; its last try is alone in its process."""

    def crash(self, storage: Storage, clock: ManualClock, messages: Batch, times: int) -> None:
        for number in range(times):
            batch_pipeline(storage, lambda _: None, worker=f"dead{number}").begin(messages)
            clock.advance(LEASE + 1)

    @pytest.mark.parametrize("times", [1, 2])
    def test_suspects_are_called_alone_after_the_others(
        self, storage: TroubledStorage, clock: ManualClock, times: int
    ) -> None:
        messages, calls = many(5), Calls()
        self.crash(storage, clock, messages[1:3], times)
        storage.log.clear()

        outcomes = batch_pipeline(storage, calls).handle_many(messages)

        assert kinds(outcomes) == [Handled] * 5
        assert calls.seen == [[0, 3, 4], [1], [2]]
        one = ["claim", "handled"]
        assert storage.log == [" ".join(["claim"] * 5), "released released", "handled handled handled", *one, *one]

    def test_a_killer_takes_nobody_with_it(self, storage: Storage, clock: ManualClock) -> None:
        """As processes would: each time one dies, all that it held comes back, a lease later."""

        class Killed(BaseException):
            pass

        messages = many(20)

        def store(batch: Batch) -> None:
            if any(message.data == 7 for message in batch):
                raise Killed

        settings = {"interrupts": lambda error: isinstance(error, Killed)}
        outcomes: list[Outcome] = []
        deaths = 0
        while not outcomes:
            try:
                worker = f"w{deaths}"
                outcomes = batch_pipeline(storage, store, worker=worker, settings=settings).handle_many(messages)
            except Killed:
                deaths += 1
                clock.advance(LEASE + 1)

        assert deaths == 3
        assert [letter.id for letter in storage.dead()] == ["m7"]
        assert [letter.reason for letter in storage.dead()] == [Reason.KILLED_WORKER]
        assert storage.len() == 19

    def test_where_one_crash_is_one_too_many_nobody_has_company(self, storage: Storage) -> None:
        calls = Calls()
        batch_pipeline(storage, calls, settings={"max_crashes": 1}).handle_many(many(3))
        assert calls.sizes == [1, 1, 1]

    def test_the_others_are_not_counted_when_a_suspect_crashes_again(
        self, storage: Storage, clock: ManualClock
    ) -> None:
        messages = many(3)
        self.crash(storage, clock, messages, 1)

        def store(batch: Batch) -> None:
            begun = batch_pipeline(storage, done, worker="other").begin(messages)
            crashes = [getattr(work, "crashes", None) for work in begun]
            assert crashes.count(1) == 2, "only the one in this call is claimed"
            raise SystemExit(-241)

        with pytest.raises(SystemExit):
            batch_pipeline(storage, store, settings={"interrupts": lambda error: True}).handle_many(messages)


class TestPackets:
    """The members of a packet are in hand together: of a topic with a batch handler, so they are handled."""

    def handle(self, pipeline: Pipeline, messages: Batch, *, stopping: bool = False) -> list[Taken]:
        packet = Packet("t", [member_of(message, dump(message.data)) for message in messages])
        return Members(pipeline, lambda: stopping).handle(packet)

    def test_members_are_called_in_batches(self, storage: TroubledStorage) -> None:
        calls = Calls(4)
        taken = self.handle(batch_pipeline(storage, calls, size=3), many(5))
        assert kinds([one.outcome for one in taken]) == [Handled] * 4 + [Retry]
        assert calls.seen == [[0, 1, 2], [3, 4], [3], [4]]
        assert storage.log[0] == " ".join(["claim"] * 5)

    def test_suspects_leave_as_singles(self, storage: Storage, clock: ManualClock) -> None:
        calls, messages = Calls(), many(3)
        batch_pipeline(storage, calls, worker="dead").begin(messages[:1])
        clock.advance(LEASE + 1)

        taken = self.handle(batch_pipeline(storage, calls), messages)

        assert [(type(one.outcome), one.is_left) for one in taken] == [
            (Busy, False),
            (Handled, False),
            (Handled, False),
        ]
        assert calls.seen == [[1, 2]]

    def test_a_stop_leaves_what_no_call_has_begun_with(self, storage: TroubledStorage) -> None:
        calls = Calls()
        taken = self.handle(batch_pipeline(storage, calls), many(3), stopping=True)
        assert [(one.outcome, one.is_left) for one in taken] == [(Busy(0.0), True)] * 3
        assert calls.seen == []

    def test_an_interrupted_call_gives_back_what_it_has_not_begun_with(self, storage: TroubledStorage) -> None:
        def store(batch: Batch) -> None:
            if batch[0].data == 2:
                raise SystemExit(-241)

        settings = {"interrupts": lambda error: True, "stopping": lambda: True}
        pipeline = batch_pipeline(storage, store, size=2, settings=settings)
        with pytest.raises(SystemExit):
            self.handle(pipeline, many(6))
        assert storage.log[1:] == ["handled handled", "released released", "released released"]


@pytest.fixture
def _uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_uncollected")
@pytest.mark.parametrize("bad", [(1,), (0, 7)])
@pytest.mark.parametrize("max_retries", [0, 1])
def test_what_failed_calls_held_is_let_go_of(
    pipe: Callable[..., Pipeline], bad: tuple[int, ...], max_retries: int
) -> None:
    held: list[weakref.ref[Any]] = []

    class Much:
        pass

    def store(messages: Batch) -> None:
        much = Much()
        held.append(weakref.ref(much))
        if any(message.data in bad for message in messages):
            raise ValueError("no luck")

    pipe(store, retry=RetryPolicy(max_retries=max_retries)).handle_many(many(8))

    assert [much() for much in held] == [None] * len(held)
