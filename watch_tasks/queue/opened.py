"""A packet that a reader has in hand, handed out member by member, each as a message of its own.

One member is tried at a time, so a crash counts against that one; the packet then comes again, and the members before
it are Duplicates by their claims.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, Final, Protocol

from ..errors import QueueUnavailableError, SendError
from ..message import Message
from ..packets import Member, Packet
from .base import Delivery, Unreadable
from .envelope import unpack_member

__all__ = ["OpenPacket", "Publisher"]

#: Seconds after which what is left of a packet is left to others: by then there may be readers with nothing to do.
_ENOUGH: Final = 2.0


class Publisher(Protocol):
    """Where members go that leave their packet: the queue they came from."""

    def push(self, message: Message[Any], *, delay: float = 0.0, bounded: bool = True) -> None: ...
    def push_packet(self, packet: Packet, *, delay: float = 0.0) -> None: ...


class OpenPacket:
    """One packet in hand. May be used by several threads.

    Args:
        packet: its content.
        delivery: by what it came; acked when each member was acked, or has left as a message of its own. Kept for as
            long as this, or a delivery of a member, is referred to.
        queue: where members go that leave.
        limit: bytes of JSON that the data of a member may have.
    """

    def __init__(self, packet: Packet, delivery: Delivery, queue: Publisher, limit: int) -> None:
        self._packet, self._delivery, self._queue, self._limit = packet, delivery, queue, limit
        self._lock = threading.Lock()
        #: The members that were not handed out yet, with their places.
        self._waiting = deque(enumerate(packet.members))
        #: Places of those that need nothing more.
        self._settled: set[int] = set()
        self._since = time.monotonic()
        if not packet.members:
            delivery.ack()

    def __len__(self) -> int:
        """How many members were not handed out yet."""
        return len(self._waiting)

    def next(self) -> Delivery | None:
        """Return the next member; None where none is left."""
        if len(self._waiting) > 1 and time.monotonic() > self._since + _ENOUGH:
            self._leave_in_halves()
        with self._lock:
            if not self._waiting:
                return None
            place, member = self._waiting.popleft()
        return _Member(self, place, member, unpack_member(self._packet, member, limit=self._limit))

    def clear(self) -> int:
        """Throw away what was not handed out; return how many that were."""
        gone = self._take(len(self._packet.members))
        if gone:
            self.settle(*(place for place, _ in gone))
        return len(gone)

    def forget(self) -> None:
        """Hand out nothing more: the packet comes again, to whomever."""
        self._take(len(self._packet.members))

    def release(self) -> None:
        """Leave to others what was not handed out, as a packet again.

        Raises:
            SendError: it could not be published, and stays in hand.
        """
        self._leave(len(self._packet.members))

    def settle(self, *places: int) -> None:
        """Those members need nothing more. Twice is safe, also after an error."""
        with self._lock:
            self._settled.update(places)
            is_done = len(self._settled) == len(self._packet.members)
        if is_done:
            self._delivery.ack()

    def is_settled(self, place: int) -> bool:
        """Whether a member needs nothing more."""
        return place in self._settled

    def give_back(self, place: int, member: Member, message: Message[Any] | Unreadable, delay: float) -> None:
        """Publish a member as a message of its own; one that is none, as a packet of its own.

        Raises:
            QueueUnavailableError: it could not be published, and stays in hand.
        """
        try:
            if isinstance(message, Unreadable):
                self._queue.push_packet(self._of([member]), delay=delay)
            else:
                self._queue.push(message, delay=delay, bounded=False)
        except SendError as exc:
            raise QueueUnavailableError(f"a member of a packet could not be handed back: {exc}") from exc
        self.settle(place)

    def _leave_in_halves(self) -> None:
        # In two, so that what is slow to handle is soon spread over all readers.
        count = len(self._waiting)
        try:
            self._leave(count // 2)
            self._leave(count - count // 2)
        except SendError:
            # It can be handled here as well.
            self._since = time.monotonic()

    def _leave(self, count: int) -> None:
        """Publish the last of what was not handed out as a packet."""
        left = self._take(count)
        if not left:
            return
        try:
            self._queue.push_packet(self._of([member for _, member in left]))
        except SendError:
            with self._lock:
                self._waiting.extend(left)
            raise
        self.settle(*(place for place, _ in left))

    def _take(self, count: int) -> list[tuple[int, Member]]:
        """Return the last of what was not handed out, which it is no longer."""
        with self._lock:
            taken = [self._waiting.pop() for _ in range(min(count, len(self._waiting)))]
        return taken[::-1]

    def _of(self, members: list[Member]) -> Packet:
        return Packet(self._packet.topic, members, sent_at=self._packet.sent_at)


class _Member(Delivery):
    def __init__(self, packet: OpenPacket, place: int, member: Member, message: Message[Any] | Unreadable) -> None:
        self.message = message
        self._packet, self._place, self._member = packet, place, member

    def ack(self) -> None:
        self._packet.settle(self._place)

    def back(self, delay: float = 0.0) -> None:
        if not self._packet.is_settled(self._place):
            self._packet.give_back(self._place, self._member, self.message, delay)
