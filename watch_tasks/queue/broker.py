"""How this package speaks to a Redis or Valkey broker through kombu: its options, its URLs, and what its errors mean.

The queue for Watchers and the outlet for Celery apps both go by it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any, Final

import kombu
import kombu.exceptions
import redis

from ..errors import ConfigurationError, SendError, SendFailedError, SendUnknownError
from ..message import Message
from ..packets import Packet

__all__ = ["ANSWER", "CONNECT", "TROUBLE", "broker_url", "check_url", "name_of", "send_error", "transport_options"]

#: kombu's classes have no types.
_kombu: Final[Any] = kombu
#: Seconds that a server may take for one answer, and to connect.
ANSWER: Final = 5.0
CONNECT: Final = 2.0
#: What a client of Redis raises when the server does not answer, or answers that it cannot serve now.
TROUBLE: Final = (redis.RedisError, kombu.exceptions.KombuError, OSError)


def transport_options() -> dict[str, Any]:
    """Return the options for kombu's Redis transport, its own and ours, under which nothing waits for ever."""
    return {
        # kombu's default is to wait for ever.
        "socket_timeout": ANSWER,
        "socket_connect_timeout": CONNECT,
        "socket_keepalive": True,
        "health_check_interval": 10,
    }


def send_error(error: BaseException, message: Message[Any] | Packet) -> SendError:
    """Return what a failed publish means: certainly not sent, or perhaps sent.

    Args:
        error: what kombu, Celery or redis raised; its causes are looked at too.
        message: what was being sent.
    """
    chain = list(_causes(error))
    text = name_of(message)
    # The pool's own "nothing to reuse" may stand below what went wrong with the connection.
    last = next((cause for cause in reversed(chain) if isinstance(cause, (OSError, redis.RedisError))), error)
    why = str(last) or type(last).__name__
    if any(_is_refusal(cause) for cause in chain):
        return SendFailedError(f"{text} was not sent: {why}; is the broker up, and its URL right?")
    told: Any = message  # that of a packet goes no further than its Sender, which knows the messages
    return SendUnknownError(f"{text} may have been sent, the broker's answer was lost: {why}; send it again", told)


def name_of(sent: Message[Any] | Packet) -> str:
    """Return how errors name what was being sent."""
    what = "message" if isinstance(sent, Message) else f"packet of {len(sent.members)} messages,"
    return f"{what} {sent.id} of topic `{sent.topic}`"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_refusal(error: BaseException) -> bool:
    """Whether an error says that nothing was written: no connection came about, or the server declined."""
    if isinstance(error, (ConnectionRefusedError, FileNotFoundError, PermissionError, socket.gaierror)):
        return True
    if isinstance(error, (redis.ResponseError, redis.AuthenticationError, redis.exceptions.BusyLoadingError)):
        return True
    # redis-py tells a failure to connect from one to answer only in its text.
    return isinstance(error, (redis.ConnectionError, redis.TimeoutError)) and "connecting to" in str(error)


def broker_url(url: str) -> str:
    """Return a URL in the words of kombu: `unix:` is its `redis+socket:`, and TLS checks certificates."""
    scheme, _, rest = url.partition("://")
    if scheme == "unix":
        return f"redis+socket://{rest}"
    if scheme == "rediss" and "ssl_cert_reqs" not in rest:
        return f"{url}{'&' if '?' in rest else '?'}ssl_cert_reqs=CERT_REQUIRED"
    return url


def check_url(url: str) -> None:
    """Find out whether kombu can read a URL, without connecting.

    Raises:
        ConfigurationError: it cannot; the text does not tell the password.
    """
    scheme, _, rest = url.partition("://")
    try:
        database = _kombu.Connection(url).virtual_host or ""
        is_fine = "socket" in scheme or not database.strip("/") or database.strip("/").isdecimal()
    except (ValueError, LookupError):
        is_fine = False
    if not is_fine:
        # Whatever stands before the last @ may be a password.
        raise ConfigurationError(
            f"a queue's URL must be like `redis://:password@host:6379/0`, got `{scheme}://{rest.rpartition('@')[2]}`"
        )
