"""Many messages at once: what packs, what becomes of each, and when."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import pytest

from watch_tasks import (
    Message,
    QueueClosedError,
    QueueFullError,
    SendFailedError,
    SendReport,
    SendUnknownError,
    TooLargeError,
    Topic,
    TopicError,
    Verdict,
)
from watch_tasks.packets import MOST_BYTES, MOST_MEMBERS, Packet, new_ids, read_member
from watch_tasks.queue import bulk
from watch_tasks.sending import PacketOutlet, Sender

from .workers import until

#: Seconds after which what must come has not.
PATIENCE = 10.0


class Truck:
    """An outlet that takes packets, notes what they hold, and fails by what it is told."""

    def __init__(self, max_payload: int = 1_048_576) -> None:
        self.max_payload = max_payload
        self.packets: list[list[Message[Any]]] = []
        self.bytes: list[int] = []
        self.count = 0
        self.keeps = True
        #: What the next ones raise.
        self.errors: list[BaseException | None] = []
        self.began = threading.Event()
        self.may_go: threading.Event | None = None

    def push(self, message: Message[Any], *, delay: float = 0.0) -> None:
        self._take([message])

    def push_packet(self, packet: Packet) -> None:
        self.bytes.append(len(bulk.body(packet)))
        self._take([read_member(member, packet.topic, packet.sent_at) for member in packet.members])

    def _take(self, messages: list[Message[Any]]) -> None:
        self.began.set()
        if self.may_go:
            assert self.may_go.wait(PATIENCE)
        error = self.errors.pop(0) if self.errors else None
        if error:
            raise error
        self.count += len(messages)
        if self.keeps:
            self.packets.append(messages)

    @property
    def data(self) -> list[Any]:
        return [message.data for packet in self.packets for message in packet]

    @property
    def sizes(self) -> list[int]:
        return [len(packet) for packet in self.packets]


class Cart:
    """An outlet that takes no packets."""

    def __init__(self) -> None:
        self.pushed: list[Message[Any]] = []

    def push(self, message: Message[Any], *, delay: float = 0.0) -> None:
        if message.data == "down":
            raise SendFailedError("the broker is down")
        self.pushed.append(message)


class Told(list[tuple[Any, Verdict]]):
    """What a callback was told."""

    def __call__(self, message: Message[Any], verdict: Verdict) -> None:
        self.append((message.data, verdict))


@dataclass(frozen=True)
class Alarm:
    """An Indexer."""

    host: str

    def index(self) -> str:
        return self.host


@pytest.fixture
def truck() -> Truck:
    return Truck()


@pytest.fixture
def bound(truck: Truck) -> Topic[Any]:
    made: Topic[Any] = Topic("t")
    made.bind(truck)
    return made


def lost(packet: int = 0) -> SendUnknownError:
    return SendUnknownError("the answer was lost", Message(packet, "t"))


class TestPacking:
    def test_what_comes_together_goes_together(self, truck: Truck, bound: Topic[Any]) -> None:
        assert bound.send_many(range(2 * MOST_MEMBERS + 7)) == SendReport(sent=2 * MOST_MEMBERS + 7)
        assert truck.sizes == [MOST_MEMBERS, MOST_MEMBERS, 7]
        assert truck.data == list(range(2 * MOST_MEMBERS + 7))

    def test_one_that_goes_alone_is_no_packet(self, truck: Truck, bound: Topic[Any]) -> None:
        assert bound.send_many([{"n": 1}]).sent == 1
        assert (truck.sizes, truck.bytes) == ([1], [])
        (message,) = truck.packets[0]
        assert (message.data, message.topic, message.index) == ({"n": 1}, "t", message.id)

    @pytest.mark.parametrize("index", ["i", "☃" * 512, '"' * 512])
    def test_a_packet_has_so_many_bytes_at_most(self, truck: Truck, bound: Topic[Any], index: str) -> None:
        messages = [Message("x" * 9_000, "t", index=index, max_retries=7) for _ in range(100)]
        assert bound.send_many(messages).sent == 100
        assert len(truck.sizes) > 3
        assert max(truck.bytes) <= MOST_BYTES + 100 * 600  # what JSON escapes of an index is not foreseen
        assert max(truck.bytes) <= bulk.most_bytes(0)

    def test_one_that_is_larger_goes_with_no_other(self, truck: Truck, bound: Topic[Any]) -> None:
        large = "x" * (MOST_BYTES + 1)
        bound.send_many(["a", "b", large, "c", "d"])
        assert truck.sizes == [2, 1, 2]

    def test_a_sender_may_want_smaller_packets(self, truck: Truck, bound: Topic[Any]) -> None:
        with bound.sender(size=3) as sender:
            for number in range(7):
                sender.send(number)
        assert truck.sizes == [3, 3, 1]

    def test_an_outlet_without_packets_gets_them_one_by_one(self) -> None:
        cart = Cart()
        topic: Topic[Any] = Topic("t")
        topic.bind(cart)
        assert topic.send_many(range(3)).sent == 3
        assert [message.data for message in cart.pushed] == [0, 1, 2]

    def test_a_topic_with_a_bound_sends_one_by_one(self, truck: Truck) -> None:
        bounded: Topic[Any] = Topic("t", max_waiting=2)
        bounded.bind(truck)
        truck.errors = [None, QueueFullError("full")]
        assert bounded.send_many(range(3)) == SendReport(sent=2, refused=1)
        assert truck.sizes == [1, 1]
        assert truck.bytes == []

    def test_an_endless_iterable_takes_constant_memory(self, truck: Truck, bound: Topic[Any]) -> None:
        truck.keeps = False
        sizes: list[int] = []

        def numbers() -> Iterator[dict[str, int]]:
            for number in itertools.count():
                if number % 1_000 == 999:
                    sizes.append(tracemalloc.get_traced_memory()[0])
                yield {"number": number}

        tracemalloc.start()
        try:
            report = bound.send_many(itertools.islice(numbers(), 5_000), on_verdict=lambda message, verdict: None)
        finally:
            tracemalloc.stop()

        assert report.sent == truck.count == 5_000
        assert sizes[-1] - sizes[0] < 100_000

    def test_nothing_of_an_iterable_is_read_ahead(self, truck: Truck, bound: Topic[Any]) -> None:
        read = 0

        def numbers() -> Iterator[int]:
            nonlocal read
            for number in itertools.count():
                read += 1
                yield number

        bound.send_many(itertools.islice(numbers(), MOST_MEMBERS))
        assert read == MOST_MEMBERS
        assert truck.sizes == [MOST_MEMBERS]


class TestMembers:
    """Each message of a packet is what it would be alone."""

    def test_data_is_encoded_and_named(self, truck: Truck) -> None:
        alarms = Topic("t", schema=Alarm)
        alarms.bind(truck)
        alarms.send_many([Alarm("web-1"), Alarm("straße/☃")])
        assert [(message.data, message.index) for message in truck.packets[0]] == [
            ({"host": "web-1"}, "web-1"),
            ({"host": "straße/☃"}, "straße/☃"),
        ]

    def test_nobody_named_it(self, truck: Truck, bound: Topic[Any]) -> None:
        bound.send_many([1, 2])
        assert all(message.index == message.id for message in truck.packets[0])

    @pytest.mark.parametrize("told", [None, Told()])
    def test_rules_of_its_own_go_with_it(self, truck: Truck, bound: Topic[Any], told: Told | None) -> None:
        with bound.sender(on_verdict=told) as sender:
            sender.send(1, index="a", max_retries=0, once="none")
            sender.send(2, once="index")
            sender.send(3, max_retries=9)
            sender.send(4)
        assert [(one.data, one.max_retries, one.once) for one in truck.packets[0]] == [
            (1, 0, "none"),
            (2, None, "index"),
            (3, 9, None),
            (4, None, None),
        ]
        assert truck.packets[0][0].index == "a"

    def test_a_message_keeps_its_id_and_its_time(self, truck: Truck, bound: Topic[Any]) -> None:
        sent: list[Message[Any]] = [Message(number, "t", index=f"i{number}", retries=number) for number in range(3)]
        bound.send_many(sent)
        assert truck.packets[0] == sent

    @pytest.mark.parametrize("told", [None, Told()])
    def test_data_is_what_it_was_when_it_was_given(self, truck: Truck, bound: Topic[Any], told: Told | None) -> None:
        reused: dict[str, Any] = {}

        def items() -> Iterator[dict[str, Any]]:
            for number in range(3):
                reused["number"] = number
                yield reused

        bound.send_many(items(), on_verdict=told)
        assert truck.data == [{"number": 0}, {"number": 1}, {"number": 2}]

    def test_it_is_told_of_as_it_was_sent(self, truck: Truck, bound: Topic[Any]) -> None:
        told: list[Message[Any]] = []
        bound.send_many([{"n": 1}, {"n": 2}], on_verdict=lambda message, verdict: told.append(message))
        assert truck.packets == [told]

    def test_a_message_of_another_topic_is_a_mistake(self, truck: Truck, bound: Topic[Any]) -> None:
        with pytest.raises(TopicError):
            bound.send_many([1, Message(2, "other"), 3])
        assert truck.data == [1]

    @pytest.mark.parametrize("told", [None, Told()])
    def test_ids_are_those_of_celery_and_each_its_own(self, truck: Truck, bound: Topic[Any], told: Told | None) -> None:
        bound.send_many(range(1_000), on_verdict=told)
        ids = [message.id for packet in truck.packets for message in packet]
        assert len(set(ids)) == 1_000
        assert all(str(UUID(id)) == id and UUID(id).version == 4 for id in ids)
        assert all(UUID(id).variant == "specified in RFC 4122" for id in ids)

    def test_fresh_ids_never_end(self) -> None:
        ids = list(itertools.islice(new_ids(), 3 * MOST_MEMBERS))
        assert len(set(ids)) == 3 * MOST_MEMBERS

    def test_a_fresh_id_is_a_random_uuid(self) -> None:
        numbers = [UUID(id).int for id in itertools.islice(new_ids(), 1_000)]
        # Each bit but the six that are fixed is now this, now that.
        assert functools.reduce(int.__or__, numbers) == UUID("ffffffff-ffff-4fff-bfff-ffffffffffff").int
        assert functools.reduce(int.__and__, numbers) == UUID("00000000-0000-4000-8000-000000000000").int


class TestVerdicts:
    def test_each_is_told_in_order(self, truck: Truck, bound: Topic[Any]) -> None:
        told = Told()
        truck.errors = [None, lost()]
        report = bound.send_many(range(MOST_MEMBERS + 2), on_verdict=told)
        assert report == SendReport(sent=MOST_MEMBERS, unknown=2)
        sent = [(number, Verdict.SENT) for number in range(MOST_MEMBERS)]
        assert told == [*sent, (MOST_MEMBERS, Verdict.UNKNOWN), (MOST_MEMBERS + 1, Verdict.UNKNOWN)]

    def test_what_does_not_fit_keeps_no_other_from_being_sent(self) -> None:
        truck, told = Truck(max_payload=10), Told()
        topic: Topic[Any] = Topic("t")
        topic.bind(truck)
        bad = object()
        items = [1, bad, 2, "x" * 9, 3, Alarm("a\nb"), 4]
        assert topic.send_many(items, on_verdict=told) == SendReport(sent=4, refused=3)
        assert truck.data == [1, 2, 3, 4]
        assert [data for data, verdict in told if verdict is Verdict.REFUSED] == [bad, "x" * 9, Alarm("a\nb")]
        assert topic.send_many(items) == SendReport(sent=4, refused=3)

    def test_why_the_first_one_is_refused_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        for told in (None, Told()):
            caplog.clear()
            topic: Topic[Any] = Topic("t")
            topic.bind(Truck(max_payload=10))
            topic.send_many([1, "x" * 9, object()], on_verdict=told)
            (record,) = caplog.records
            assert record.levelname == "WARNING"
            assert "topic `t`: data takes 11 bytes" in record.getMessage()

    def test_a_message_that_is_refused_is_told_as_it_is(self, bound: Topic[Any]) -> None:
        messages: list[Message[Any]] = []
        sent: Message[Any] = Message(object(), "t", index="i")
        bound.send_many([sent], on_verdict=lambda message, verdict: messages.append(message))
        assert messages == [sent]

    def test_a_broker_that_is_down_ends_it(self, truck: Truck, bound: Topic[Any]) -> None:
        told = Told()
        truck.errors = [None, SendFailedError("down")]
        with pytest.raises(SendFailedError, match="down"):
            bound.send_many(itertools.count(), on_verdict=told)
        assert truck.sizes == [MOST_MEMBERS]
        assert [verdict for _, verdict in told] == [Verdict.SENT] * MOST_MEMBERS + [Verdict.REFUSED] * MOST_MEMBERS

    def test_so_does_one_where_messages_go_one_by_one(self) -> None:
        told = Told()
        topic: Topic[Any] = Topic("t")
        topic.bind(Cart())
        with pytest.raises(SendFailedError):
            topic.send_many([1, "down", 2], on_verdict=told)
        assert told == [(1, Verdict.SENT), ("down", Verdict.REFUSED)]

    def test_a_queue_that_is_closed_ends_it_too(self, truck: Truck, bound: Topic[Any]) -> None:
        told = Told()
        truck.errors = [QueueClosedError("closed")]
        with pytest.raises(QueueClosedError):
            bound.send_many([1, 2], on_verdict=told)
        assert told == [(1, Verdict.REFUSED), (2, Verdict.REFUSED)]

    def test_what_ended_unknown_may_be_sent_again_under_its_ids(self, truck: Truck, bound: Topic[Any]) -> None:
        unknown: list[Message[Any]] = []
        truck.errors = [lost()]
        bound.send_many(range(3), on_verdict=lambda message, verdict: unknown.append(message))
        assert truck.packets == []

        assert bound.send_many(unknown).sent == 3

        assert [message.id for message in truck.packets[0]] == [message.id for message in unknown]
        assert truck.data == [0, 1, 2]

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a mistake")])
    def test_whatever_interrupts_a_send_leaves_no_message_without_a_verdict(
        self, truck: Truck, bound: Topic[Any], error: BaseException
    ) -> None:
        told = Told()
        truck.errors = [error]
        with pytest.raises(type(error)):
            bound.send_many([1, 2], on_verdict=told)
        assert told == [(1, Verdict.UNKNOWN), (2, Verdict.UNKNOWN)]

    def test_nor_does_what_interrupts_it_between_two_packets(self, truck: Truck, bound: Topic[Any]) -> None:
        told = Told()
        truck.errors = [KeyboardInterrupt()]
        large = "x" * MOST_BYTES
        with pytest.raises(KeyboardInterrupt):
            bound.send_many([1, 2, large], on_verdict=told)
        assert told == [(1, Verdict.UNKNOWN), (2, Verdict.UNKNOWN), (large, Verdict.REFUSED)]

    def test_one_that_goes_alone_and_is_refused_ends_nothing(self, truck: Truck, bound: Topic[Any]) -> None:
        truck.errors = [TooLargeError("t", 2, 1)]
        with bound.sender(linger=0) as sender:
            sender.send(1)
            sender.send(2)
        assert (sender.report, truck.data) == (SendReport(sent=1, refused=1), [2])

    def test_an_iterable_that_raises_has_had_sent_what_it_gave(self, truck: Truck, bound: Topic[Any]) -> None:
        told = Told()

        def numbers() -> Iterator[int]:
            yield from range(MOST_MEMBERS + 2)
            raise LookupError("no more")

        with pytest.raises(LookupError):
            bound.send_many(numbers(), on_verdict=told)
        assert truck.sizes == [MOST_MEMBERS, 2]
        assert len(told) == MOST_MEMBERS + 2

    def test_a_callback_may_send_again(self, truck: Truck, bound: Topic[Any]) -> None:
        truck.errors = [lost()]

        def again(message: Message[Any], verdict: Verdict) -> None:
            if verdict is Verdict.UNKNOWN:
                sender.send(message)

        with bound.sender(linger=3600, on_verdict=again) as sender:
            sender.send(1)
            sender.send(2)
        assert truck.data == [1, 2]
        assert sender.report == SendReport(sent=2, unknown=2)


class TestSender:
    def test_what_waits_is_sent_after_a_while(self, truck: Truck, bound: Topic[Any]) -> None:
        sender = bound.sender(linger=0.05)
        sender.send(1)
        sender.send(2)
        assert truck.packets == []
        until(lambda: truck.data == [1, 2], "what waits is sent")
        sender.send(3)
        until(lambda: truck.data == [1, 2, 3], "and so is what comes later")
        assert sender.close() == SendReport(sent=3)

    def test_with_no_time_to_wait_each_is_sent_before_send_returns(self, truck: Truck, bound: Topic[Any]) -> None:
        with bound.sender(linger=0) as sender:
            sender.send(1)
            assert truck.data == [1]
            sender.send(2)
            assert truck.data == [1, 2]

    def test_flush_sends_what_waits(self, truck: Truck, bound: Topic[Any]) -> None:
        with bound.sender(linger=3600) as sender:
            sender.send(1)
            sender.flush()
            assert truck.data == [1]
            sender.flush()
            assert sender.report == SendReport(sent=1)

    def test_closing_sends_what_waits_and_twice_is_safe(self, truck: Truck, bound: Topic[Any]) -> None:
        sender = bound.sender(linger=3600)
        sender.send(1)
        assert sender.close() == sender.close() == SendReport(sent=1)
        assert truck.data == [1]

    def test_a_closed_sender_says_so(self, bound: Topic[Any]) -> None:
        sender = bound.sender()
        sender.close()
        with pytest.raises(ValueError, match="sender of topic `t` is closed"):
            sender.send(1)

    def test_a_broker_that_is_down_is_told_by_the_next_call(self, truck: Truck, bound: Topic[Any]) -> None:
        told = Told()
        truck.errors = [SendFailedError("down")]
        sender = bound.sender(linger=0.01, on_verdict=told)
        sender.send(1)
        until(lambda: bool(told), "it was tried")

        with pytest.raises(SendFailedError):
            sender.send(2)
        sender.send(3)

        assert sender.close() == SendReport(sent=1, refused=2)
        assert told == [(1, Verdict.REFUSED), (2, Verdict.REFUSED), (3, Verdict.SENT)]

    def test_so_is_a_mistake_and_the_sender_goes_on(self, truck: Truck, bound: Topic[Any]) -> None:
        truck.errors = [RuntimeError("a mistake")]
        sender = bound.sender(linger=0.01)
        sender.send(1)
        until(lambda: sender.report.unknown == 1, "it was tried")
        with pytest.raises(RuntimeError):
            sender.flush()
        sender.send(2)
        until(lambda: truck.data == [2], "it goes on")
        sender.close()

    def test_closing_tells_it_too(self, truck: Truck, bound: Topic[Any]) -> None:
        truck.errors = [SendFailedError("down")]
        sender = bound.sender(linger=3600)
        sender.send(1)
        with pytest.raises(SendFailedError):
            sender.close()
        assert sender.close() == SendReport(refused=1)

    def test_an_error_of_the_body_goes_before_it(self, truck: Truck, bound: Topic[Any]) -> None:
        truck.errors = [SendFailedError("down")]
        sender = bound.sender(linger=3600)

        def fail() -> None:
            with sender:
                sender.send(1)
                raise LookupError

        with pytest.raises(LookupError):
            fail()
        assert sender.report == SendReport(refused=1)

    def test_several_threads_may_share_one(self, truck: Truck, bound: Topic[Any]) -> None:
        told = Told()

        def send(thread: int) -> None:
            for number in range(200):
                sender.send([thread, number])

        with bound.sender(size=7, linger=0.001, on_verdict=told) as sender:
            threads = [threading.Thread(target=send, args=(thread,)) for thread in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert sorted(truck.data) == [[thread, number] for thread in range(8) for number in range(200)]
        assert len(told) == sender.report.sent == 1_600
        for thread in range(8):
            assert [data[1] for data in truck.data if data[0] == thread] == list(range(200))

    def test_a_slow_broker_holds_back_who_sends(self, truck: Truck, bound: Topic[Any]) -> None:
        truck.may_go = threading.Event()
        with bound.sender(linger=0) as sender:
            thread = threading.Thread(target=sender.send, args=(1,))
            thread.start()
            assert truck.began.wait(PATIENCE)
            assert sender.report == SendReport()
            truck.may_go.set()
            thread.join(PATIENCE)
            assert sender.report == SendReport(sent=1)

    def test_one_that_nobody_keeps_sends_what_waits(self, truck: Truck, bound: Topic[Any]) -> None:
        bound.sender(linger=0.05).send(1)
        gc.collect()
        until(lambda: truck.data == [1], "what waits is sent")

    def test_one_that_nobody_keeps_is_gone_when_nothing_waits(self, truck: Truck, bound: Topic[Any]) -> None:
        def senders() -> int:
            gc.collect()
            return sum(isinstance(thing, Sender) for thing in gc.get_objects())

        before = senders()
        bound.sender(linger=0.01).send(1)
        until(lambda: truck.data == [1], "it is sent")
        until(lambda: senders() == before, "it is gone")

    @pytest.mark.parametrize("size", [0, -1, MOST_MEMBERS + 1, True])
    def test_a_size_that_is_none_is_refused(self, bound: Topic[Any], size: int) -> None:
        with pytest.raises(ValueError, match="`size` must be 1 to 500"):
            bound.sender(size=size)

    @pytest.mark.parametrize("linger", [-1, float("inf"), float("nan")])
    def test_a_linger_that_is_none_is_refused(self, bound: Topic[Any], linger: float) -> None:
        with pytest.raises(ValueError, match="`linger` must be seconds"):
            bound.sender(linger=linger)


PROGRAM = """
import sys
from watch_tasks import Topic

