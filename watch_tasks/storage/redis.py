"""A storage on Redis 6.2 or newer, or Valkey. Every step of the protocol is one script: atomic, one round trip.

The scripts are in `redis_scripts/`; they keep the rules that `rules.py` states in Python. They build their keys
from the prefix themselves, so Redis Cluster is not supported.

Keys, each under the prefix (a topic has no `:`, or it is escaped, so no two names share a key):

| key | holds |
|---|---|
| `r:<topic>:<index>` | the record: times, tokens, id and digest, then the record's bytes |
| `s:<id>` | hash: the state of an unfinished or dead message |
| `m:<id>` | the mark: done, though no record says so |
| `h:<topic>:<index>` | the id that holds the index, under once="index" |
| `t:<topic>:<index>` | list: the story |
| `z:<topic>`, `x:<topic>` | indexes of the records by the time handled, and by the time they expire |
| `d:<id>`, `letters`, `l:<topic>` | dead letters, and their ids by time: all, and those of a topic |
| `c:<topic>`, `topics`, `token` | hash of counters, set of names, the last token |
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any, Final

import msgspec
import redis
from redis.exceptions import (
    ChildDeadlockedError,
    ClusterDownError,
    MasterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    TryAgainError,
)

from ..errors import StorageClosedError, StorageError, StorageUnavailableError
from ..record import Counters
from .base import PAGE, Storage
from .protocol import Claim, Commit, Granted, Put, Refusal, Refused, Replay, Replayed
from .redis_client import mask, open_client, read_options
from .stored import Stored, StoredRecord

__all__ = ["RedisStorage", "open_url"]

#: Items that one call of a script takes, and bytes: while it runs, the server does nothing else.
_MOST_ITEMS: Final = 500
_MOST_BYTES: Final = 16 * 1024 * 1024

#: The roots of all that redis-py raises here.
_FOREIGN: Final = (redis.RedisError, RedisClusterException, ChildDeadlockedError)
#: What is over when the server is back, free or writable again.
_AWAY: Final = (
    redis.ConnectionError,
    redis.TimeoutError,
    ClusterDownError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
)
#: The same, from inside a script (Redis 6.2 wraps them in a text), and codes that redis-py has no class for.
_AWAY_CODES: Final = re.compile(
    r"\b(OOM|READONLY|LOADING|MISCONF|NOREPLICAS|BUSY|MASTERDOWN|CLUSTERDOWN|TRYAGAIN)\b(?! GROUP)"
)

_RECORD: Final = struct.Struct(">ddddI")  # handled at, expires, first token, token, length of the id
_LETTER: Final = struct.Struct(">dI")  # dead at, length of the topic
_EVENT: Final = struct.Struct(">ddB")  # at, expires, length of the kind


class _Script:
    """A script by its digest; the server is told its text when it does not know it."""

    def __init__(self, name: str) -> None:
        folder = files(__package__) / "redis_scripts"
        text = "\n".join((folder / f"{part}.lua").read_text(encoding="utf-8") for part in ("common", name))
        self._text = text.encode()
        self._digest = hashlib.sha1(self._text, usedforsecurity=False).hexdigest()

    def __call__(self, execute: Callable[..., Any], *args: bytes | str) -> Any:
        try:
            return execute("EVALSHA", self._digest, 0, *args)
        except NoScriptError:
            return execute("EVAL", self._text, 0, *args)


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
        self._execute: Callable[..., Any] = client.execute_command
        self._prefix = prefix.encode()
        self._clock = clock
        self._name = name
        self._closed = False
        self._scripts: dict[str, _Script] = {}

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
        for part in _parts(claims, lambda claim: len(claim.note)):
            request = [
                (
                    claim.topic,
                    claim.index,
                    claim.id,
                    claim.copy,
                    claim.once,
                    claim.worker,
                    claim.lease,
                    claim.digest,
                    claim.retention,
                    claim.sent_at,
                    claim.started,
                    claim.nonce,
                )
                for claim in part
            ]
            answers += map(_answer, self._run("claim", request, *(claim.note for claim in part)))
        return answers

    def _commit(self, commits: Sequence[Commit]) -> list[bool]:
        accepted: list[bool] = []
        for part in _parts(commits, lambda commit: len(commit.blob)):
            request = [
                (
                    commit.step,
                    commit.topic,
                    commit.index,
                    commit.id,
                    commit.copy,
                    commit.token,
                    commit.digest,
                    commit.retention,
                    commit.delay,
                    [kind for kind, _ in commit.notes],
                )
                for commit in part
            ]
            blobs = [blob for commit in part for blob in (commit.blob, *(note for _, note in commit.notes))]
            accepted += map(bool, self._run("commit", request, *blobs))
        return accepted

    def _renew(self, worker: str, ids: Sequence[str], lease: float) -> set[str]:
        held: set[str] = set()
        for part in _parts(ids):
            answers = self._run("renew", (worker, part, lease))
            held.update(id for id, is_held in zip(part, answers, strict=True) if is_held)
        return held

    def _release(self, worker: str, ids: Sequence[str], crashed: bool) -> list[int]:
        return [count for part in _parts(ids) for count in self._run("release", (worker, part, crashed))]

    def _replay(self, replays: Sequence[Replay]) -> list[tuple[Replayed, int]]:
        answers: list[tuple[Replayed, int]] = []
        for part in _parts(replays):
            request = [(replay.id, replay.patience, replay.force) for replay in part]
            found = self._run("replay", request, *(replay.note for replay in part))
            answers += [(Replayed(why.decode()), copy) for why, copy in found]
        return answers

    # -- records

    def _get(self, topic: str, index: str) -> StoredRecord | None:
        value = self._ask("GET", self._key(f"r:{topic}:{index}"))
        return _read_record(topic, index, value, self._clock() if self._clock else 0.0)[0] if value else None

    def _put(self, puts: Sequence[Put]) -> list[bool]:
        kept: list[bool] = []
        for part in _parts(puts, lambda put: len(put.blob)):
            request = [
                (put.topic, put.index, put.id, put.digest, put.at, put.retention, put.only_newer) for put in part
            ]
            kept += map(bool, self._run("put", request, *(put.blob for put in part)))
        return kept

    def _remove(self, topic: str, indexes: Sequence[str], note: bytes) -> int:
        return int(self._run("remove", (topic, indexes), note))

    def _scan(self, topic: str, since: float | None, newest_first: bool) -> Iterator[StoredRecord]:
        # A record written meanwhile moves to the end of the time order. It is left out there: by its token where it
        # was claimed after the start, by its time where it was claimed before.
        last_token = max(int(self._ask("GET", self._key("token")) or 0), self._now())
        newest = self._ask("ZRANGE", self._key(f"z:{topic}"), -1, -1)
        end = float(self._ask("ZSCORE", self._key(f"z:{topic}"), newest[0]) or math.inf) if newest else -math.inf
        for index, score, now, value in self._pages(f"z:{topic}", f"r:{topic}:", since, newest_first):
            if score > end and not newest_first:
                return
            stored, token = _read_record(topic, index, value, now)
            if stored and token <= last_token:
                yield stored

    def _len(self, topic: str) -> int:
        return int(self._run("count", topic))

    # -- dead letters

    def _letters(self, topic: str | None, since: float | None) -> Iterator[Stored]:
        members = "letters" if topic is None else f"l:{_escape(topic)}"
        for _, _, _, value in self._pages(members, "d:", since, True):
            yield _read_letter(value)

    def _letter(self, id: str) -> Stored | None:
        value = self._ask("GET", self._key(f"d:{id}"))
        return _read_letter(value) if value else None

    def _drop_letter(self, id: str, topic: str, index: str | None, note: bytes) -> bool:
        return bool(self._run("drop_letter", (id, topic, index), note))

    # -- what happened

    def _story(self, topic: str, index: str) -> Iterator[tuple[float, str, bytes]]:
        events = self._ask("LRANGE", self._key(f"t:{topic}:{index}"), 0, -1)
        now = self._now() if self._clock else 0
        if any(_EVENT.unpack_from(event)[1] > now for event in events):
            for event in events:
                at, _, size = _EVENT.unpack_from(event)
                note = _EVENT.size + size
                yield at / 1_000_000, event[_EVENT.size : note].decode(), event[note:]

    def _counters(self, topic: str) -> Counters:
        name = _escape(topic)
        fields = ("handled", "duplicates", "retries")
        counts = self._ask("HMGET", self._key(f"c:{name}"), *fields)
        dead = self._ask("ZCARD", self._key(f"l:{name}"))
        return Counters(**{field: int(count or 0) for field, count in zip(fields, counts, strict=True)}, dead=dead)

    def _topics(self) -> set[str]:
        return {name.decode() for name in self._ask("SMEMBERS", self._key("topics")) if name}

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
            script = self._scripts[name] = _Script(name)
        now = str(self._now()) if self._clock else ""
        with self._translated():
            return script(self._execute, self._prefix, now, msgspec.msgpack.encode(request), *blobs)

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
        except _FOREIGN as exc:
            raise translate(exc, self._name) from exc


def translate(error: Exception, name: str) -> StorageError:
    """Return the error of ours that says the same as one of redis-py's."""
    text = f"storage `{name}`: {type(error).__name__}: {error}"
    if isinstance(error, _AWAY) or (isinstance(error, redis.ResponseError) and _AWAY_CODES.search(str(error))):
        return StorageUnavailableError(text)
    return StorageError(text)


