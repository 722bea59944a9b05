"""What one reader of Celery's queues on Redis or Valkey has in hand.

A fetch moves items out of their lists *and* records them as in hand, in one step on the server; until they are
settled they stay there. Whoever holds items has a lease, renewed by a thread; when it is over, any other reader puts
them back. Each handing-over has a number that no other one has, so that a late word about an earlier one changes
nothing. All times are the server's.

Keys, each under the prefix:

| key | holds |
|---|---|
| `watch.holders` | sorted set: who has something in hand, by the end of its lease |
| `watch.held:<holder>` | hash: number → the list it came from, and the item |
| `watch.looked` | when somebody last looked for leases that are over |
| `<queue>␆␖later` | sorted set: items of this queue that are not due yet |
| `<queue>␆␖besides` | how many messages wait in this queue besides one for each item: those of packets |
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from typing import Any, Final, NamedTuple
from uuid import uuid4

import redis
from redis.exceptions import NoScriptError

__all__ = ["EVERY", "LEASE", "Fetched", "Flight", "Item", "besides_key", "later_key", "later_words", "push_words"]

logger = logging.getLogger(__name__)

#: Seconds that what is in hand is kept for a reader that does not renew, and between two renewals.
LEASE: Final = 6.0
EVERY: Final = 2.0
#: Seconds between two looks, for leases of others that are over and for what is to be settled here; with a short lease
#: an eighth of it, since after half a lease without a look all begin anew.
_LOOK: Final = 0.5
#: Seconds between two lines in the log about a server that is away.
_TELL: Final = 10.0
#: Items, and bytes, that one fetch takes at most: while it runs, the server does nothing else.
_MOST_ITEMS: Final = 100
_MOST_BYTES: Final = 8 * 1024 * 1024
#: What kombu puts between the name of a queue and its priority; a priority is a number, so this is no list of kombu's.
_LATER: Final = "\x06\x16later"
_BESIDES: Final = "\x06\x16besides"

#: Past a client's own method: kombu's adds its prefix to some keys, and ours have it.
_execute: Final[Callable[..., Any]] = redis.Redis.execute_command

_HEAD: Final = "RPUSH"
_TAIL: Final = "LPUSH"
_CAME_BACK: Final = " "


class Script:
    """A script by its digest; a server that does not know it is told its text."""

    def __init__(self, name: str) -> None:
        folder = files(__package__) / "flight_scripts"
        self.text = "\n".join((folder / f"{part}.lua").read_text(encoding="utf-8") for part in ("common", name))
        self.digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def __call__(self, client: redis.Redis, keys: Sequence[str], *args: Any) -> Any:
        try:
            return _execute(client, "EVALSHA", self.digest, len(keys), *keys, *args)
        except NoScriptError:
            return _execute(client, "EVAL", self.text, len(keys), *keys, *args)


_fetch: Final = Script("fetch")
_back: Final = Script("back")
_later: Final = Script("later")
_push: Final = Script("push")
_tend: Final = Script("tend")


class Item(NamedTuple):
    """One item that was handed over."""

    #: Names this handing-over.
    number: int
    #: The key of the list it came from.
    list: str
    raw: bytes

    @property
    def returns(self) -> int:
        """How often it was in somebody's hand before, and came back."""
        return len(self.raw) - len(self.raw.rstrip(b" "))


class Fetched(NamedTuple):
    """The answer to a fetch."""

    items: list[Item]
    #: The server's time, seconds since the epoch.
    now: float
    #: Seconds until the next item that waits is due; None: none waits.
    due: float | None


def later_key(queue: str, prefix: str = "") -> str:
    """Return the key of what is due later in a queue."""
    return f"{prefix}{queue}{_LATER}"


def besides_key(queue: str, prefix: str = "") -> str:
    """Return the key of how many messages wait in a queue besides one for each item.

    It means nothing where no item waits.
    """
    return f"{prefix}{queue}{_BESIDES}"


def push_words(list_key: str, raw: bytes) -> tuple[Any, ...]:
    """Return what EVAL is called with to add a packet to a list, its messages counted."""
    return (_push.text, 1, list_key, raw)


def later_words(later: str, list_key: str, raw: bytes, delay: float) -> tuple[Any, ...]:
    """Return what EVAL is called with to add an item to a queue, due in some seconds by the server's clock."""
    return (_later.text, 1, later, "", _ms(delay), _member(list_key, raw))


