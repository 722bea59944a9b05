from __future__ import annotations

import asyncio
import gc
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from watch_tasks import (
    ConfigurationError,
    Discard,
    MemoryQueue,
    MemoryStorage,
    Message,
    QueueClosedError,
    QueueUnavailableError,
    Reason,
    RetryPolicy,
    Snooze,
    StorageClosedError,
    StorageUnavailableError,
    TopicError,
    TopicHandler,
    Watcher,
    open_storage,
    topic,
)
from watch_tasks.queue import Delivery, Unreadable
from watch_tasks.queue.redis import RedisQueue
from watch_tasks.storage.protocol import Commit
from watch_tasks.topics import Topic

from .servers import RedisServer

#: Seconds in which everything here must be done.
PATIENCE = 20.0


@pytest.fixture
def storage() -> Iterator[MemoryStorage]:
    with MemoryStorage() as storage:
        yield storage


@pytest.fixture
def queue() -> Iterator[MemoryQueue]:
    with MemoryQueue() as queue:
        yield queue


def watch(*handlers: Callable[[Message[Any]], Any], **options: Any) -> TopicHandler:
    return TopicHandler({"t": handlers}, **options)


def dead(storage: MemoryStorage) -> list[tuple[Reason, str]]:
    return [(letter.reason, letter.error) for letter in storage.dead()]


def run(watcher: Watcher, *messages: Message[Any]) -> None:
    with watcher:
        for message in messages:
            watcher.queue.push(message)
        assert watcher.wait(PATIENCE)


class TestTheCountdown:
    @pytest.fixture
    def calls(self, queue: MemoryQueue, storage: MemoryStorage) -> list[int]:
        calls: list[int] = []

        def fails_for_multiples_of_3(message: Message[int]) -> None:
            calls.append(message.data)
            if message.data % 3 == 0:
                raise ValueError

        for number in range(100, 0, -1):
            queue.push(Message(number, "t", max_retries=3))
        run(Watcher(queue, storage, watch(fails_for_multiples_of_3), timeout=3.0))
        return calls

    def test_67_are_handled_and_33_are_dead(self, calls: list[int], storage: MemoryStorage) -> None:
        assert storage.len("t") == 67
        assert Counter(letter.reason for letter in storage.dead("t")) == {Reason.EXHAUSTED: 33}

    def test_it_takes_199_calls_of_which_99_are_retries(self, calls: list[int], storage: MemoryStorage) -> None:
        assert len(calls) == 199  # 67 + 33 * 4
        assert storage.counters("t").retries == 99

    def test_each_retry_goes_to_the_tail(self, calls: list[int]) -> None:
        down, threes = list(range(100, 0, -1)), list(range(99, 0, -3))
        assert calls == down + threes * 3


