"""How many messages wait in one of Celery's queues on Redis or Valkey: those of a packet are counted each.

Reading the packets for it would take as long as reading the queue. So the scripts that move items keep the number of
what packets add (see `flight.py`), and counting costs the same for any number of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import redis

from .flight import besides_key, later_key

__all__ = ["clear_waiting", "count_waiting"]


def count_waiting(client: redis.Redis, queue: str, lists: Iterable[str], prefix: str = "") -> int:
    """Return how many messages wait, those that are not due yet included.

    Args:
        client: one that adds no prefix.
        queue: the queue's name.
        lists: the keys of its lists.
        prefix: before every key.

    Raises:
        redis.RedisError: no answer came.
    """
    with client.pipeline() as pipeline:
        _ask(pipeline, queue, lists, prefix)
        return _told(pipeline.execute())


def clear_waiting(client: redis.Redis, queue: str, lists: Sequence[str], prefix: str = "") -> int:
    """Throw away what waits; return how many messages that were. Arguments and errors as of `count_waiting`."""
    with client.pipeline() as pipeline:
        _ask(pipeline, queue, lists, prefix)
        pipeline.delete(*lists, later_key(queue, prefix), besides_key(queue, prefix))
        return _told(pipeline.execute()[:-1])


def _ask(pipeline: Any, queue: str, lists: Iterable[str], prefix: str) -> None:
    pipeline.get(besides_key(queue, prefix))
    pipeline.zcard(later_key(queue, prefix))
    for key in lists:
        pipeline.llen(key)


def _told(answers: Sequence[Any]) -> int:
    besides, *lengths = (int(answer or 0) for answer in answers)
    # Where no item waits, a count is left over from what others than us took away.
    return sum(lengths) + besides if sum(lengths) else 0
