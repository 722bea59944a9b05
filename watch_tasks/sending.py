"""Sending: where messages go, what became of each, and many at once.

Many at once travel in packets where the outlet takes them: an iterable by `Topic.send_many`, a stream by
`Topic.sender`. Each message keeps its own id, index and verdict.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, Self, TypeVar, cast, runtime_checkable

import msgspec
from msgspec.structs import replace

from .errors import MessageError, QueueClosedError, QueueFullError, SendError, SendUnknownError, TooLargeError
from .message import Message, Once
from .packets import MOST_BYTES, MOST_MEMBERS, Member, Packet, member_of, new_ids, read_member
from .seconds import is_seconds

if TYPE_CHECKING:
    from .topics import Topic

__all__ = ["Outlet", "PacketOutlet", "SendReport", "Sender", "Verdict", "send_all"]

T = TypeVar("T")

#: Bytes of a packet that a member takes beside its id, its index, its data and its rules: brackets, quotes and commas.
_BESIDES: Final = 16
#: The same, that its rules take, beside the names of handlers.
_RULES: Final = 160

logger = logging.getLogger(__name__)

#: Senders with messages that wait: those are sent, whether or not anybody else still knows the sender.
_busy: Final[set[Sender[Any]]] = set()
#: All of this process, which begin anew in one that is forked.
_all: Final[weakref.WeakSet[Sender[Any]]] = weakref.WeakSet()


class Outlet(Protocol):
    """What a topic sends through: a queue, or an app."""

    def push(self, message: Message[Any], *, delay: float = 0.0) -> None:
        """Hand over a message with its data in plain form; return when the broker has it.

        Raises:
            SendError: refused, failed or unknown; see its kinds.
            MessageError: the message itself cannot be sent.
        """


@runtime_checkable
class PacketOutlet(Outlet, Protocol):
    """An outlet that takes many messages at once."""

    #: Bytes of JSON that the data of one message may have.
    max_payload: int

    def push_packet(self, packet: Packet) -> None:
        """Hand over a packet; return when the broker has it.

        Raises:
            SendError: none of its messages was sent, or nobody knows; see its kinds.
        """


class Verdict(StrEnum):
    """What became of one of many messages."""

    SENT = "sent"  #: the broker has it
    REFUSED = "refused"  #: it was not sent: its shape, its size, a full queue, or a broker that cannot be reached
    UNKNOWN = "unknown"  #: the broker's answer was lost: send the same object again


@dataclass(frozen=True, slots=True)
class SendReport:
    """How many messages of many ended in which verdict."""

    sent: int = 0
    refused: int = 0
    unknown: int = 0


class Sender(Generic[T]):
    """Sends a stream of messages of one topic, many at once. Get one by `Topic.sender`.

    A message waits here until `size` of them are together or `linger` seconds are over, whichever comes first; then it
    is sent and has its verdict. What waits when the program ends as usual is sent then. May be shared by threads, and
    used on in a forked process, where it begins anew: what waits at the fork is the parent's to send.

    Raises:
        SendFailedError: from `send`, `flush` and `close`: the broker could not be reached, now or since the last call.
            The messages concerned had the verdict REFUSED, and may be sent again; so had the one that was given.
    """

    def __init__(
        self,
        topic: Topic[T],
        outlet: Outlet,
        *,
        size: int = MOST_MEMBERS,
        linger: float | None = 0.05,
        on_verdict: Callable[[Message[T], Verdict], None] | None = None,
    ) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MOST_MEMBERS:
            raise ValueError(f"`size` must be 1 to {MOST_MEMBERS}, got {size!r}")
        if linger is not None and not is_seconds(linger):
            raise ValueError(f"`linger` must be seconds, 0 or more, or None, got {linger!r}")
        self._topic, self._outlet = topic, outlet
        #: None: one by one. A bound counts messages, so they must be seen one by one.
        self._packets = outlet if isinstance(outlet, PacketOutlet) and topic.max_waiting is None else None
        self._size, self._linger, self._on_verdict = size, linger, on_verdict
        self._begin_anew()
        self._is_closed = False
        _all.add(self)
        if linger is not None:
            _at_exit(self)

    def _begin_anew(self) -> None:
        self._counts = dict.fromkeys(Verdict, 0)
        #: Made ahead: a forked process would have the same.
        self._ids = new_ids()
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._members: list[Member] = []
        #: The messages that the members are, where somebody wants to hear of them.
        self._messages: list[Message[T]] = []
        self._bytes = 0
        #: Bytes of JSON that the data of one message may have.
        self._limit = 0
        self._since = 0.0
        self._sent_at = datetime.now(UTC)
        #: What went wrong since the last call.
        self._error: Exception | None = None
        self._has_told_why = False
        self._thread: threading.Thread | None = None

    # -- for users

    def send(
        self,
        data: T | Message[T],
        *,
        index: str | None = None,
        max_retries: int | None = None,
        once: Once | None = None,
    ) -> None:
        """Take one message, as `Topic.send` does; it is sent soon. What cannot be sent has the verdict REFUSED.

        Args:
            data: what the handlers get, or a message.
            index: the business name; else what the data says, else the topic's `index=`, else the id.
            max_retries: this message's own limit.
            once: this message's own once-rule.

        Raises:
            ValueError: the sender is closed.
        """
        with self._lock:
            if self._is_closed:
                raise ValueError(f"this sender of topic `{self._topic.name}` is closed: make a new one")
            if self._error:
                self._refuse(data)
                self._raise()
            self._take(data, index, max_retries, once)

    def flush(self) -> None:
        """Send what waits, and return when the broker has it."""
        with self._lock:
            self._flush()
            self._raise()

    def close(self) -> SendReport:
        """Send what waits, and end. Twice is safe.

        Returns:
            How many messages ended in which verdict.
        """
        with self._lock:
            self._flush()
            self._is_closed = True
            self._wake.notify_all()
            # What a callback gave it again; from now on it takes no more.
            self._flush()
            self._raise()
            return self.report

    @property
    def report(self) -> SendReport:
        """How many messages ended in which verdict so far; those that wait are not counted."""
        return SendReport(**{verdict.value: count for verdict, count in self._counts.items()})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        try:
            self.close()
        except Exception:
            if kind is None:
                raise

    # -- taking

    def _take(
        self,
        data: T | Message[T],
        index: str | None = None,
        max_retries: int | None = None,
        once: Once | None = None,
    ) -> None:
        if not self._members:
            self._begin()
        try:
            if self._packets is None or isinstance(data, Message):
                self._take_message(self._topic.message(data, index=index, max_retries=max_retries, once=once))
            elif self._on_verdict is None and max_retries is None and once is None:
                self._take_data(data, index)
            else:
                self._take_message(self._message(data, index, max_retries, once))
        except MessageError as exc:
            self._tell_why(exc)
            self._refuse(data)

    def _begin(self) -> None:
        """See what holds for all that goes into the next packet."""
        self._sent_at = datetime.now(UTC)
        if self._packets is not None:
            self._limit = self._packets.max_payload

    def _take_data(self, data: T, index: str | None) -> None:
        """Take one message without making a Message of it, which nobody wants to see."""
        named = self._topic.named(data, index)
        plain = self._plain(data)
        self._add(Member(next(self._ids), named or "", msgspec.Raw(plain)), len(plain), None)

    def _take_message(self, message: Message[T]) -> None:
        if self._packets is None:
            self._push(message)
            return
        try:
            plain = self._plain(message.data)
        except MessageError as exc:
            self._tell_why(exc)
            self._note(message, Verdict.REFUSED)
        else:
            self._add(member_of(message, plain, self._sent_at), len(plain), message)

    def _message(self, data: T, index: str | None, max_retries: int | None, once: Once | None) -> Message[T]:
        """Return the message that data becomes, of the packet's time: so its member need not say its own."""
        self._topic.check_once(once)
        id, named = next(self._ids), self._topic.named(data, index)
        return Message(
            data,
            self._topic.name,
            index=named or id,
            id=id,
            max_retries=max_retries,
            once=once,
            sent_at=self._sent_at,
        )

    def _plain(self, data: T) -> bytes:
        plain = self._topic.dump(data)
        if len(plain) > self._limit:
            raise TooLargeError(self._topic.name, len(plain), self._limit)
        return plain

    def _refuse(self, data: T | Message[T]) -> None:
        if not isinstance(data, Message) and self._on_verdict is not None:
            # Its own index may be unusable: the callback has a message to look at all the same.
            data = Message(data, self._topic.name, index="?")
        self._note(data if isinstance(data, Message) else None, Verdict.REFUSED)

    def _add(self, member: Member, size: int, message: Message[T] | None) -> None:
        size += _BESIDES + len(member.id) + len(member.index if member.index.isascii() else member.index.encode())
        if member.more is not None:
            size += _RULES + sum(len(name.encode()) for name in member.more.handled)
        if self._members and self._bytes + size > MOST_BYTES:
            try:
                self._flush()
            except BaseException:
                self._note(message, Verdict.REFUSED)
                raise
        self._members.append(member)
        self._bytes += size
        if message is not None and self._on_verdict is not None:
            self._messages.append(message)
        if len(self._members) >= self._size or self._bytes >= MOST_BYTES or self._linger == 0:
            self._flush()
        elif len(self._members) == 1:
            self._since = time.monotonic()
            self._watch()

    # -- sending

    def _push(self, message: Message[T]) -> None:
        try:
            self._outlet.push(replace(message, data=self._topic.encode(message.data)))
        except (MessageError, QueueFullError) as exc:
            self._tell_why(exc)
            self._note(message, Verdict.REFUSED)
        except SendUnknownError:
            self._note(message, Verdict.UNKNOWN)
        except (SendError, QueueClosedError):
            self._note(message, Verdict.REFUSED)
            raise
        except BaseException:
            self._note(message, Verdict.UNKNOWN)
            raise
        else:
            self._note(message, Verdict.SENT)

    def _flush(self) -> None:
        if not self._members:
            return
        packet = Packet(self._topic.name, self._members, sent_at=self._sent_at)
        messages = self._messages
        self._members, self._messages, self._bytes = [], [], 0
        # Unless something is known: whatever interrupted it, it was sent, or it was not.
        verdict, error = Verdict.UNKNOWN, None
        try:
            if len(packet.members) == 1:
                # One that goes alone goes as what it is: Flower shows its topic and its index.
                self._outlet.push(read_member(packet.members[0], packet.topic, packet.sent_at))
            else:
                cast(PacketOutlet, self._outlet).push_packet(packet)
            verdict = Verdict.SENT
        except SendUnknownError:
            pass
        except (QueueFullError, MessageError):
            verdict = Verdict.REFUSED
        except (SendError, QueueClosedError) as exc:
            verdict, error = Verdict.REFUSED, exc
        finally:
            _busy.discard(self)
            self._counts[verdict] += len(packet.members)
            if self._on_verdict is not None:
                for message in messages:
                    self._on_verdict(message, verdict)
            self._error = error or self._error

    def _tell_why(self, error: Exception) -> None:
        """Say why one is refused: of a million that are, the first."""
        if not self._has_told_why:
            self._has_told_why = True
            logger.warning("a message is refused, and others from now on without a word: %s", error)

    def _note(self, message: Message[T] | None, verdict: Verdict) -> None:
        self._counts[verdict] += 1
        if self._on_verdict is not None and message is not None:
            self._on_verdict(message, verdict)

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error:
            raise error

    # -- what lingers

    def _watch(self) -> None:
        if self._linger is None:
            return
        _busy.add(self)
        if self._thread is None or not self._thread.is_alive():
            # Refers weakly: a sender that nobody closed must not be kept by its own thread.
            self._thread = threading.Thread(
                target=_linger, args=(weakref.ref(self), self._wake), name="watch-sender", daemon=True
            )
            self._thread.start()
        self._wake.notify_all()

    def _look(self) -> float | None:
        """Send what has waited long enough; return the seconds until the next look, or None where nothing waits."""
        if not self._members:
            return None
        left = self._since + (self._linger or 0.0) - time.monotonic()
        if left > 0:
            return left
        try:
            self._flush()
        except Exception as exc:  # noqa: BLE001 - whatever it is, the next call tells of it
            self._error = exc
        return None