class TestHandlers:
    def test_a_retry_resumes_at_the_handler_that_failed(self, storage: MemoryStorage) -> None:
        calls: list[str] = []

        def a(message: Message[Any]) -> None:
            calls.append("a")

        def b(message: Message[Any]) -> None:
            calls.append("b")
            if message.retries < 2:
                raise ValueError

        def c(message: Message[Any]) -> None:
            calls.append("c")

        run(Watcher(storage=storage, handler=watch(a, b, c)), Message(1, "t"))

        assert calls == ["a", "b", "b", "b", "c"]
        assert storage.len("t") == 1

    def test_a_messages_own_limit_holds_for_it_alone(self, storage: MemoryStorage) -> None:
        calls: Counter[str] = Counter()

        def fails(message: Message[str]) -> None:
            calls[message.data] += 1
            raise ValueError

        handler = watch(fails, retry=RetryPolicy(max_retries=2))
        run(Watcher(storage=storage, handler=handler), Message("own", "t", max_retries=5), Message("next", "t"))

        assert calls == {"own": 6, "next": 3}

    def test_a_snooze_costs_no_retry(self, storage: MemoryStorage) -> None:
        seen: list[int] = []

        def snoozes(message: Message[Any]) -> None:
            seen.append(message.retries)
            if len(seen) < 3:
                raise Snooze(0.01)

        run(Watcher(storage=storage, handler=watch(snoozes)), Message(1, "t", max_retries=0))

        assert seen == [0, 0, 0]
        assert storage.len("t") == 1

    def test_a_discard_is_dead_at_once(self, storage: MemoryStorage) -> None:
        def discards(message: Message[Any]) -> None:
            raise Discard("not for us")

        run(Watcher(storage=storage, handler=watch(discards)), Message(1, "t"))

        assert dead(storage) == [(Reason.DISCARDED, "Discard: not for us")]

    def test_backoff_delays_and_wait_waits_for_it(self, storage: MemoryStorage) -> None:
        def fails_once(message: Message[Any]) -> None:
            if not message.retries:
                raise ValueError

        started = time.monotonic()
        handler = watch(fails_once, retry=RetryPolicy(backoff=0.3, jitter=False))
        run(Watcher(storage=storage, handler=handler), Message(1, "t"))

        assert time.monotonic() - started >= 0.3
        assert storage.len("t") == 1

    def test_a_handler_that_exits_does_not_end_the_watcher(self, storage: MemoryStorage) -> None:
        def exits(message: Message[str]) -> None:
            if message.data == "exit":
                sys.exit("bye")

        run(
            Watcher(storage=storage, handler=watch(exits)),
            Message("exit", "t", max_retries=0),
            Message("next", "t"),
        )

        assert storage.len("t") == 1
        assert [reason for reason, _ in dead(storage)] == [Reason.EXHAUSTED]

    def test_async_handlers_run_too(self, storage: MemoryStorage) -> None:
        async def sleeps(message: Message[Any]) -> None:
            await asyncio.sleep(0)

        run(Watcher(storage=storage, handler=watch(sleeps)), Message(1, "t"), Message(2, "t"))
        gc.collect()  # a loop left open would warn now

        assert storage.len("t") == 2

    def test_an_async_handler_is_cancelled_on_time(self, storage: MemoryStorage) -> None:
        async def sleeps(message: Message[Any]) -> None:
            await asyncio.sleep(PATIENCE)

        run(Watcher(storage=storage, handler=watch(sleeps), timeout=0.1), Message(1, "t", max_retries=0))

        ((reason, error),) = dead(storage)
        assert reason is Reason.EXHAUSTED
        assert error.startswith("HandlerTimeoutError")

    def test_a_sync_handler_is_reported_and_counts_as_timed_out(
        self, storage: MemoryStorage, caplog: pytest.LogCaptureFixture
    ) -> None:
        def waits_for_the_report(message: Message[Any]) -> None:
            end = time.monotonic() + PATIENCE
            while not caplog.records and time.monotonic() < end:
                threading.Event().wait(0.01)

        caplog.set_level(logging.ERROR, "watch_tasks.handlers")
        message = Message(1, "t", max_retries=0)
        run(Watcher(storage=storage, handler=watch(waits_for_the_report), timeout=0.1), message)

        assert "cannot be cut off in a thread" in caplog.text
        assert dead(storage)[0][1].startswith("HandlerTimeoutError")

    def test_a_topics_own_timeout_beats_the_watchers(self, storage: MemoryStorage) -> None:
        deadlines: list[float] = []

        def notes(message: Message[Any]) -> None:
            assert message.deadline
            deadlines.append(message.deadline.timestamp() - time.time())

        handler = TopicHandler({"t": [notes], "own": Topic("own", timeout=1000)})
        handler.find("own").handler(notes)  # type: ignore[union-attr]
        run(Watcher(storage=storage, handler=handler, timeout=100), Message(1, "t"), Message(1, "own"))

        assert deadlines == [pytest.approx(100, abs=5), pytest.approx(1000, abs=5)]

    def test_data_arrives_in_the_topics_shape(self, storage: MemoryStorage) -> None:
        @dataclass(frozen=True)
        class Alarm:
            host: str

            def index(self) -> str:
                return self.host

        seen: list[Alarm] = []
        alarms: Topic[Alarm] = Topic("alarm", schema=Alarm)
        alarms.handler(lambda message: seen.append(message.data))
        run(
            Watcher(storage=storage, handler=TopicHandler({"alarm": alarms})),
            Message(Alarm("web-1"), "alarm"),
            Message({"host": "web-2"}, "alarm"),
            Message({"hots": "web-3"}, "alarm"),
        )

        assert seen == [Alarm("web-1"), Alarm("web-2")]
        assert [record.index for record in storage.range(newest_first=False)] == ["web-1", "web-2"]
        assert [reason for reason, _ in dead(storage)] == [Reason.UNDECODABLE]


