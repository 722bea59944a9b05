"""Handlers that write in the transaction that records their message, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from msgspec.structs import replace
from sqlalchemy import event, text

from watch_tasks import (
    ConfigurationError,
    Dead,
    Discard,
    Fenced,
    Handled,
    MemoryQueue,
    MemoryStorage,
    Message,
    Outcome,
    Reason,
    Retry,
    Snooze,
    Snoozed,
    TopicHandler,
    Watcher,
    points,
)
from watch_tasks.errors import MessageError
from watch_tasks.pipeline import Pipeline
from watch_tasks.storage.protocol import Claim, Commit, Granted, Settled, Step
from watch_tasks.topics import Topic

from .bench import Bench, is_clean, write, writes
from .driver import LEASE, done

pytestmark = pytest.mark.integration


class TestTogether:
    def test_effect_and_record_appear_at_once(self, bench: Bench) -> None:
        seen: list[Any] = []

        def handler(message: Message[Any]) -> None:
            write(message, "a")
            seen.append((bench.effects(), bench.storage.len("t")))

        assert isinstance(bench.pipe(handler).handle(Message(1, "t")), Handled)
        assert seen == [([], 0)]
        assert (bench.effects(), bench.storage.len("t")) == (["a"], 1)

    def test_between_the_commit_and_the_ack_both_are_there(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Any] = []
        reach = {"after_effect": [], "after_commit": []}
        monkeypatch.setattr(
            points, "reach", lambda name: name in reach and seen.append((name, bench.effects(), bench.storage.len("t")))
        )
        bench.pipe(writes("a"), writes("b")).handle(Message(1, "t"))
        assert seen == [
            ("after_effect", [], 0),
            ("after_commit", ["a"], 0),
            ("after_effect", ["a"], 0),
            ("after_commit", ["a", "b"], 1),
        ]

    def test_a_failing_handlers_writes_are_gone_and_those_before_stay(self, bench: Bench) -> None:
        pipeline = bench.pipe(writes("a"), writes("b", ValueError("no")), writes("c"))
        retry = pipeline.handle(Message(1, "t"))
        assert isinstance(retry, Retry)
        assert (retry.message.handled, retry.message.retries, bench.effects()) == (("h0",), 1, ["a"])
        assert isinstance(pipeline.handle(replace(retry.message, handled=())), Handled)
        assert bench.effects() == ["a", "b", "c"]

    @pytest.mark.parametrize(
        ("error", "kind"), [(Snooze(0), Snoozed), (Discard("no"), Dead), (SystemExit(3), Retry), (ValueError(), Retry)]
    )
    def test_so_they_are_however_it_ends(self, bench: Bench, error: BaseException, kind: type[Outcome]) -> None:
        assert isinstance(bench.pipe(writes("a"), writes("b", error)).handle(Message(1, "t")), kind)
        assert bench.effects() == ["a"]
        assert is_clean(bench)

    def test_async_handlers_write_too(self, bench: Bench) -> None:
        async def handler(message: Message[Any]) -> None:
            await asyncio.sleep(0)
            write(message, "a")

        assert isinstance(bench.pipe(handler).handle(Message(1, "t")), Handled)
        assert bench.effects() == ["a"]

    def test_many_at_once_have_a_transaction_each(self, bench: Bench) -> None:
        def handler(message: Message[Any]) -> None:
            write(message, message.data)
            if message.data == "b":
                raise ValueError

        outcomes = bench.pipe(handler).handle_many([Message(data, "t") for data in "abc"])
        assert [type(outcome) for outcome in outcomes] == [Handled, Retry, Handled]
        assert bench.effects() == ["a", "c"]

    def test_more_handlers_at_once_than_a_pool_has_leave_the_storage_usable(self, postgres_bench: Bench) -> None:
        """Their leases could not be renewed."""
        bench, gate, inside = postgres_bench, threading.Event(), threading.Barrier(31)

        def handler(message: Message[Any]) -> None:
            write(message, "a")
            inside.wait(20)
            gate.wait(20)

        pipeline = bench.pipe(handler)
        threads = [threading.Thread(target=pipeline.handle, args=(Message(n, "t", id=f"m{n}"),)) for n in range(30)]
        for thread in threads:
            thread.start()
        try:
            inside.wait(20)
            assert bench.storage.renew("w", ["m0"], LEASE) == {"m0"}
        finally:
            gate.set()
            for thread in threads:
                thread.join()
        assert len(bench.effects()) == 30


class TestTheToken:
    def overtaken(self, bench: Bench, number: int) -> tuple[Outcome, Outcome]:
        """A lease ends while handler `number` runs, and another worker handles the message."""
        outcomes: list[Outcome] = []
        message = Message(1, "t", index="i")

        def overtakes(given: Message[Any]) -> None:
            if not outcomes:
                bench.storage.release("w", [message.id])
                outcomes.append(bench.pipe(writes("x"), writes("y"), worker="other").handle(message))
            write(given, "late")

        handlers = [writes("x"), writes("y")]
        handlers[number] = overtakes
        return bench.pipe(*handlers).handle(message), outcomes[0]

    @pytest.mark.parametrize("number", [0, 1])
    def test_a_late_one_wrote_nothing_and_is_told_of(self, postgres_bench: Bench, number: int) -> None:
        late, other = self.overtaken(postgres_bench, number)
        assert isinstance(late, Fenced)
        assert isinstance(other, Handled)
        assert postgres_bench.effects() == ["x", "y"]
        assert postgres_bench.told("i").count("fenced") == 1
        assert is_clean(postgres_bench)

    def test_so_it_is_on_sqlite(self, sqlite_bench: Bench) -> None:
        late, other = self.overtaken(sqlite_bench, 1)
        assert (type(late), type(other), sqlite_bench.effects()) == (Fenced, Handled, ["x", "y"])

    def test_a_commit_that_holds_already_undoes_what_was_written_again(self, bench: Bench) -> None:
        claim = Claim(
            topic="t",
            index="i",
            id="m",
            copy=0,
            once="message",
            worker="w",
            lease=LEASE,
            digest="",
            retention=None,
            sent_at=0.0,
        )
        granted = bench.storage.claim(claim)
        assert isinstance(granted, Granted)
        commit = Commit(
            step=Step.HANDLED, topic="t", index="i", id="m", copy=0, token=granted.token, blob=b"{}", retention=None
        )
        settled = []
        for what in ("once", "again"):
            with bench.storage.transaction() as transaction:
                transaction.connection.execute(text("INSERT INTO effects VALUES (:what)"), {"what": what})
                settled.append(transaction.commit(commit))
        assert settled == [Settled.ACCEPTED, Settled.REPEATED]
        assert (bench.effects(), bench.storage.counters("t").handled) == (["once"], 1)

    def test_its_lease_is_renewed_while_it_writes(self, postgres_bench: Bench) -> None:
        """Its state row is not locked before the end."""
        renewed = []

        def handler(message: Message[Any]) -> None:
            write(message, "a")
            renewed.append(postgres_bench.storage.renew("w", [message.id], LEASE))

        message = Message(1, "t")
        assert isinstance(postgres_bench.pipe(handler, handler).handle(message), Handled)
        assert renewed == [{message.id}] * 2


class TestRefused:
    def test_a_plain_topic_begins_nothing(self, bench: Bench) -> None:
        seen, statements = [], []

        def handler(message: Message[Any]) -> None:
            statements.clear()
            seen.append(message.connection)

        def after(message: Message[Any]) -> None:
            seen.append(len(statements))

        bench.pipe(lambda message: None, transactional=False).handle(Message(0, "t"))
        event.listen(bench.storage._backend.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
        event.listen(bench.storage._backend.engine, "begin", lambda connection: statements.append("begin"))
        assert isinstance(bench.pipe(handler, transactional=False).handle(Message(1, "t")), Handled)
        plain = statements.count("begin")
        assert (seen, plain) == ([None], 1)

    def test_once_none_is_refused_where_it_is_said(self, bench: Bench) -> None:
        with pytest.raises(ValueError, match="`transactional` needs a claim"):
            Topic("t", transactional=True, once="none")
        with pytest.raises(MessageError, match="is transactional"):
            Topic[int]("t", transactional=True).message(1, once="none")
        outcome = bench.pipe(writes("a")).handle(Message(1, "t", once="none"))
        assert isinstance(outcome, Dead)
        assert (outcome.reason, bench.effects()) == (Reason.MALFORMED, [])

    def test_a_messages_own_once_rule_may_be_another(self, bench: Bench) -> None:
        for _ in range(2):
            bench.pipe(writes("a")).handle(Message(1, "t", index="i", once="index"))
        assert bench.effects() == ["a"]

    def test_a_watcher_does_not_start_without_transactions(self) -> None:
        made: Topic[Any] = Topic("t", transactional=True)
        made.handler(done)
        watcher = Watcher(queue=MemoryQueue(1), storage=MemoryStorage(), handler=TopicHandler({"t": made}))
        with pytest.raises(ConfigurationError, match=r"topic `t` is transactional, and storage .* has no transactions"):
            watcher.start()


def test_a_writer_that_outlasts_its_lease_is_right_all_the_same(sqlite_bench: Bench) -> None:
    """SQLite: nobody can renew, and nobody can take over, while it holds the file."""
    bench, message, outcomes = sqlite_bench, Message(1, "t"), list[Outcome]()
    inside, is_over = threading.Event(), threading.Event()

    def handler(given: Message[Any]) -> None:
        write(given, "a")
        inside.set()
        is_over.wait(1.0)  # past the lease

    def pipe(worker: str) -> Pipeline:
        pipeline = bench.pipe(handler, worker=worker)
        pipeline._lease = 0.3
        return pipeline

    first = threading.Thread(target=lambda: outcomes.append(pipe("one").handle(message)))
    first.start()
    assert inside.wait(10)
    outcomes.append(pipe("two").handle(message))
    first.join()

    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Duplicate", "Handled"]
    assert bench.effects() == ["a"]
    assert bench.storage.len("t") == 1
