"""The Redis storage keeps every promise, on Valkey and on Redis, and uses the server as it says."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.servers import RedisServer
from watch_tasks.errors import StorageError
from watch_tasks.storage import open_storage
from watch_tasks.storage.protocol import Granted, Step
from watch_tasks.storage.redis import RedisStorage
from watch_tasks.storage.redis_client import open_client
from watch_tasks.testing import ManualClock, StorageSuite
from watch_tasks.testing.storage_values import LEASE, TOPIC, ask, grant, handle, record, settle
from watch_tasks.topics import WEEK

pytestmark = pytest.mark.integration


class RedisSuite(StorageSuite):
    backend = RedisStorage

    @pytest.fixture
    def storage(self, server: RedisServer, clock: ManualClock) -> Iterator[RedisStorage]:
        with RedisStorage(open_client(server.url), clock=clock) as storage:
            yield storage

    @pytest.fixture
    def reopen(self, server: RedisServer, clock: ManualClock) -> Callable[[], RedisStorage]:
        return lambda: RedisStorage(open_client(server.url), clock=clock)


class TestOnValkey(RedisSuite):
    @pytest.fixture
    def server(self, valkey: RedisServer) -> RedisServer:
        return valkey


class TestOnRedis(RedisSuite):
    @pytest.fixture
    def server(self, redis_server: RedisServer) -> RedisServer:
        return redis_server


@pytest.fixture
def storage(valkey: RedisServer) -> Iterator[RedisStorage]:
    """One that goes by the server's clock."""
    with open_storage(valkey.url) as storage:
        assert isinstance(storage, RedisStorage)
        yield storage


# -- how it uses the server


def test_a_claim_is_one_command_and_a_commit_another(valkey: RedisServer, storage: RedisStorage) -> None:
    handle(storage, "known", index="known")  # so that the server knows the scripts
    claims = [ask(f"m{number}", index=f"order-{number}") for number in range(100)]
    before = _calls(valkey)

    granted = storage.claim_many(claims)
    storage.commit_many([settle(Step.HANDLED, *pair) for pair in zip(claims, granted, strict=True)])  # type: ignore[arg-type]

    assert _calls(valkey) - before == 2


def test_a_server_that_forgot_the_scripts_is_told_again(valkey: RedisServer, storage: RedisStorage) -> None:
    handle(storage, "m1")
    with valkey.client() as client:
        client.script_flush()

    handle(storage, "m2")

    assert storage.counters(TOPIC).handled == 2


def test_times_and_tokens_are_the_servers(valkey: RedisServer, storage: RedisStorage) -> None:
    with valkey.client() as client:
        seconds, micros = client.time()

    granted = grant(storage, ask())

    assert 0 <= granted.now - (seconds + micros / 1_000_000) < 5
    assert granted.token == pytest.approx(granted.now * 1_000_000, abs=2)


def test_the_server_expires_marks_and_stories_that_nobody_owns(valkey: RedisServer, storage: RedisStorage) -> None:
    handle(storage, "replaced")
    handle(storage, "m1")
    handle(storage, "removed", index="removed")
    storage.remove(TOPIC, "removed")
    storage.commit(settle(Step.RETRY, claim := ask("waiting", index="kept", retention=None), grant(storage, claim)))

    with valkey.client() as client:
        left = {key: client.ttl(key) for key in client.scan_iter("watch:*")}

    ending = {b"watch:m:replaced", b"watch:m:removed", b"watch:t:orders:removed"}
    assert {key for key, seconds in left.items() if seconds >= 0} == ending
    assert all(WEEK - 10 <= left[key] <= WEEK for key in ending)


def test_an_expired_record_is_gone_by_the_servers_clock(storage: RedisStorage) -> None:
    storage.put(record("order-1", at=time.time()), retention=0.2)
    assert storage.len(TOPIC) == 1

    _until(lambda: storage.get(TOPIC, "order-1") is None)

    assert storage.len(TOPIC) == 0
    assert list(storage.range()) == []


def test_records_are_listed_though_the_counter_of_tokens_was_lost(valkey: RedisServer, storage: RedisStorage) -> None:
    first = handle(storage)
    with valkey.client() as client:
        client.delete("watch:token")

    assert [found.id for found in storage.range()] == ["m1"]
    assert grant(storage, ask("m2")).token > first.token