class TestTopicHandler:
    def test_a_topic_under_another_name_is_refused(self) -> None:
        with pytest.raises(TopicError, match="`a` cannot stand under the name `b`"):
            TopicHandler({"b": Topic("a")})

    def test_the_same_handler_twice_is_refused(self) -> None:
        with pytest.raises(TopicError):
            TopicHandler({"a": [print, print]})

    def test_what_is_no_handler_is_refused(self) -> None:
        with pytest.raises(TypeError):
            TopicHandler({"a": ["print"]})  # type: ignore[list-item]

    def test_an_unknown_name_finds_nothing(self) -> None:
        assert TopicHandler({"a": [print]}).find("b") is None


class TestTopics:
    def test_without_a_handler_every_registered_topic_is_watched_later_ones_too(self, storage: MemoryStorage) -> None:
        early, late = [], []
        first = topic("early")
        first.handler(lambda message: early.append(message.data))
        with Watcher(storage=storage) as watcher:
            second = topic("late")
            second.handler(lambda message: late.append(message.data))
            first.send(1)
            second.send(2)
            assert watcher.wait(PATIENCE)
        assert (early, late) == ([1], [2])

    def test_a_handler_sends_into_the_watchers_queue(self, storage: MemoryStorage) -> None:
        got: list[int] = []
        follow: Topic[int] = Topic("follow")
        follow.handler(lambda message: got.append(message.data))
        handler = TopicHandler({"t": [lambda message: follow.send(message.data + 1)], "follow": follow})
        run(Watcher(storage=storage, handler=handler), Message(1, "t"))
        assert got == [2]

    def test_a_topic_that_is_bound_stays_so(self) -> None:
        with MemoryQueue() as elsewhere:
            bound: Topic[int] = Topic("t")
            bound.bind(elsewhere)
            with Watcher(handler=TopicHandler({"t": bound})):
                bound.send(1)
            assert elsewhere.len() == 1

    def test_an_unknown_topic_is_put_back(self, queue: MemoryQueue, storage: MemoryStorage) -> None:
        queue.push(Message(1, "unknown"))
        with Watcher(queue, storage, watch(print)) as watcher:
            assert not watcher.wait(0.3)
        assert queue.len() == 1
        assert dead(storage) == []


