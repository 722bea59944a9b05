"""Celery's envelope around a message, for those who send and receive without Celery: packing and unpacking.

Source of the form: Celery's documentation, "Message Protocol", version 2. What stands in it is decided in `wire.py`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from ..errors import MessageError, SchemaError, TooLargeError, TopicError
from ..message import Message, check_index
from ..outcome import Reason
from ..packets import Member, Packet, read_member
from ..schema import PlainSchema, dump, load
from ..topics import check_topic
from . import bulk, wire
from .base import Unreadable
from .inflate import inflate

__all__ = ["MAX_PAYLOAD", "Envelope", "pack", "pack_packet", "unpack", "unpack_member"]

#: Bytes of JSON that the data of a message may have: 1 MiB.
MAX_PAYLOAD: Final = 1_048_576
#: Bytes that a body may have beside its data: an index of the longest, escaped, and what Celery embeds.
_BESIDES: Final = 8192

#: The only content type that is read: a pickle runs what its sender likes.
_JSON: Final = "application/json"
_EMBED: Final = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
_plain = PlainSchema()


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message as it travels."""

    headers: Mapping[str, Any]
    #: JSON: arguments, keyword arguments, and what Celery embeds.
    body: bytes
    content_type: str | None = _JSON


def pack(message: Message[Any], *, delay: float = 0.0, limit: int | None = MAX_PAYLOAD) -> Envelope:
    """Return the envelope by which a message is sent, its data in plain form.

    Args:
        message: the message.
        delay: seconds until it is due; becomes an `eta` by this machine's clock.
        limit: bytes of JSON that its data may have; None: any number.

    Raises:
        SchemaError: its data has no JSON form.
        TooLargeError: it takes more bytes.
        TopicError: its topic is no name of one.
    """
    check_topic(message.topic)
    args, keywords = wire.arguments(message)
    try:
        body = dump([_plain.encode(args), keywords, _EMBED])
    except (SchemaError, TypeError, ValueError, RecursionError) as exc:
        raise SchemaError(f"topic `{message.topic}`: data must have a JSON form: {exc}") from exc
    size = len(body) - len(dump([[None], keywords, _EMBED])) + len(b"null")
    if limit is not None and size > limit:
        raise TooLargeError(message.topic, size, limit)
    headers = _headers(wire.task_name(message.topic), message.id, delay, message.retries)
    return Envelope({**headers, **wire.reprs(message), **wire.headers(message)}, body)


def pack_packet(packet: Packet, *, delay: float = 0.0) -> Envelope:
    """Return the envelope by which a packet is sent; `delay` as of `pack`.

    Raises:
        TopicError: its topic is no name of one.
    """
    check_topic(packet.topic)
    headers = _headers(bulk.TASK, packet.id, delay)
    return Envelope({**headers, **bulk.reprs(packet), **bulk.headers(packet)}, bulk.body(packet))


def _headers(task: str, id: str, delay: float, retries: int = 0) -> dict[str, Any]:
    """Return what Celery writes into the headers of every message."""
    eta = datetime.now(UTC) + timedelta(seconds=delay) if delay > 0 else None
    return {
        "lang": "py",
        "task": task,
        "id": id,
        "shadow": None,
        "eta": eta.isoformat() if eta else None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": retries,
        "timelimit": [None, None],
        "root_id": id,
        "parent_id": None,
        "origin": f"{os.getpid()}@{socket.gethostname()}",
        "ignore_result": True,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
    }


def unpack(envelope: Envelope, *, limit: int = MAX_PAYLOAD) -> tuple[Message[Any] | Packet | Unreadable, float]:
    """Return what an envelope holds, and the seconds until that is due.

    Whatever is wrong with it comes back as an Unreadable: nothing is raised.
    """
    try:
        message = _read(envelope, limit)
        return message, _seconds(envelope.headers, "eta") or 0.0
    except _Unfit as exc:
        return _unreadable(envelope, exc.reason, str(exc)), 0.0
    except MessageError as exc:
        return _unreadable(envelope, Reason.MALFORMED, str(exc)), 0.0


