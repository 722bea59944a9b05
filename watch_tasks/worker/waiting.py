"""How many messages wait in a queue, and senders that wait for room in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from amqp.exceptions import AMQPError
from celery import Celery

from ..errors import QueueFullError, SendError
from ..message import Message
from ..queue.broker import TROUBLE, send_error
from ..topics import Topic

__all__ = ["count_waiting", "wait_for_room"]

#: Seconds between two looks whether there is room: the first, doubled up to the last.
_PAUSES: Final = (0.02, 0.5)


def count_waiting(connection: Any, queue: str) -> int:
    """Return how many messages wait in a queue, those with a delay included; those that workers hold are not.

    RabbitMQ tells how many envelopes wait, and keeps delays elsewhere: there, a packet counts as one, and what is
    delayed as none.

    Args:
        connection: kombu's, connected.
        queue: the queue's name.
    """
    try:
        with connection.channel() as channel:
            if hasattr(channel, "count_waiting"):
                return int(channel.count_waiting(queue))
            return int(channel.queue_declare(queue=queue, passive=True).message_count)
    except connection.channel_errors:
        # 404: nobody has declared it yet.
        return 0


def wait_for_room(
    app: Celery,
    topic: Topic[Any],
    message: Message[Any],
    seconds: float,
    failed: Callable[[BaseException, Message[Any]], SendError] = send_error,
) -> None:
    """Return once fewer messages than the topic's bound wait in its queue.

    Args:
        app: whose broker it is.
        topic: the message's.
        message: what is to be sent.
        seconds: to wait at most.
        failed: what an error of the broker means.

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
    except (*TROUBLE, AMQPError) as exc:
        raise failed(exc, message) from exc
