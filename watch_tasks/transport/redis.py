"""The transport: kombu's own for Redis, with our channels and our way to wait for them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final

from kombu.transport import redis as kombu_redis

from .channel import Channel, SentinelChannel
from .poller import Poller
from .waker import Waker

__all__ = ["SentinelTransport", "Transport"]

#: kombu's classes have no types.
_stock: Final[Any] = kombu_redis


class _Loop:
    """An event loop, as kombu's transport uses it: which adds all of its sockets before each wait.

    That asks the system twice for what it knows already, and with every message several times.
    """

    def __init__(self, loop: Any, cycle: Poller) -> None:
        self._loop, self._cycle = loop, cycle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def add_reader(self, fileno: int, callback: Any, *args: Any) -> None:
        if self._cycle.is_new(fileno) or fileno not in self._loop.readers:
            self._loop.add_reader(fileno, callback, *args)


class Transport(_stock.Transport):
    """kombu's transport for Redis, with our channels."""

    Channel = Channel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()

    def _collect(self, connection: Any) -> None:
        """Let go of a connection by which an error came: kombu calls this then, and where nothing is wrong, never.

        The error may be that of another socket, such as the one for broadcasts, of which the channels know nothing.
        """
        for channel in [*self._avail_channels, *self.channels]:
            channel.is_broken = True
        with suppress(*self.connection_errors, OSError):
            self.close_connection(connection)

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        waker = Waker(_nothing)
        waker.register(loop)
        self.cycle.wake = lambda seconds: loop.call_later(seconds, _nothing) if seconds else waker.wake()
        super().register_with_event_loop(connection, _Loop(loop, self.cycle))


class SentinelTransport(Transport):
    """The same, behind Redis Sentinel."""

    default_port = _stock.SentinelTransport.default_port
    Channel = SentinelChannel


def _nothing() -> None:
    """What the event loop runs once more for."""
