"""An item as it lies in one of Celery's queues on Redis: kombu's envelope in JSON, or something that is none.

Source of the form: kombu, `kombu.transport.virtual` (what a channel's `prepare_message` and `basic_publish` make).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final
from uuid import uuid4

import msgspec
from kombu.utils import json as _kombu_json

from .envelope import Envelope

__all__ = [
    "NO_ENVELOPE",
    "TYPED",
    "decode_body",
    "due_at",
    "envelope_of",
    "item_of",
    "make_item",
    "open_item",
    "without_eta",
]

#: The content type of what was no envelope: nothing decodes it.
NO_ENVELOPE: Final = "not an envelope"
#: kombu's modules have no types.
_kombu: Final[Any] = _kombu_json
#: How kombu marks values that JSON has no form for; only such an item needs its own, slower decoder.
TYPED: Final = b'"__type__"'
_CODECS: Final = ("base64", "utf-8", None)


def open_item(raw: bytes, queue: str) -> dict[str, Any]:
    """Return the envelope that an item is. What is none is put into one, whole, as a body that nothing decodes.

    Args:
        raw: the item.
        queue: where it lay, and goes back to if it is not settled.
    """
    with suppress(Exception):  # whatever a decoder raises, it is no envelope
        payload = _kombu.loads(raw) if TYPED in raw else msgspec.json.decode(raw)
        properties = payload["properties"]
        info = properties["delivery_info"]
        headers = payload.get("headers")
        if (
            isinstance(properties["delivery_tag"], str)
            and {"exchange", "routing_key"} <= info.keys()
            and isinstance(headers, (dict, type(None)))
            and isinstance(payload.get("body"), (str, type(None)))
            and properties.get("body_encoding") in _CODECS
            # What is written for a priority decides on a list's key when the message goes back.
            and isinstance(properties.get("priority", 0), (int, type(None)))
        ):
            payload["headers"] = headers or {}
            return dict(payload)
    bare = raw.rstrip(b" ")
    # The blanks say how often it came back, and are not its own.
    return _wrap(bare if bare.endswith(b"}") else raw, NO_ENVELOPE, {}, queue)


def make_item(envelope: Envelope, queue: str, **properties: Any) -> bytes:
    """Return the item by which an envelope is sent to a queue.

    Args:
        envelope: what is sent; its headers are plain values.
        queue: the name of the queue.
        properties: what else kombu keeps of a message, such as `correlation_id`.
    """
    payload = _wrap(envelope.body, envelope.content_type, envelope.headers, queue)
    payload["content-encoding"] = "utf-8"
    payload["properties"] |= {"delivery_mode": 2, "priority": 0, **properties}
    try:
        return msgspec.json.encode(payload)
    except UnicodeEncodeError:  # half a surrogate pair
        return item_of(payload)


def envelope_of(payload: Mapping[str, Any]) -> Envelope:
    """Return what an opened item holds, its body as bytes."""
    kind = payload.get("content-type")
    body = payload.get("body")
    raw = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else repr(body).encode()
    if payload["properties"].get("body_encoding") == "base64":
        raw, is_base64 = decode_body(raw)
        kind = kind if is_base64 else "not base64"
    return Envelope(payload["headers"], raw, kind if isinstance(kind, str) else None)


def decode_body(raw: bytes) -> tuple[bytes, bool]:
    """Return a body in base64 as the bytes it stands for; what is none stays as it is, and is said to be none."""
    try:
        return base64.b64decode(raw, validate=True), True
    except (binascii.Error, ValueError):
        return raw, False


def due_at(headers: Mapping[str, Any]) -> float | None:
    """Return when a message is due, seconds since the epoch by its sender's clock; None: it does not say.

    What is no time is left to whoever decodes the message.
    """
    eta = headers.get("eta")
    if eta is None:
        return None
    try:
        time = eta if isinstance(eta, datetime) else datetime.fromisoformat(eta)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def without_eta(payload: dict[str, Any]) -> bytes:
    """Return the item by which a message waits at the server: there, that clock alone says when it is due."""
    return item_of({**payload, "headers": {**payload["headers"], "eta": None}})


def item_of(payload: Mapping[str, Any]) -> bytes:
    """Return the item that an envelope is, as kombu writes it: but its body, which takes kombu ten times as long."""
    with suppress(UnicodeEncodeError):  # half a surrogate pair
        if isinstance(payload.get("body"), str):
            body = msgspec.json.encode(payload["body"])
            rest: str = _kombu.dumps({name: value for name, value in payload.items() if name != "body"})
            return b'{"body": ' + body + b", " + rest[1:].encode()
    whole: str = _kombu.dumps(payload)
    return whole.encode()


def _wrap(body: bytes, content_type: str | None, headers: Mapping[str, Any], queue: str) -> dict[str, Any]:
    return {
        "body": base64.b64encode(body).decode(),
        "content-type": content_type,
        "content-encoding": "binary",
        "headers": dict(headers),
        "properties": {
            "body_encoding": "base64",
            "delivery_tag": str(uuid4()),
            "delivery_info": {"exchange": "", "routing_key": queue},
        },
    }
