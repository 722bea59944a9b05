"""Packets: many messages of one topic that travel as one, each with its own id, index and rules.

A packet is JSON, like every message. What becomes of its members is decided for each alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from .errors import MessageError
from .message import Message, Once, new_id
from .schema import load

__all__ = ["MOST_BYTES", "MOST_MEMBERS", "Member", "Packet", "StrangeMember", "member_of", "new_ids", "read_member"]

#: Members that a packet has at most, and bytes of JSON: so many that what the packet itself costs hardly counts, and so
#: few that a group of them does not keep a server from others for long.
MOST_MEMBERS: Final = 500
MOST_BYTES: Final = 262_144


class More(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What is rarely said of a message: a copy that is no longer the first, and rules of its own."""

    copy: int = 0
    retries: int = 0
    handled: tuple[str, ...] = ()
    max_retries: int | None = None
    once: Once | None = None
    sent_at: datetime | None = None


class Member(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A message in a packet."""

    id: str
    #: Empty: nobody named it.
    index: str
    #: The data in plain form, as the canonical JSON that `schema.dump` makes.
    data: msgspec.Raw
    more: More | None = None


class StrangeMember(Member, frozen=True, array_like=True):
    """Something in a packet that is no message. Its data is the whole of it."""

    error: str = ""


@dataclass(slots=True)
class Packet:
    """Many messages of one topic."""

    topic: str
    members: list[Member]
    #: Its own id, which names it in the broker and in Flower.
    id: str = field(default_factory=new_id)
    #: When its members were made, those that do not say.
    sent_at: datetime = field(default_factory=lambda: datetime.now(UTC))


_NOTHING: Final = More()


def member_of(message: Message[Any], plain: bytes, sent_at: datetime | None = None) -> Member:
    """Return the member that a message is, in a packet of that time.

    Args:
        message: the message; its data does not matter.
        plain: its data, as `schema.dump` makes it.
        sent_at: the packet's time.
    """
    more = More(
        copy=message.copy,
        retries=message.retries,
        handled=message.handled,
        max_retries=message.max_retries,
        once=message.once,
        sent_at=None if message.sent_at == sent_at else message.sent_at,
    )
    index = "" if message.index == message.id else message.index
    return Member(message.id, index, msgspec.Raw(plain), None if more == _NOTHING else more)


def read_member(member: Member, topic: str, sent_at: datetime) -> Message[Any]:
    """Return the message that a member is, its data in plain form.

    An index that nobody named is the id.

    Raises:
        MessageError: it is no message.
        ValueError: its data is no JSON.
    """
    if isinstance(member, StrangeMember):
        raise MessageError(f"a member of a packet must be [id, index, data, more]: {member.error}")
    if not isinstance(member.id, str) or not 0 < len(member.id) <= 255 or not member.id.isprintable():
        raise MessageError(f"the id must be 1 to 255 printable characters, got {member.id!r}"[:500])
    data, more = load(bytes(member.data)), member.more
    if more is None:
        return Message(data, topic, index=member.index or member.id, id=member.id, sent_at=sent_at)
    return Message(
        data,
        topic,
        index=member.index or member.id,
        id=member.id,
        retries=more.retries,
        max_retries=more.max_retries,
        once=more.once,
        handled=more.handled,
        sent_at=_aware(more.sent_at) or sent_at,
        copy=more.copy,
    )


def _aware(time: datetime | None) -> datetime | None:
    return time.replace(tzinfo=UTC) if time and time.tzinfo is None else time


def new_ids() -> Iterator[str]:
    """Yield fresh message ids without end (UUID version 4, RFC 9562), cheaper than one by one."""
    while True:
        yield from _some_ids(MOST_MEMBERS)


#: Where the hexadecimal digits of a UUID stand in its text, in their order; and the digits of a whole line of text.
_DIGITS: Final = [place for place, sign in enumerate("xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx") if sign == "x"]
_LINE: Final = 36 + len("\n")
#: What stands for a byte where the version is said, and the variant: RFC 9562, 4.1 and 4.2.
_VERSIONS: Final = bytes(0x40 | byte & 0x0F for byte in range(256))
_VARIANTS: Final = bytes(0x80 | byte & 0x3F for byte in range(256))


def _some_ids(count: int) -> list[str]:
    """Return so many ids, made column by column: each step is one for all of them."""
    numbers = bytearray(os.urandom(16 * count))
    numbers[6::16] = numbers[6::16].translate(_VERSIONS)
    numbers[8::16] = numbers[8::16].translate(_VARIANTS)
    digits = numbers.hex().encode()
    text = bytearray(b"-" * _LINE * count)
    for column, place in enumerate(_DIGITS):
        text[place::_LINE] = digits[column::32]
    text[36::_LINE] = b"\n" * count
    return text.decode().split()
