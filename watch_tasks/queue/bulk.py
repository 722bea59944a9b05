"""A packet in the wire form of Celery: one message of the internal task `watch._bulk`, and back.

Its two arguments are the name of the topic and the list of its members, each `[id, index, data, more]`, where `more` is
null or an object; see `packets.py`. Our own header tells when it was made, and how many messages it holds. Fields that
a newer version may add are passed over, in a member as in the header.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from ..errors import MessageError, TopicError
from ..packets import MOST_BYTES, Member, More, Packet, StrangeMember
from ..schema import dump
from ..topics import check_topic
from . import wire

__all__ = [
    "TASK",
    "Named",
    "body",
    "check_headers",
    "headers",
    "id_of",
    "is_bulk",
    "most_bytes",
    "names",
    "read",
    "reprs",
]

#: The task that packets are messages of.
TASK: Final = f"{wire.PREFIX}_bulk"
_EXPECTED: Final = "the body must be [[topic, members], {}, embed]"

_VERSION: Final = 1
#: Bytes that a body may have beside what its sender counts: indexes that take more than counted, and rules of members.
_BESIDES: Final = 1_048_576
_EMBED: Final = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


class Named(msgspec.Struct, frozen=True, array_like=True):
    """A member, as far as its worker's main process has to know it."""

    id: str


class _LooseMember(msgspec.Struct, frozen=True, array_like=True):
    id: str
    index: str
    data: Any
    more: More | None = None


class _Header(msgspec.Struct, frozen=True):
    version: int = _VERSION
    #: RFC 3339.
    sent_at: datetime | None = None


_Body = tuple[tuple[str, list[Member]], dict[str, Any], Any]
_NamedBody = tuple[tuple[str, list[Named]], dict[str, Any], Any]
_RawBody = tuple[tuple[str, list[msgspec.Raw]], dict[str, Any], Any]
_LooseBody = tuple[tuple[str, list[Any]], dict[str, Any], Any]
_decode = msgspec.json.Decoder(_Body).decode
_decode_names = msgspec.json.Decoder(_NamedBody).decode
_decode_raw = msgspec.json.Decoder(_RawBody).decode
_decode_member = msgspec.json.Decoder(Member).decode

#: What tells the parts of JSON from each other: strings as a whole, commas, runs of brackets. A quote alone has no end:
#: nothing after it is known.
_TOKEN: Final = re.compile(rb'"(?>[^"\\]+|\\.)*+"|"|,|[\[{]+|[\]}]+', re.DOTALL)
#: How deep the members lie in a body: in its list, its arguments, and the second of these.
_DEPTH: Final = 3


def is_bulk(task: object) -> bool:
    """Whether a Celery task's name says that its message is a packet."""
    return task == TASK


def most_bytes(limit: int) -> int:
    """Return the bytes that a body may have whose members' data may have `limit` each."""
    return max(limit, MOST_BYTES) + _BESIDES


def headers(packet: Packet) -> dict[str, Any]:
    """Return our own header, under its name."""
    # The scripts on Redis read the number: see `flight_scripts/common.lua`.
    fields = {"version": _VERSION, "sent_at": packet.sent_at.isoformat(), "messages": len(packet.members)}
    return {wire.HEADER: fields}


def reprs(packet: Packet) -> dict[str, str]:
    """Return what Flower and logs show of the arguments: the topic, and how many there are."""
    return {"argsrepr": "()", "kwargsrepr": repr({"topic": packet.topic, "messages": len(packet.members)})}


def body(packet: Packet) -> bytes:
    """Return the body: JSON of its arguments, keyword arguments, and what Celery embeds."""
    return msgspec.json.encode(((packet.topic, packet.members), {}, _EMBED))


def id_of(member: Member) -> str:
    """Return the id of a member, or where it has none that can be one, that of its bytes."""
    if wire.is_id(member.id):
        return member.id
    return wire.bytes_id(repr((member.id, member.index)).encode() + bytes(member.data))


