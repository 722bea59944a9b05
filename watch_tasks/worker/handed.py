"""What a child of the prefork pool was handed is its own, also when the worker stops.

Celery's pool forgets at a stop what no child has said that it accepted. Yet a child that was sent it runs it all the
same: nobody takes its result, for which the child waits half a minute before it ends. And of what was sent by half, the
rest never comes. (`AsynPool.flush` and billiard's `Worker._ensure_messages_consumed`, celery 5.7 and billiard 4.3.)
"""

from __future__ import annotations

import select
import time
from typing import Any, Final

__all__ = ["count_as_accepted"]

#: Seconds for which children take the rest of what they were sent by half.
_REST: Final = 5.0


def count_as_accepted(pool: Any) -> None:
    """Have what the children of a pool were sent count as accepted by them, after the rest of it is sent too.

    Args:
        pool: Celery's prefork pool, whose event loop does not run any more.
    """
    if pool._pool is None:  # a cold stop ends it first
        return
    until = time.monotonic() + _REST
    for job in list(pool._pool._cache.values()):
        child = job._write_to
        if job._accepted or child is None or not child._is_alive():
            continue
        writing = job._writer()
        if writing is None or _is_written(child, writing, until):
            job._ack(None, time.time(), child.pid, None)


def _is_written(child: Any, writing: Any, until: float) -> bool:
    """Write the rest of a job; return whether that was taken."""
    pipe = select.poll()
    pipe.register(child.inq._writer, select.POLLOUT)
    while child._is_alive() and (left := until - time.monotonic()) > 0:
        pipe.poll(left * 1000)
        try:
            next(writing)
        except StopIteration:
            return True
        except OSError:
            return False
    return False
