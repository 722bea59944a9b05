"""Sending the lines of a file, in constant memory and in their order, with a verdict for each."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import IO, TYPE_CHECKING, Any, Final

from ..errors import MessageError, TooLargeError, TopicError
from ..message import Message, Once
from ..schema import dump
from ..sending import Verdict
from ..topics import Topic, check_topic
from .lines import Complain, is_file, parse, reading
from .output import emit, note
from .pace import Pace, Stop

if TYPE_CHECKING:
    from .program import Program

__all__ = ["Counts", "Route", "send_lines"]


#: Seconds that a line waits for others to go with it, at most.
_SHORT: Final = 0.05
_LONG: Final = 60.0


@dataclass(frozen=True, slots=True)
class Route:
    """How a line becomes a message: which of its fields is what, and what holds for all."""

    #: The topic of every line, or None where `topic_field` names it.
    topic: str | None
    topic_field: str | None
    index_field: str | None
    #: None: the whole line is the data.
    data_field: str | None
    once: Once | None
    max_retries: int | None


@dataclass(slots=True)
class Counts:
    """What became of the lines so far."""

    sent: int = 0
    refused: int = 0
    unknown: int = 0
    started: float = field(default_factory=time.monotonic)
    #: Verdicts come in the sender's thread too.
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, verdict: Verdict) -> None:
        """Count one line."""
        with self.lock:
            setattr(self, verdict.value, getattr(self, verdict.value) + 1)

    def told(self) -> str:
        """Return them in a few words."""
        return f"{self.sent:,} sent, {self.refused:,} refused"


def send_lines(
    program: Program, source: IO[bytes], route: Route, *, dry_run: bool, rate: float | None = None
) -> Counts:
    """Send every line of `source`; print bad lines to stderr and the counts to stdout, however it ends.

    Lines that follow each other closely go many at a time; one that nothing follows waits a moment only.

    Args:
        program: what to send through.
        source: JSON lines. Empty ones are passed over.
        route: how they become messages.
        dry_run: check them only; `sent` counts those that would be.
        rate: messages a second at most; None: as many as go.

    Raises:
        SendFailedError: the broker went away; the lines before were sent.
        KeyboardInterrupt: somebody pressed Ctrl-C; every line that was read was sent, or told.
    """
    counts = Counts()
    pace = Pace(None if dry_run else rate)
    # The lines of a file are all there: none waits for one that is long in coming.
    linger = _LONG if is_file(source) and not rate else _SHORT
    if route.topic:
        program.topic(route.topic)  # what is wrong with its module is said before the first line is read
    try:
        with reading(source, counts.told) as (lines, complain), Stop() as stop:
            reader = _Reader(program, route, counts, complain, binds=not dry_run)
            try:
                # Runs of one topic: what was read of one is sent before what follows of another.
                for topic, run in groupby(reader.messages(stop.reading(lines, pace)), key=reader.topic_of):
                    with nullcontext() if dry_run else topic.sender(linger=linger, on_verdict=reader.settle) as sender:
                        for message in run:
                            if sender is None:
                                reader.settle(message, Verdict.SENT)
                            else:
                                sender.send(message)
                            pace.count()
            finally:
                reader.end()
    finally:
        emit(
            {
                "sent": counts.sent,
                "refused": counts.refused,
                "unknown": counts.unknown,
                "seconds": round(time.monotonic() - counts.started, 3),
            }
        )
    if dry_run:
        note("dry run: nothing was sent")
    return counts


class _Reader:
    """Turns lines into messages, and remembers which line a message was until its verdict."""

    def __init__(self, program: Program, route: Route, counts: Counts, complain: Complain, *, binds: bool) -> None:
        self._program = program
        self._route = route
        self._counts = counts
        self._complain = complain
        self._binds = binds
        self._topics: dict[str, Topic[Any]] = {}
        self._lines: dict[str, int] = {}

    def messages(self, lines: Iterator[bytes]) -> Iterator[Message[Any]]:
        """Yield a message for each good line."""
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                message = self._message(line)
            except (ValueError, TopicError) as exc:  # MessageError is a ValueError
                self._refuse(number, str(exc))
                continue
            self._lines[message.id] = number
            yield message

    def topic_of(self, message: Message[Any]) -> Topic[Any]:
        return self._topics[message.topic]

    def settle(self, message: Message[Any], verdict: Verdict) -> None:
        """Take note of what became of a message."""
        number = self._lines.pop(message.id, 0)
        if verdict is Verdict.REFUSED:
            # What does not fit or is too large was refused before.
            full = "" if self._topics[message.topic].max_waiting is None else " the queue is full, or"
            self._refuse(number, f"not sent:{full} the broker could not be reached")
            return
        self._counts.note(verdict)
        if verdict is Verdict.UNKNOWN:
            self._complain(number, "the broker's answer was lost: it was sent, or it was not")

    def end(self) -> None:
        """Tell of the lines that nothing became of, because those before them ended it."""
        while self._lines:
            self._refuse(self._lines.popitem()[1], "not sent: a line before it ended the command")

    def _refuse(self, number: int, error: str) -> None:
        self._counts.note(Verdict.REFUSED)
        self._complain(number, error)

    def _message(self, line: bytes) -> Message[Any]:
        route = self._route
        try:
            value = parse(line)
        except ValueError as exc:
            raise ValueError(f"expected JSON, {exc}") from exc
        name = check_topic(route.topic if route.topic_field is None else _field(value, route.topic_field))
        topic = self._topics.get(name)
        if topic is None:
            topic = self._topics[name] = self._program.topic(name)
            if self._binds:
                self._program.bind(topic)
        index = None if route.index_field is None else _index(_field(value, route.index_field), route.index_field)
        data = value if route.data_field is None else _field(value, route.data_field)
        message = topic.message(topic.decode(data), index=index, once=route.once, max_retries=route.max_retries)
        size, limit = len(dump(topic.encode(message.data))), self._program.settings.max_payload
        if size > limit:
            raise TooLargeError(name, size, limit)
        return message


def _field(value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise MessageError(f"expected an object with the field `{name}`, got {value!r:.80}")
    if name not in value:
        raise MessageError(f"expected the field `{name}`, got {', '.join(map(repr, value))}"[:300])
    return value[name]


def _index(value: Any, name: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise MessageError(f"the field `{name}`, the index, must be a text or a whole number, got {value!r:.80}")
    return value