def names(raw: bytes) -> list[str]:
    """Return the ids of the members of a body. What this takes, `read` takes.

    Raises:
        MessageError: it is no body of a packet.
    """
    members: Sequence[Member | Named]
    try:
        (topic, members), _, _ = _decode_names(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        topic, members = _read_each(raw)
    _check(topic)
    return [member.id for member in members]


def check_headers(fields: dict[str, Any]) -> None:
    """See that headers are those of a packet, with which `read` takes its body.

    Raises:
        MessageError: they are not.
    """
    _read_headers(fields)


def read(raw: bytes, fields: dict[str, Any]) -> Packet:
    """Return the packet that a body and its headers stand for. Its members are not looked into.

    Raises:
        MessageError: they are none; the text says what was expected and what came.
    """
    try:
        (topic, members), _, _ = _decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        topic, members = _read_each(raw)
    _check(topic)
    return Packet(topic, members, *_read_headers(fields))


def _check(topic: str) -> None:
    try:
        check_topic(topic)
    except TopicError as exc:
        raise MessageError(f"{_EXPECTED}: {exc}"[:500]) from exc


def _read_headers(fields: dict[str, Any]) -> tuple[str, datetime]:
    try:
        header = msgspec.convert(fields.get(wire.HEADER) or {}, _Header)
    except msgspec.ValidationError as exc:
        raise MessageError(f"the header `{wire.HEADER}` does not fit: {exc}") from exc
    if header.version > _VERSION:
        raise MessageError(f"the header `{wire.HEADER}` is of version {header.version}, this worker knows {_VERSION}")
    id = fields.get("id")
    if not wire.is_id(id):
        raise MessageError(f"the header `id` must be 1 to 255 printable characters, got {id!r}"[:500])
    return id, wire.aware(header.sent_at) or datetime.now(UTC)


def _read_each(raw: bytes) -> tuple[str, list[Member]]:
    """Return the topic and the members, some of which are no members: those keep no other from being handled.

    Raises:
        MessageError: it is no body of a packet.
    """
    try:
        (topic, found), _, _ = _decode_raw(raw)
        return topic, [_member(one, _decode_member) for one in found]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        error = MessageError(f"{_EXPECTED}: {exc}"[:500])
        error.__cause__ = exc
    try:
        # What Python's own decoder lets pass, and so a single message may hold: half a surrogate pair.
        (topic, found), _, _ = msgspec.convert(json.loads(raw), _LooseBody)
        return topic, [_member(one, _convert_member) for one in found]
    except (ValueError, RecursionError):  # what msgspec raises is a ValueError too
        pass
    try:
        # One of them is nested too deep for any decoder, or is no JSON.
        frame, parts = _split(raw)
        (topic, _), _, _ = _decode_raw(frame)
    except (ValueError, RecursionError):
        raise error from error.__cause__
    return topic, [_member_of_bytes(part) for part in parts]


def _split(raw: bytes) -> tuple[bytes, list[bytes]]:
    """Return a body without its members, and the bytes of each, by nothing but its brackets, commas and quotes.

    Raises:
        ValueError: it has no place for members, or no end of it.
    """
    depth, begin, start = 0, -1, -1
    parts: list[bytes] = []
    for found in _TOKEN.finditer(raw):
        token, size = found[0], found.end() - found.start()
        if token == b'"':
            break
        if token[0] in b"[{":
            if begin < 0 and depth < _DEPTH <= depth + size:
                begin = start = found.start() + _DEPTH - depth
            depth += size
        elif token[0] in b"]}":
            depth -= size
            if begin >= 0 and depth < _DEPTH:
                end = found.end() - (_DEPTH - depth)
                return raw[:begin] + raw[end:], [*parts, raw[start:end].strip()]
        elif token == b"," and depth == _DEPTH and begin >= 0:
            parts.append(raw[start : found.start()].strip())
            start = found.end()
    raise ValueError("the members have no end")


def _member_of_bytes(part: bytes) -> Member:
    try:
        return _decode_member(part)
    except (ValueError, RecursionError) as exc:
        error = exc
    try:
        return _convert_member(json.loads(part))
    except (ValueError, RecursionError):
        return StrangeMember(wire.bytes_id(part), "", msgspec.Raw(part), error=str(error)[:500])


def _member(one: Any, read: Callable[[Any], Member]) -> Member:
    try:
        return read(one)
    except msgspec.MsgspecError as exc:
        raw = bytes(one) if isinstance(one, msgspec.Raw) else dump(one)
        return StrangeMember(wire.bytes_id(raw), "", msgspec.Raw(raw), error=str(exc)[:500])


def _convert_member(one: Any) -> Member:
    loose = msgspec.convert(one, _LooseMember)
    return Member(loose.id, loose.index, msgspec.Raw(dump(loose.data)), loose.more)