def _linger(sender: weakref.ref[Sender[Any]], wake: threading.Condition) -> None:
    with wake:
        while True:
            one = sender()
            if one is None or one._is_closed:
                return
            left = one._look()
            del one
            # Without anything to wait for it looks now and then whether its sender is still there.
            wake.wait(1.0 if left is None else left)


def _have_forked() -> None:
    _busy.clear()
    for sender in list(_all):
        # Somebody may have held its lock, who is not here to let go of it.
        sender._begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_have_forked)


def _at_exit(sender: Sender[Any]) -> None:
    refer = weakref.ref(sender)

    def close() -> None:
        one = refer()
        if one is not None:
            one.close()

    atexit.register(close)
    weakref.finalize(sender, atexit.unregister, close).atexit = False


def send_all(
    topic: Topic[T],
    outlet: Outlet,
    items: Iterable[T | Message[T]],
    on_verdict: Callable[[Message[T], Verdict], None] | None,
) -> SendReport:
    """Send every item; see `Topic.send_many`."""
    # Whatever ends the items, those that were read are sent.
    with Sender(topic, outlet, linger=None, on_verdict=on_verdict) as sender:
        for item in items:
            sender._take(item)
            if sender._error:
                # At once, not with the next item: that may be long in coming.
                sender._raise()
    return sender.report