def test_a_prefix_keeps_storages_apart(valkey: RedisServer) -> None:
    with open_storage(f"{valkey.url}?prefix=a:") as first, open_storage(f"{valkey.url}?prefix=b:") as second:
        handle(first)

        assert second.topics() == set()
        with valkey.client() as client:
            assert all(key.startswith(b"a:") for key in client.scan_iter())


def test_what_a_newer_version_wrote_is_not_read(valkey: RedisServer, storage: RedisStorage) -> None:
    handle(storage)
    with valkey.client() as client:
        assert client.get("watch:layout") == b"2"
        client.set("watch:layout", 3)

    with open_storage(valkey.url) as older, pytest.raises(StorageError, match="its layout is 3, this version reads"):
        older.get(TOPIC, "order-1")


# -- processes


def test_of_two_processes_each_message_is_granted_to_one(valkey: RedisServer) -> None:
    code = (
        "import sys\n"
        "from watch_tasks.storage import open_storage\n"
        "from watch_tasks.storage.protocol import Granted\n"
        "from watch_tasks.testing.storage_values import ask\n"
        "storage = open_storage(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "answers = [storage.claim(ask(f'm{number}', worker=sys.argv[2])) for number in range(300)]\n"
        "print(*(number for number, answer in enumerate(answers) if isinstance(answer, Granted)))\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, valkey.url, worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for worker in ("w1", "w2")
    ]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    granted = [number for process in processes for number in process.communicate(timeout=30)[0].split()]

    assert len(granted) == len(set(granted)) == 300


def test_a_storage_stays_usable_on_both_sides_of_a_fork(storage: RedisStorage) -> None:
    grant(storage, ask("parent", index="parent"))

    child = os.fork()
    if not child:
        granted = [isinstance(storage.claim(ask(f"c{one}", index=f"c{one}")), Granted) for one in range(50)]
        os._exit(0 if all(granted) else 1)
    granted = [isinstance(storage.claim(ask(f"p{one}", index=f"p{one}")), Granted) for one in range(50)]
    _, status = os.waitpid(child, 0)

    assert all(granted)
    assert status == 0
    assert storage.renew("w1", ["c0", "c49", "p49", "parent"], LEASE) == {"c0", "c49", "p49", "parent"}


# -- check


def test_a_server_fit_for_its_task_is_said_to_be(storage: RedisStorage) -> None:
    checks = {check: (ok, detail) for check, ok, detail, _ in storage.check()}

    assert checks["storage version"] == (True, checks["storage version"][1])
    assert checks["storage version"][1].startswith("Valkey ")
    assert checks["storage persistence"] == (True, "appendonly yes")
    assert checks["storage eviction"] == (True, "maxmemory-policy noeviction")


def test_a_server_that_forgets_is_told_of(own_valkey: RedisServer) -> None:
    with open_storage(own_valkey.url) as storage, own_valkey.client() as client:
        client.config_set("appendonly", "no")
        client.config_set("maxmemory-policy", "allkeys-lru")

        checks = {check: (ok, fix) for check, ok, _, fix in storage.check()}

    assert not checks["storage persistence"][0]
    assert "appendonly yes" in checks["storage persistence"][1]
    assert not checks["storage eviction"][0]
    assert "noeviction" in checks["storage eviction"][1]


def test_what_may_not_be_asked_is_unknown_and_no_complaint(own_valkey: RedisServer) -> None:
    with own_valkey.client() as client:
        client.execute_command("ACL", "SETUSER", "app", "on", ">pass", "~*", "+@all", "-config")

    with open_storage(own_valkey.url.replace("//", "//app:pass@")) as storage:
        handle(storage)
        checks = storage.check()

    assert all(ok for _, ok, _, _ in checks)
    assert sum("unknown" in detail for _, _, detail, _ in checks) == 2


def _calls(server: RedisServer) -> int:
    """Return how many commands clients sent so far, without those that scripts made."""
    with server.client() as client:
        stats = client.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("evalsha", "eval"))


def _until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)
