"""A bad network: a TCP proxy whose faults are switched on and off while connections run through it."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

T = TypeVar("T")

#: Bytes that are passed on at once.
_CHUNK = 65_536
#: Has the kernel send a reset instead of an orderly end.
_ABORT = struct.pack("ii", 1, 0)


class Proxy:
    """Stands between clients and one server on the loopback interface.

    Nothing is thrown away unless a fault says so: what was held back goes on when the fault ends, as packets would.
    """

    def __init__(self, port: int, chance: random.Random | None = None) -> None:
        self._target = port
        self._chance = chance or random.Random(0)
        self._links: set[_Link] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        #: Direction → whether bytes pass: `up` to the server, `down` from it.
        self._passes = {"up": self._call(asyncio.Event), "down": self._call(asyncio.Event)}
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._accept, "127.0.0.1", 0), self._loop
        ).result(10)
        self.port = int(self._server.sockets[0].getsockname()[1])
        self._refuses = False
        self._tears = False
        self._word, self._times, self._is_kept_back = b"", 0, False
        self._delay, self._jitter, self._rate = 0.0, 0.0, 0.0
        #: How often a fault that waits for its moment found it.
        self.hits = 0
        self.heal()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    # -- faults

    def heal(self) -> None:
        """End every fault."""
        self._refuses = self._tears = False
        self._times = 0
        self._delay = self._jitter = self._rate = 0.0
        for gate in self._passes.values():
            self._call(gate.set)

    def cut(self) -> None:
        """Nothing passes, and nobody is told: a pulled cable."""
        self.stall("up")
        self.stall("down")

    def stall(self, direction: str) -> None:
        """Nothing passes one way: `up` to the server, or `down` from it."""
        self._call(self._passes[direction].clear)

    def refuse(self) -> None:
        """Reset every connection, and each new one at once."""
        self._refuses = True
        self.reset_all()

    def reset_all(self) -> None:
        """Reset every connection there is."""
        self._call(lambda: [link.abort() for link in list(self._links)])

    def forget_all(self) -> None:
        """Let every connection there is be dead without a word, for ever: a firewall that forgot them."""
        self._call(lambda: [link.freeze() for link in list(self._links)])

    def tear_reply(self) -> None:
        """Reset the next connection by which the server answers, in the middle of its answer."""
        self._tears = True

    def swallow_replies(self, word: bytes, times: int = 1) -> None:
        """Let the next requests with this word in them pass, and reset their connections instead of the replies."""
        self._word, self._times, self._is_kept_back = word, times, False

    def swallow_requests(self, word: bytes, times: int = 1) -> None:
        """Reset the connections of the next requests with this word in them, which do not pass."""
        self._word, self._times, self._is_kept_back = word, times, True

    def delay(self, seconds: float, jitter: float = 0.0) -> None:
        """Hold every piece back for a while."""
        self._delay, self._jitter = seconds, jitter

    def throttle(self, rate: float) -> None:
        """Pass so many bytes a second, each way of each connection."""
        self._rate = rate

    @contextmanager
    def closing(self) -> Iterator[Proxy]:
        try:
            yield self
        finally:
            self.close()

    def close(self) -> None:
        """Reset everything and end."""
        self.heal()
        self.reset_all()
        self._call(self._server.close)
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _end(self) -> None:
        mine = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not mine]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- the loop's side

    def _call(self, function: Callable[[], T]) -> T:
        async def call() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(10)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(writer)
        self._links.add(link)
        try:
            if self._refuses:
                link.abort()
                return
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            link.writers.append(back)
            pumps = [
                asyncio.ensure_future(self._pump(link, "up", reader, back)),
                asyncio.ensure_future(self._pump(link, "down", there, writer)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            link.abort()  # the server is away
        finally:
            self._links.discard(link)
            link.close()

    async def _pump(
        self, link: _Link, direction: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK):
                if self._delay:
                    await asyncio.sleep(max(self._delay + self._chance.uniform(-1, 1) * self._jitter, 0.0))
                if self._rate:
                    await asyncio.sleep(len(data) / self._rate)
                await self._passes[direction].wait()
                await link.moves.wait()
                if direction == "up" and self._times and self._word in data:
                    self._times -= 1
                    if self._is_kept_back:
                        self.hits += 1
                        link.abort()
                        return
                    link.swallows = True
                if direction == "down" and link.swallows:
                    self.hits += 1
                    link.abort()
                    return
                if direction == "down" and self._tears:
                    self._tears = False
                    self.hits += 1
                    writer.write(data[: max(len(data) // 2, 1)])
                    await writer.drain()
                    link.abort()
                    return
                writer.write(data)
                await writer.drain()


class _Link:
    """One connection through the proxy."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writers = [writer]
        self.swallows = False
        self.moves = asyncio.Event()
        self.moves.set()

    def freeze(self) -> None:
        self.moves.clear()

    def abort(self) -> None:
        for writer in self.writers:
            raw = writer.get_extra_info("socket")
            with suppress(OSError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
            writer.transport.abort()

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


#: What is done to the workers' connections, and for how many seconds: from, to.
FAULTS = {
    "cut": (1.0, 8.0),
    "cut for long": (20.0, 20.0),
    "stall up": (1.0, 8.0),
    "stall down": (1.0, 8.0),
    "refuse": (0.5, 5.0),
    "reset": (0.0, 0.0),
    "forget": (0.0, 0.0),
    "tear a reply": (1.0, 1.0),
    "swallow a fetch": (1.0, 1.0),
    "latency": (3.0, 5.0),
    "throttle": (3.0, 5.0),
}


def inflict(proxy: Proxy, fault: str) -> None:
    match fault:
        case "cut" | "cut for long":
            proxy.cut()
        case "stall up" | "stall down":
            proxy.stall(fault.split()[1])
        case "refuse":
            proxy.refuse()
        case "reset":
            proxy.reset_all()
        case "forget":
            proxy.forget_all()
        case "tear a reply":
            proxy.tear_reply()
        case "swallow a fetch":
            proxy.swallow_replies(b"EVALSHA")
        case "latency":
            proxy.delay(0.2, 0.1)
        case "throttle":
            proxy.throttle(64_000)
