"""RQ: a job is a hash of its own. It is kept for 500 s when it is done, RQ's default: to keep none of it at all
(`result_ttl=0`) takes seven round trips more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from redis import Redis
from rq import Queue

from ..works import WORKS
from . import BROKER, chunks

queue = Queue("bench", connection=Redis.from_url(BROKER))


def send(work: str, bodies: Iterable[list[Any]]) -> None:
    function = WORKS[work]
    for body in bodies:
        queue.enqueue(function, args=body, description=work)


def send_many(work: str, bodies: Iterable[list[Any]]) -> None:
    function = WORKS[work]
    for chunk in chunks(bodies):
        queue.enqueue_many([Queue.prepare_data(function, args=body, description=work) for body in chunk])
