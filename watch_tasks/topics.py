"""Topics: a named kind of message with its schema, its rules and its handlers in order.

A topic knows neither Celery nor a queue: it sends into an `Outlet` (see `sending.py`). The module is not called `topic`
because the function of that name would hide it.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeAlias, TypeVar, overload

from msgspec.structs import replace

from .errors import MessageError, SchemaError, TopicError
from .message import Message, Once, check_index, index_of
from .packets import MOST_MEMBERS
from .registry import registry
from .retry import RetryPolicy
from .schema import Schema, dump, dump_directly, schema_of
from .seconds import CENTURY, is_seconds
from .sending import Outlet, Sender, SendReport, Verdict, send_all

__all__ = [
    "WEEK",
    "BatchAnswer",
    "BatchHandler",
    "Handler",
    "Topic",
    "check_topic",
    "topic",
]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
B = TypeVar("B", bound="Callable[..., BatchAnswer | Awaitable[BatchAnswer]]")

#: Seconds in a week: how long records are kept by default, as a Celery result backend would (there: one day).
WEEK: Final = 604800.0
#: Seconds in a day: the shortest retention, so that a record outlives every copy in flight.
DAY: Final = 86400.0

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)

#: What a batch handler returns. None: every message is handled. A sequence as long as the one it was given: None or an
#: exception for each message, in its order. A mapping of message ids: those that failed, and why. `Snooze` and
#: `Discard` are given like any exception.
BatchAnswer: TypeAlias = "Sequence[Exception | None] | Mapping[str, Exception | None] | None"


@dataclass(frozen=True, slots=True)
class Handler:
    """One step of a topic: a callable that takes the message, under a name that is stored."""

    name: str
    function: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class BatchHandler(Handler):
    """The one step of a topic whose messages are handled many at a time: its callable takes a list of them."""

    #: Messages that one call gets at most.
    size: int
    #: Seconds that the first message of a batch waits for others.
    seconds: float


def check_topic(name: object) -> str:
    """Return the name of a topic unchanged.

    Raises:
        TopicError: it is no name of a topic.
    """
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    raise TopicError(
        f"the name of a topic must be 1 to 64 of a-z, 0-9, `.`, `_`, `-`, the first a letter or a digit, got {name!r}"
    )


class Topic(Generic[T]):
    """A kind of message. Make one with `topic()`, which also registers it for workers.

    Raises:
        TopicError: the name is no name of a topic.
        TypeError: the schema, the retry policy or `index` is none.
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        name: str,
        *,
        schema: type[T] | Schema[T] | None = None,
        index: Callable[[T], str] | None = None,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - a frozen value
        timeout: float | None = None,
        once: Once = "message",
        queue: str | None = None,
        keep_data: bool = True,
        retention: float | None = WEEK,
        max_waiting: int | None = None,
        transactional: bool = False,
    ) -> None:
        self.name = check_topic(name)
        self.schema = schema_of(schema)
        if index is not None and not callable(index):
            raise TypeError(f"topic `{name}`: `index` must be a callable that takes the data, or None, got {index!r}")
        self.index = index
        if not isinstance(retry, RetryPolicy):
            raise TypeError(f"topic `{name}`: `retry` must be a RetryPolicy, got {retry!r}")
        self.retry = retry
        self.timeout = _positive("timeout", timeout)
        if once not in ("message", "index", "none"):
            raise ValueError(f'topic `{name}`: `once` must be "message", "index" or "none", got {once!r}')
        if transactional and once == "none":
            raise ValueError(f'topic `{name}`: `transactional` needs a claim, which `once="none"` does without')
        self.once: Once = once
        self.transactional = transactional
        if queue is not None and not (isinstance(queue, str) and queue):
            raise ValueError(f"topic `{name}`: `queue` must be the name of a queue, or None, got {queue!r}")
        self.queue = queue
        self.keep_data = keep_data
        if retention is not None and not is_seconds(retention, DAY):
            raise ValueError(
                f"topic `{name}`: `retention` must be at least {DAY:.0f} seconds (a day) or None (for ever), "
                f"got {retention!r}"
            )
        self.retention = retention
        if max_waiting is not None and not _is_count(max_waiting):
            raise ValueError(f"topic `{name}`: `max_waiting` must be at least 1, or None, got {max_waiting!r}")
        self.max_waiting = max_waiting
        self.handlers: tuple[Handler, ...] = ()
        self._outlet: Outlet | None = None

    def __repr__(self) -> str:
        return f"<Topic {self.name}: {', '.join(handler.name for handler in self.handlers) or 'no handlers'}>"

    @overload
    def handler(self, function: F, /) -> F: ...
    @overload
    def handler(self, function: None = None, /, *, name: str | None = None) -> Callable[[F], F]: ...

    def handler(self, function: F | None = None, /, *, name: str | None = None) -> F | Callable[[F], F]:
        """Add a handler, sync or async, after those there are. Use as `@t.handler` or `@t.handler(name="…")`.

        Its name is stored with unfinished messages, which resume by it: give one where the function may be renamed.

        Returns:
            The function, unchanged.

        Raises:
            TopicError: the topic has a handler of that name, or a batch handler.
        """

        def add(function: F) -> F:
            self._add(Handler(name or _name_of(self._checked(function)), function))
            return function

        return add if function is None else add(function)

    @overload
    def batch_handler(self, function: B, /) -> B: ...
    @overload
    def batch_handler(
        self, function: None = None, /, *, size: int = 100, seconds: float = 1.0, name: str | None = None
    ) -> Callable[[B], B]: ...

    def batch_handler(
        self, function: B | None = None, /, *, size: int = 100, seconds: float = 1.0, name: str | None = None
    ) -> B | Callable[[B], B]:
        """Handle messages many at a time, by one function, sync or async, that takes a list of them.

        It returns a `BatchAnswer`: None when every message is handled, else what became of each. When it raises, the
        call counts as failed, and is repeated with halves of its messages until those that fail stand alone; see
        docs/batches.md. `Snooze` raised is a verdict on all of them. The topic's timeout is that of one call.

        Args:
            function: the handler, where it is used as `@t.batch_handler`.
            size: messages that one call gets at most.
            seconds: how long the first message of a batch waits for others, at most.
            name: as that of a plain handler: stored with unfinished messages.

        Returns:
            The function, unchanged.

        Raises:
            TopicError: the topic has a handler already, or is transactional.
            ValueError: a number is out of its range.
        """
        if not _is_count(size):
            raise ValueError(f"topic `{self.name}`: `size` must be a whole number above 0, got {size!r}")
        if not is_seconds(seconds):
            raise ValueError(f"topic `{self.name}`: `seconds` must be 0 or more, got {seconds!r}")

        def add(function: B) -> B:
            if self.transactional:
                raise TopicError(
                    f"topic `{self.name}` is transactional and can have no batch handler: a transaction is that of "
                    "one message; give it plain handlers, or leave out `transactional`"
                )
            self._add(BatchHandler(name or _name_of(self._checked(function)), function, size, seconds))
            return function

        return add if function is None else add(function)

    @property
    def batch(self) -> BatchHandler | None:
        """Its batch handler, where it has one."""
        handler = self.handlers[0] if self.handlers else None
        return handler if isinstance(handler, BatchHandler) else None

    def _checked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if not callable(function):
            raise TypeError(f"topic `{self.name}`: a handler must be callable, got {function!r}")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"topic `{self.name}`: handler `{_name_of(function)}` must not yield: nothing would run it")
        return function

    def _add(self, handler: Handler) -> None:
        if self.handlers and (self.batch or isinstance(handler, BatchHandler)):
            raise TopicError(
                f"topic `{self.name}` has a handler `{self.handlers[0].name}` already, so it can have no "
                f"`{handler.name}`: a topic has plain handlers, or one batch handler and no other"
            )
        if any(handler.name == other.name for other in self.handlers):
            raise TopicError(
                f"topic `{self.name}` has a handler `{handler.name}` already; "
                'give the second another name: @topic.handler(name="…")'
            )
        self.handlers += (handler,)

    def bind(self, outlet: Outlet) -> None:
        """Send through this outlet from now on. The last call wins."""
        self._outlet = outlet

    @property
    def is_bound(self) -> bool:
        """Whether an outlet was given; an unbound topic takes the package's default app at its first send."""
        return self._outlet is not None

    def message(
        self,
        data: T | Message[T],
        *,
        index: str | None = None,
        max_retries: int | None = None,
        once: Once | None = None,
    ) -> Message[T]:
        """Return the message that `send` would send. A Message keeps its id, so that it may be sent again.

        Raises:
            MessageError: the index or another value is out of its range.
        """
        self.check_once(once or (data.once if isinstance(data, Message) else None))
        if not isinstance(data, Message):
            return Message(data, self.name, index=self.named(data, index) or "", max_retries=max_retries, once=once)
        if data.topic not in ("", self.name):
            raise TopicError(f"a message of topic `{data.topic}` cannot be sent as `{self.name}`")
        named = check_index(index) if index is not None else data.index
        if named == data.id:  # nobody named it
            named = self.index_of(data.data) or named
        return replace(
            data,
            topic=self.name,
            index=named,
            max_retries=data.max_retries if max_retries is None else max_retries,
            once=once or data.once,
        )

    def send(
        self,
        data: T | Message[T],
        *,
        index: str | None = None,
        max_retries: int | None = None,
        once: Once | None = None,
        delay: float = 0.0,
    ) -> Message[T]:
        """Send one message and return it, when the broker has it.

        Args:
            data: what the handlers get, or a message (one that was sent before keeps its id).
            index: the business name; else what the data says, else the topic's `index=`, else the id.
            max_retries: this message's own limit.
            once: this message's own once-rule.
            delay: seconds until it may be handled.

        Raises:
            MessageError: data that does not fit the schema, is too large, or has no valid index. Nothing was sent.
            QueueFullError: the queue's bound is reached. Nothing was sent.
            SendFailedError: the broker cannot be reached. Nothing was sent.
            SendUnknownError: the answer was lost; sending `error.message` again is safe.
            ValueError: `delay` is no number of seconds, or more than a hundred years.
        """
        if delay != 0 and not (is_seconds(delay, -math.inf) and delay <= CENTURY):
            raise ValueError(f"`delay` must be seconds, a hundred years at most, got {delay!r}")
        message = self.message(data, index=index, max_retries=max_retries, once=once)
        self._bound().push(replace(message, data=self.encode(message.data)), delay=delay)
        return message

    def send_many(
        self,
        items: Iterable[T | Message[T]],
        *,
        on_verdict: Callable[[Message[T], Verdict], None] | None = None,
    ) -> SendReport:
        """Send every item of an iterable, many at once; it is read as it goes and may be endless.

        An item that cannot be sent (its shape, its size, a full queue) does not keep the others from being sent. What
        waits for more to go with it is sent when the iterable ends, in whatever way; for one that is slow in coming,
        see `sender`.

        Args:
            items: data, or messages.
            on_verdict: called with each message and what became of it.

        Raises:
            SendFailedError: the broker cannot be reached. Every item read has had its verdict.
        """
        return send_all(self, self._bound(), items, on_verdict)

    def sender(
        self,
        *,
        size: int = MOST_MEMBERS,
        linger: float = 0.05,
        on_verdict: Callable[[Message[T], Verdict], None] | None = None,
    ) -> Sender[T]:
        """Return a sender for a stream of messages, which are sent many at once.

            with alarm.sender() as sender:
                for line in log:
                    sender.send(Alarm(line.host, line.level))

        Args:
            size: messages that are sent together at most, 1 to 500.
            linger: seconds that a message waits for others to go with it, at most. What a program that is killed has
                not sent yet is lost with it: 0 sends each at once.
            on_verdict: called with each message and what became of it, in the thread that sent it.
        """
        return Sender(self, self._bound(), size=size, linger=linger, on_verdict=on_verdict)

    def check_once(self, once: Once | None) -> None:
        """See that a message's own once-rule suits the topic.

        Raises:
            MessageError: it does not.
        """
        if self.transactional and once == "none":
            raise MessageError(f'topic `{self.name}` is transactional: a message of it cannot have `once="none"`')

    def named(self, data: T, index: str | None = None) -> str | None:
        """Return the index that is given, else what `index_of` says.

        Raises:
            MessageError: it is no index.
        """
        return check_index(index) if index is not None else self.index_of(data)

    def index_of(self, data: T) -> str | None:
        """Return what the data says as an Indexer, else what the topic's `index=` says of it, else None.

        Raises:
            MessageError: what they say is no index, or they failed.
        """
        try:
            named = index_of(data)
            return check_index(self.index(data)) if named is None and self.index else named
        except MessageError:
            raise
        except Exception as exc:
            raise MessageError(f"topic `{self.name}`: finding the index failed: {type(exc).__name__}: {exc}") from exc

    def encode(self, data: T) -> Any:
        """Return the data in plain JSON values.

        Raises:
            SchemaError: it does not fit; the text says where.
        """
        try:
            return self.schema.encode(data)
        except Exception as exc:  # a schema is the user's: whatever it raises means "does not fit"
            raise self._unfit(exc) from exc

    def dump(self, data: T) -> bytes:
        """Return the data in plain JSON values, as canonical JSON.

        Raises:
            SchemaError: it does not fit; the text says where.
        """
        raw = dump_directly(self.schema, data)
        return dump(self.encode(data)) if raw is None else raw

    def decode(self, plain: Any) -> T:
        """Return the data that plain JSON values stand for.

        Raises:
            SchemaError: they do not fit; the text says where.
        """
        try:
            return self.schema.decode(plain)
        except Exception as exc:  # as above
            raise self._unfit(exc) from exc

    def _unfit(self, error: Exception) -> SchemaError:
        return SchemaError(f"topic `{self.name}`: {error}")

    def _bound(self) -> Outlet:
        if self._outlet is None:
            self._outlet = registry.default_outlet()
        return self._outlet


