"""What a channel has in hand, in the terms of kombu."""

from __future__ import annotations

import time
from typing import Any, Final

from kombu.log import get_logger
from kombu.transport import redis as kombu_redis
from redis.exceptions import ResponseError

__all__ = ["QoS"]

logger = get_logger(__name__)

#: kombu's classes have no types.
_stock: Final[Any] = kombu_redis

#: Seconds between two looks for what workers with kombu's own transport left.
_LEGACY: Final = 60.0


class QoS(_stock.QoS):
    """Messages by the numbers of a channel's flight; that, not kombu's own keys, is where they are kept."""

    def can_consume(self) -> bool:
        return bool(self.channel.room > 0)

    def can_consume_max_estimate(self) -> int:
        return int(self.channel.room)

    def append(self, message: Any, delivery_tag: int) -> None:
        self.channel.flight.keep(delivery_tag, message)

    def get(self, delivery_tag: int) -> Any:
        return self.channel.flight.kept(delivery_tag)

    def ack(self, delivery_tag: int) -> None:
        self.channel.flight.ack(delivery_tag)
        self.channel.wake_for_settled()

    def reject(self, delivery_tag: int, requeue: bool = False) -> None:
        if requeue:
            self.channel.flight.back_soon(delivery_tag)
        else:
            self.channel.flight.ack(delivery_tag)
        self.channel.wake_for_settled()

    def restore_unacked(self, client: Any = None) -> None:
        self.channel.flight.back_all()

    def restore_unacked_once(self, stderr: Any = None) -> None:
        self._on_collect.cancel()
        if self.restore_at_shutdown and self.channel.do_restore:
            self.channel.end_flight()

    def restore_visible(self, start: int = 0, num: int | None = 10, interval: int = 10) -> None:
        """Put back what workers with kombu's own transport had in hand, should they be gone."""
        if time.monotonic() < self.channel.next_legacy:
            return
        self.channel.next_legacy = time.monotonic() + _LEGACY
        try:
            with self.channel.conn_or_acquire() as client:
                if client.zrange(self.unacked_index_key, 0, 0):
                    super().restore_visible(start, num, 1)
        except ResponseError as exc:
            # A server at its limit, for instance: no reason to stop what works.
            logger.warning("could not look for what kombu's own transport left: %s", exc)
