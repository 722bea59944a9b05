from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from watch_tasks import HandlerExitError, HandlerTimeoutError, Message
from watch_tasks.handlers import close_loop, run_handler
from watch_tasks.topics import Handler

#: Seconds in which everything here must be done.
PATIENCE = 20.0
#: Seconds of the timeout that the handlers here run past.
SHORT = 0.1


def run(function: Callable[[Message[Any]], Any], seconds: float | None = None, **options: Any) -> None:
    run_handler(Handler("h", function), Message(1, "t"), seconds, **options)


def in_thread(function: Callable[[Message[Any]], Any], seconds: float | None = None, **options: Any) -> None:
    def work() -> None:
        try:
            run(function, seconds, **options)
        finally:
            close_loop()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result(PATIENCE)


def block(seconds: float = PATIENCE) -> None:
    """Hold the thread, as a handler that waits for something would."""
    threading.Event().wait(seconds)


@pytest.fixture(params=[run, in_thread], ids=["main thread", "thread"])
def anywhere(request: pytest.FixtureRequest) -> Callable[..., None]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _no_loop_left() -> Any:
    yield
    close_loop()


class TestAnywhere:
    def test_a_handler_gets_the_message(self, anywhere: Callable[..., None]) -> None:
        got: list[Any] = []
        anywhere(lambda message: got.append(message.data))
        assert got == [1]

    def test_an_async_handler_is_awaited(self, anywhere: Callable[..., None]) -> None:
        got: list[Any] = []

        async def handler(message: Message[Any]) -> None:
            await asyncio.sleep(0)
            got.append(message.data)

        anywhere(handler)
        anywhere(handler, PATIENCE)
        assert got == [1, 1]

    def test_its_error_passes_as_it_is(self, anywhere: Callable[..., None]) -> None:
        error = ValueError("no")

        def handler(message: Message[Any]) -> None:
            raise error

        with pytest.raises(ValueError, match="no") as caught:
            anywhere(handler, PATIENCE)
        assert caught.value is error

    def test_its_own_timeout_error_is_not_the_topics(self, anywhere: Callable[..., None]) -> None:
        async def handler(message: Message[Any]) -> None:
            raise TimeoutError("the shop is slow")

        with pytest.raises(TimeoutError, match="the shop") as caught:
            anywhere(handler, PATIENCE)
        assert not isinstance(caught.value, HandlerTimeoutError)

    @pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()])
    def test_what_would_end_the_worker_becomes_an_error(
        self, anywhere: Callable[..., None], error: BaseException
    ) -> None:
        def handler(message: Message[Any]) -> None:
            raise error

        with pytest.raises(HandlerExitError, match=type(error).__name__) as caught:
            anywhere(handler, PATIENCE)
        assert caught.value.__cause__ is error

    def test_the_drivers_own_interrupts_pass(self, anywhere: Callable[..., None]) -> None:
        def handler(message: Message[Any]) -> None:
            raise SystemExit(-241)

        with pytest.raises(SystemExit):
            anywhere(handler, interrupts=lambda error: isinstance(error, SystemExit))

    def test_an_async_handler_is_cancelled_on_time(self, anywhere: Callable[..., None]) -> None:
        cancelled: list[bool] = []

        async def handler(message: Message[Any]) -> None:
            try:
                await asyncio.sleep(PATIENCE)
            except asyncio.CancelledError:
                cancelled.append(True)
                raise

        started = time.monotonic()
        with pytest.raises(HandlerTimeoutError, match="`h` of topic `t`"):
            anywhere(handler, SHORT)
        assert time.monotonic() - started < 1
        assert cancelled == [True]

    def test_tasks_that_a_handler_left_behind_are_cancelled(self, anywhere: Callable[..., None]) -> None:
        ends: list[str] = []

        async def lingers() -> None:
            try:
                await asyncio.sleep(PATIENCE)
            except asyncio.CancelledError:
                ends.append("cancelled")
                raise

        async def handler(message: Message[Any]) -> None:
            task = asyncio.create_task(lingers())
            await asyncio.sleep(0)
            assert not task.done()

        anywhere(handler)
        assert ends == ["cancelled"]

    def test_after_a_timeout_the_next_one_runs(self, anywhere: Callable[..., None]) -> None:
        async def sleeps(message: Message[Any]) -> None:
            await asyncio.sleep(PATIENCE if not got else 0)
            got.append(1)

        got: list[int] = []
        with pytest.raises(HandlerTimeoutError):
            anywhere(sleeps, SHORT)
        got.append(0)
        anywhere(sleeps, PATIENCE)
        assert got == [0, 1]

    def test_a_loop_is_kept_from_message_to_message(self) -> None:
        loops: list[Any] = []

        async def handler(message: Message[Any]) -> None:
            loops.append(asyncio.get_running_loop())

        run(handler)
        run(handler)
        assert loops[0] is loops[1]