def topic(
    name: str,
    *,
    schema: type[T] | Schema[T] | None = None,
    index: Callable[[T], str] | None = None,
    retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - a frozen value
    timeout: float | None = None,
    once: Once = "message",
    queue: str | None = None,
    keep_data: bool = True,
    retention: float | None = WEEK,
    max_waiting: int | None = None,
    transactional: bool = False,
) -> Topic[T]:
    """Define a topic and register it: under every Celery app it becomes the task `watch.<name>`.

    Args:
        name: permanent; stored messages refer to it. 1 to 64 of a-z, 0-9, `.`, `_`, `-`.
        schema: the shape of the data; None: plain JSON values.
        index: how to name data that does not name itself.
        retry: when a failed message is tried again.
        timeout: seconds that one delivery may take, all its handlers together; None: no limit.
        once: "message": redeliveries of one id are recognised; a new message under an old index is handled, and its
            record replaces the older. "index": one handling per index within the retention. "none": every delivery
            runs, unclaimed and unfenced.
        queue: the Celery queue; None: the app's default queue. Workers read all of them.
        keep_data: whether the record keeps the data.
        retention: seconds that a record is kept, at least a day; None: for ever. Default a week.
        max_waiting: how many messages may wait in the queue when one is sent; beyond that, a send waits for room, and
            then raises QueueFullError. Holds back senders of this package only, and never retries; about as exact as
            senders are few. None: no bound.
        transactional: whether each handler has a transaction of the storage, in `message.connection`: what it writes
            by that is committed together with the record that its message was handled, so it happens once whatever
            crashes. Needs a SQL storage.

    Raises:
        TopicError: the name is no name of a topic, or another module uses it.
        TypeError: the schema, the retry policy or `index` is none.
        ValueError: a number is out of its range.
    """
    made: Topic[T] = Topic(
        name,
        schema=schema,
        index=index,
        retry=retry,
        timeout=timeout,
        once=once,
        queue=queue,
        keep_data=keep_data,
        retention=retention,
        max_waiting=max_waiting,
        transactional=transactional,
    )
    caller = inspect.currentframe()
    module = caller.f_back.f_globals.get("__name__", "?") if caller and caller.f_back else "?"
    registry.add(made, module)
    return made


def _positive(name: str, seconds: float | None) -> float | None:
    if seconds is not None and not (is_seconds(seconds) and seconds > 0):
        raise ValueError(f"`{name}` must be seconds above 0, or None, got {seconds!r}")
    return seconds


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", None) or type(function).__name__
