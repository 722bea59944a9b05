"""A storage on Redis 6.2 or newer, or Valkey. Every step of the protocol is one script: atomic, one round trip.

The scripts are in `redis_scripts/`; they keep the rules that `rules.py` states in Python. They build their keys
from the prefix themselves, so Redis Cluster is not supported.

Keys, each under the prefix (a topic has no `:`, or it is escaped, so no two names share a key):

| key | holds |
|---|---|
| `r:<topic>` | hash: the records, by index: times, tokens, id, digest, the record's bytes, perhaps the story |
| `b:<topic>` | hash: those bytes, where they are more than 4 KiB |
| `o:<topic>`, `i:<topic>:<order>`, `z:<topic>:<order>:<fence>` | the indexes by time: see `orders.lua` |
| `s:<id>` | the state of an unfinished or dead message; at its first try in a short form, see `forms.lua` |
| `m:<id>` | the mark: done, though no record says so |
| `h:<topic>:<index>` | the id that holds the index, under once="index" |
| `t:<topic>:<index>` | list: the story; or the id of the message that is at its first try |
| `d:<id>`, `letters`, `l:<topic>` | dead letters, and their ids by time: all, and those of a topic |
| `c:<topic>`, `topics`, `token` | hash of counters, set of names, the last token |
| `layout`, `tended` | the number of this form of the keys, and when what is over was trimmed last |

The story of a message at its first try is folded into its state, and when it is handled, into its record: most
messages need no list, no key outlives them, and many are granted or settled by a few commands of the server. Whatever
else happens to the index unfolds it first; see `stories.lua`. Other messages of the same request go the long way.

Records are ended by us, a bounded number at a time, when there are writes and by `tend`. Ended by the server, a million
that end together are a pause; and each would need a key of its own, which costs more than the record.
"""

from __future__ import annotations

import heapq
import os
import random
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, Final

import msgspec
import redis

from ..errors import StorageClosedError, StorageError, StorageUnavailableError
from ..record import Counters
from .base import PAGE, Storage
from .protocol import Claim, Commit, Granted, Put, Refused, Replay, Replayed
from .redis_client import FOREIGN, mask, open_client, read_options, translate
from .redis_records import (
    Row,
    digest_bytes,
    escape,
    id_bytes,
    in_order,
    micros,
    read_letter,
    read_record,
    read_story,
)
from .redis_requests import accepted, granted, pack_claims, pack_commits
from .redis_script import Script, cut, pack, read_script
from .stored import Stored, StoredRecord

__all__ = ["RedisStorage", "open_url"]

#: The form of the keys that this version reads and writes.
LAYOUT: Final = 2

#: Records that one script of `tend` forgets, with their stories, in less than 1 ms.
_MOST_TENDED: Final = 64
#: Seconds that one `tend` takes at most, of which the server is busy half, and between two of any processes.
_TENDING, _TEND_PAUSE = 0.4, 1.0
#: Topics that one script of `tend` looks at.
_MOST_TOPICS: Final = 32


_note: Final[Callable[[Any], bytes]] = attrgetter("note")
_blob: Final[Callable[[Any], bytes]] = attrgetter("blob")


