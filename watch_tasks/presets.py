"""Settings for brokers that need more than a URL, for `celeryconfig.py`:

from watch_tasks import presets

globals().update(presets.rabbitmq())
"""

from __future__ import annotations

from typing import Any, Final

import amqp
import kombu

from .errors import ConfigurationError
from .queue.amqp import DEAD_LETTERS, DELIVERY_LIMIT, quorum_arguments

__all__ = ["rabbitmq"]

#: kombu's classes have no types.
_kombu: Final[Any] = kombu


class _Queue(_kombu.Queue):
    """A queue that declares the one its dead letters go to, which nobody consumes, before itself."""

    def declare(self, *args: Any, **options: Any) -> Any:
        target = (self.queue_arguments or {}).get("x-dead-letter-routing-key")
        channel = options.get("channel") or self.channel
        if target and channel is not None:
            channel.queue_declare(target, durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"})
        try:
            return super().declare(*args, **options)
        except amqp.exceptions.PreconditionFailed as exc:
            raise ConfigurationError(
                f"RabbitMQ has a queue or an exchange `{self.name}` of another kind than `presets.rabbitmq` asks for: "
                f"drain and delete both, or give `presets.rabbitmq(default=…)` a new name ({exc})"
            ) from exc


def rabbitmq(
    *queues: str,
    default: str = "celery",
    delivery_limit: int = DELIVERY_LIMIT,
    dead_letters: str = DEAD_LETTERS,
) -> dict[str, Any]:
    """Return Celery's settings for RabbitMQ with quorum queues: replicated, confirmed, with delays in the broker.

    Every producer on these queues needs the same settings: RabbitMQ refuses a queue, or an exchange, that is declared
    again as another kind. For the same reason existing classic queues have to be drained and deleted first, or
    `default` and `queues` get names that are new.

    Args:
        queues: names of further queues, those that topics name.
        default: name of the queue of all other topics.
        delivery_limit: deliveries after which the server gives a message up, and puts it into `dead_letters`; above
            what we cause ourselves: our own limits come first.
        dead_letters: the queue for what the server gives up, and what a foreign producer's time to live ends. Nobody
            reads it: our own dead letters are in the storage.

    Raises:
        ValueError: the limit is so low that it would come before our own.
    """
    if delivery_limit < 100:
        raise ValueError(
            f"`delivery_limit` must be 100 or more, got {delivery_limit!r}: a message of an unknown topic is looked at "
            "again and again for a minute"
        )
    arguments = quorum_arguments(delivery_limit, dead_letters)
    return {
        "broker_transport_options": {"confirm_publish": True},
        "broker_native_delayed_delivery_queue_type": "quorum",
        "task_default_queue": default,
        "task_default_queue_type": "quorum",
        "task_default_exchange": default,
        "task_default_exchange_type": "topic",
        "task_default_routing_key": default,
        # A queue that nobody named here would have no limit and no place for its dead letters, but works.
        "task_create_missing_queue_type": "quorum",
        "task_create_missing_queue_exchange_type": "topic",
        "task_queues": [
            _Queue(name, _kombu.Exchange(name, "topic"), name, queue_arguments=dict(arguments))
            for name in dict.fromkeys((default, *queues))
        ],
    }
