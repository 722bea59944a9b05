"""Dramatiq on Redis, as it comes. The one module that knows it; loaded only where it is installed."""

from __future__ import annotations

from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from ..ledger import work
from ..sender import main
from . import broker_url

#: It has no types.
_make_broker: Any = RedisBroker

# The socket of the embedded server has a scheme of its own at redis-py.
broker: Any = _make_broker(url=broker_url().replace("redis+socket://", "unix://"))
dramatiq.set_broker(broker)


@dramatiq.actor
def score(number: int, seconds: float) -> None:
    """Do the work of one message."""
    work(number, seconds)


def send(number: int, seconds: float) -> None:
    """Send one."""
    score.send(number, seconds)


if __name__ == "__main__":
    main(send)
