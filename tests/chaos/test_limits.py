"""Memory that runs out (F12), giants (F14), and handlers that do to their process what nobody should (F15)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from watch_tasks import Reason

from ..servers import RedisServer
from ..worker.test_garbage import envelope
from ..workers import Site, until
from .harness import Place, Producer, Tally, check, pass_time, settle

pytestmark = [pytest.mark.chaos, pytest.mark.worker, pytest.mark.timeout(600)]

MakeSite = Callable[..., Site]


@pytest.fixture
def make_site(tmp_path: Path, own_valkey: RedisServer) -> Iterator[MakeSite]:
    made: list[Site] = []

    def make(topics: str, **environment: str) -> Site:
        made.append(Site(tmp_path / "site", own_valkey.url, topics, **environment))
        return made[-1]

    yield make
    for site in made:
        site.close()


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_server_without_memory_loses_nothing(tmp_path: Path, own_valkey: RedisServer, pool: str) -> None:
    """F12: it refuses to write, for messages and records alike, and goes on when it may."""
    place = Place(tmp_path / "site", own_valkey.url)
    producer = Producer(place, tmp_path / "sent.jsonl")
    tally = Tally()
    try:
        workers = [place.spawn(pool=pool, concurrency=2) for _ in range(2)]
        until(lambda: all("ready." in worker.text() for worker in workers), "the workers are ready", 40)
        with own_valkey.client() as client, producer.flowing(own_valkey, 0.02, lambda: 0.02):
            for _ in range(3):
                before = len(producer.sent)
                until(lambda: len(producer.sent) > before + 30, "messages flow", 30, place.report)  # noqa: B023
                client.config_set("maxmemory", "1")
                pass_time(8)  # longer than a lease
                client.config_set("maxmemory", "0")
        settle(place, own_valkey, producer, tally)
        exits = [worker.process.returncode for worker in workers if not worker.is_running()]
        check(place, producer, tally, in_flight=0)
    finally:
        place.close()
        producer.close()
    print(f"F12 {pool}, a server without memory: {tally}")
    assert exits == []
    assert tally.sent_unknown > 0, "it refused no send"
    assert not tally.complaints, tally.complaints[:10]


HUNGRY = """
import resource
hungry = topic("hungry", retry=RetryPolicy(max_retries=1, backoff=0.05))

@hungry.handler
def eat(message):
    note("eat", message)
    if message.data == "too much":
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), resource.RLIM_INFINITY))
        [bytearray(16 << 20) for _ in range(100)]
    if message.data == "the kernel's choice":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_handlers_over_their_memory_are_dead_after_their_tries(make_site: MakeSite) -> None:
    """F12."""
    site = make_site(HUNGRY)
    worker = site.worker(concurrency=2)
    good = [site.send("hungry", "little") for _ in range(10)]
    failing, killed = site.send("hungry", "too much"), site.send("hungry", "the kernel's choice")
    began = time.monotonic()

    site.until_dead(2, 30)
    dead_after = time.monotonic() - began
    good += [site.send("hungry", "little") for _ in range(10)]
    site.until_handled(20, 15)

    reasons = {letter.id: letter.reason for letter in site.dead()}
    print(f"F12: {reasons} after {dead_after:.1f} s")
    assert reasons == {failing: Reason.EXHAUSTED, killed: Reason.KILLED_WORKER}
    calls = site.calls("id")
    assert (calls[failing], calls[killed], {calls[id] for id in good}) == (2, 3, {1})
    assert worker.is_running()


PROBE = """
probe = topic("probe")

@probe.handler
def look(message): note("look", message)
"""

#: What is far too large, as JSON: megabytes, many keys, deep, one long number.
GIANTS: dict[str, Callable[[], bytes]] = {
    "2 MB": lambda: b'"' + b"x" * 2_000_000 + b'"',
    "10 MB": lambda: b'"' + b"x" * 10_000_000 + b'"',
    "64 MB": lambda: b'"' + b"x" * 64_000_000 + b'"',
    "1,000,000 keys": lambda: json.dumps(dict.fromkeys(map(str, range(1_000_000)), 0)).encode(),
    "100,000 deep": lambda: b"[" * 100_000 + b"]" * 100_000,
    "a number of 10,000 digits": lambda: b"9" * 10_000,
}


