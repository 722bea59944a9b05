"""A packet in the wire form of Celery: one message of the internal task `watch._bulk`, and back.

Its two arguments are the name of the topic and the list of its members, each `[id, index, data, more]`, where `more` is
null or an object; see `packets.py`. Our own header tells when it was made.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from ..errors import MessageError, TopicError
from ..packets import Member, Packet
from ..topics import check_topic
from . import wire

__all__ = ["TASK", "Named", "body", "headers", "is_bulk", "names", "read", "reprs"]

#: The task that packets are messages of.
TASK: Final = f"{wire.PREFIX}_bulk"

_EMBED: Final = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


class Named(msgspec.Struct, frozen=True, array_like=True):
    """A member, as far as its worker's main process has to know it."""

    id: str


class _Header(msgspec.Struct, frozen=True):
    sent_at: datetime


_Body = tuple[tuple[str, list[Member]], dict[str, Any], Any]
_NamedBody = tuple[tuple[str, list[Named]], dict[str, Any], Any]
_decode = msgspec.json.Decoder(_Body).decode
_decode_names = msgspec.json.Decoder(_NamedBody).decode


def is_bulk(task: object) -> bool:
    """Whether a Celery task's name says that its message is a packet."""
    return task == TASK


def headers(packet: Packet) -> dict[str, Any]:
    """Return our own header, under its name."""
    return {wire.HEADER: {"version": 1, "sent_at": packet.sent_at.isoformat()}}


def reprs(packet: Packet) -> dict[str, str]:
    """Return what Flower and logs show of the arguments: the topic, and how many there are."""
    return {"argsrepr": "()", "kwargsrepr": repr({"topic": packet.topic, "messages": len(packet.members)})}


def body(packet: Packet) -> bytes:
    """Return the body: JSON of its arguments, keyword arguments, and what Celery embeds."""
    return msgspec.json.encode(((packet.topic, packet.members), {}, _EMBED))


def names(raw: bytes) -> list[str]:
    """Return the ids of the members of a body.

    Raises:
        MessageError: it is no body of a packet.
    """
    return [member.id for member in _read(_decode_names, raw)[0][1]]


def read(raw: bytes, fields: dict[str, Any]) -> Packet:
    """Return the packet that a body and its headers stand for. Its members are not looked into.

    Raises:
        MessageError: they are none; the text says what was expected and what came.
    """
    (topic, members), _, _ = _read(_decode, raw)
    header = fields.get(wire.HEADER)
    try:
        sent_at = msgspec.convert(header, _Header).sent_at if header else datetime.now(UTC)
    except msgspec.ValidationError as exc:
        raise MessageError(f"the header `{wire.HEADER}` does not fit: {exc}") from exc
    id = fields.get("id")
    if not wire.is_id(id):
        raise MessageError(f"the header `id` must be 1 to 255 printable characters, got {id!r}"[:500])
    return Packet(topic, members, id, sent_at if sent_at.tzinfo else sent_at.replace(tzinfo=UTC))


def _read(decode: Any, raw: bytes) -> Any:
    try:
        found = decode(raw)
        check_topic(found[0][0])
    except (msgspec.DecodeError, TopicError, UnicodeDecodeError) as exc:
        raise MessageError(f"the body must be [[topic, members], {{}}, embed]: {exc}"[:500]) from exc
    return found