class TestLife:
    def test_it_finishes_what_is_in_hand_and_takes_nothing_more(
        self, queue: MemoryQueue, storage: MemoryStorage
    ) -> None:
        entered, leave = threading.Event(), threading.Event()

        def holds(message: Message[Any]) -> None:
            entered.set()
            assert leave.wait(PATIENCE)

        queue.push(Message(1, "t"))
        queue.push(Message(2, "t"))
        watcher = Watcher(queue, storage, watch(holds))
        watcher.start()
        assert entered.wait(PATIENCE)

        assert not watcher.stop(timeout=0.05)
        leave.set()
        assert watcher.stop()

        assert storage.len("t") == 1
        assert queue.len() == 1

    def test_a_retry_in_hand_at_the_end_is_still_published(self, queue: MemoryQueue, storage: MemoryStorage) -> None:
        entered, leave = threading.Event(), threading.Event()

        def fails(message: Message[Any]) -> None:
            entered.set()
            leave.wait(PATIENCE)
            raise ValueError

        queue.push(Message(1, "t"))
        watcher = Watcher(queue, storage, watch(fails))
        watcher.start()
        assert entered.wait(PATIENCE)
        watcher.stop(timeout=0)
        leave.set()
        watcher.stop()

        delivery = queue.next(timeout=0)
        assert delivery
        assert (delivery.message.retries, delivery.message.copy) == (1, 1)  # type: ignore[union-attr]

    def test_it_closes_what_it_opened_and_nothing_else(self, queue: MemoryQueue, storage: MemoryStorage) -> None:
        own, given = Watcher(), Watcher(queue, storage)
        for watcher in (own, given):
            with watcher:
                pass
        with pytest.raises(QueueClosedError):
            own.queue.len()
        with pytest.raises(StorageClosedError):
            own.storage.len()
        assert queue.len() == storage.len() == 0

    def test_starting_and_stopping_twice_is_safe(self) -> None:
        watcher = Watcher(handler=watch(print))
        watcher.start()
        watcher.start()
        assert watcher.stop()
        assert watcher.stop()

    def test_it_does_not_start_again(self) -> None:
        watcher = Watcher(handler=watch(print))
        watcher.stop()
        with pytest.raises(RuntimeError, match="make a new one"):
            watcher.start()

    def test_a_handler_may_stop_its_watcher(self, queue: MemoryQueue, storage: MemoryStorage) -> None:
        watcher = Watcher(queue, storage, watch(lambda message: watcher.stop()))
        queue.push(Message(1, "t"))
        queue.push(Message(2, "t"))
        watcher.start()
        assert not watcher.wait(PATIENCE)
        assert watcher.stop(PATIENCE)
        assert storage.len("t") == 1

    def test_waiting_for_a_watcher_that_does_not_run_is_in_vain(self) -> None:
        watcher = Watcher(handler=watch(print))
        assert not watcher.wait()
        watcher.stop()
        assert not watcher.wait()

    def test_waiting_misses_no_message_in_hand(self, storage: MemoryStorage) -> None:
        done: list[int] = []
        with Watcher(storage=storage, handler=watch(lambda message: done.append(message.data))) as watcher:
            for number in range(50):
                watcher.queue.push(Message(number, "t"))
                assert watcher.wait(PATIENCE)
                assert done[-1] == number

    def test_several_may_wait(self) -> None:
        leave = threading.Event()
        with Watcher(handler=watch(lambda message: leave.wait(PATIENCE))) as watcher, ThreadPoolExecutor(4) as pool:
            watcher.queue.push(Message(1, "t"))
            waiting = [pool.submit(watcher.wait, PATIENCE) for _ in range(4)]
            leave.set()
            assert all(wait.result(PATIENCE) for wait in waiting)

    def test_closing_its_queue_ends_it(self, queue: MemoryQueue, caplog: pytest.LogCaptureFixture) -> None:
        with Watcher(queue, handler=watch(print)) as watcher:
            queue.close()
            assert not watcher.wait(PATIENCE)
        assert "its queue was closed" in caplog.text

    @pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
    def test_a_timeout_that_is_none_is_refused(self, timeout: float) -> None:
        with pytest.raises(ValueError, match="timeout"):
            Watcher(timeout=timeout)


