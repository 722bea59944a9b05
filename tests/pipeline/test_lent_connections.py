"""What handlers do to the connection that is lent to them, what happens to it, and what errors come to."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import psycopg
import pytest
from msgspec.structs import replace
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from watch_tasks import (
    Busy,
    Dead,
    Duplicate,
    Handled,
    Message,
    Reason,
    Retry,
    Snoozed,
)
from watch_tasks.errors import HandlerTimeoutError, HandlerTransactionError, StorageUnavailableError
from watch_tasks.storage.protocol import Commit, Settled
from watch_tasks.storage.sql import SqlStorage
from watch_tasks.storage.sql.transaction import SqlTransaction

from .bench import Bench, is_clean, write, writes
from .driver import Function, to_the_end

pytestmark = pytest.mark.integration


class TestCutOff:
    @pytest.mark.parametrize("nested", [False, True])
    def test_a_timeout_in_a_statement_is_a_failure_and_its_connection_goes(
        self, postgres_bench: Bench, nested: bool
    ) -> None:
        bench = postgres_bench

        def handler(message: Message[Any]) -> None:
            write(message, "a")
            if nested:
                with message.connection.begin_nested():
                    message.connection.execute(text("SELECT pg_sleep(5)"))
            message.connection.execute(text("SELECT pg_sleep(5)"))

        outcome = bench.pipe(handler, timeout=0.3).handle(Message(1, "t"))

        assert isinstance(outcome, Retry)
        assert isinstance(outcome.error, HandlerTimeoutError)
        assert bench.effects() == []
        assert is_clean(bench)

    def test_one_that_hides_its_timeout_leaves_no_connection_in_an_unknown_state(self, postgres_bench: Bench) -> None:
        def handler(message: Message[Any]) -> None:
            write(message, "a")
            try:
                message.connection.execute(text("SELECT pg_sleep(5)"))
            except HandlerTimeoutError:
                pass
            raise ValueError("something else")

        assert isinstance(postgres_bench.pipe(handler, timeout=0.3).handle(Message(1, "t")), Retry)
        assert postgres_bench.effects() == []
        assert is_clean(postgres_bench)

    def test_an_async_handler_that_is_cancelled_wrote_nothing(self, bench: Bench) -> None:
        async def handler(message: Message[Any]) -> None:
            write(message, "a")
            await asyncio.sleep(30)

        assert isinstance(bench.pipe(handler, timeout=0.2).handle(Message(1, "t")), Retry)
        assert bench.effects() == []
        assert is_clean(bench)

    def test_a_worker_that_is_stopped_in_it_gives_the_message_back(self, bench: Bench) -> None:
        settings = {"interrupts": lambda error: isinstance(error, KeyboardInterrupt), "stopping": lambda: True}
        pipeline = bench.pipe(writes("a"), writes("b", KeyboardInterrupt()), settings=settings)
        message = Message(1, "t")
        with pytest.raises(KeyboardInterrupt):
            pipeline.handle(message)
        assert bench.effects() == ["a"]
        assert isinstance(bench.pipe(writes("a"), writes("b"), worker="other").handle(message), Handled)
        assert bench.effects() == ["a", "b"]

    def test_one_stopped_in_the_commit_takes_no_mark_back(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        """The mark may hold: given back without it, the message's first handler ran again."""
        real = SqlTransaction.commit

        def commit(self: SqlTransaction, given: Commit) -> Settled:
            real(self, given)
            raise KeyboardInterrupt

        monkeypatch.setattr(SqlTransaction, "commit", commit)
        message = Message(1, "t")
        with pytest.raises(KeyboardInterrupt):
            bench.pipe(writes("a"), writes("b"), settings={"stopping": lambda: True}).handle(message)
        monkeypatch.setattr(SqlTransaction, "commit", real)
        bench.storage.release("w", [message.id])
        assert isinstance(bench.pipe(writes("a"), writes("b"), worker="other").handle(message), Handled)
        assert bench.effects() == ["a", "b"]


