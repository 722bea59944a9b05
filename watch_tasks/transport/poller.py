"""Waits for all channels of a connection at once, with or without an event loop."""

from __future__ import annotations

import select
from collections.abc import Callable
from queue import Empty
from typing import Any

from kombu.transport.redis import MultiChannelPoller
from kombu.utils.eventio import ERR, READ

__all__ = ["Poller"]


class Poller(MultiChannelPoller):
    """kombu's, whose channels ask by a command that the server answers at once: nothing is left unread in a socket."""

    #: Has the event loop run once more, soon or after some seconds; None without one.
    wake: Callable[[float], object] | None = None

    def __init__(self) -> None:
        super().__init__()
        #: Sockets, by their numbers, that nobody has asked for since they came.
        self._new: set[int] = set()

    def is_new(self, fileno: int) -> bool:
        """Whether this number is that of another socket since the last time it was asked for."""
        is_new = fileno in self._new
        self._new.discard(fileno)
        return is_new

    def _register(self, channel: Any, client: Any, type: str) -> None:
        super()._register(channel, client, type)
        self._new.add(client.connection._sock.fileno())

    def on_poll_start(self) -> bool:
        """Have every channel do what it can do now; return whether messages were delivered."""
        is_any = False
        for channel in list(self._channels):
            if channel.active_queues:
                is_any = channel.look() or is_any
            if channel.active_fanout_queues:
                self._register_LISTEN(channel)
        return is_any

    def on_readable(self, fileno: int) -> Any:
        found = self._fd_to_chan.get(fileno)
        if found is not None and found[1] == "BRPOP":
            return found[0].handlers["BRPOP"]()
        return super().on_readable(fileno)

    def register(self, channel: Any) -> None:
        """See to it that the socket a channel fetches by is waited on."""
        if not self._client_registered(channel, channel.client, "BRPOP"):
            channel._in_poll = None
            self._register(channel, channel.client, "BRPOP")

    def _poll(self, timeout: float | None) -> Any:
        if self.wake is None:
            return self.poller.poll(timeout)
        # The poller is the event loop's. Somebody waits here without the loop, as a worker does for its neighbours when
        # it starts: what others read by the loop must not end that, again and again.
        own = select.poll()
        for fileno in self._fd_to_chan:
            own.register(fileno, READ | ERR)
        return own.poll(None if timeout is None else timeout * 1000)

    def get(self, callback: Any, timeout: float | None = None) -> None:
        self._in_protected_read = True
        try:
            self.maybe_refresh_binding_expiry()
            if self.on_poll_start():
                return
            waits = [channel.patience() for channel in self._channels if channel.active_queues]
            events = self._poll(min([*waits, *([] if timeout is None else [timeout])], default=None))
            is_any = False
            for fileno, event in events or ():
                try:
                    self.handle_event(fileno, event)
                    is_any = True
                except Empty:
                    pass
            if not is_any:
                self.maybe_restore_messages()
                raise Empty()
        finally:
            self._in_protected_read = False
            while self.after_read:
                self.after_read.pop()()