class TestUrls:
    def test_queue_and_storage_may_be_urls(self) -> None:
        with Watcher("memory://", "memory://", watch(print)) as watcher:
            watcher.queue.push(Message(1, "t"))
            assert watcher.wait(PATIENCE)
            assert watcher.storage.len("t") == 1
        with pytest.raises(QueueClosedError):
            watcher.queue.len()

    def test_the_environment_names_the_broker(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CELERY_BROKER_URL", "memory://")
        with Watcher.from_settings() as watcher:
            assert isinstance(watcher.queue, MemoryQueue)
            assert isinstance(watcher.storage, MemoryStorage)

    def test_where_nothing_is_configured_it_asks_for_the_embedded_server(self, tmp_path: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-c", "from watch_tasks import Watcher; Watcher.from_settings()"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert "ConfigurationError: no broker is configured" in done.stderr
        assert "watch-tasks up" in done.stderr

    def test_a_mapping_stands_for_the_environment(self) -> None:
        watcher = Watcher.from_settings(
            {"CELERY_BROKER_URL": "redis://localhost:1/0", "WATCH_STORAGE_BACKEND": "memory://"}
        )
        assert isinstance(watcher.queue, RedisQueue)
        assert isinstance(watcher.storage, MemoryStorage)
        watcher.stop()

    @pytest.mark.parametrize(
        ("settings", "text"),
        [({}, "CELERY_BROKER_URL"), ({"CELERY_BROKER_URL": "amqp://u:secret@h"}, "WATCH_STORAGE_BACKEND")],
    )
    def test_what_is_missing_is_named(self, settings: dict[str, str], text: str) -> None:
        with pytest.raises(ConfigurationError, match=text) as caught:
            Watcher.from_settings(settings)
        assert "secret" not in str(caught.value)


class AwayStorage(MemoryStorage):
    """A storage whose commits fail while it is away."""

    def __init__(self) -> None:
        super().__init__()
        self.is_away = False
        self.refused = threading.Event()

    def _commit(self, commits: Sequence[Commit]) -> list[bool]:
        if self.is_away:
            self.refused.set()
            raise StorageUnavailableError("away")
        return super()._commit(commits)


class FaultyQueue(MemoryQueue):
    """A queue of which any verb can be made to fail a number of times."""

    def __init__(self, **failures: int) -> None:
        super().__init__()
        self.failures = failures

    def _fail(self, verb: str) -> None:
        if self.failures.get(verb, 0) > 0:
            self.failures[verb] -= 1
            raise QueueUnavailableError(f"{verb} failed")

    def push(self, message: Message[Any], *, delay: float = 0.0, bounded: bool = True) -> None:
        if not bounded:
            self._fail("push")
        super().push(message, delay=delay, bounded=bounded)

    def next(self, timeout: float | None = None) -> Delivery | None:
        self._fail("next")
        return super().next(timeout)

    def len(self) -> int:
        self._fail("len")
        return super().len()


class TestTrouble:
    def test_a_storage_away_at_the_commit_repeats_nothing_and_loses_nothing(self) -> None:
        calls: list[int] = []
        with AwayStorage() as storage, Watcher(storage=storage, handler=watch(lambda m: calls.append(m.data))) as w:
            storage.is_away = True
            for number in range(5):
                w.queue.push(Message(number, "t"))
            assert storage.refused.wait(PATIENCE)
            assert not w.wait(0.3)
            storage.is_away = False
            assert w.wait(PATIENCE)
            assert storage.len("t") == 5
        assert calls == [0, 1, 2, 3, 4]

    def test_stopped_while_the_storage_is_away_it_leaves_a_copy_that_knows_all(
        self, queue: MemoryQueue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("watch_tasks.watcher._LEASE", 0.5)
        calls: list[int] = []
        handler = watch(lambda message: calls.append(message.data))
        with AwayStorage() as storage:
            storage.is_away = True
            queue.push(Message(1, "t"))
            with Watcher(queue, storage, handler):
                assert storage.refused.wait(PATIENCE)
            storage.is_away = False
            run(Watcher(queue, storage, handler))
            assert storage.len("t") == 1
        assert calls == [1]

    def test_a_queue_that_fails_is_asked_again(self, storage: MemoryStorage, caplog: pytest.LogCaptureFixture) -> None:
        run(Watcher(FaultyQueue(next=2, len=1), storage, watch(print)), Message(1, "t"))
        assert storage.len("t") == 1
        assert "trying again in 0.1 s: QueueUnavailableError: next failed" in caplog.text
        assert "trying again in 0.2 s" in caplog.text

    def test_a_retry_that_cannot_be_pushed_is_pushed_again(self, storage: MemoryStorage) -> None:
        def fails_once(message: Message[Any]) -> None:
            if not message.retries:
                raise ValueError

        run(Watcher(FaultyQueue(push=2), storage, watch(fails_once)), Message(1, "t"))
        assert storage.len("t") == 1

    def test_a_retry_that_can_never_be_pushed_is_never_acked(self, valkey: RedisServer) -> None:
        tried = threading.Event()

        class Deaf(RedisQueue):
            def push(self, message: Message[Any], *, delay: float = 0.0, bounded: bool = True) -> None:
                if bounded:
                    super().push(message, delay=delay)
                else:
                    tried.set()
                    raise QueueUnavailableError("deaf")

        def fails(message: Message[Any]) -> None:
            raise ValueError

        with Deaf(valkey.url) as queue:
            queue.push(Message(1, "t"))
            with Watcher(queue, handler=watch(fails)):
                assert tried.wait(PATIENCE)
        with RedisQueue(valkey.url) as queue:
            assert queue.len() == 1

    def test_a_fault_in_the_storage_does_not_end_it(self, caplog: pytest.LogCaptureFixture) -> None:
        class Broken(MemoryStorage):
            broken = True

            def _commit(self, commits: Sequence[Commit]) -> list[bool]:
                if self.broken:
                    self.broken = False
                    raise RuntimeError("a bug")
                return super()._commit(commits)

        with Broken() as storage, Watcher(storage=storage, handler=watch(print)) as watcher:
            watcher.queue.push(Message(1, "t"))
            watcher.queue.push(Message(2, "t"))
            assert not watcher.wait(0.5)
            assert storage.len("t") == 1
            assert watcher.queue.len() == 1
        assert "a bug" in caplog.text

    def test_what_is_no_message_is_buried_with_its_bytes(self, valkey: RedisServer, storage: MemoryStorage) -> None:
        with valkey.client() as client:
            client.lpush("celery", b"garbage{{{")
        run(Watcher(valkey.url, storage, watch(print)), Message(1, "t"))
        (letter,) = storage.dead()
        assert (letter.reason, letter.raw) == (Reason.UNDECODABLE, b"garbage{{{")
        assert storage.len("t") == 1
        with valkey.client() as client:
            assert not client.exists("celery", "unacked")


class TestPackets:
    def test_each_message_of_a_packet_is_handled_as_if_it_came_alone(
        self, valkey: RedisServer, storage: MemoryStorage
    ) -> None:
        calls: Counter[int] = Counter()

        def fails_for_multiples_of_10(message: Message[int]) -> None:
            calls[message.data] += 1
            if message.data % 10 == 0:
                raise ValueError(message.data)

        handler = watch(fails_for_multiples_of_10, retry=RetryPolicy(max_retries=2))
        with Watcher(valkey.url, storage, handler) as watcher:
            t = handler.find("t")
            assert t
            assert t.send_many(range(100)).sent == 100
            assert watcher.wait(PATIENCE)
            assert watcher.queue.len() == 0
        assert storage.len("t") == 90
        assert len(dead(storage)) == 10
        assert calls == {number: 1 if number % 10 else 3 for number in range(100)}
        with valkey.client() as client:
            assert not list(client.scan_iter("watch.held:*"))

    def test_the_same_message_twice_in_a_packet_is_handled_once(
        self, valkey: RedisServer, storage: MemoryStorage
    ) -> None:
        calls: list[int] = []
        handler = watch(lambda message: calls.append(message.data))
        message = Message(1, "t")
        with Watcher(valkey.url, storage, handler) as watcher:
            t = handler.find("t")
            assert t
            t.send_many([message, message])
            assert watcher.wait(PATIENCE)
        assert calls == [1]
        assert storage.counters("t").duplicates == 1

    def test_what_it_did_not_begin_is_left_to_others_when_it_stops(
        self, valkey: RedisServer, storage: MemoryStorage
    ) -> None:
        began = threading.Event()
        may_end = threading.Event()

        def handle(message: Message[int]) -> None:
            began.set()
            may_end.wait(PATIENCE)

        topic: Topic[int] = Topic("t")
        topic.handler(handle)
        with RedisQueue(valkey.url) as queue, RedisQueue(valkey.url) as other:
            topic.bind(queue)
            topic.send_many(range(5))
            watcher = Watcher(queue, storage, TopicHandler({"t": topic}))
            watcher.start()
            assert began.wait(PATIENCE)
            assert not watcher.stop(0)
            may_end.set()
            assert watcher.stop(PATIENCE)

            assert storage.len("t") == 1
            assert other.len() == 4
            left = [other.next(PATIENCE) for _ in range(4)]
            assert [delivery.message.data for delivery in left if delivery] == [1, 2, 3, 4]  # type: ignore[union-attr]

    def test_one_that_is_killed_at_a_packet_loses_nothing_and_repeats_what_it_had_in_hand(
        self, valkey: RedisServer, tmp_path: Path
    ) -> None:
        program = tmp_path / "watch.py"
        program.write_text(
            "import os, sys\n"
            "from watch_tasks import Topic, TopicHandler, Watcher\n"
            "url, die_at = sys.argv[1], int(sys.argv[2])\n"
            "t = Topic('t')\n"
            "@t.handler\n"
            "def handle(message):\n"
            "    print(message.data, flush=True)\n"
            "    if message.data == die_at:\n"
            "        os._exit(9)\n"
            "with Watcher(url, url, TopicHandler({'t': t})) as watcher:\n"
            "    while watcher.storage.len('t') < 20:\n"
            "        watcher.wait(0.2)\n"
        )
        topic: Topic[int] = Topic("t")
        with RedisQueue(valkey.url) as queue:
            topic.bind(queue)
            topic.send_many(range(20))

        done = [
            subprocess.run(
                [sys.executable, str(program), valkey.url, die_at],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
                capture_output=True,
                text=True,
                timeout=60,
            )
            for die_at in ("5", "-1")
        ]

        assert [process.returncode for process in done] == [9, 0]
        assert [process.stdout.split() for process in done] == [
            [str(number) for number in range(6)],
            [str(number) for number in range(5, 20)],
        ]
        with open_storage(valkey.url) as kept:
            assert kept.counters("t").duplicates == 5
            assert list(kept.dead()) == []


class TestTwoWatchers:
    def test_given_the_same_message_one_handles_it_and_the_other_finds_it_done(
        self, valkey: RedisServer, storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("watch_tasks.watcher._LEASE", 0.8)
        monkeypatch.setattr("watch_tasks.watcher._RENEWAL", 0.2)
        calls: list[str] = []
        busy = threading.Event()

        def waits_until_the_other_was_told(message: Message[Any]) -> None:
            calls.append(message.id)
            end = time.monotonic() + PATIENCE
            while "busy" not in {event.event for event in storage.explain("t", "i")} and time.monotonic() < end:
                busy.wait(0.02)

        handler = watch(waits_until_the_other_was_told)
        message = Message(1, "t", index="i")
        with RedisQueue(valkey.url) as queue:
            queue.push(message)
            queue.push(message)
        with Watcher(valkey.url, storage, handler) as one, Watcher(valkey.url, storage, handler) as two:
            assert one.wait(PATIENCE)
            assert two.wait(PATIENCE)
            assert one.wait(PATIENCE)

        assert calls == [message.id]
        counters = storage.counters("t")
        assert (counters.handled, counters.duplicates) == (1, 1)
        with valkey.client() as client:
            assert not client.exists("celery", "unacked")

    def test_they_share_the_work(self, valkey: RedisServer, storage: MemoryStorage) -> None:
        calls: Counter[int] = Counter()
        handler = watch(lambda message: calls.update([message.data]))
        with Watcher(valkey.url, storage, handler) as one, Watcher(valkey.url, storage, handler) as two:
            for number in range(40):
                one.queue.push(Message(number, "t"))
            assert one.wait(PATIENCE)
            assert two.wait(PATIENCE)
        assert calls == dict.fromkeys(range(40), 1)
        assert storage.len("t") == 40


def test_a_delivery_that_is_no_message_may_come_from_any_queue(storage: MemoryStorage) -> None:
    class Odd(MemoryQueue):
        def next(self, timeout: float | None = None) -> Delivery | None:
            delivery = super().next(timeout)
            if delivery:
                delivery.message = Unreadable(reason=Reason.MALFORMED, error="odd", id="x", raw=b"?")
            return delivery

    run(Watcher(Odd(), storage, watch(print)), Message(1, "t"))
    assert dead(storage) == [(Reason.MALFORMED, "odd")]


class TestBatches:
    """A topic with a batch handler is collected from the queue, by size and by time."""

    @pytest.fixture
    def calls(self) -> list[list[Any]]:
        return []

    def topics(self, calls: list[list[Any]], *, size: int = 10, seconds: float = 30.0) -> TopicHandler:
        rows: Topic[Any] = Topic("rows", retry=RetryPolicy(max_retries=1))

        @rows.batch_handler(size=size, seconds=seconds)
        def store(messages: list[Message[Any]]) -> dict[str, Exception]:
            calls.append([message.data for message in messages])
            return {message.id: ValueError("no") for message in messages if message.data == "bad"}

        plain: Topic[Any] = Topic("plain")
        plain.handler(name="enter")(lambda message: calls.append(["plain", message.data]))
        return TopicHandler({"rows": rows, "plain": plain})

    def test_full_batches_do_not_wait(self, queue: MemoryQueue, storage: MemoryStorage, calls: list[list[Any]]) -> None:
        for number in range(20):
            queue.push(Message(number, "rows"))
        run(Watcher(queue, storage, self.topics(calls)))
        assert calls == [list(range(10)), list(range(10, 20))]
        assert storage.len("rows") == 20

    def test_the_first_waits_for_others_for_so_long(
        self, queue: MemoryQueue, storage: MemoryStorage, calls: list[list[Any]]
    ) -> None:
        begun = time.monotonic()
        run(Watcher(queue, storage, self.topics(calls, seconds=0.5)), *(Message(number, "rows") for number in range(3)))
        assert calls == [[0, 1, 2]]
        assert time.monotonic() - begun >= 0.5, "`wait` waits for what is collected too"

    def test_other_topics_do_not_wait(self, queue: MemoryQueue, storage: MemoryStorage, calls: list[list[Any]]) -> None:
        for name in ("rows", "plain", "rows", "plain"):
            queue.push(Message(name, name))
        run(Watcher(queue, storage, self.topics(calls, seconds=0.5)))
        assert calls == [["plain", "plain"], ["plain", "plain"], ["rows", "rows"]]

    def test_each_has_its_outcome(self, queue: MemoryQueue, storage: MemoryStorage, calls: list[list[Any]]) -> None:
        run(
            Watcher(queue, storage, self.topics(calls, size=3, seconds=0.2)),
            *(Message(data, "rows") for data in ("a", "bad", "b")),
        )
        assert calls == [["a", "bad", "b"], ["bad"]]
        assert dead(storage) == [(Reason.EXHAUSTED, "ValueError: no")]
        assert storage.len("rows") == 2

    def test_a_stop_puts_back_what_is_collected(
        self, queue: MemoryQueue, storage: MemoryStorage, calls: list[list[Any]]
    ) -> None:
        watcher = Watcher(queue, storage, self.topics(calls))
        with watcher:
            for number in range(5):
                queue.push(Message(number, "rows"))
            deadline = time.monotonic() + PATIENCE
            while queue.len() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert watcher.wait(0.3) is False
        assert (queue.len(), calls) == (5, [])

    def test_what_could_not_be_handled_comes_again_whole(
        self, queue: MemoryQueue, storage: MemoryStorage, calls: list[list[Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("watch_tasks.watcher._PAUSES", (0.05, 0.1))
        watcher = Watcher(queue, storage, self.topics(calls, size=3, seconds=0.2))
        handle_many, errors = watcher._pipeline.handle_many, [RuntimeError("a mistake of ours")]

        def failing(messages: Sequence[Message[Any]]) -> Any:
            if errors:
                raise errors.pop()
            return handle_many(messages)

        monkeypatch.setattr(watcher._pipeline, "handle_many", failing)
        run(watcher, *(Message(number, "rows") for number in range(3)))
        assert sorted(data for call in calls for data in call) == [0, 1, 2]
