"""The members of a packet: each settles alone, and none pays for its neighbour."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from watch_tasks import (
    Busy,
    Dead,
    Discard,
    Duplicate,
    Handled,
    Message,
    Once,
    Outcome,
    Reason,
    Retry,
    RetryPolicy,
    Snooze,
    Snoozed,
    together,
)
from watch_tasks import members as module
from watch_tasks.members import Members, Taken
from watch_tasks.packets import Member, Packet, member_of, read_member
from watch_tasks.pipeline import Pipeline
from watch_tasks.schema import dump
from watch_tasks.testing import ManualClock

from .driver import LEASE, Function, done, fails, raising
from .trouble import TroubledStorage

Make = Callable[..., Pipeline]


def packet_of(*messages: Message[Any] | Member) -> Packet:
    """Return a packet of these; what is no message is a member as it is."""
    return Packet("t", [one if isinstance(one, Member) else member_of(one, dump(one.data)) for one in messages])


def numbered(count: int, **options: Any) -> list[Message[Any]]:
    return [Message(number, "t", index=f"i{number}", id=f"m{number}", **options) for number in range(count)]


def take(
    pipeline: Pipeline, *messages: Message[Any] | Member, stopping: Callable[[], bool] = lambda: False
) -> list[Taken]:
    return Members(pipeline, stopping).handle(packet_of(*messages))


def outcomes(taken: list[Taken]) -> dict[str, Outcome]:
    return {one.member.id: one.outcome for one in taken}


def kinds(taken: list[Taken]) -> dict[str, str]:
    return {one.member.id: type(one.outcome).__name__ for one in taken}


def on(number: int, act: Function) -> Function:
    """Return a handler that does this for one message, and nothing for the others."""

    def handler(message: Message[Any]) -> Any:
        return act(message) if message.data == number else None

    return handler


class TestHandled:
    def test_all_are_claimed_and_recorded_in_one_round_trip_each(self, pipe: Make, storage: TroubledStorage) -> None:
        taken = take(pipe(done), *numbered(3))
        assert kinds(taken) == dict.fromkeys(("m0", "m1", "m2"), "Handled")
        assert storage.log == ["claim claim claim", "handled handled handled"]

    @pytest.mark.parametrize(
        ("act", "outcome"),
        [
            (fails, Retry),
            (raising(Snooze(5)), Snoozed),
            (raising(Discard("no")), Dead),
            (raising(SystemExit(1)), Retry),
            (raising(KeyboardInterrupt()), Retry),
            (raising(MemoryError()), Retry),
        ],
    )
    def test_what_becomes_of_one_is_not_the_others(self, pipe: Make, act: Function, outcome: type[Outcome]) -> None:
        taken = outcomes(take(pipe(on(1, act)), *numbered(3)))
        assert isinstance(taken["m1"], outcome)
        assert [type(taken[id]) for id in ("m0", "m2")] == [Handled, Handled]

    def test_a_fatal_error_buries_one(self, pipe: Make, storage: TroubledStorage) -> None:
        policy = RetryPolicy(give_up_for=(ValueError,))
        take(pipe(on(1, fails), retry=policy), *numbered(3))
        assert [(letter.id, letter.reason) for letter in storage.dead()] == [("m1", Reason.FATAL)]
        assert storage.len() == 2

    def test_each_has_a_timeout_of_its_own(self, pipe: Make) -> None:
        def slow(message: Message[Any]) -> None:
            time.sleep(0.15 if message.data != 1 else 5)

        taken = outcomes(take(pipe(slow, timeout=0.3), *numbered(4)))
        assert isinstance(taken["m1"], Retry)
        assert [type(taken[id]) for id in ("m0", "m2", "m3")] == [Handled] * 3

    def test_marks_of_several_handlers_are_stored_as_always(self, pipe: Make, storage: TroubledStorage) -> None:
        calls: list[str] = []

        def second(message: Message[Any]) -> None:
            calls.append(message.id)
            if message.retries == 0:
                raise ValueError("once")

        pipeline = pipe(lambda message: calls.append("first"), second)
        retry = outcomes(take(pipeline, *numbered(1)))["m0"]
        assert isinstance(retry, Retry)
        assert isinstance(pipeline.handle(retry.message), Handled)
        assert calls == ["first", "m0", "m0"]

    def test_once_none_is_run_each_time_and_recorded(self, pipe: Make, storage: TroubledStorage) -> None:
        calls: list[Any] = []
        pipeline = pipe(lambda message: calls.append(message.id), once="none")
        for _ in range(2):
            assert set(kinds(take(pipeline, *numbered(2))).values()) == {"Handled"}
        assert calls == ["m0", "m1"] * 2
        assert "claim" not in " ".join(storage.log)


class TestTogether:
    """What is handled waits for others for a second at most."""

    def test_a_group_is_recorded_after_a_second(
        self, pipe: Make, storage: TroubledStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = ManualClock(1000.0)
        monkeypatch.setattr(time, "monotonic", now)
        take(pipe(lambda message: now.advance(0.3)), *numbered(6))
        assert storage.log[1:] == ["handled handled handled handled", "handled handled"]

    def test_what_is_done_does_not_wait_for_a_slow_handler(self, pipe: Make, storage: TroubledStorage) -> None:
        seen: list[int] = []

        def slow(message: Message[Any]) -> None:
            end = time.monotonic() + 10
            while storage.len() < 2 and time.monotonic() < end:
                time.sleep(0.01)
            seen.append(storage.len())

        assert set(kinds(take(pipe(on(2, slow)), *numbered(4))).values()) == {"Handled"}
        assert seen == [2]


class TestLeft:
    """What is not begun is given back."""

    def test_asked_to_stop_the_one_in_hand_is_the_last(self, pipe: Make, storage: TroubledStorage) -> None:
        asked: list[int] = []
        pipeline = pipe(lambda message: asked.append(1))
        taken = take(pipeline, *numbered(4), stopping=lambda: bool(asked))
        assert [one.is_left for one in taken] == [False, True, True, True]
        assert kinds(taken) == {"m0": "Handled", "m1": "Busy", "m2": "Busy", "m3": "Busy"}
        assert set(kinds(take(pipe(done, worker="b"), *numbered(4))).values()) == {"Duplicate", "Handled"}

    def test_after_two_seconds_the_rest_is_left(self, pipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        now = ManualClock(1000.0)
        monkeypatch.setattr(time, "monotonic", now)
        taken = take(pipe(lambda message: now.advance(0.3)), *numbered(60))
        assert sum(one.is_left for one in taken) == 60 - 7

    def test_a_storage_that_takes_long_to_claim_does_not_keep_the_first_from_being_handled(
        self, pipe: Make, storage: TroubledStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else the same packet goes from hand to hand, and nobody begins."""
        now = ManualClock(1000.0)
        monkeypatch.setattr(time, "monotonic", now)

        def pause(seconds: float) -> None:
            now.advance(60)
            storage.away.clear()

        storage.away = {"claim"}
        taken = take(pipe(lambda message: now.advance(3), settings={"pause": pause}), *numbered(3))
        assert [one.is_left for one in taken] == [False, True, True]

    def test_so_it_is_where_somebody_was_alone_in_the_process(
        self, pipe: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = ManualClock(1000.0)
        monkeypatch.setattr(time, "monotonic", now)
        pipeline = pipe(done)
        enter = pipeline.company.__enter__
        monkeypatch.setattr(type(pipeline.company), "__enter__", lambda self: (now.advance(60), enter())[1])
        assert set(kinds(take(pipeline, *numbered(2))).values()) == {"Handled"}


class TestNotOurs:
    """Members that somebody else has, had, or takes over."""

    def test_a_fenced_member_is_the_only_one(self, pipe: Make, storage: TroubledStorage, clock: ManualClock) -> None:
        other = pipe(done, worker="b")

        def overtaken(message: Message[Any]) -> None:
            clock.advance(LEASE + 1)
            assert isinstance(other.handle(message), Handled)

        taken = kinds(take(pipe(on(1, overtaken), worker="a"), *numbered(3)))
        assert taken == {"m0": "Handled", "m1": "Fenced", "m2": "Handled"}
        assert storage.counters("t").handled == 3
        record = storage.get("t", "i1")
        assert record
        assert record.worker == "b"

    def test_what_runs_elsewhere_is_busy_and_what_is_done_a_duplicate(self, pipe: Make) -> None:
        messages = numbered(3)
        pipe(done, worker="b").handle(messages[0])
        pipe(done, worker="b").begin([messages[1]])
        assert outcomes(take(pipe(done), *messages)) == {
            "m0": Duplicate(),
            "m1": Busy(LEASE),
            "m2": Handled(pytest.approx(0, abs=1)),
        }

    def test_the_same_id_twice_is_handled_once(self, pipe: Make) -> None:
        calls: list[Any] = []
        message = numbered(1)[0]
        taken = take(pipe(calls.append), message, message, message)
        assert [type(one.outcome) for one in taken] == [Handled, Duplicate, Duplicate]
        assert len(calls) == 1

    @pytest.mark.parametrize("rule", ["index", None])
    def test_the_same_index_again_is_a_duplicate_under_its_rule(self, pipe: Make, rule: Once | None) -> None:
        messages = [Message(1, "t", index="i", id=f"m{number}", once=rule) for number in range(3)]
        taken = [type(one.outcome) for one in take(pipe(done), *messages)]
        assert taken == ([Handled, Duplicate, Duplicate] if rule else [Handled] * 3)

    def test_with_other_data_it_is_a_conflict(self, pipe: Make, storage: TroubledStorage) -> None:
        messages = [Message(number, "t", index="i", id=f"m{number}") for number in range(2)]
        taken = kinds(take(pipe(done, once="index"), *messages, *numbered(1, once="message")[:0]))
        assert taken == {"m0": "Handled", "m1": "Dead"}
        assert [(letter.id, letter.reason) for letter in storage.dead()] == [("m1", Reason.INDEX_CONFLICT)]

    def test_after_a_failure_the_next_of_its_index_is_handled(self, pipe: Make) -> None:
        messages = [Message(0, "t", index="i", id=f"m{number}") for number in range(2)]
        failed: list[int] = []

        def first_fails(message: Message[Any]) -> None:
            if not failed:
                failed.append(1)
                raise ValueError("once")

        taken = take(pipe(first_fails, once="index"), *messages)
        assert [type(one.outcome) for one in taken] == [Retry, Handled]


class TestNoMessages:
    """What cannot be read is buried alone."""

    @pytest.mark.parametrize(
        "member",
        [
            Member("", "", msgspec.Raw(b"1")),
            Member("a\nb", "", msgspec.Raw(b"1")),
            Member("x" * 300, "", msgspec.Raw(b"1")),
            Member("a", "b\nc", msgspec.Raw(b"1")),
            Member("a", "x" * 600, msgspec.Raw(b"1")),
            Member("a", "", msgspec.Raw(b"nothing")),
            Member("a", "", msgspec.Raw(b"[" * 100_000 + b"]" * 100_000)),
        ],
        ids=["no id", "an id of two lines", "a long id", "an index of two lines", "a long index", "no JSON", "deep"],
    )
    def test_it_is_dead_with_its_bytes_and_its_neighbours_are_handled(
        self, pipe: Make, storage: TroubledStorage, member: Member
    ) -> None:
        one, two = numbered(2)
        taken = [type(one.outcome) for one in take(pipe(done), one, member, two)]
        assert sorted(kind.__name__ for kind in taken) == ["Dead", "Handled", "Handled"]
        (letter,) = storage.dead()
        assert letter.raw == bytes(member.data)
        assert letter.id
        assert letter.id.isprintable()
        assert len(letter.id) <= 255
        assert letter.reason in (Reason.MALFORMED, Reason.UNDECODABLE)

    def test_two_without_an_id_are_two_letters(self, pipe: Make, storage: TroubledStorage) -> None:
        take(pipe(done), Member("", "", msgspec.Raw(b"1")), Member("", "", msgspec.Raw(b"2")))
        assert {letter.raw for letter in storage.dead()} == {b"1", b"2"}

    def test_data_that_does_not_fit_is_undecodable(self, pipe: Make, storage: TroubledStorage) -> None:
        messages = [Message("no number", "t", id="odd"), *numbered(2)]
        taken = kinds(take(pipe(done, schema=int), *messages))
        assert taken == {"odd": "Dead", "m0": "Handled", "m1": "Handled"}
        assert [letter.reason for letter in storage.dead()] == [Reason.UNDECODABLE]

    def test_an_unknown_topic_is_waited_for_and_then_dead(self, storage: TroubledStorage) -> None:
        pipeline = Pipeline(storage, lambda name: None, worker="w", unknown_grace=0.0)
        taken = take(pipeline, *numbered(2))
        assert [(letter.id, letter.reason) for letter in storage.dead()] == [
            (id, Reason.UNKNOWN_TOPIC) for id in ("m1", "m0")
        ]
        assert set(kinds(taken).values()) == {"Dead"}
        waiting = Pipeline(storage, lambda name: None, worker="w", unknown_grace=60.0)
        assert set(kinds(take(waiting, *[Message(1, "t", id="n")])).values()) == {"Busy"}

    def test_one_that_cannot_be_buried_before_the_stop_is_not_settled(
        self, pipe: Make, storage: TroubledStorage
    ) -> None:
        """Acked with its packet, it would be nowhere."""
        storage.away = {"dead"}
        pipeline = pipe(done, settings={"stopping": lambda: True})
        (taken,) = take(pipeline, Member("", "", msgspec.Raw(b"1")))
        assert taken.message is None
        assert isinstance(taken.outcome, Busy)


class TestTakenApart:
    def test_nothing_runs_and_each_leaves(self, pipe: Make, storage: TroubledStorage) -> None:
        calls: list[Any] = []
        pipeline = pipe(calls.append)
        done_before, *others = numbered(3)
        pipeline.handle(done_before)
        taken = Members(pipeline, lambda: False).take_apart(packet_of(done_before, *others))
        assert outcomes(taken) == {"m0": Duplicate(), "m1": Busy(0.0), "m2": Busy(0.0)}
        assert not any(one.is_left for one in taken)
        assert len(calls) == 1
        for message in others:
            assert isinstance(pipeline.handle(message), Handled)

    def test_one_that_cannot_even_be_claimed_is_alone_with_that(
        self, pipe: Make, storage: TroubledStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else its packet comes again and again, and its neighbours with it."""
        claim = storage.claim_many

        def picky(claims: Any) -> Any:
            if any(one.id == "m1" for one in claims):
                raise OverflowError("more than a storage can take")
            return claim(claims)

        monkeypatch.setattr(storage, "claim_many", picky)
        pipeline, messages = pipe(done), numbered(3)
        with pytest.raises(OverflowError):
            take(pipeline, *messages)
        taken = Members(pipeline, lambda: False).take_apart(packet_of(*messages))
        assert outcomes(taken) == {"m0": Busy(0.0), "m1": Busy(0.0), "m2": Busy(0.0)}
        assert [type(pipeline.handle(messages[number])) for number in (0, 2)] == [Handled, Handled]

    def test_crashes_in_packets_count_against_nobody(self, pipe: Make, clock: ManualClock) -> None:
        messages = numbered(2)
        for number in range(5):
            pipe(done, worker=f"w{number}").begin(messages, started=False)
            clock.advance(LEASE + 1)
        assert set(kinds(take(pipe(done), *messages)).values()) == {"Handled"}

    def test_one_that_took_a_worker_down_leaves_and_its_neighbours_are_handled(
        self, pipe: Make, clock: ManualClock
    ) -> None:
        messages = numbered(3)
        pipe(done, worker="gone").begin([messages[1]])
        clock.advance(LEASE + 1)
        taken = outcomes(take(pipe(done), *messages))
        assert taken["m1"] == Busy(0.0)
        assert [type(taken[id]) for id in ("m0", "m2")] == [Handled, Handled]

    def test_one_that_took_three_down_is_dead_and_its_neighbours_are_handled(
        self, pipe: Make, storage: TroubledStorage, clock: ManualClock
    ) -> None:
        messages = numbered(3)
        for number in range(3):
            pipe(done, worker=f"w{number}").begin([messages[1]])
            clock.advance(LEASE + 1)
        assert kinds(take(pipe(done), *messages)) == {"m0": "Handled", "m1": "Dead", "m2": "Handled"}
        assert [(letter.reason, letter.crashes) for letter in storage.dead()] == [(Reason.KILLED_WORKER, 3)]

    def test_a_retry_that_was_never_published_is_not_stale(self, pipe: Make, clock: ManualClock) -> None:
        """Killed between storing the retry and publishing it: the packet comes again, long after it was due."""
        pipeline, (message,) = pipe(fails, retry=RetryPolicy(backoff=1.0, jitter=False)), numbered(1)
        take(pipeline, message)
        clock.advance(60)
        (taken,) = Members(pipeline, lambda: False).take_apart(packet_of(message))
        assert taken.message
        clock.advance(LEASE + 1)
        assert isinstance(pipeline.handle(taken.message), Retry)


class TestAway:
    """A storage that does not answer in the middle of a packet."""

    @pytest.mark.parametrize("asked", ["claim", "handled"])
    def test_it_is_waited_for_and_nothing_runs_twice(self, pipe: Make, storage: TroubledStorage, asked: str) -> None:
        calls: list[str] = []

        def pause(seconds: float) -> None:
            if asked == "claim":
                assert not calls, "nothing is handled without a claim"
            storage.away.clear()

        storage.away = {asked}
        pipeline = pipe(lambda message: calls.append(message.id), settings={"pause": pause})
        assert set(kinds(take(pipeline, *numbered(3))).values()) == {"Handled"}
        assert calls == ["m0", "m1", "m2"]

    @pytest.mark.parametrize("asked", ["claim", "handled"])
    def test_an_answer_that_is_lost_repeats_nothing(self, pipe: Make, storage: TroubledStorage, asked: str) -> None:
        calls: list[str] = []
        storage.loses = {asked}
        pipeline = pipe(lambda message: calls.append(message.id), settings={"pause": lambda seconds: None})
        assert set(kinds(take(pipeline, *numbered(3))).values()) == {"Handled"}
        assert calls == ["m0", "m1", "m2"]
        assert storage.counters("t").handled == 3

    def test_asked_to_stop_meanwhile_it_says_what_is_done(self, pipe: Make, storage: TroubledStorage) -> None:
        asked: list[int] = []

        def last(message: Message[Any]) -> None:
            storage.away = {"handled", "released"}
            asked.append(1)

        pipeline = pipe(on(1, last), settings={"stopping": lambda: bool(asked)})
        taken = outcomes(take(pipeline, *numbered(4), stopping=lambda: bool(asked)))
        for id in ("m0", "m1"):
            carried = taken[id]
            assert isinstance(carried, Snoozed)
            assert carried.message.handled == ("h0",)
        assert [taken[id] for id in ("m2", "m3")] == [Busy(0.0)] * 2


class TestCutOff:
    """The process of a packet is being ended."""

    def test_what_is_done_is_kept_and_what_is_not_begun_goes_back(self, pipe: Make, storage: TroubledStorage) -> None:
        class End(BaseException):
            pass

        pipeline = pipe(on(1, raising(End())), settings={"interrupts": lambda error: isinstance(error, End)})
        with pytest.raises(End):
            take(pipeline, *numbered(4))
        assert storage.len() == 1
        assert kinds(take(pipe(done, worker="b"), *numbered(4))) == {
            "m0": "Duplicate",
            "m1": "Busy",
            "m2": "Handled",
            "m3": "Handled",
        }

    def test_an_error_of_the_storage_keeps_what_is_done(
        self, pipe: Make, storage: TroubledStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One that no waiting cures: the packet comes again, and nothing that was done is done twice."""
        commit, raised = storage.commit_many, list[int]()

        def once(commits: Any) -> Any:
            if not raised:
                raised.append(1)
                raise RuntimeError("a mistake")
            return commit(commits)

        monkeypatch.setattr(storage, "commit_many", once)
        with pytest.raises(RuntimeError):
            take(pipe(done), *numbered(3))
        assert storage.len() == 3


class TestBuried:
    def test_each_is_a_letter_with_its_data_that_can_be_replayed(self, pipe: Make, storage: TroubledStorage) -> None:
        pipeline = pipe(done)
        pipeline.handle(numbered(1)[0])
        Members(pipeline, lambda: True).bury(packet_of(*numbered(3)), Reason.REVOKED, "by Flower")
        letters = {letter.id: letter for letter in storage.dead()}
        assert letters.keys() == {"m1", "m2"}
        assert [(letters[id].data, letters[id].index, letters[id].reason) for id in ("m1", "m2")] == [
            (1, "i1", Reason.REVOKED),
            (2, "i2", Reason.REVOKED),
        ]
        assert kinds(take(pipeline, *numbered(3))) == dict.fromkeys(("m0", "m1", "m2"), "Duplicate")


def test_the_seconds_of_a_group_and_of_a_packet_are_as_documented() -> None:
    assert (together._TOGETHER, module._ENOUGH) == (1.0, 2.0)


def test_a_member_is_the_message_again() -> None:
    message = Message({"n": 1}, "t", index="i", id="m", retries=2, max_retries=5, once="index", handled=("a",), copy=3)
    member = member_of(message, dump(message.data), message.sent_at)
    assert read_member(member, "t", message.sent_at) == message
    assert json.loads(bytes(member.data)) == {"n": 1}
