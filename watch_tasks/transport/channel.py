"""kombu's channel for Redis, with another way to fetch, to settle, to wait and to recover.

A fetch is one script that moves items out of their lists and records them as in hand (see `queue/flight.py`), as many
as the prefetch limit has room for; what was settled meanwhile is told along with it. A channel that finds nothing is
told by the server when something comes, by client-side caching: the connection reads the keys of its lists, and the
server sends it a push when one of them changes. Nothing blocks, and nothing is polled.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty
from typing import Any, ClassVar, Final
from weakref import WeakMethod

import redis
from kombu.log import get_logger
from kombu.transport import redis as kombu_redis
from redis.exceptions import NoScriptError, ResponseError

from ..queue.counting import clear_waiting, count_waiting
from ..queue.flight import EVERY, LEASE, Flight, Item, besides_key, later_key
from ..queue.item import due_at, open_item, without_eta
from .bounded import bound_decoders
from .codec import ForgivingBase64
from .qos import QoS
from .sending import SendingChannel

__all__ = ["Channel", "SentinelChannel"]

logger = get_logger(__name__)

#: kombu's classes have no types.
_stock: Final[Any] = kombu_redis

#: Messages that are asked for where no prefetch limit is set.
_ROOM: Final = 100
#: Seconds after which a channel that was told nothing asks all the same: a push may be lost with its connection.
_ASK: Final = 1.0
#: The same, where the server tells nobody.
_POLL: Final = 0.05
#: Seconds that an answer may take, and a connection: kombu would wait for ever.
_ANSWER: Final = 5.0
_CONNECT: Final = 2.0
#: Seconds that delivering may take before the event loop runs again: a pool may handle messages right here.
_DELIVERING: Final = 0.01
#: Seconds by which a message must be early to wait at the server rather than here.
_EARLY: Final = 1.0
#: Seconds that what is settled may wait for a fetch to tell it along with.
_TELL: Final = 0.01
#: Bytes that a body may be inflated to, unless somebody says otherwise.
_INFLATED: Final = 16 * 1024 * 1024


class Channel(SendingChannel):
    """kombu's channel, whose messages are never anywhere but in a list, in hand, or due later."""

    QoS = QoS
    codecs: ClassVar[dict[str, Any]] = {**_stock.Channel.codecs, "base64": ForgivingBase64()}
    #: Each delivery has a tag of its own: to settle one says nothing about a later one of the same message.
    tags_are_unique = True

    socket_timeout = _ANSWER
    socket_connect_timeout = _CONNECT
    socket_keepalive = True
    health_check_interval = 10
    #: Seconds that what is in hand is kept for a worker that does not renew, and between two renewals.
    lease = LEASE
    renew_every = EVERY

    from_transport_options = (*_stock.Channel.from_transport_options, "lease", "renew_every")

    _flight: Flight | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        bound_decoders(_INFLATED, firmly=False)
        #: What was fetched and not yet delivered, with the name of its queue.
        self._arrived: deque[tuple[Item, str, float]] = deque()
        #: Key of a list → its queue, for the fetch under way.
        self._asked: dict[str, str] = {}
        self._asked_room = 0
        self._asked_at = 0.0
        #: Whether there may be something to fetch.
        self._is_due = True
        #: When to ask again, whatever is told.
        self._ask_at = 0.0
        #: When to tell what is settled, should nothing be asked for until then.
        self._tell_at = math.inf
        #: The thread that looks.
        self._looker = 0
        #: The socket whose server tells it of changes.
        self._told_by: Any = None
        self._is_told = True
        #: Whether an error came by the connection: what is handled meanwhile is kept.
        self.is_broken = False
        #: Whether the answer to a fetch is still to come.
        self._is_awaited = False
        #: Queues whose messages count as settled once they are delivered.
        self._settled_queues: set[str] = set()
        #: Queue → what takes its messages here. kombu knows of one for all channels of a connection, whose numbers may
        #: be those of other items.
        self._takers: dict[str, Callable[[dict[str, Any]], object]] = {}
        self.next_legacy = 0.0
        super().__init__(*args, **kwargs)

    # -- in hand

    @property
    def flight(self) -> Flight:
        """What this channel has in hand."""
        if self._flight is None:
            self._flight = Flight(
                # Not the client of a prefix: the flight's keys have it.
                lambda: redis.Redis(connection_pool=self._get_pool()),
                prefix=self.global_keyprefix,
                lease=float(self.lease),
                every=float(self.renew_every),
            )
            # Weakly: a flight outlives its channel where something of it is still being handled.
            wake = WeakMethod(self.wake)
            self._flight.on_room = lambda: (call := wake()) and call()
        return self._flight

    @property
    def room(self) -> int:
        """How many more messages may be in hand."""
        limit = self.qos.prefetch_count
        held = self._flight.count if self._flight else 0
        return max(limit - held, 0) if limit else _ROOM

    def end_flight(self) -> None:
        """Put back what is in hand; after an error, keep what is still being handled until that is done."""
        self._arrived.clear()
        if self._flight is None:
            return
        if self._is_awaited:
            self._flight.failed()
            self._is_awaited = False
        if self.is_broken:
            self._flight.retire()
        else:
            self._flight.close()

    def basic_consume(self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **kwargs: Any) -> Any:
        # One queue has one taker, the last.
        if no_ack or not self.ack_emulation:
            self._settled_queues.add(queue)
        else:
            self._settled_queues.discard(queue)
        self._is_due = True
        answer = super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)
        self._takers[queue] = self.connection._callbacks[queue]
        return answer

    def _basic_cancel(self, consumer_tag: str) -> Any:
        queue = self._tag_to_queue.get(consumer_tag)
        answer = super()._basic_cancel(consumer_tag)
        if queue not in self._active_queues:
            self._takers.pop(queue, None)
        return answer

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        fetched = self.flight.fetch(self._plain(), 1, self._keys([queue]), [later_key(queue, self.global_keyprefix)])
        for item in fetched.items:
            payload = self._open(item, queue, fetched.now)
            if payload is not None:
                message = self.Message(payload, channel=self)
                self._take_over(item, message, no_ack or not self.ack_emulation)
                return message
        return None

    def _take_over(self, item: Item, message: Any, is_settled: bool) -> None:
        if is_settled:
            self.flight.ack(item.number)
        else:
            self.flight.keep(item.number, message)

    # -- fetching

    def look(self) -> bool:
        """Deliver what has arrived, and ask for more where there may be some; return whether there was any."""
        self._looker = threading.get_ident()
        is_any = self._deliver_all()
        if self._is_awaited:
            if time.monotonic() > self._asked_at + (self.socket_timeout or _ANSWER):
                self._fail()
                self.client.connection.disconnect()
                raise redis.TimeoutError(f"no answer within {self.socket_timeout or _ANSWER:.3g} s")
            return is_any
        room, now = self.room, time.monotonic()
        if room > 0 and (self._is_due or now >= self._ask_at):
            self._ask(room)
        elif self._flight and self._flight.has_settled:
            if self._tell_at is math.inf:
                self._tell_at = now + _TELL
                self.wake(_TELL)
            elif now >= self._tell_at:
                self._ask(room)
        return is_any

    def patience(self) -> float:
        """Return the seconds after which `look` may find something that no socket tells of."""
        if self._arrived:
            return 0.0
        wait = self._tell_at
        if self._is_awaited:
            wait = self._asked_at + (self.socket_timeout or _ANSWER)
        elif self.room > 0:
            wait = min(wait, self._ask_at)
        return min(max(wait - time.monotonic(), 0.001), _ASK)

    def _brpop_start(self, timeout: float | None = None) -> None:
        self.look()

    def _ask(self, room: int) -> None:
        cycle = self.connection.cycle
        try:
            cycle.register(self)
            connection = self.client.connection
            if self._told_by is not connection._sock:
                self._have_told(connection)
            queues = self._queue_cycle.consume(len(self.active_queues))
            lists = self._keys(queues)
            laters = [later_key(queue, self.global_keyprefix) for queue in queues]
            self._asked = {key: queue for queue in queues for key in self._keys([queue])}
            command = self.flight.ask(room, lists, laters)
            self._is_awaited, self._asked_room, self._asked_at = True, room, time.monotonic()
            self._is_due, self._tell_at = False, math.inf
            self._in_poll = connection
            connection.send_command(*command)
        except BaseException:
            self._fail()
            raise

    def _brpop_read(self, **options: Any) -> bool:
        connection = self.client.connection
        is_any = False
        try:
            while True:
                answer = connection.read_response(push_request=True)
                if self._is_awaited and isinstance(answer, list) and answer and isinstance(answer[0], int):
                    self._have_arrived(answer)
                else:
                    self._is_due = True
                if not connection.can_read(timeout=0):
                    break
        except NoScriptError:
            self._is_awaited, self._in_poll, self._is_due = False, None, True
            self.flight.failed()
            self.flight.teach()
        except BaseException:
            self._fail()
            connection.disconnect()
            raise
        is_any = self._deliver_all()
        if not is_any:
            raise Empty()
        return True

    def _have_arrived(self, answer: list[Any]) -> None:
        fetched = self.flight.fetched(answer)
        self._is_awaited, self._in_poll = False, None
        now = time.monotonic()
        self._ask_at = now + (_ASK if self._is_told else _POLL)
        if fetched.due is not None and fetched.due < _ASK:
            self._ask_at = min(self._ask_at, now + max(fetched.due, 0.0))
        if fetched.items:
            self._queue_cycle.rotate(self._asked[fetched.items[-1].list])
        if len(fetched.items) < self._asked_room:
            # All there was: from now on the server tells.
            self.wake(self._ask_at - now)
        else:
            self._is_due = True
        self._arrived.extend((item, self._asked[item.list], fetched.now) for item in fetched.items)

    def _have_told(self, connection: Any) -> None:
        """Have the server tell this connection of changes to the keys that it reads."""
        try:
            connection.send_command("CLIENT", "TRACKING", "ON")
            connection.read_response()
            self._is_told = True
        except ResponseError as exc:
            logger.warning("the server cannot tell of new messages, asking every %.3g s instead: %s", _POLL, exc)
            self._is_told = False
        self._told_by = connection._sock

    def _fail(self) -> None:
        """Nothing more comes by this connection; what the fetch under way may have moved is put back later."""
        self.is_broken = True
        self._in_poll = None
        self._told_by = None
        if self._is_awaited:
            self._is_awaited = False
            self.flight.failed()

    # -- delivering

    def _deliver_all(self) -> bool:
        """Deliver what has arrived, for a moment at most: then the event loop is to run, and whoever stops it."""
        began = time.monotonic()
        is_any = False
        while self._arrived:
            is_any = True
            self._deliver(*self._arrived.popleft())
            if time.monotonic() > began + _DELIVERING:
                self.wake()
                break
        return is_any

    def _deliver(self, item: Item, queue: str, now: float) -> None:
        payload = self._open(item, queue, now)
        if payload is None:
            return
        take = self._takers.get(queue)
        if take is None:
            # Cancelled since it was asked for.
            self.flight.back([item.number])
            return
        try:
            take(payload)
            if queue in self._settled_queues:
                self.flight.ack(item.number)
        finally:
            self.flight.drop_unkept(item.number)

    def _open(self, item: Item, queue: str, now: float) -> dict[str, Any] | None:
        """Return the envelope of an item, or None where it is not due and waits at the server again."""
        payload = open_item(item.raw, queue)
        due = due_at(payload["headers"])
        if due is not None and due > now + _EARLY:
            self.flight.later(item, without_eta(payload), later_key(queue, self.global_keyprefix), due=due)
            return None
        payload["properties"]["delivery_tag"] = item.number
        if item.returns:
            payload["headers"]["redelivered"] = True
            payload["properties"]["delivery_info"]["redelivered"] = True
        return payload

    # -- the queue as a whole

    def count_waiting(self, queue: str) -> int:
        """Return how many messages wait in a queue, those in packets and those that are not due yet included."""
        return count_waiting(self._plain(), queue, self._keys([queue]), self.global_keyprefix)

    def _purge(self, queue: str) -> int:
        return clear_waiting(self._plain(), queue, self._keys([queue]), self.global_keyprefix)

    def _delete(self, queue: str, exchange: str, routing_key: str, pattern: str, *args: Any, **kwargs: Any) -> None:
        super()._delete(queue, exchange, routing_key, pattern, *args, **kwargs)
        self._plain().delete(later_key(queue, self.global_keyprefix), besides_key(queue, self.global_keyprefix))

    def close(self) -> None:
        self._closing = True
        self.end_flight()
        # kombu reads on where an answer is still to come: whatever that brings is put back already.
        self._in_poll = None
        super().close()

    def wake_for_settled(self) -> None:
        """Have the event loop look where there is room now, or what is settled waits to be told."""
        # In the loop's own thread, that much is seen by its next look; only what waits for room must not wait for that.
        if self._is_due or threading.get_ident() != self._looker:
            self.wake()

    def wake(self, seconds: float = 0.0) -> None:
        """Have the event loop look again, soon or after some seconds."""
        transport = self.connection
        if transport is not None and transport.cycle.wake:
            transport.cycle.wake(seconds)

    def _keys(self, queues: Sequence[str]) -> list[str]:
        """Return the keys of these queues' lists, the most urgent first."""
        prefix = self.global_keyprefix
        return [prefix + self._q_for_pri(queue, step) for step in self.priority_steps for queue in queues]


class SentinelChannel(Channel, _stock.SentinelChannel):
    """The same, behind Redis Sentinel."""

    from_transport_options = (*_stock.SentinelChannel.from_transport_options, "lease", "renew_every")