class TestMainThread:
    def test_a_sync_handler_is_cut_off_on_time(self) -> None:
        started = time.monotonic()
        with pytest.raises(HandlerTimeoutError):
            run(lambda message: block(), SHORT)
        assert time.monotonic() - started < 1

    def test_a_handler_that_swallows_the_cut_is_cut_again(self) -> None:
        cuts: list[BaseException] = []

        def handler(message: Message[Any]) -> None:
            try:
                block()
            except Exception as exc:
                cuts.append(exc)
            block()

        with pytest.raises(HandlerTimeoutError):
            run(handler, SHORT)
        assert len(cuts) == 1

    def test_a_handler_that_swallows_the_cut_and_returns_has_timed_out(self) -> None:
        def handler(message: Message[Any]) -> None:
            try:
                block()
            except HandlerTimeoutError:
                return

        with pytest.raises(HandlerTimeoutError):
            run(handler, SHORT)

    def test_an_async_handler_that_blocks_its_loop_is_cut_off(self) -> None:
        async def handler(message: Message[Any]) -> None:
            block()

        started = time.monotonic()
        with pytest.raises(HandlerTimeoutError):
            run(handler, SHORT)
        assert time.monotonic() - started < 5

    def test_nothing_rings_afterwards_and_the_alarm_is_its_owners_again(self) -> None:
        def owner(*args: Any) -> None: ...

        before = signal.signal(signal.SIGALRM, owner)
        try:
            run(lambda message: None, SHORT)
            with pytest.raises(HandlerTimeoutError):
                run(lambda message: block(), SHORT)
            assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
            assert signal.getsignal(signal.SIGALRM) is owner
        finally:
            signal.signal(signal.SIGALRM, before)

    def test_without_a_limit_no_alarm_is_set(self) -> None:
        seen: list[Any] = []
        run(lambda message: seen.append(signal.getsignal(signal.SIGALRM)))
        assert seen == [signal.getsignal(signal.SIGALRM)]

    def test_nothing_left_of_the_timeout_is_a_timeout(self) -> None:
        with pytest.raises(HandlerTimeoutError):
            run(lambda message: block(SHORT), 0.0)

    def test_a_process_that_cannot_even_be_cut_off_is_ended(self) -> None:
        program = """
import re, threading
from watch_tasks import Message
from watch_tasks.handlers import run_handler
from watch_tasks.topics import Handler
# A search that takes for ever, in C, holding the interpreter.
run_handler(Handler("h", lambda m: re.match("(a+)+$", "a" * 100 + "b")), Message(1, "t"), 0.1, kill_after=0.3)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=PATIENCE, check=False)
        assert done.returncode == 1
        assert b"Timeout" in done.stderr


class TestThread:
    def test_a_sync_handler_is_reported_at_its_deadline(self, caplog: pytest.LogCaptureFixture) -> None:
        reported = threading.Event()
        seen: list[bool] = []
        handler = logging.Handler()
        handler.emit = lambda record: reported.set()  # type: ignore[method-assign]
        logger = logging.getLogger("watch_tasks.handlers")
        logger.addHandler(handler)
        try:
            with pytest.raises(HandlerTimeoutError):
                in_thread(lambda message: seen.append(reported.wait(PATIENCE)), SHORT)
        finally:
            logger.removeHandler(handler)
        assert seen == [True]
        assert "handler `h` of topic `t`" in caplog.text
        assert "cannot be cut off in a thread" in caplog.text

    def test_who_is_done_in_time_is_not_reported(self, caplog: pytest.LogCaptureFixture) -> None:
        in_thread(lambda message: None, SHORT)
        with pytest.raises(HandlerTimeoutError):  # the next deadline passes, and is reported
            in_thread(lambda message: block(3 * SHORT), 2 * SHORT)
        assert len(caplog.records) == 1

    def test_an_async_handler_that_blocks_its_loop_has_timed_out(self) -> None:
        async def handler(message: Message[Any]) -> None:
            block(2 * SHORT)

        with pytest.raises(HandlerTimeoutError):
            in_thread(handler, SHORT)

    def test_deadlines_of_many_threads_are_kept_apart(self, caplog: pytest.LogCaptureFixture) -> None:
        def work(number: int) -> str:
            try:
                run(lambda message: block(2 * SHORT if number % 2 else 0), SHORT)
            except HandlerTimeoutError:
                return "timeout"
            return "done"

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(work, range(8))) == ["done", "timeout"] * 4
        assert len(caplog.records) == 4