class Printer:
    max_payload = 1000
    def push(self, message, *, delay=0.0):
        print("sent", message.data, flush=True)
    def push_packet(self, packet):
        print("sent", *(bytes(member.data).decode() for member in packet.members), flush=True)

topic = Topic("t")
topic.bind(Printer())
sender = topic.sender(linger=3600)
sender.send(1)
sender.send(2)
print("ends", flush=True)
"""


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "raise KeyboardInterrupt", "del sender"])
def test_what_waits_is_sent_when_the_program_ends(end: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM + end], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["ends", "sent 1 2"]


FORKING = """
import os, signal, threading
from watch_tasks import Topic

class Printer:
    max_payload = 1000
    began, may_go = threading.Event(), threading.Event()
    def push(self, message, *, delay=0.0):
        self.began.set()
        self.may_go.wait()
        print(os.getpid(), message.data, message.id, flush=True)
    def push_packet(self, packet):
        for member in packet.members:
            print(os.getpid(), bytes(member.data).decode(), member.id, flush=True)

topic = Topic("t")
topic.bind(Printer())
slow, sender = topic.sender(linger=0.001), topic.sender(linger=3600)
sender.send(1)
sender.send(2)
sender.flush()
sender.send(3)
slow.send(4)
Printer.began.wait()  # the lock is held by a thread that no child has
child = os.fork()
Printer.may_go.set()
first = 5 if child else 7
if child:
    os.waitpid(child, 0)
else:
    signal.alarm(20)
sender.send(first)
slow.send(first + 1)
slow.flush()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_sender_in_a_forked_process_begins_anew() -> None:
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=60)
    lines = [line.split() for line in done.stdout.splitlines()]
    parent = lines[0][0]

    assert {data: process == parent for process, data, _ in lines} == {
        **dict.fromkeys("123456", True),
        **dict.fromkeys("78", False),
    }
    assert len(lines) == len({id for _, _, id in lines}) == 8


def test_an_outlet_of_packets_is_told_by_what_it_has() -> None:
    assert isinstance(Truck(), PacketOutlet)
    assert not isinstance(Cart(), PacketOutlet)
