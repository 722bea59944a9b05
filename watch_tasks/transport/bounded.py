"""Has kombu inflate compressed bodies under a cap.

kombu inflates a message while it is made, in the main process of a worker, without any bound: 242 bytes of bz2 become
300 MB there. Its decoders are looked up in a table of the process, whose entries are replaced here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from kombu import compression

from ..errors import TooLargeError
from ..queue.inflate import KINDS, inflate

__all__ = ["bound_decoders"]

#: kombu's modules have no types.
_compression: Final[Any] = compression


#: The bound of this process.
_most: int | None = None


def bound_decoders(most: int, *, firmly: bool = True) -> None:
    """Have kombu inflate no body beyond this many bytes, in this process and from now on.

    A body that takes more, or is compressed in a way that has no bound here, stays as it came; kombu keeps a
    TooLargeError or a ValueError in the message's `errors`, and its consumers and queues raise it.

    Args:
        most: bytes.
        firmly: whether it holds where another bound was set before.
    """
    global _most
    if _most is not None and not firmly:
        return
    _most = most
    for kind in {*_compression._decoders, *KINDS}:
        _compression._decoders[kind] = _bounded(kind, most)


def _bounded(kind: str, most: int) -> Callable[[bytes], bytes]:
    def decode(body: bytes) -> bytes:
        raw = inflate(kind, body, most)
        size = len(raw)
        if size > most:
            # kombu keeps the error with the message, and an error keeps the variables of where it was raised.
            del raw
            raise TooLargeError(None, size, most)
        return raw

    return decode