def test_giants_are_dead_and_leave_no_memory_behind(make_site: MakeSite) -> None:
    """F14."""
    site = make_site(PROBE)
    worker = site.worker(concurrency=1)
    ended: dict[str, Any] = {}
    with site.bare.connection().channel() as channel:
        for name, make in GIANTS.items():
            dead, handled = len(site.dead()), site.handled()
            before, began = worker.memory(), time.monotonic()
            channel.client.lpush("celery", json.dumps(envelope(b"[[%s],{},{}]" % make())))
            until(lambda: len(site.dead()) > dead or site.handled() > handled, name, 60, site.report)  # noqa: B023
            growth, seconds = worker.memory() - before, time.monotonic() - began
            ended[name] = "dead" if len(site.dead()) > dead else "handled"
            print(f"F14 {name}: {ended[name]} after {seconds:.1f} s, {growth:.1f} MiB more")
    site.send("probe", 1)
    until(lambda: site.calls()["look"] >= 1, "others are handled", 20, site.report)
    assert ended.pop("a number of 10,000 digits") in ("dead", "handled")
    assert set(ended.values()) == {"dead"}
    assert worker.is_running()


BAD = """
import ctypes, subprocess, threading
bad = topic("bad", timeout=1, retry=RetryPolicy(max_retries=0))

@bad.handler
def act(message):
    match message.data:
        case "hang": time.sleep(60)
        case "hang and catch":
            while True:
                try: time.sleep(60)
                except Exception: pass
        case "hang deaf":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            time.sleep(60)
        case "_exit 0": os._exit(0)
        case "_exit 1": os._exit(1)
        case "sys.exit": sys.exit(0)
        case "segfault": ctypes.string_at(0)
        case "fork and exit":
            if os.fork() == 0: sys.exit(0)
        case "leave a child": subprocess.Popen(["sleep", "300"])
        case "leave a thread": threading.Thread(target=time.sleep, args=(300,), daemon=True).start()
        case "recurse":
            def again(): again()
            again()
        case "leak files":
            global leaked
            leaked = []
            while True: leaked.append(open("/dev/null"))
        case "close files": os.closerange(3, 4096)
        case "stop signals": signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
"""

#: What a handler does → how its message may end.
ENDS = {
    "good": {"handled"},
    # Killed, in a process where another handler stopped all signals.
    "hang": {Reason.EXHAUSTED, Reason.KILLED_WORKER},
    "hang and catch": {Reason.EXHAUSTED, Reason.KILLED_WORKER},
    "hang deaf": {Reason.KILLED_WORKER},
    "_exit 0": {Reason.KILLED_WORKER},
    "_exit 1": {Reason.KILLED_WORKER},
    "sys.exit": {Reason.EXHAUSTED},
    "segfault": {Reason.KILLED_WORKER},
    "fork and exit": {"handled"},
    # Not handled, in a process that has no file left.
    "leave a child": {"handled", Reason.EXHAUSTED},
    "leave a thread": {"handled"},
    "recurse": {Reason.EXHAUSTED},
    "leak files": {Reason.EXHAUSTED},
    "close files": {"handled", Reason.EXHAUSTED, Reason.KILLED_WORKER},
    "stop signals": {"handled"},
}


def test_bad_handlers_end_alone_and_in_time(make_site: MakeSite) -> None:
    """F15."""
    site = make_site(BAD, WATCH_KILL_AFTER="2", WATCH_MAX_CRASHES="2")
    worker = site.worker(concurrency=4)
    ids = {}
    for name in ENDS:
        ids[site.send("bad", name)] = name
        ids[site.send("bad", "good")] = "good"
    began = time.monotonic()

    def ended() -> dict[str, Any]:
        return {letter.id: letter.reason for letter in site.dead()} | {
            record.id: "handled" for record in site.storage.range("bad")
        }

    until(lambda: len(ended()) == len(ids), "all have ended", 60, site.report)
    found = ended()
    print(f"F15: {len(ids)} messages ended after {time.monotonic() - began:.1f} s")
    for id, name in ids.items():
        assert found[id] in ENDS[name], f"{name}: {found[id]}, {site.storage.dead_get(id)}"
    assert worker.is_running()
    site.send("bad", "good", index="after")
    until(lambda: site.storage.get("bad", "after") is not None, "it works on", 20, site.report)
