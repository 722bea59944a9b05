"""The work that a message asks for, the same under every library. Each function counts the message when it is done.

A message carries a number (or when it was sent) and perhaps a payload, which nobody looks at.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from .counting import seen

#: Seconds of one I/O, and of one computation.
WORK = 0.001


def noop(value: float, payload: str = "") -> None:
    seen(value)


def io(value: float, payload: str = "") -> None:
    time.sleep(WORK)
    seen(value)


def cpu(value: float, payload: str = "") -> None:
    """Take this thread's time on a processor: what a thread waits for is not counted as its work."""
    end = time.thread_time() + WORK
    while time.thread_time() < end:
        pass
    seen(value)


async def async_noop(value: float, payload: str = "") -> None:
    seen(value)


async def async_io(value: float, payload: str = "") -> None:
    await asyncio.sleep(WORK)
    seen(value)


async def async_cpu(value: float, payload: str = "") -> None:
    cpu(value)


WORKS: dict[str, Callable[..., None]] = {"noop": noop, "io": io, "cpu": cpu}
#: For libraries whose workers run coroutines.
ASYNC_WORKS: dict[str, Callable[..., Awaitable[None]]] = {"noop": async_noop, "io": async_io, "cpu": async_cpu}
