"""How many messages wait in a queue, and senders that wait for room in it."""

from __future__ import annotations

import time
from typing import Any, Final

from celery import Celery
from kombu.exceptions import KombuError

from ..errors import QueueFullError
from ..message import Message
from ..queue.redis import send_error
from ..topics import Topic

__all__ = ["count_waiting", "wait_for_room"]

#: Seconds between two looks whether there is room: the first, doubled up to the last.
_PAUSES: Final = (0.02, 0.5)


def count_waiting(connection: Any, queue: str) -> int:
    """Return how many messages wait in a queue, those with a delay included; those that workers hold are not.

    RabbitMQ keeps delays where they cannot be counted: there, those are not included.

    Args:
        connection: kombu's, connected.
        queue: the queue's name.
    """
    later = 0
    try:
        with connection.channel() as channel:
            if hasattr(channel, "count_later"):
                later = channel.count_later(queue)
            return later + int(channel.queue_declare(queue=queue, passive=True).message_count)
    except connection.channel_errors:
        # 404: nobody has declared it yet; on Redis that is what an empty queue is.
        return later


def wait_for_room(app: Celery, topic: Topic[Any], message: Message[Any], seconds: float) -> None:
    """Return once fewer messages than the topic's bound wait in its queue.

    Raises:
        QueueFullError: there was no room in time.
        SendFailedError: the broker does not answer; nothing was sent.
    """
    if topic.max_waiting is None:
        return
    queue = topic.queue or app.conf.task_default_queue
    end = time.monotonic() + seconds
    pause, longest = _PAUSES
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0.1, timeout=4)
            while (count := count_waiting(connection, queue)) >= topic.max_waiting:
                left = end - time.monotonic()
                if left <= 0:
                    raise QueueFullError(
                        f"message {message.id} of topic `{topic.name}` was not sent: {count} messages wait in queue "
                        f"`{queue}`, its bound is {topic.max_waiting}, and there was no room within {seconds:.3g} s; "
                        "send slower, or start more workers"
                    )
                time.sleep(min(pause, left))
                pause = min(pause * 2, longest)
    except (KombuError, OSError) as exc:
        raise send_error(exc, message) from exc