def open_url(url: str) -> RedisStorage:
    """Open a storage by URL; see `open_client` for its forms. `?prefix=` sets the prefix of its keys.

    Raises:
        ConfigurationError: an option is unknown, lacking or cannot be read.
    """
    prefix = read_options(url).get("prefix", "watch:")
    return RedisStorage(open_client(url, "prefix"), prefix=prefix, name=mask(url))


def _parts(items: Sequence[Any], size: Callable[[Any], int] = lambda item: 0) -> Iterator[list[Any]]:
    """Cut what is too much for one script; usually it is one part."""
    part: list[Any] = []
    total = 0
    for item in items:
        if part and (len(part) == _MOST_ITEMS or total > _MOST_BYTES):
            yield part
            part, total = [], 0
        part.append(item)
        total += size(item)
    yield part


def _answer(answer: list[Any]) -> Granted | Refused:
    if answer[0] == b"granted":
        _, token, copy, progress, crashes, now = answer
        return Granted(token, copy, progress, crashes, now / 1_000_000)
    return Refused(Refusal(answer[0].decode()), answer[1] / 1_000_000)


def _read_record(topic: str, index: str, value: bytes, now: float) -> tuple[StoredRecord | None, float]:
    """Return a record, None where its time is over, and its token."""
    at, expires, _, token, size = _RECORD.unpack_from(value)
    if expires <= now * 1_000_000:
        return None, token
    end = _RECORD.size + size
    blob = end + 2 + int.from_bytes(value[end : end + 2], "big")
    stored = StoredRecord(
        topic=topic,
        index=index,
        id=value[_RECORD.size : end].decode(),
        digest=value[end + 2 : blob].decode(),
        at=at / 1_000_000,
        expires=None if expires == math.inf else expires / 1_000_000,
        blob=value[blob:],
    )
    return stored, token


def _read_letter(value: bytes) -> Stored:
    at, size = _LETTER.unpack_from(value)
    return Stored(at / 1_000_000, value[_LETTER.size + size :])


def _escape(topic: str) -> str:
    return topic.replace("%", "%25").replace(":", "%3A")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
