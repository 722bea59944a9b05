"""The Redis storage when its server is away, refuses or answers with an error: bounded waits, and errors of ours."""

from __future__ import annotations

import time
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP

import pytest
import redis.exceptions
import redis.sentinel

from tests.servers import RedisServer
from watch_tasks.errors import StorageClosedError, StorageError, StorageUnavailableError
from watch_tasks.record import Counters
from watch_tasks.storage import open_storage
from watch_tasks.storage.protocol import Step
from watch_tasks.storage.redis_client import translate
from watch_tasks.testing.storage_values import TOPIC, ask, grant, handle, settle, unclaimed

pytestmark = pytest.mark.integration


# -- servers that are away


def test_everything_survives_a_killed_server(lasting_valkey: RedisServer) -> None:
    with open_storage(lasting_valkey.url) as storage:
        done = handle(storage, "done", index="done")
        running = ask("running", index="running")
        held = grant(storage, running)
        storage.commit(unclaimed(Step.DEAD, "dead"))

        lasting_valkey.stop(SIGKILL)
        lasting_valkey.start()

        assert storage.get(TOPIC, "done")
        assert storage.dead_get("dead")
        assert storage.counters(TOPIC) == Counters(handled=1, dead=1)
        assert storage.commit(settle(Step.HANDLED, running, held))
        assert grant(storage, ask("next")).token > max(done.token, held.token)


def test_a_stopped_server_is_unavailable_at_once(own_valkey: RedisServer) -> None:
    with open_storage(own_valkey.url) as storage:
        handle(storage)
        own_valkey.stop()
        begun = time.monotonic()

        for verb in (lambda: storage.claim(ask()), lambda: storage.get(TOPIC, "order-1"), lambda: storage.len()):
            with pytest.raises(StorageUnavailableError):
                verb()

        assert time.monotonic() - begun < 3


def test_a_frozen_server_is_unavailable_after_the_timeout(own_valkey: RedisServer) -> None:
    with open_storage(f"{own_valkey.url}?socket_timeout=0.2&socket_connect_timeout=0.2") as storage:
        handle(storage)
        own_valkey.signal(SIGSTOP)
        begun = time.monotonic()

        with pytest.raises(StorageUnavailableError):
            storage.claim(ask("m2"))

        assert time.monotonic() - begun < 2
        own_valkey.signal(SIGCONT)
        assert storage.get(TOPIC, "order-1")


def test_a_server_that_never_was_is_unavailable() -> None:
    with open_storage("redis://127.0.0.1:1/0") as storage, pytest.raises(StorageUnavailableError):
        storage.claim(ask())


@pytest.mark.parametrize("command", [("CONFIG", "SET", "maxmemory", "1"), ("REPLICAOF", "127.0.0.1", "1")])
@pytest.mark.parametrize("brand", ["valkey", "redis"])
def test_a_server_that_refuses_to_write_is_unavailable_and_nothing_is_written(
    tmp_path: Path, request: pytest.FixtureRequest, brand: str, command: tuple[str, ...]
) -> None:
    binary = request.getfixturevalue("_redis").binary if brand == "redis" else None
    server = RedisServer(tmp_path / "server", binary).start()
    try:
        with open_storage(server.url) as storage, server.client() as client:
            claim = ask()
            granted = grant(storage, claim)
            client.execute_command(*command)

            for verb in (
                lambda: storage.claim(ask("m2")),
                lambda: storage.commit(settle(Step.HANDLED, claim, granted)),
                lambda: storage.commit(settle(Step.DEAD, claim, granted)),
            ):
                with pytest.raises(StorageUnavailableError):
                    verb()

            assert storage.get(TOPIC, "order-1") is None
            assert storage.dead_get("m1") is None
    finally:
        server.stop()


# -- errors

#: Every error that redis-py has, and whether it means that the server is away.
_ERRORS = {
    "AskError": False,
    "AuthenticationError": True,
    "AuthenticationWrongNumberOfArgsError": False,
    "AuthorizationError": True,
    "BusyLoadingError": True,
    "ChildDeadlockedError": False,
    "ClusterCrossSlotError": False,
    "ClusterDownError": True,
    "ClusterError": False,
    "ConnectionError": True,
    "DataError": False,
    "ExecAbortError": False,
    "ExternalAuthProviderError": True,
    "InvalidResponse": False,
    "LockError": False,
    "LockNotOwnedError": False,
    "MasterDownError": True,
    "MasterNotFoundError": True,
    "MaxConnectionsError": True,
    "ModuleError": False,
    "MovedError": False,
    "NoPermissionError": False,
    "NoScriptError": False,
    "NoSuchFieldsetError": False,
    "OutOfMemoryError": True,
    "PubSubError": False,
    "ReadOnlyError": True,
    "RedisClusterException": False,
    "RedisError": False,
    "ReplicaNotFoundError": True,
    "ResponseError": False,
    "SlaveNotFoundError": True,
    "SlotNotCoveredError": False,
    "TimeoutError": True,
    "TryAgainError": True,
    "WatchError": False,
}


#: Raised by parts of redis-py that the storage does not use.
_ELSEWHERE = {"CrossSlotTransactionError", "IncorrectPolicyType", "InvalidPipelineStack"}


def _errors_of_redis_py() -> dict[str, type[Exception]]:
    return {
        name: error
        for module in (redis.exceptions, redis.sentinel)
        for name, error in vars(module).items()
        if isinstance(error, type) and issubclass(error, Exception) and name not in _ELSEWHERE
    }


def test_each_error_of_redis_py_is_decided_on() -> None:
    assert _errors_of_redis_py().keys() == _ERRORS.keys()


@pytest.mark.parametrize("name", sorted(_ERRORS))
def test_an_error_of_redis_py_becomes_ours(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    storage = open_storage("redis://127.0.0.1:1/0")
    kind = _errors_of_redis_py()[name]
    original = kind.__new__(kind)

    def fail(*command: object) -> None:
        raise original

    monkeypatch.setattr(storage, "_execute", fail)
    monkeypatch.setattr(storage, "_call", fail)
    with pytest.raises(StorageError) as caught:
        storage.claim(ask())

    assert isinstance(caught.value, StorageUnavailableError) == _ERRORS[name]
    assert caught.value.__cause__ is original


@pytest.mark.parametrize(
    ("text", "away"),
    [
        ("Error running script (call to f_1): @user_script:1: -OOM command not allowed when used memory > max", True),
        ("MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk", True),
        ("NOREPLICAS Not enough good replicas to write.", True),
        ("BUSY Redis is busy running a script", True),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", False),
        ("user_script:1: attempt to index a nil value", False),
    ],
)
def test_a_refusal_without_a_class_is_known_by_its_code(text: str, away: bool) -> None:
    error = translate(redis.ResponseError(text), "redis")

    assert isinstance(error, StorageUnavailableError) == away


def test_errors_and_repr_never_show_the_password() -> None:
    with open_storage("redis://user:s3cret@127.0.0.1:1/0") as storage:
        with pytest.raises(StorageUnavailableError) as caught:
            storage.claim(ask())

        assert "s3cret" not in f"{caught.value} {caught.value.__cause__} {storage!r}"
        assert "user:***@127.0.0.1" in str(caught.value)


def test_a_storage_closed_before_its_first_use_is_closed() -> None:
    storage = open_storage("redis://127.0.0.1:1/0")
    storage.close()

    with pytest.raises(StorageClosedError):
        storage.claim(ask())