class _Unfit(Exception):
    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def unpack_member(packet: Packet, member: Member, *, limit: int = MAX_PAYLOAD) -> Message[Any] | Unreadable:
    """Return the message that a member of a packet is; one that is none is an Unreadable of its own."""
    reason = Reason.MALFORMED
    try:
        if len(bytes(member.data)) > limit:
            raise _Unfit(Reason.TOO_LARGE, f"the data takes more than {limit} bytes, the most that are read")
        return read_member(member, packet.topic, packet.sent_at)
    except _Unfit as exc:
        reason, error = exc.reason, str(exc)
    except MessageError as exc:
        error = str(exc)
    except (ValueError, RecursionError) as exc:
        reason, error = Reason.UNDECODABLE, f"the data must be JSON: {exc}"[:300]
    return Unreadable(
        reason=reason,
        error=error,
        id=bulk.id_of(member),
        topic=packet.topic,
        index=_checked(member.index),
        raw=bytes(member.data),
        content_type=_JSON,
    )


def _read(envelope: Envelope, limit: int) -> Message[Any] | Packet:
    kind = str(envelope.content_type).partition(";")[0].strip().lower()
    if kind != _JSON:
        raise _Unfit(Reason.UNDECODABLE, f"the content type must be `{_JSON}`, got {envelope.content_type!r}"[:300])
    is_packet = bulk.is_bulk(envelope.headers.get("task"))
    most = bulk.most_bytes(limit) if is_packet else limit + _BESIDES
    body = _inflate(envelope.body, envelope.headers.get("compression"), most)
    if len(body) > most:
        raise _Unfit(Reason.TOO_LARGE, f"the body takes more than {most} bytes, the most that are read")
    message = bulk.read(body, dict(envelope.headers)) if is_packet else _read_message(envelope, body)
    left = _seconds(envelope.headers, "expires")
    if left is not None and left <= 0:
        raise _Unfit(Reason.EXPIRED, f"it expired at {envelope.headers['expires']}, before it was handled")
    return message


def _read_message(envelope: Envelope, body: bytes) -> Message[Any]:
    try:
        parts = load(body)
    except (ValueError, RecursionError) as exc:
        raise _Unfit(Reason.UNDECODABLE, f"the body must be JSON: {exc}"[:300]) from exc
    if not isinstance(parts, list) or len(parts) != 3:
        came = f"{len(parts)} of them" if isinstance(parts, list) else type(parts).__name__
        raise _Unfit(Reason.MALFORMED, f"the body must be a list of 3: args, kwargs and embed, got {came}")
    return wire.read(dict(envelope.headers), parts[0], parts[1])


def _inflate(body: bytes, compression: object, limit: int) -> bytes:
    """Return the body as it was before its sender compressed it, or one byte more than the limit of it."""
    if compression is None:
        return body
    try:
        return inflate(compression, body, limit)
    except ValueError as exc:
        raise _Unfit(Reason.UNDECODABLE, str(exc)) from exc


def _seconds(headers: Mapping[str, Any], name: str) -> float | None:
    """Return the seconds until a time that a header names, or None where it names none."""
    value = headers.get(name)
    if value is None:
        return None
    try:
        time = datetime.fromisoformat(value)
    except (TypeError, ValueError) as exc:
        raise _Unfit(Reason.MALFORMED, f"the header `{name}` must be a time in RFC 3339, got {value!r}"[:300]) from exc
    return ((time if time.tzinfo else time.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds()


def _unreadable(envelope: Envelope, reason: Reason, error: str) -> Unreadable:
    id = envelope.headers.get("id")
    return Unreadable(
        reason=reason,
        error=error,
        id=id if wire.is_id(id) else wire.bytes_id(envelope.body),
        topic=_topic(envelope.headers),
        index=_index(envelope.headers),
        raw=envelope.body,
        content_type=str(envelope.content_type)[:255] if envelope.content_type else None,
    )


def _topic(headers: Mapping[str, Any]) -> str | None:
    try:
        return check_topic(wire.topic_of(headers.get("task")))
    except TopicError:
        return None


def _index(headers: Mapping[str, Any]) -> str | None:
    own = headers.get(wire.HEADER)
    return _checked(own.get("index")) if isinstance(own, dict) else None


def _checked(index: object) -> str | None:
    try:
        return check_index(index)
    except MessageError:
        return None