class TestWhatHandlersDo:
    """…to the connection, which is not theirs."""

    @pytest.mark.parametrize("how", ["commit", "begin", "swallowed", "autocommit", "close", "with"])
    def test_ending_the_transaction_is_a_failure_that_says_so(self, bench: Bench, how: str) -> None:
        def handler(message: Message[Any]) -> None:
            connection = message.connection
            if how == "autocommit":
                connection.execution_options(isolation_level="AUTOCOMMIT")
            if how == "begin":
                with connection.begin():
                    write(message, "a")
            if how == "with":
                with connection:
                    write(message, "a")
                return
            write(message, "a")
            if how == "close":
                connection.close()
            elif how == "swallowed":
                try:
                    connection.commit()
                except HandlerTransactionError:
                    raise ValueError from None
            else:
                connection.commit()

        outcome = bench.pipe(handler).handle(Message(1, "t"))

        assert isinstance(outcome, Retry)
        assert isinstance(outcome.error, ValueError if how == "swallowed" else HandlerTransactionError)
        assert bench.effects() == []
        assert is_clean(bench)

    def test_it_may_roll_back_what_it_wrote(self, bench: Bench) -> None:
        def handler(message: Message[Any]) -> None:
            write(message, "a")
            message.connection.rollback()
            write(message, "b")

        assert isinstance(bench.pipe(handler).handle(Message(1, "t")), Handled)
        assert bench.effects() == ["b"]

    @pytest.mark.parametrize("is_left_open", [False, True])
    def test_it_may_use_savepoints(self, bench: Bench, is_left_open: bool) -> None:
        def handler(message: Message[Any]) -> None:
            write(message, "a")
            try:
                with message.connection.begin_nested():
                    write(message, "b")
                    message.connection.execute(text("SELECT nonsense FROM nowhere"))
            except DBAPIError:
                pass
            if is_left_open:
                message.connection.begin_nested()
            write(message, "c")

        assert isinstance(bench.pipe(handler).handle(Message(1, "t")), Handled)
        assert bench.effects() == ["a", "c"]
        assert is_clean(bench)

    def test_going_on_after_an_error_of_postgres_is_a_failure(self, postgres_bench: Bench) -> None:
        def handler(message: Message[Any]) -> None:
            write(message, "a")
            with pytest.raises(DBAPIError):
                message.connection.execute(text("SELECT nonsense FROM nowhere"))

        outcome = postgres_bench.pipe(handler).handle(Message(1, "t"))
        assert isinstance(outcome, Retry)
        assert isinstance(outcome.error, HandlerTransactionError)
        assert (postgres_bench.effects(), is_clean(postgres_bench)) == ([], True)

    def test_so_it_is_after_one_by_which_sqlite_undid_everything(self, sqlite_bench: Bench) -> None:
        sqlite_bench.ask("CREATE UNIQUE INDEX only ON effects (what)")

        def handler(message: Message[Any]) -> None:
            write(message, "a")
            with pytest.raises(IntegrityError):
                message.connection.execute(text("INSERT OR ROLLBACK INTO effects VALUES ('a')"))

        outcome = sqlite_bench.pipe(handler).handle(Message(1, "t"))
        assert isinstance(outcome, Retry)
        assert isinstance(outcome.error, HandlerTransactionError)
        assert (sqlite_bench.effects(), is_clean(sqlite_bench)) == ([], True)

    def test_what_fails_at_the_commit_is_the_handlers_failure(self, bench: Bench) -> None:
        bench.ask("DROP TABLE IF EXISTS child")
        bench.ask("DROP TABLE IF EXISTS parent")
        bench.ask("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
        bench.ask("CREATE TABLE child (of INTEGER REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED)")

        def handler(message: Message[Any]) -> None:
            write(message, "a")
            message.connection.execute(text("INSERT INTO child VALUES (7)"))

        def checks(message: Message[Any]) -> None:
            if not bench.is_postgres:
                message.connection.rollback()  # it is off in SQLite, and cannot be turned on in a transaction
                message.connection.connection.driver_connection.execute("PRAGMA foreign_keys = ON")
            handler(message)

        outcomes = to_the_end(bench.pipe(checks), Message(1, "t"))
        assert [type(outcome) for outcome in outcomes] == [Retry, Retry, Dead]
        (letter,) = bench.storage.dead()
        assert letter.reason is Reason.EXHAUSTED
        assert "IntegrityError" in letter.error
        assert (bench.effects(), is_clean(bench)) == ([], True)


class TestErrors:
    def costs(self, bench: Bench, handler: Function) -> int:
        """Return the retries that one try costs."""
        outcome = bench.pipe(handler).handle(Message(1, "t"))
        assert isinstance(outcome, Retry | Busy)
        assert not isinstance(outcome, Busy) or outcome.until > 0, "a hot loop, where the cause lasts"
        assert bench.effects() == []
        assert is_clean(bench)
        return bench.storage.counters("t").retries

    @pytest.mark.parametrize("state", ["40001", "40P01", "53200"])
    def test_what_passes_costs_no_retry(self, postgres_bench: Bench, state: str) -> None:
        def handler(message: Message[Any]) -> None:
            write(message, "a")
            message.connection.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{state}'; END $$"))

        assert self.costs(postgres_bench, handler) == 0

    @pytest.mark.parametrize("state", ["57014", "55P03", "23505", "22012"])
    def test_a_handlers_own_limits_and_mistakes_cost_one(self, postgres_bench: Bench, state: str) -> None:
        """A statement that always runs past `statement_timeout` would be tried for ever."""

        def handler(message: Message[Any]) -> None:
            write(message, "a")
            message.connection.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{state}'; END $$"))

        assert self.costs(postgres_bench, handler) == 1

    @pytest.mark.parametrize("goes_on", [False, True])
    def test_a_connection_that_was_lost_costs_none(self, postgres_bench: Bench, goes_on: bool) -> None:
        def handler(message: Message[Any]) -> None:
            write(message, "a")
            number = message.connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
            postgres_bench.ask(f"SELECT pg_terminate_backend({number})")
            try:
                message.connection.execute(text("SELECT 1"))
            except OperationalError:
                if not goes_on:
                    raise

        assert self.costs(postgres_bench, handler) == 0

    def test_nor_does_one_that_cannot_be_opened(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = bench.storage._backend.engine

        def refuse(*given: Any) -> None:
            monkeypatch.undo()
            cause: Exception = psycopg.OperationalError("no connection")
            if engine.dialect.name == "sqlite":
                cause = sqlite3.OperationalError("database is locked")
                cause.sqlite_errorcode = sqlite3.SQLITE_BUSY
            raise OperationalError("connect", {}, cause)

        pipeline = bench.pipe(writes("a"))
        (work,) = pipeline.begin([Message(1, "t")])
        monkeypatch.setattr(engine, "connect", refuse)
        (outcome,) = pipeline.settle([pipeline.run(work)])  # type: ignore[arg-type]
        assert isinstance(outcome, Busy)
        assert bench.storage.counters("t").retries == 0

    def test_an_error_of_another_database_costs_one(self, bench: Bench, tmp_path: Path) -> None:
        other = create_engine(f"sqlite:///{tmp_path}/nowhere/other.db")

        def handler(message: Message[Any]) -> None:
            write(message, "a")
            other.connect()

        assert self.costs(bench, handler) == 1

    def test_a_locked_sqlite_costs_none(self, sqlite_bench: Bench) -> None:
        def handler(message: Message[Any]) -> None:
            message.connection.execute(text("PRAGMA busy_timeout = 50"))
            with sqlite3.connect(sqlite_bench.url.removeprefix("sqlite:///")) as other:
                message.connection.rollback()
                other.execute("BEGIN IMMEDIATE")
                write(message, "a")

        assert self.costs(sqlite_bench, handler) == 0


class Lossy(SqlStorage):
    """Loses the answer to commits of handlers' transactions, which hold or not; perhaps it cannot tell either."""

    holds, tells = True, True
    left = 1

    def was_accepted(self, commit: Commit) -> bool:
        if not self.tells:
            raise StorageUnavailableError("away")
        return super().was_accepted(commit)


class TestALostCommit:
    @pytest.fixture
    def lossy(self, bench: Bench) -> Lossy:
        storage = Lossy(bench.storage._backend)
        bench.storage = storage

        @event.listens_for(storage._backend.engine, "commit", insert=True)
        def lose(connection: Any) -> None:
            if "watch_lent" in connection.get_execution_options() and storage.left:
                storage.left -= 1
                driver = connection.connection.driver_connection
                driver.commit() if storage.holds else driver.rollback()
                connection.invalidate()
                raise OperationalError("COMMIT", {}, psycopg.OperationalError("database is locked: lost"))

        return storage

    @pytest.mark.parametrize("holds", [True, False])
    @pytest.mark.parametrize("handler", [0, 1])
    def test_it_is_settled_as_it_was(self, bench: Bench, lossy: Lossy, holds: bool, handler: int) -> None:
        lossy.holds, message = holds, Message(1, "t", max_retries=0)
        pipeline = bench.pipe(writes("a"), writes("b"))
        lossy.left = 0
        if handler == 1:
            first = bench.pipe(writes("a"), writes("b", ValueError()))
            message = first.handle(replace(message, max_retries=1)).message  # type: ignore[attr-defined]
        lossy.left = 1
        outcome = pipeline.handle(message)
        assert isinstance(outcome, Handled if holds else Busy)
        assert isinstance(pipeline.handle(message), Duplicate if holds else Handled)
        assert bench.effects() == ["a", "b"]

    @pytest.mark.parametrize("holds", [True, False])
    @pytest.mark.parametrize("handlers", ["ab", "a"])
    def test_a_stop_before_it_can_be_told_repeats_nothing(
        self, bench: Bench, lossy: Lossy, holds: bool, handlers: str
    ) -> None:
        """Given back as it was before, a message whose mark held lost it."""
        lossy.holds, lossy.tells = holds, False
        steps = [writes(what) for what in handlers]
        outcome = bench.pipe(*steps, settings={"stopping": lambda: True}).handle(Message(1, "t"))
        assert isinstance(outcome, Snoozed)
        lossy.tells = True
        bench.storage.release("w", [outcome.message.id])
        again = bench.pipe(*steps, worker="other").handle(outcome.message)
        assert isinstance(again, Duplicate if holds and handlers == "a" else Handled)
        assert bench.effects() == list(handlers)
