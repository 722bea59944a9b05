"""How a channel of the transport sends, and the connections that it sends by."""

from __future__ import annotations

import time
from typing import Any, Final

import redis
from kombu.transport import redis as kombu_redis

from ..queue import bulk
from ..queue.flight import later_key, later_words, push_words
from ..queue.item import due_at, item_of, without_eta
from .one_write import in_one_write
from .unwrapped import is_unwrapped

__all__ = ["SendingChannel"]

#: kombu's classes have no types.
_stock: Final[Any] = kombu_redis


class SendingChannel(_stock.Channel):
    """kombu's channel, which keeps what is not due yet at the server, and asks little of the client for the others."""

    #: Clients of the pool, kept for as long as it is the same: kombu's own, and one that adds no prefix.
    _sync_client: Any = None
    _plain_client: redis.Redis | None = None

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        due = due_at(message["headers"] or {})
        delay = 0.0 if due is None else due - time.time()
        is_packet = bulk.is_bulk((message["headers"] or {}).get("task"))
        key = self.global_keyprefix + self._q_for_pri(queue, self._get_message_priority(message, reverse=False))
        batch = kwargs.get("_publish_batch")
        if delay <= 0 and not is_packet:
            if batch is not None or self.expires(queue):
                super()._put(queue, message, **kwargs)
            else:
                self._push(key, item_of(message))
            return
        if delay <= 0:
            words = push_words(key, without_eta(message))
        else:
            # How long is told, not until when: the server's clock decides.
            words = later_words(later_key(queue, self.global_keyprefix), key, without_eta(message), delay)
        if batch is not None:
            batch.add("eval", *words)
            return
        self._plain().eval(*words)

    def push_item(self, queue: str, item: bytes) -> None:
        """Send an item that is written already, of no particular priority."""
        self._push(self.global_keyprefix + self._q_for_pri(queue, self.default_priority), item)

    def expires(self, queue: str) -> bool:
        """Whether a queue goes away when nobody has used it for some time."""
        return bool(self._expires and queue in self._expires)

    def _push(self, key: str, item: bytes) -> None:
        """Append an item to a list.

        By a connection rather than a client, which takes longer to look at a command than the server to do it, and
        tries again by itself what kombu tries again as well. Unless somebody watches the client.
        """
        if not is_unwrapped(redis.client, redis.Redis.execute_command):
            self._plain().lpush(key, item)
            return
        pool = self.pool
        connection = pool.get_connection()
        try:
            connection.send_command("LPUSH", key, item)
            connection.read_response()
        except redis.ResponseError:
            raise
        except BaseException:
            # Its answer may still come, and is nobody else's.
            connection.disconnect()
            raise
        finally:
            pool.release(connection)

    def _plain(self) -> redis.Redis:
        """Return a client that adds no prefix: the keys here have it."""
        pool = self.pool
        if self._plain_client is None or self._plain_client.connection_pool is not pool:
            self._plain_client = redis.Redis(connection_pool=pool)
        return self._plain_client

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:
            return super()._create_client(asynchronous=True)
        # kombu makes one for each message that is sent, which costs a third of sending it.
        pool = self.pool
        if self._sync_client is None or self._sync_client.connection_pool is not pool:
            self._sync_client = super()._create_client()
        return self._sync_client

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        params: dict[str, Any] = super()._connparams(asynchronous=asynchronous)
        if not asynchronous:
            params["connection_class"] = in_one_write(params["connection_class"])
        # Only the newer protocol has pushes; nothing else needs it, and it costs a greeting at each connection.
        params["protocol"] = 3 if asynchronous else 2
        return params