class RedisStorage(Storage):
    """Keeps everything in a Redis or Valkey server, which every process that opens it shares.

    It connects at its first use, may be used by any number of threads, and stays usable in a forked child.

    Args:
        client: a redis-py client that returns bytes; `close` closes its connections.
        prefix: before every key; storages under different prefixes know nothing of each other.
        clock: seconds since the epoch, for tests; None: the server's own clock.
        name: what `repr` and errors call it: a URL without its password.
    """

    def __init__(
        self,
        client: redis.Redis,
        *,
        prefix: str = "watch:",
        clock: Callable[[], float] | None = None,
        name: str = "redis",
    ) -> None:
        self._client = client
        self._execute: Callable[..., Any] = self._execute_first
        #: Connections of the process of that number that no command is on.
        self._idle: deque[Any] = deque()
        self._pid = os.getpid()
        self._prefix = prefix.encode()
        self._states = f"{prefix}s:"
        self._clock = clock
        self._name = name
        self._closed = False
        self._scripts: dict[str, Script] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._name!r})"

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._client.close()
            self._client.connection_pool.disconnect()

    # -- the protocol

    def _claim(self, claims: Sequence[Claim]) -> list[Granted | Refused]:
        answers: list[Granted | Refused] = []
        for part in cut(claims, _note):
            answers += granted(part, self._run("claim", pack_claims(part)))
        return answers

    def _commit(self, commits: Sequence[Commit]) -> list[bool]:
        answers: list[bool] = []
        for part in cut(commits, _blob):
            request, blobs, places = pack_commits(part, self._states)
            answers += accepted(len(part), places, self._run("commit", request, *blobs))
        return answers

    def _renew(self, worker: str, ids: Sequence[str], lease: float) -> set[str]:
        held: set[str] = set()
        for part in cut(ids):
            answers = self._run("renew", (worker, part, micros(lease)))
            held.update(id for id, is_held in zip(part, answers, strict=True) if is_held)
        return held

    def _release(self, worker: str, ids: Sequence[str], crashed: bool) -> list[int]:
        return [count for part in cut(ids) for count in self._run("release", (worker, part, crashed))]

    def _replay(self, replays: Sequence[Replay]) -> list[tuple[Replayed, int]]:
        answers: list[tuple[Replayed, int]] = []
        for part in cut(replays):
            request = [(replay.id, micros(replay.patience), replay.force) for replay in part]
            found = self._run("replay", request, *(replay.note for replay in part))
            answers += [(Replayed(why.decode()), copy) for why, copy in found]
        return answers

    # -- records

    def _get(self, topic: str, index: str) -> StoredRecord | None:
        now, *found = self._run("get", (topic, index))
        row = read_record(topic, index, found[0], float(now), found[1] or b"") if found else None
        return row.stored if row else None

    def _put(self, puts: Sequence[Put]) -> list[bool]:
        kept: list[bool] = []
        for part in cut(puts, _blob):
            request, blobs = [], []
            for put in part:
                id, digest, at = id_bytes(put.id), digest_bytes(put.digest), micros(put.at)
                blobs.append(id + digest + put.blob)
                retention = None if put.retention is None else micros(put.retention)
                request.append((put.topic, put.index, put.id, at, retention, put.only_newer, len(id), len(digest)))
            order = in_order([(item[3], item[1]) for item in request])
            kept += map(bool, self._run("put", (request, order), *blobs))
        return kept

    def _remove(self, topic: str, indexes: Sequence[str], note: bytes) -> int:
        return int(self._run("remove", (topic, indexes), note))

    def _scan(self, topic: str, since: float | None, newest_first: bool) -> Iterator[StoredRecord]:
        # A record written meanwhile moves to the end of the time order. It is left out there: by its token where it
        # was claimed after the start, by its time where it was claimed before.
        found = self._run("scan", topic)
        last_token, ends = float(found[1]), [float(end) for end in found[3::2]]
        orders = [self._walk(topic, name.decode(), since, newest_first) for name in found[2::2]]
        for row in heapq.merge(*orders, key=lambda row: row.at, reverse=newest_first):
            if not newest_first and row.at > max(ends):
                return
            if row.token <= last_token:
                yield row.stored

    def _walk(self, topic: str, order: str, since: float | None, newest_first: bool) -> Iterator[Row]:
        """Yield the records of one order, page by page."""
        start = None if since is None else round(since * 1_000_000)
        after: tuple[bytes, ...] = ()
        while True:
            now, last, *found = self._run("page_records", (topic, order, newest_first, PAGE, start), *after)
            for index, value in zip(found[::2], found[1::2], strict=True):
                row = read_record(topic, index.decode(), value, float(now))
                if row:
                    yield row
            if last is None:
                return
            after = (last,)

    def _len(self, topic: str) -> int:
        return int(self._run("count", topic))

    # -- dead letters

    def _letters(self, topic: str | None, since: float | None) -> Iterator[Stored]:
        members = "letters" if topic is None else f"l:{escape(topic)}"
        for _, _, _, value in self._pages(members, "d:", since, True):
            yield read_letter(value)

    def _letter(self, id: str) -> Stored | None:
        value = self._ask("GET", self._key(f"d:{id}"))
        return read_letter(value) if value else None

    def _drop_letter(self, id: str, topic: str, index: str | None, note: bytes) -> bool:
        return bool(self._run("drop_letter", (id, topic, index), note))

    # -- what happened

    def _story(self, topic: str, index: str) -> Iterator[tuple[float, str, bytes]]:
        yield from read_story(self._run("story", (topic, index)))

    def _counters(self, topic: str) -> Counters:
        name = escape(topic)
        fields = ("handled", "duplicates", "retries")
        counts = self._ask("HMGET", self._key(f"c:{name}"), *fields)
        dead = self._ask("ZCARD", self._key(f"l:{name}"))
        return Counters(**{field: int(count or 0) for field, count in zip(fields, counts, strict=True)}, dead=dead)

    def _topics(self) -> set[str]:
        return {name.decode() for name in self._ask("SMEMBERS", self._key("topics")) if name}

    # -- life

    def tend(self) -> None:
        """Forget records that are over, in many short scripts with as long a pause after each; at most for 0.4 s.

        Where another process did so within the last second, there is nothing to do.
        """
        names = [name.decode() for name in self._ask("SMEMBERS", self._key("topics"))]
        random.shuffle(names)  # so that none has to wait for the others, always
        start = time.monotonic()
        pause: int | None = round(_TEND_PAUSE * 1_000_000)
        for first in range(0, len(names), _MOST_TOPICS):
            trimmed = 1
            while trimmed:
                before = time.monotonic()
                if before - start > _TENDING:
                    return
                trimmed = self._run("tend", (names[first : first + _MOST_TOPICS], _MOST_TENDED, pause))
                if trimmed < 0:
                    return
                pause = None
                time.sleep(time.monotonic() - before)

    # -- what a person should know

    def check(self) -> list[tuple[str, bool, str, str]]:
        """Return whether the server is new enough, keeps what it acknowledged, and evicts nothing."""
        info = self._ask("INFO", "server")
        version = str(info.get("valkey_version") or info.get("redis_version", "0"))
        brand = "Valkey" if "valkey_version" in info else "Redis"
        new_enough = tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= (6, 2)
        appends, policy = self._setting("appendonly"), self._setting("maxmemory-policy")
        return [
            ("storage version", new_enough, f"{brand} {version}", "" if new_enough else "use Redis 6.2, or Valkey"),
            (
                "storage persistence",
                appends in ("yes", None),
                f"appendonly {appends or 'unknown: CONFIG GET is not allowed'}",
                "" if appends in ("yes", None) else "set `appendonly yes`: a restart forgets what was handled",
            ),
            (
                "storage eviction",
                policy in ("noeviction", None),
                f"maxmemory-policy {policy or 'unknown: CONFIG GET is not allowed'}",
                "" if policy in ("noeviction", None) else "set `maxmemory-policy noeviction`: records would vanish",
            ),
        ]

    def _setting(self, name: str) -> str | None:
        try:
            found: dict[Any, Any] = self._ask("CONFIG GET", name)
        except StorageUnavailableError:
            raise
        except StorageError:
            return None
        values = {_text(key): _text(value) for key, value in found.items()}
        return values.get(name)

    # -- the seam to redis-py

    def _execute_first(self, *command: Any) -> Any:
        """Execute the first command of this process; after it, commands go straight to the client."""
        layout = int(self._client.get(self._key("layout")) or LAYOUT)
        if layout > LAYOUT:
            raise StorageError(
                f"storage `{self._name}` was written by a newer version: its layout is {layout}, this version reads "
                f"layout {LAYOUT}. Update watch-tasks here, or name another `?prefix=`"
            )
        execute: Callable[..., Any] = self._client.execute_command
        self._execute = execute
        return execute(*command)

    def _call(self, *command: Any) -> Any:
        """Execute a script, on a connection of our own: the pool's care for each command takes a tenth of its time."""
        if self._execute == self._execute_first:
            return self._execute(*command)
        if self._pid != os.getpid():
            self._idle, self._pid = deque(), os.getpid()  # the parent's are let go of
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._client.connection_pool.get_connection()

        packed = [pack(command)]

        def ask() -> Any:
            connection.send_packed_command(packed)
            return connection.read_response()

        try:
            return connection.retry.call_with_retry(ask, lambda error: connection.disconnect())
        except redis.ResponseError:
            raise
        except BaseException:
            connection.disconnect()  # an answer that nobody read would be taken for that of the next command
            raise
        finally:
            self._idle.append(connection)

    def _now(self) -> int:
        """Return the time in µs."""
        if self._clock:
            return int(self._clock() * 1_000_000)
        seconds, micros = self._ask("TIME")
        return int(seconds) * 1_000_000 + int(micros)

    def _key(self, name: str) -> bytes:
        return self._prefix + name.encode()

    def _ask(self, *command: bytes | str | int) -> Any:
        with self._translated():
            return self._execute(*command)

    def _run(self, name: str, request: Any, *blobs: bytes) -> Any:
        script = self._scripts.get(name)
        if script is None:
            script = self._scripts[name] = Script(read_script(name))
        now = str(self._now()) if self._clock else ""
        with self._translated():
            return script(self._call, self._prefix, now, msgspec.msgpack.encode(request), *blobs)

    def _pages(
        self, members: str, values: str, since: float | None, newest_first: bool
    ) -> Iterator[tuple[str, float, float, bytes]]:
        """Yield (member, score, now, value) of all that is there, page by page."""
        start = None if since is None else round(since * 1_000_000)
        score: float | None = None
        after: tuple[bytes, ...] = ()
        while True:
            found = self._run("page", (members, values, newest_first, PAGE, start, score), *after)
            now = int(found[0]) / 1_000_000
            if len(found) == 1:
                return
            for place in range(1, len(found), 3):
                if found[place + 2] is not None:
                    yield found[place].decode(), float(found[place + 1]), now, found[place + 2]
            after, score = (found[-3],), float(found[-2])

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn every error of redis-py into one of ours."""
        if self._closed:
            raise StorageClosedError(f"{self!r} was closed")
        try:
            yield
        except FOREIGN as exc:
            raise translate(exc, self._name) from exc


def open_url(url: str) -> RedisStorage:
    """Open a storage by URL; see `open_client` for its forms. `?prefix=` sets the prefix of its keys.

    Raises:
        ConfigurationError: an option is unknown, lacking or cannot be read.
    """
    prefix = read_options(url).get("prefix", "watch:")
    return RedisStorage(open_client(url, "prefix"), prefix=prefix, name=mask(url))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
