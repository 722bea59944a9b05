"""Mutants of real messages, each with an id of its own: none ends a worker, and none is gone (F13, F14).

`CHAOS_MUTANTS` says how many, `CHAOS_SEED` from which seed; both are printed.
"""

from __future__ import annotations

import base64
import bz2
import json
import os
import random
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from watch_tasks import MessageError
from watch_tasks.packets import StrangeMember
from watch_tasks.queue import bulk, wire

from ..servers import RedisServer
from ..worker.packets import push_body
from ..workers import Site, until
from .harness import leftovers

pytestmark = pytest.mark.worker

TOPICS = """
probe = topic("probe", retry=RetryPolicy(max_retries=1))

@probe.handler
def run(message):
    pass
"""
#: Items that are pushed before the worker is waited for.
BATCH = 500
#: What takes the place of a value.
VALUES: list[Any] = [None, True, 0, -1, 1e308, 10**30, "", "x", "\u202e\x00", [], {}, [[]], {"a": {"b": []}}, "9" * 400]


class Mutator:
    """Makes items that are nearly messages."""

    def __init__(self, base: bytes, seed: int) -> None:
        self._base = base
        self._random = random.Random(seed)

    def __call__(self) -> tuple[str, bytes]:
        """Return an id and an item that had it before it was mutated."""
        chance = self._random
        payload = json.loads(self._base)
        id = str(UUID(int=chance.getrandbits(128), version=4))
        payload["headers"] |= {"id": id, "root_id": id}
        payload["properties"] |= {"correlation_id": id, "delivery_tag": id}
        kind = chance.choice(
            ("nothing", "value", "value", "drop", "body", "body bytes", "bytes", "bytes", "cut", "twice")
        )
        if kind in ("value", "drop"):
            place = payload if chance.random() < 0.2 else chance.choice((payload["headers"], payload["properties"]))
            name = chance.choice(list(place))
            if kind == "drop":
                del place[name]
            else:
                place[name] = chance.choice(VALUES)
        elif kind == "body":
            parts = json.loads(base64.b64decode(payload["body"]))
            parts[chance.randrange(3)] = chance.choice(VALUES)
            payload["body"] = base64.b64encode(json.dumps(parts).encode()).decode()
        elif kind == "body bytes":
            payload["body"] = base64.b64encode(self._spoil(base64.b64decode(payload["body"]))).decode()
        item = json.dumps(payload).encode()
        if kind == "bytes":
            item = self._spoil(item)
        elif kind == "cut":
            item = item[: chance.randrange(len(item))]
        elif kind == "twice":
            item += item
        return id, item

    def _spoil(self, raw: bytes) -> bytes:
        spoilt = bytearray(raw)
        for _ in range(self._random.choice((1, 1, 1, 2, 5))):
            spoilt[self._random.randrange(len(spoilt))] = self._random.randrange(256)
        return bytes(spoilt)


def base_item(site: Site, server: RedisServer) -> bytes:
    """What a producer that never heard of this package sends."""
    site.send("probe", {"host": "web-1", "level": 3}, index="web-1")
    with server.client() as client:
        item: bytes = client.rpop("celery")
    return item


def identity(item: bytes) -> int:
    """Return the same number for items that are one dead letter: without headers, only the body is left to name it."""
    try:
        payload = json.loads(item)
    except ValueError:
        return hash(item)
    headers = payload.get("headers") or {} if isinstance(payload, dict) else None
    if not isinstance(headers, dict) or {"id", "root_id"} & headers.keys():
        return hash(item)
    return hash(f"{headers}{payload.get('body')}")


