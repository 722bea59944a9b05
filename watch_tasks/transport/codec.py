"""The codec of bodies, which leaves what is no base64 as it is: to be read, and refused, as a message."""

from __future__ import annotations

from typing import Any

from kombu.transport.virtual import Base64

from ..queue.item import decode_body

__all__ = ["ForgivingBase64"]


class ForgivingBase64(Base64):
    """kombu's codec, whose errors would end the worker."""

    def decode(self, s: Any) -> bytes:
        raw = s if isinstance(s, bytes) else str(s).encode("utf-8", "replace")
        return decode_body(raw)[0]
