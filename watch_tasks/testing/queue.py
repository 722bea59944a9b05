"""The promises of a queue as tests: a backend's own tests are a subclass with one fixture.

class TestMyQueue(QueueSuite):
    @pytest.fixture
    def queue(self):
        with MyQueue(...) as queue:
            yield queue
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from typing import Any, ClassVar

import msgspec
import pytest

from ..errors import QueueClosedError, QueueFullError
from ..message import Message
from ..outcome import Reason
from ..packets import MOST_MEMBERS, Member, More, Packet, member_of
from ..queue.base import Delivery, Queue, Unreadable
from ..schema import dump
from ..topics import Topic

__all__ = ["QueueSuite"]

#: Seconds in which what is to come must have come; only a broken queue takes so long.
PATIENCE = 10.0
#: Seconds in which what must not come might have.
MOMENT = 0.05
#: Seconds of the shortest delay that a test asks for.
DELAY = 0.3


class QueueSuite:
    """Every promise of `Queue`. Promises that a backend does not make are flags here, and skip their tests."""

    #: Whether what was pushed is still there after `close`, for whoever opens the queue again.
    survives_restart: ClassVar[bool] = True
    #: Whether the fixture `bounded` gives a queue that takes 3 messages and refuses a fourth at once.
    is_bounded: ClassVar[bool] = False
    #: Whether it takes and reads packets: many messages that travel as one.
    takes_packets: ClassVar[bool] = False
    #: Whether `len` counts what is in packets that nobody opened yet; else a packet counts as one.
    counts_in_packets: ClassVar[bool] = True

    @pytest.fixture
    def queue(self) -> Any:
        """An empty queue."""
        raise NotImplementedError("a suite needs a fixture `queue`")

    @pytest.fixture
    def reopen(self) -> Callable[[], Queue]:
        """Opens the same queue again, as another process would."""
        if self.survives_restart:
            raise NotImplementedError("a suite whose queue survives a restart needs a fixture `reopen`")
        pytest.skip("promise not made: survives_restart")

    @pytest.fixture
    def bounded(self) -> Any:
        """A queue that takes 3 messages and refuses a fourth at once."""
        if self.is_bounded:
            raise NotImplementedError("a suite whose queue has a bound needs a fixture `bounded`")
        pytest.skip("promise not made: is_bounded")

    @pytest.fixture
    def packets(self, queue: Any) -> Any:
        """The queue, where it takes packets."""
        if not self.takes_packets:
            pytest.skip("promise not made: takes_packets")
        return queue

    # -- messages

    def test_a_message_arrives_as_it_was_sent(self, queue: Queue) -> None:
        sent = Message(
            {"n": 1, "list": [None, True, 1.5]},
            "alarm",
            index="web-1",
            retries=2,
            max_retries=5,
            once="index",
            handled=("notify",),
            copy=3,
        )

        queue.push(sent)

        assert _take(queue) == sent

    def test_a_message_that_nobody_named_is_named_by_its_id(self, queue: Queue) -> None:
        sent = Message(1, "alarm")
        queue.push(sent)
        assert _take(queue).index == sent.id

    @pytest.mark.parametrize(
        "data", [None, 0, "", [], {}, "späße ☃ 𝄞", {"": {"日本": ["\u0000", "\\", '"']}}, 2**63, 0.1]
    )
    def test_any_json_value_arrives_unchanged(self, queue: Queue, data: Any) -> None:
        queue.push(Message(data, "alarm"))
        assert _take(queue).data == data

    def test_an_index_may_have_any_printable_character(self, queue: Queue) -> None:
        queue.push(Message(1, "alarm", index="straße:日本/☃'\"{}*?"))
        assert _take(queue).index == "straße:日本/☃'\"{}*?"

    def test_a_megabyte_arrives(self, queue: Queue) -> None:
        data = "é" * 500_000
        queue.push(Message(data, "alarm"))
        assert _take(queue).data == data

    # -- order

    def test_messages_come_in_the_order_they_were_pushed(self, queue: Queue) -> None:
        for number in range(20):
            queue.push(Message(number, "alarm"))
        assert [_take(queue).data for _ in range(20)] == list(range(20))

    def test_what_is_pushed_again_comes_after_what_waits(self, queue: Queue) -> None:
        for number in range(3):
            queue.push(Message(number, "alarm"))
        first = _take(queue)

        queue.push(first, bounded=False)

        assert [_take(queue).data for _ in range(3)] == [1, 2, 0]

    def test_an_empty_queue_gives_none_in_time(self, queue: Queue) -> None:
        started = time.monotonic()
        assert queue.next(timeout=MOMENT) is None
        assert time.monotonic() - started < PATIENCE / 2

    def test_next_waits_for_a_message(self, queue: Queue) -> None:
        with _in_thread(lambda: queue.next(timeout=PATIENCE)) as waiting:
            queue.push(Message(1, "alarm"))
        assert waiting.delivery is not None

    # -- delays

    def test_a_delayed_message_comes_when_it_is_due(self, queue: Queue) -> None:
        started = time.monotonic()
        queue.push(Message(1, "alarm"), delay=DELAY)

        assert _take(queue).data == 1

        # The wire may carry its time in another clock's milliseconds.
        assert time.monotonic() - started > DELAY - 0.05

    def test_a_delayed_message_does_not_come_before(self, queue: Queue) -> None:
        queue.push(Message(1, "alarm"), delay=PATIENCE)
        assert queue.next(timeout=MOMENT) is None

    def test_a_delayed_message_holds_back_no_other(self, queue: Queue) -> None:
        queue.push(Message("late", "alarm"), delay=PATIENCE)
        queue.push(Message("now", "alarm"))
        assert _take(queue).data == "now"

    def test_delayed_messages_come_as_they_are_due(self, queue: Queue) -> None:
        queue.push(Message(2, "alarm"), delay=2 * DELAY)
        queue.push(Message(1, "alarm"), delay=DELAY)
        assert [_take(queue).data for _ in range(2)] == [1, 2]

    # -- deliveries

    def test_what_is_acked_does_not_come_again(self, queue: Queue) -> None:
        queue.push(Message(1, "alarm"))
        _next(queue).ack()
        assert queue.next(timeout=MOMENT) is None
        assert queue.len() == 0

    def test_acking_twice_is_safe(self, queue: Queue) -> None:
        queue.push(Message(1, "alarm"))
        delivery = _next(queue)
        delivery.ack()
        delivery.ack()
        assert queue.next(timeout=MOMENT) is None

    def test_what_is_handed_back_comes_again_as_the_same_copy(self, queue: Queue) -> None:
        queue.push(Message(1, "alarm", copy=4))
        delivery = _next(queue)

        delivery.back()

        assert _take(queue) == delivery.message

    def test_what_is_handed_back_with_a_delay_comes_when_it_is_due(self, queue: Queue) -> None:
        queue.push(Message(1, "alarm"))
        started = time.monotonic()

        _next(queue).back(DELAY)

        assert queue.len() == 1
        assert _take(queue).data == 1
        assert time.monotonic() - started >= DELAY

    def test_what_was_handed_back_is_not_acked_by_the_old_delivery(self, queue: Queue) -> None:
        queue.push(Message(1, "alarm"))
        delivery = _next(queue)
        delivery.back()
        delivery.ack()
        assert _take(queue).data == 1

    def test_what_was_acked_cannot_be_handed_back(self, queue: Queue) -> None:
        queue.push(Message(1, "alarm"))
        delivery = _next(queue)
        delivery.ack()
        delivery.back()
        assert queue.next(timeout=MOMENT) is None

    def test_another_thread_may_ack_while_next_waits(self, queue: Queue) -> None:
        queue.push(Message(1, "alarm"))
        delivery = _next(queue)
        with _in_thread(lambda: queue.next(timeout=PATIENCE)) as waiting:
            delivery.ack()
            queue.push(Message(2, "alarm"))
        assert waiting.delivery is not None
        assert queue.len() == 0

    # -- packets

    def test_each_message_of_a_packet_arrives_as_it_was_sent(self, packets: Any) -> None:
        sent: list[Message[Any]] = [
            Message({"n": [1, None]}, "alarm", index="straße/☃"),
            Message("bare", "alarm"),
            Message(3, "alarm", retries=2, max_retries=5, once="index", handled=("notify",), copy=3),
        ]
        packets.push_packet(_packet(sent))
        assert [_take(packets) for _ in sent] == sent
        assert packets.len() == 0
        assert packets.next(timeout=MOMENT) is None

    def test_a_topic_bound_to_the_queue_sends_packets(self, packets: Any) -> None:
        topic: Topic[Any] = Topic("alarm")
        topic.bind(packets)
        count = 2 * MOST_MEMBERS + 100
        assert topic.send_many(range(count)).sent == count
        assert packets.len() == (count if self.counts_in_packets else 3)
        assert [_take(packets).data for _ in range(count)] == list(range(count))

    def test_packets_and_messages_come_in_the_order_they_were_pushed(self, packets: Any) -> None:
        packets.push(Message(0, "alarm"))
        packets.push_packet(_packet([Message(1, "alarm"), Message(2, "alarm")]))
        packets.push(Message(3, "alarm"))
        assert [_take(packets).data for _ in range(4)] == [0, 1, 2, 3]

    def test_an_empty_packet_is_nothing(self, packets: Any) -> None:
        packets.push_packet(_packet([]))
        packets.push(Message(1, "alarm"))
        assert _take(packets).data == 1
        assert packets.next(timeout=MOMENT) is None
        assert packets.len() == 0

    def test_len_counts_the_messages_of_a_packet(self, packets: Any) -> None:
        packets.push_packet(_packet([Message(number, "alarm") for number in range(5)]))
        assert packets.len() == (5 if self.counts_in_packets else 1)
        deliveries = [_next(packets)]
        assert packets.len() == 4
        deliveries += [_next(packets) for _ in range(4)]
        assert packets.len() == 0
        assert packets.next(timeout=MOMENT) is None

    def test_a_member_that_is_handed_back_comes_as_a_message_of_its_own(self, packets: Any) -> None:
        sent = [Message(number, "alarm", index=f"i{number}", copy=number) for number in range(3)]
        packets.push_packet(_packet(sent))
        started = time.monotonic()
        for number in range(3):
            delivery = _next(packets)
            if number == 1:
                delivery.back(DELAY)
            delivery.ack()

        assert packets.len() == 1
        assert _take(packets) == sent[1]
        assert time.monotonic() - started >= DELAY
        assert packets.next(timeout=MOMENT) is None

    def test_a_member_that_was_acked_cannot_be_handed_back(self, packets: Any) -> None:
        packets.push_packet(_packet([Message(1, "alarm"), Message(2, "alarm")]))
        first, second = _next(packets), _next(packets)
        first.ack()
        first.back()
        second.ack()
        second.ack()
        assert packets.next(timeout=MOMENT) is None
        assert packets.len() == 0

    def test_a_member_that_is_no_message_comes_with_its_bytes_and_keeps_no_other_back(self, packets: Any) -> None:
        members = [
            Member("x" * 256, "", msgspec.Raw(b"1")),
            Member("m1", "a\nb", msgspec.Raw(b"2")),
            Member("m2", "", msgspec.Raw(b"3"), More(max_retries=-1)),
            Member("m3", "", msgspec.Raw(b"4")),
        ]
        packets.push_packet(Packet("alarm", members))

        deliveries = [_next(packets) for _ in members]

        *bad, good = [delivery.message for delivery in deliveries]
        assert isinstance(good, Message)
        assert (good.id, good.data) == ("m3", 4)
        assert [(one.reason, one.topic, one.raw) for one in bad if isinstance(one, Unreadable)] == [
            (Reason.MALFORMED, "alarm", raw) for raw in (b"1", b"2", b"3")
        ]
        assert [one.id for one in bad[1:]] == ["m1", "m2"]
        assert 0 < len(bad[0].id) <= 255
        for delivery in deliveries:
            delivery.ack()
        assert packets.next(timeout=MOMENT) is None

    def test_a_member_that_is_no_message_can_be_handed_back(self, packets: Any) -> None:
        packets.push_packet(Packet("alarm", [Member("m1", "a\nb", msgspec.Raw(b"2")), _member(Message(1, "alarm"))]))
        first = _next(packets)
        first.back(DELAY)
        assert _take(packets).data == 1
        again = _next(packets)
        assert again.message == first.message
        again.ack()

    def test_a_packet_comes_again_where_a_member_was_not_acked(self, packets: Any, reopen: Callable[[], Queue]) -> None:
        packets.push_packet(_packet([Message(number, "alarm") for number in range(4)]))
        first, _second = _next(packets), _next(packets)
        first.ack()
        packets.close()
        with reopen() as again:
            assert [_take(again).data for _ in range(4)] == [0, 1, 2, 3]
            assert again.next(timeout=MOMENT) is None

    def test_what_was_not_handed_out_is_left_to_others(self, packets: Any, reopen: Callable[[], Queue]) -> None:
        packets.push_packet(_packet([Message(number, "alarm") for number in range(4)]))
        first = _next(packets)
        packets.release()
        packets.release()
        with reopen() as other:
            assert [_take(other).data for _ in range(3)] == [1, 2, 3]
            first.ack()
            assert other.next(timeout=MOMENT) is None
        assert packets.len() == 0

    def test_clear_throws_away_what_is_in_packets(self, packets: Any, reopen: Callable[[], Queue]) -> None:
        packets.push_packet(_packet([Message(number, "alarm") for number in range(3)]))
        first = _next(packets)
        packets.push_packet(_packet([Message(number, "alarm") for number in range(3)]))

        assert packets.clear() == (5 if self.counts_in_packets else 3)

        assert packets.len() == 0
        assert packets.next(timeout=MOMENT) is None
        first.ack()
        packets.close()
        with reopen() as again:
            assert again.next(timeout=MOMENT) is None

    def test_a_closed_queue_takes_no_packets(self, packets: Any) -> None:
        packets.close()
        with pytest.raises(QueueClosedError):
            packets.push_packet(_packet([Message(1, "alarm")]))
        with pytest.raises(QueueClosedError):
            packets.release()

    # -- counting and clearing

    def test_len_counts_what_waits(self, queue: Queue) -> None:
        assert queue.len() == 0
        for number in range(3):
            queue.push(Message(number, "alarm"))
        assert queue.len() == 3

    def test_len_counts_what_is_delayed(self, queue: Queue) -> None:
        queue.push(Message(1, "alarm"), delay=PATIENCE)
        assert queue.len() == 1
        assert queue.next(timeout=MOMENT) is None
        assert queue.len() == 1

    def test_len_does_not_count_what_was_delivered(self, queue: Queue) -> None:
        queue.push(Message(1, "alarm"))
        delivery = _next(queue)
        assert queue.len() == 0
        delivery.ack()

    def test_clear_throws_away_what_waits_and_says_how_much(self, queue: Queue) -> None:
        queue.push(Message(1, "alarm"), delay=PATIENCE)
        queue.push(Message(2, "alarm"))
        queue.push(Message(3, "alarm"))
        assert queue.next(timeout=PATIENCE)

        assert queue.clear() == 2

        assert queue.len() == 0
        assert queue.next(timeout=MOMENT) is None

    def test_clearing_an_empty_queue_is_nothing(self, queue: Queue) -> None:
        assert queue.clear() == 0

    # -- threads

    def test_eight_threads_push_while_one_reads(self, queue: Queue) -> None:
        with ThreadPoolExecutor(8) as pool:
            pushes = [
                pool.submit(queue.push, Message([thread, number], "alarm"))
                for number in range(25)
                for thread in range(8)
            ]
            got = [_take(queue).data for _ in range(200)]
            for push in pushes:
                push.result()

        assert sorted(got) == [[thread, number] for thread in range(8) for number in range(25)]
        assert queue.len() == 0

    def test_len_may_be_asked_while_next_waits(self, queue: Queue) -> None:
        with _in_thread(lambda: queue.next(timeout=PATIENCE)) as waiting:
            assert queue.len() == 0
            queue.push(Message(1, "alarm"))
        assert waiting.delivery is not None

    # -- bounds

    def test_a_full_queue_refuses_a_sender(self, bounded: Queue) -> None:
        for number in range(3):
            bounded.push(Message(number, "alarm"))
        with pytest.raises(QueueFullError):
            bounded.push(Message(3, "alarm"))
        assert bounded.len() == 3

    def test_a_full_queue_counts_what_is_delayed(self, bounded: Queue) -> None:
        for number in range(3):
            bounded.push(Message(number, "alarm"), delay=PATIENCE)
        with pytest.raises(QueueFullError):
            bounded.push(Message(3, "alarm"))

    def test_a_full_queue_takes_retries_and_what_is_handed_back(self, bounded: Queue) -> None:
        for number in range(3):
            bounded.push(Message(number, "alarm"))
        delivery = _next(bounded)
        bounded.push(Message(3, "alarm"))

        bounded.push(Message("retry", "alarm"), bounded=False)
        bounded.push(Message("later", "alarm"), bounded=False, delay=PATIENCE)
        delivery.back()

        assert bounded.len() == 6

    def test_room_comes_with_each_message_that_leaves(self, bounded: Queue) -> None:
        for number in range(3):
            bounded.push(Message(number, "alarm"))
        _take(bounded)
        bounded.push(Message(3, "alarm"))
        assert bounded.len() == 3

    # -- closing

    def test_closing_twice_is_safe(self, queue: Queue) -> None:
        queue.close()
        queue.close()

    def test_closing_wakes_who_waits(self, queue: Queue) -> None:
        started = time.monotonic()
        with _in_thread(lambda: queue.next()) as waiting:
            queue.close()
        assert waiting.delivery is None
        assert time.monotonic() - started < PATIENCE

    def test_a_closed_queue_says_so(self, queue: Queue) -> None:
        queue.close()
        with pytest.raises(QueueClosedError):
            queue.push(Message(1, "alarm"))
        with pytest.raises(QueueClosedError):
            queue.next(timeout=0)
        with pytest.raises(QueueClosedError):
            queue.len()
        with pytest.raises(QueueClosedError):
            queue.clear()

    def test_what_waits_outlives_the_queue_object(self, queue: Queue, reopen: Callable[[], Queue]) -> None:
        queue.push(Message(1, "alarm"))
        queue.close()
        with reopen() as again:
            assert _take(again).data == 1

    def test_what_was_not_acked_comes_again_after_closing(self, queue: Queue, reopen: Callable[[], Queue]) -> None:
        queue.push(Message(1, "alarm"))
        assert queue.next(timeout=PATIENCE)
        queue.close()
        with reopen() as again:
            assert _take(again).data == 1

    def test_what_was_held_comes_again_after_closing(self, queue: Queue, reopen: Callable[[], Queue]) -> None:
        queue.push(Message("handed back", "alarm"))
        _next(queue).back(PATIENCE)
        queue.close()
        with reopen() as again:
            assert _take(again).data == "handed back"

    def test_a_delay_outlives_the_queue_object(self, queue: Queue, reopen: Callable[[], Queue]) -> None:
        queue.push(Message(1, "alarm"), delay=PATIENCE)
        assert queue.next(timeout=MOMENT) is None
        queue.close()
        with reopen() as again:
            assert again.next(timeout=MOMENT) is None
            assert again.len() == 1

    def test_each_message_goes_to_one_of_two_readers(self, queue: Queue, reopen: Callable[[], Queue]) -> None:
        with reopen() as other:
            for number in range(10):
                queue.push(Message(number, "alarm"))
            got = [_take(reader).data for _ in range(5) for reader in (queue, other)]
        assert sorted(got) == list(range(10))


def _packet(messages: Sequence[Message[Any]]) -> Packet:
    packet = Packet("alarm", [])
    packet.members += [_member(message, packet.sent_at) for message in messages]
    return packet


def _member(message: Message[Any], sent_at: datetime | None = None) -> Member:
    return member_of(message, dump(message.data), sent_at)


class _in_thread:
    """Runs `next` in another thread while the body runs, and waits for it at the end."""

    def __init__(self, call: Callable[[], Delivery | None]) -> None:
        self.delivery: Delivery | None = None
        self._call = call
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self._started.set()
        with suppress(QueueClosedError):  # closed before it began to wait
            self.delivery = self._call()
            if self.delivery:
                self.delivery.ack()

    def __enter__(self) -> _in_thread:
        self._thread.start()
        assert self._started.wait(PATIENCE)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._thread.join(2 * PATIENCE)
        assert not self._thread.is_alive(), "`next` still waits"


def _next(queue: Queue) -> Delivery:
    delivery = queue.next(timeout=PATIENCE)
    assert delivery is not None, "nothing came"
    return delivery


def _take(queue: Queue) -> Message[Any]:
    delivery = _next(queue)
    assert not isinstance(delivery.message, Unreadable), delivery.message
    delivery.ack()
    return delivery.message