def run_mutants(site: Site, server: RedisServer, count: int, seed: int) -> tuple[int, dict[str, int]]:
    """Return how many different items were pushed, and what became of them."""
    print(f"seed={seed}")
    mutate = Mutator(base_item(site, server), seed)
    worker = site.worker("--prefetch-multiplier", "32", concurrency=2)
    children = set(worker.children())
    pushed: set[int] = set()
    with server.client() as client:

        def is_drained() -> bool:
            waiting = client.llen("celery") + sum(client.llen(f"celery\x06\x16{step}") for step in (3, 6, 9))
            return not waiting and not sum(client.hlen(key) for key in client.scan_iter("watch.held:*"))

        for start in range(0, count, BATCH):
            items = [mutate()[1] for _ in range(min(BATCH, count - start))]
            pushed.update(map(identity, items))
            client.lpush("celery", *items)
            until(is_drained, "all are settled", 120, site.report)
        later = client.zcard("celery\x06\x16later")
    assert worker.is_running(), worker.text()[-3000:]
    assert set(worker.children()) == children, "a child of the pool was lost"
    dead = sum(1 for _ in site.storage.dead())
    counters = site.storage.counters("probe")
    ended = {"handled": counters.handled, "dead": dead, "duplicates": counters.duplicates, "later": later}
    print(f"seed={seed} mutants={count} different={len(pushed)} {ended}")
    return len(pushed), ended


def check(site: Site, different: int, ended: dict[str, int], tolerance: float = 0.005) -> None:
    # Those that were cut short before their ids may be alike, and are one dead letter then; so are those of one id.
    assert different * (1 - tolerance) <= sum(ended.values()) <= different * (1 + tolerance)
    for letter in site.storage.dead():
        assert letter.raw is not None or letter.data is not None, letter
        assert letter.error


@pytest.fixture
def fuzzed(make_site: Callable[..., Site]) -> Site:
    return make_site(TOPICS, "worker_hijack_root_logger = False\n", WATCH_UNKNOWN_GRACE="0.1")


def test_a_few_mutants(fuzzed: Site, valkey: RedisServer) -> None:
    seed = int(os.environ.get("CHAOS_SEED") or time.time_ns() % 10**6)
    check(fuzzed, *run_mutants(fuzzed, valkey, 500, seed))


@pytest.mark.chaos
def test_many_mutants(fuzzed: Site, valkey: RedisServer) -> None:
    seed = int(os.environ.get("CHAOS_SEED") or time.time_ns() % 10**6)
    count = int(os.environ.get("CHAOS_MUTANTS", "100000"))
    check(fuzzed, *run_mutants(fuzzed, valkey, count, seed))


