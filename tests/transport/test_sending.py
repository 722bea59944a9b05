"""What a channel of ours does with a connection on which an item was refused, or its answer is still to come."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Iterator
from typing import Any

import kombu
import pytest
import redis

from watch_tasks.transport.redis import Transport

from ..servers import RedisServer

pytestmark = pytest.mark.integration


@pytest.fixture
def channel(own_valkey: RedisServer) -> Iterator[Any]:
    """A channel whose server has something else than a list where queue `spoilt` would be."""
    with own_valkey.client() as client:
        client.set("spoilt", "no list")
    with kombu.Connection(own_valkey.url, transport=Transport) as connection:
        yield connection.default_channel


def test_an_item_that_is_refused_costs_no_connection(channel: Any, own_valkey: RedisServer) -> None:
    channel.push_item("q", b"before")
    with own_valkey.client() as client:
        count = client.info("stats")["total_connections_received"]
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            channel.push_item("spoilt", b"refused")
        channel.push_item("q", b"after")
        assert client.info("stats")["total_connections_received"] == count
        assert client.lrange("q", 0, -1) == [b"after", b"before"]


def test_the_answer_of_a_push_that_was_interrupted_is_taken_for_no_others(
    channel: Any, own_valkey: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a time limit that strikes between the command and its answer, which comes late."""
    channel.push_item("q", b"connects")

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    own_valkey.signal(signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(redis.Connection, "read_response", interrupted)
        with pytest.raises(KeyboardInterrupt):
            channel.push_item("q", b"interrupted")
    timer = threading.Timer(0.3, own_valkey.signal, [signal.SIGCONT])
    timer.start()

    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        channel.push_item("spoilt", b"refused")
    timer.join()


def test_who_watches_the_client_sees_every_push(channel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    execute = redis.Redis.execute_command

    @functools.wraps(execute)
    def watched(client: redis.Redis, *words: Any, **options: Any) -> Any:
        seen.append(words)
        return execute(client, *words, **options)

    monkeypatch.setattr(redis.Redis, "execute_command", watched)
    channel.push_item("q", b"seen")
    assert seen == [("LPUSH", "q", b"seen")]
