from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from watch_tasks import ConfigurationError, MemoryQueue, Message, QueueClosedError, open_queue
from watch_tasks.testing.queue import QueueSuite


class TestMemoryQueue(QueueSuite):
    survives_restart = False
    is_bounded = True

    @pytest.fixture
    def queue(self) -> Iterator[MemoryQueue]:
        with MemoryQueue() as queue:
            yield queue

    @pytest.fixture
    def bounded(self) -> Iterator[MemoryQueue]:
        with MemoryQueue(3, push_timeout=0) as queue:
            yield queue


def test_a_sender_waits_for_room() -> None:
    queue = MemoryQueue(1, push_timeout=10)
    queue.push(Message(1, "alarm"))
    with ThreadPoolExecutor(1) as pool:
        push = pool.submit(queue.push, Message(2, "alarm"))
        assert not push.done()
        assert queue.next(timeout=0)
        push.result(10)
    assert queue.len() == 1


def test_closing_sends_a_waiting_sender_away() -> None:
    queue = MemoryQueue(1, push_timeout=10)
    queue.push(Message(1, "alarm"))
    with ThreadPoolExecutor(1) as pool:
        push = pool.submit(queue.push, Message(2, "alarm"))
        queue.close()
        with pytest.raises(QueueClosedError):
            push.result(10)


def test_a_delay_runs_by_the_clock_given() -> None:
    now = 0.0
    queue = MemoryQueue(clock=lambda: now)
    queue.push(Message(1, "alarm"), delay=3600)
    assert queue.next(timeout=0) is None

    now = 3600.0

    assert queue.next(timeout=0)


def test_a_due_message_takes_its_place_at_the_tail() -> None:
    now = 0.0
    queue = MemoryQueue(clock=lambda: now)
    queue.push(Message("delayed", "alarm"), delay=1)
    queue.push(Message("first", "alarm"))

    now = 1.0

    deliveries = [queue.next(timeout=0) for _ in range(2)]
    assert [delivery.message.data for delivery in deliveries if delivery] == ["first", "delayed"]


def test_data_stays_the_object_it_is() -> None:
    queue, data = MemoryQueue(), threading.Event()
    queue.push(Message(data, "alarm"))
    delivery = queue.next(timeout=0)
    assert delivery
    assert delivery.message.data is data


@pytest.mark.parametrize("maxsize", [0, -1])
def test_a_bound_that_lets_nothing_in_is_refused(maxsize: int) -> None:
    with pytest.raises(ValueError, match="maxsize"):
        MemoryQueue(maxsize)


class TestUrls:
    def test_a_plain_url_is_a_new_queue_each_time(self) -> None:
        open_queue("memory://").push(Message(1, "alarm"))
        assert open_queue("memory://").len() == 0

    def test_a_name_is_shared_until_it_is_closed(self) -> None:
        with open_queue("memory://orders") as queue:
            queue.push(Message(1, "alarm"))
            assert open_queue("memory://orders").len() == 1
            assert open_queue("memory://others").len() == 0
        assert open_queue("memory://orders").len() == 0

    def test_a_bound_can_stand_in_the_url(self) -> None:
        queue = open_queue("memory://?maxsize=2")
        queue.push(Message(1, "alarm"))
        queue.push(Message(2, "alarm"))
        with ThreadPoolExecutor(1) as pool:
            push = pool.submit(queue.push, Message(3, "alarm"))
            assert queue.next(timeout=0)
            push.result(10)
        assert queue.len() == 2

    @pytest.mark.parametrize("size", ["0", "-1", "many", "1.5"])
    def test_a_bound_that_is_none_is_refused(self, size: str) -> None:
        with pytest.raises(ConfigurationError, match="maxsize"):
            open_queue(f"memory://?maxsize={size}")

    def test_an_unknown_scheme_names_the_nearest(self) -> None:
        with pytest.raises(ConfigurationError, match="did you mean `memory`"):
            open_queue("memori://")