class Flight:
    """What one reader has in hand, from a fetch until it is settled.

    A delivery is kept for as long as it is referred to, however long its handling takes: `keep` takes a weak
    reference, and what is forgotten without a word goes back. May be used by several threads; not after a fork.

    Args:
        connect: makes the client that everything but fetches goes through; closed with the flight.
        prefix: before every key.
        lease: seconds that items are kept for a reader that does not renew.
        every: seconds between two renewals.
    """

    def __init__(
        self, connect: Callable[[], redis.Redis], *, prefix: str = "", lease: float = LEASE, every: float = EVERY
    ) -> None:
        self.holder = f"{socket.gethostname()}/{os.getpid()}.{uuid4().hex[:12]}"
        self._client = connect()
        self._prefix, self._lease, self._every = prefix, lease, every
        self._look = min(_LOOK, lease / 8)
        self._holders, self._looked = f"{prefix}watch.holders", f"{prefix}watch.looked"
        self._held_key = f"{prefix}watch.held:{self.holder}"
        self._pid = os.getpid()
        self._next = 1
        #: Number → what was made of it; None: nothing yet.
        self._held: dict[int, Callable[[], object] | None] = {}
        self._lock = threading.Lock()
        self._settled: list[int] = []
        #: What is to go back to the tail.
        self._returning: list[int] = []
        #: Called in the thread when there is room for more.
        self.on_room: Callable[[], object] = _nothing
        #: What the fetch under way tells the server: which lists it asked for, and what is settled.
        self._asked: Sequence[str] = ()
        self._telling: list[int] = []
        self._renewed = 0.0
        self._is_retired = False
        self._wake = threading.Event()
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch-flight", daemon=True)
        self._thread.start()

    @property
    def count(self) -> int:
        """How many items are in hand."""
        return len(self._held)

    @property
    def has_settled(self) -> bool:
        """Whether there is something to tell the server."""
        return bool(self._settled)

    # -- fetching, in two halves: the command may go by a connection that is not waited for

    def ask(self, room: int, lists: Sequence[str], laters: Sequence[str]) -> tuple[Any, ...]:
        """Return the command of a fetch; `fetched` or `failed` must follow.

        Args:
            room: items wanted at most; with 0 it only tells what is settled.
            lists: keys, the most urgent first.
            laters: keys of what is due later in their queues.
        """
        with self._lock:
            self._telling, self._settled = self._settled, []
        self._asked = lists
        keys = [self._holders, self._held_key, *lists, *laters]
        room = min(room, _MOST_ITEMS)
        words = (self.holder, _ms(self._lease), room, self._next, _MOST_BYTES, len(lists), *self._telling)
        return ("EVALSHA", _fetch.digest, len(keys), *keys, *words)

    def fetched(self, answer: list[Any]) -> Fetched:
        """Return what the server's answer holds; from now on it is in hand."""
        self._telling = []
        now, due, *rest = answer
        items = []
        for place, raw in zip(rest[::2], rest[1::2], strict=True):
            items.append(Item(self._next, self._asked[place], raw))
            self._held[self._next] = None
            self._next += 1
        return Fetched(items, now / 1000, None if due < 0 else (due - now) / 1000)

    def failed(self) -> None:
        """No answer came to a fetch. What it may have moved is found by `retire` or `close`."""
        with self._lock:
            self._settled = self._telling + self._settled
        self._telling = []

    def teach(self) -> None:
        """Tell the server the script of a fetch, which it does not know."""
        _execute(self._client, "SCRIPT LOAD", _fetch.text)

    def fetch(self, client: redis.Redis, room: int, lists: Sequence[str], laters: Sequence[str]) -> Fetched:
        """Ask, and wait for the answer.

        Raises:
            redis.RedisError: no answer came.
        """
        command = self.ask(room, lists, laters)
        try:
            try:
                answer = _execute(client, *command)
            except NoScriptError:
                answer = _execute(client, "EVAL", _fetch.text, *command[2:])
        except BaseException:
            self.failed()
            raise
        return self.fetched(answer)

    # -- what becomes of an item

    def keep(self, number: int, delivery: object) -> None:
        """Keep an item for as long as this object lives."""
        if number in self._held:
            self._held[number] = weakref.ref(delivery)

    def has(self, number: int) -> bool:
        """Whether an item is in hand."""
        return number in self._held

    def kept(self, number: int) -> object:
        """Return what an item was kept for.

        Raises:
            KeyError: it is not in hand.
        """
        keep = self._held[number]
        return keep and keep()

    def drop_unkept(self, number: int) -> None:
        """Let an item go back for which nothing is kept, if it is still in hand."""
        if self._held.get(number, _nothing) is None:
            self._held[number] = _nothing

    def ack(self, number: int) -> None:
        """It is settled. The server is told by the next fetch, or soon; twice is safe."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._held.pop(number, self) is not self:
                self._settled.append(number)
        if len(self._settled) > 10 * _MOST_ITEMS:
            self._wake.set()

    def back(self, numbers: Iterable[int], *, to_tail: bool = False) -> None:
        """Put items back, to be handed over again; to the tail, after everything that waits.

        Raises:
            redis.RedisError: no answer came; they stay in hand.
        """
        chosen = [number for number in numbers if number in self._held]
        for start in range(0, len(chosen), 1000):
            part = chosen[start : start + 1000]
            _back(self._client, [self._held_key], "these", _TAIL if to_tail else _HEAD, _CAME_BACK, *part)
            for number in part:
                self._held.pop(number, None)

    def back_soon(self, number: int) -> None:
        """Have the thread put an item back to the tail; while the server is away, again and again."""
        with self._lock:
            self._returning.append(number)
        self._wake.set()

    def back_all(self) -> None:
        """Put back all that is in hand.

        Raises:
            redis.RedisError: no answer came; it stays in hand.
        """
        self.back(list(self._held))

    def later(
        self, item: Item, raw: bytes, later: str, *, due: float | None = None, delay: float | None = None
    ) -> None:
        """Have an item in hand wait at the server; one of `due` and `delay` says how long.

        Args:
            item: the item.
            raw: what is handed over then in its place.
            later: key of what is due later in its queue.
            due: the server's time, seconds since the epoch.
            delay: seconds from now.

        Raises:
            redis.RedisError: no answer came; it stays in hand.
        """
        until = "" if due is None else f"{due * 1000:.0f}"
        wait = "" if delay is None else _ms(delay)
        _later(self._client, [later, self._held_key], until, wait, _member(item.list, raw), item.number)
        self._held.pop(item.number, None)

    # -- the thread

    def tend(self) -> bool:
        """Tell what is settled, put back what was forgotten, renew, and take over from others whose lease is over.

        Done every half second by a thread of its own.

        Returns:
            Whether there is more to take over.

        Raises:
            redis.RedisError: no answer came.
        """
        with self._lock:
            # Before that is told which is settled: what is settled from now on is told the next time, and known still.
            known = list(self._held)
        self._tell()
        with self._lock:
            returning = self._returning[:]
        self.back(returning, to_tail=True)
        with self._lock:
            del self._returning[: len(returning)]
        forgotten = [number for number, delivery in list(self._held.items()) if delivery is not None and not delivery()]
        if forgotten:
            logger.info("%d messages were let go of without a word, putting them back", len(forgotten))
            self.back(forgotten)
        if returning or forgotten:
            self.on_room()
        own = ""
        if self._held and time.monotonic() >= self._renewed + self._every:
            own = self.holder
        if self._is_retired:
            _back(self._client, [self._held_key], "others", _HEAD, _CAME_BACK, *known)
        keys, held_prefix = [self._holders, self._looked], f"{self._prefix}watch.held:"
        is_known, moved, is_more = _tend(self._client, keys, _ms(self._lease), held_prefix, own)
        if own:
            self._renewed = time.monotonic()
            if not is_known and self._held:
                logger.warning("%d messages in hand were given to others: their lease was over", len(self._held))
        if moved:
            logger.warning("put back %d messages of workers that are gone", moved)
        return bool(is_more)

    def retire(self) -> None:
        """Fetch no more: keep what is still referred to until that is settled, put back everything else."""
        self._is_retired = True
        for number, delivery in list(self._held.items()):
            if delivery is None:
                self._held[number] = _nothing
        self._wake.set()

    def close(self) -> None:
        """Tell what is settled and put back everything else. Twice is safe."""
        if self._is_closed.is_set() or os.getpid() != self._pid:
            return
        self._is_closed.set()
        self._wake.set()
        try:
            self._tell()
            while _back(self._client, [self._held_key], "others", _HEAD, _CAME_BACK):
                pass
            self._client.zrem(self._holders, self.holder)
        except redis.RedisError as exc:
            logger.warning("could not hand back what is in hand, its lease ends by itself: %s", exc)
        self._held.clear()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=1.0)
        self._client.close()
        self._client.connection_pool.disconnect()

    def _tell(self) -> None:
        with self._lock:
            settled, self._settled = self._settled, []
        try:
            for start in range(0, len(settled), 1000):
                part = settled[start : start + 1000]
                _execute(self._client, "HDEL", self._held_key, *part)
        except BaseException:
            with self._lock:
                self._settled = settled + self._settled
            raise

    def _run(self) -> None:
        is_more = False
        told = -math.inf
        while not self._is_closed.is_set():
            if not is_more:
                self._wake.wait(self._look)
            self._wake.clear()
            if self._is_closed.is_set():
                return
            try:
                is_more = self.tend()
                if self._is_retired and not (self._held or self._settled):
                    self.close()
            except redis.RedisError as exc:
                is_more = False
                if time.monotonic() > told + _TELL:
                    told = time.monotonic()
                    logger.warning("could not renew what is in hand, trying again every %.3g s: %s", self._look, exc)
            except Exception:
                # Without this thread everything in hand would be handed to others.
                is_more = False
                logger.exception("could not renew what is in hand, trying again in %.3g s", self._look)


def _nothing() -> None:
    """Stands for a delivery that nobody refers to."""


def _ms(seconds: float) -> int:
    return max(round(seconds * 1000), 0)


def _member(list_key: str, raw: bytes) -> bytes:
    """Return an item as it waits until it is due: no two are alike, or one would take the place of the other."""
    key = list_key.encode()
    return uuid4().bytes + struct.pack(">H", len(key)) + key + raw