def packets(chance: random.Random, count: int) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Yield ids, bodies and headers of what is nearly a packet; each member has an id of its own before."""
    for number in range(count):
        id = f"p{number}"
        parts: list[Any] = [[f"{id}-{place}", f"i{number}-{place}", {"n": place}, None] for place in range(3)]
        headers: dict[str, Any] = {}
        kind = chance.choice(("nothing", "member", "field", "field", "more", "list", "bytes", "bytes", "cut", "header"))
        if kind == "member":
            parts[chance.randrange(3)] = chance.choice(VALUES)
        elif kind == "field":
            parts[chance.randrange(3)][chance.randrange(4)] = chance.choice(VALUES)
        elif kind == "more":
            name = chance.choice(("copy", "retries", "handled", "max_retries", "once", "sent_at"))
            parts[chance.randrange(3)][3] = {name: chance.choice(VALUES)}
        elif kind == "list":
            parts = chance.choice(VALUES)
        elif kind == "header":
            headers["watch"] = chance.choice(VALUES)
        body = json.dumps([["probe", parts], {}, None]).encode()
        if kind == "bytes":
            spoilt = bytearray(body)
            for _ in range(chance.choice((1, 1, 1, 2, 5))):
                spoilt[chance.randrange(len(spoilt))] = chance.randrange(256)
            body = bytes(spoilt)
        elif kind == "cut":
            body = body[: chance.randrange(len(body))]
        yield id, body, headers


def run_packets(site: Site, server: RedisServer, count: int, seed: int) -> tuple[int, dict[str, int]]:
    """Return how many messages and letters there ought to be, and what became of them."""
    print(f"seed={seed}")
    worker = site.worker("--prefetch-multiplier", "8", concurrency=2)
    children, expected, strange = set(worker.children()), 0, set[str]()
    own = {"version": 1, "sent_at": "2026-01-02T03:04:05+00:00"}
    with server.client() as client:
        for number, (id, body, headers) in enumerate(packets(random.Random(seed), count)):
            push_body(server, body, id, **headers)
            try:
                packet = bulk.read(body, {"id": id, "watch": own, **headers})
                unnamed = [one for one in packet.members if isinstance(one, StrangeMember) or not wire.is_id(one.id)]
                expected += len(packet.members) - len(unnamed)
                # Named by their bytes: those that are alike are one letter.
                strange.update(map(bulk.id_of, unnamed))
            except MessageError:
                expected += 1
            if number % BATCH == BATCH - 1 or number == count - 1:
                until(lambda: not leftovers(client), "all are settled", 120, site.report)
    expected += len(strange)
    assert worker.is_running(), worker.text()[-3000:]
    assert set(worker.children()) == children, "a child of the pool was lost"
    counters = [site.storage.counters(name) for name in site.storage.topics()]
    ended = {
        "handled": sum(one.handled for one in counters),
        "dead": sum(1 for _ in site.storage.dead()),
        "duplicates": sum(one.duplicates for one in counters),
    }
    print(f"seed={seed} packets={count} expected={expected} {ended}")
    return expected, ended


def test_a_few_mutants_of_packets(fuzzed: Site, valkey: RedisServer) -> None:
    seed = int(os.environ.get("CHAOS_SEED") or time.time_ns() % 10**6)
    check(fuzzed, *run_packets(fuzzed, valkey, 200, seed), tolerance=0.02)


@pytest.mark.chaos
def test_many_mutants_of_packets(fuzzed: Site, valkey: RedisServer) -> None:
    seed = int(os.environ.get("CHAOS_SEED") or time.time_ns() % 10**6)
    count = int(os.environ.get("CHAOS_MUTANTS", "20000"))
    check(fuzzed, *run_packets(fuzzed, valkey, count, seed), tolerance=0.02)


def bombs(site: Site, server: RedisServer, rounds: int) -> list[str]:
    """Return messages of a few kilobytes at most, whose bodies are 300 MB when they are inflated."""
    base = json.loads(base_item(site, server))
    zeros = b"0" * 300_000_000
    bodies = {"application/x-bz2": bz2.compress(zeros), "application/x-gzip": zlib.compress(zeros)}
    return [
        json.dumps(
            {
                **base,
                "headers": {**base["headers"], "id": f"{kind}-{number}", "compression": kind},
                "body": base64.b64encode(body).decode(),
            }
        )
        for number in range(rounds)
        for kind, body in bodies.items()
    ]


@pytest.mark.chaos
def test_bombs_cost_no_memory(fuzzed: Site, valkey: RedisServer) -> None:
    items = bombs(fuzzed, valkey, 10)
    worker = fuzzed.worker(concurrency=1)
    fuzzed.send("probe", 1, index="before")
    fuzzed.until_handled(1)
    before = worker.memory(peak=True)
    with valkey.client() as client:
        client.lpush("celery", *items)
    fuzzed.until_dead(20, 60)
    assert {letter.reason.value for letter in fuzzed.dead()} == {"too_large"}
    growth = worker.memory(peak=True) - before
    print(f"resident memory grew by {growth:.1f} MiB at most")
    assert growth < 32


#: Takes the cap of sizes away.
UNCAPPED = """
from watch_tasks.transport import channel
from watch_tasks.worker import consumer
channel.bound_decoders = consumer.bound_decoders = lambda most, firmly=True: None
"""


@pytest.mark.chaos
def test_without_the_cap_a_bomb_takes_memory(tmp_path: Path, own_valkey: RedisServer) -> None:
    site = Site(tmp_path / "site", own_valkey.url, UNCAPPED + TOPICS)
    try:
        items = bombs(site, own_valkey, 1)
        worker = site.worker(concurrency=1)
        before = worker.memory(peak=True)
        with own_valkey.client() as client:
            client.lpush("celery", items[0])
        until(lambda: worker.memory(peak=True) - before > 200, "it grows", 30, worker.text)
    finally:
        site.close()


@pytest.fixture
def make_site(tmp_path: Path, valkey: RedisServer) -> Any:
    made: list[Site] = []

    def make(topics: str, config: str = "", **environment: str) -> Site:
        made.append(Site(tmp_path / f"site{len(made)}", valkey.url, topics, config, **environment))
        return made[-1]

    yield make
    for site in made:
        site.close()
