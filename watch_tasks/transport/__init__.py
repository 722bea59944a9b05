"""A transport for kombu on Redis and Valkey that loses nothing and gives a dead worker's messages to others soon.

It takes the place of kombu's own under the same URLs; for any Celery project, wherever its app is built:

    from watch_tasks.transport import install
    install()

What Celery, kombu and Flower write and read stays as it is, but for what is in hand and what is not due yet.
"""

from __future__ import annotations

from typing import Any, Final

import kombu.transport

__all__ = ["install"]

#: Scheme of a URL → the transport behind it. `redis+socket` is kombu's `redis` with a path for its host.
_SCHEMES: Final = {
    "redis": "watch_tasks.transport.redis:Transport",
    "rediss": "watch_tasks.transport.redis:Transport",
    "sentinel": "watch_tasks.transport.redis:SentinelTransport",
}

#: kombu's modules have no types.
_kombu: Final[Any] = kombu.transport


def install() -> None:
    """Have every connection that this process makes from now on use it. Twice is safe."""
    for scheme, path in _SCHEMES.items():
        if _kombu.TRANSPORT_ALIASES.get(scheme) != path:
            _kombu.TRANSPORT_ALIASES[scheme] = path
            # kombu keeps the class that it found for a scheme.
            _kombu._transport_cache.pop(scheme, None)
