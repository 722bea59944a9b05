"""The form of records, dead letters and stories on Redis, as the scripts have it; see `records.lua`, `stories.lua`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Any, Final, NamedTuple

from .protocol import Granted, Refusal, Refused
from .stored import Stored, StoredRecord

__all__ = [
    "Row",
    "digest_bytes",
    "escape",
    "id_bytes",
    "in_order",
    "micros",
    "read_answer",
    "read_letter",
    "read_record",
    "read_story",
]

_FIRST, _ENDLESS, _SECONDS, _NEAR, _FOLDED = 1, 2, 16, 32, 64
_LENGTH: Final = Struct(">H")
_HEAD: Final = Struct(">Bd")  # flags, handled at
_NUMBER: Final = Struct(">d")
_SHORT_NUMBER: Final = Struct(">I")
_LETTER: Final = Struct(">dI")  # dead at, length of the topic
_EVENT: Final = Struct(">ddB")  # at, end of the story, length of the kind and flags


class Row(NamedTuple):
    """A record, with what a walk through many asks of it; times in µs."""

    at: float
    token: float
    stored: StoredRecord


def id_bytes(id: str) -> bytes:
    """Return an id in short: no other id's bytes are these, or begin with them."""
    if len(id) == 36 and id[8] == id[13] == id[18] == id[23] == "-":
        raw = _hex_bytes(id.replace("-", ""))
        if raw:
            return raw
    return _text_bytes(id)


def digest_bytes(digest: str) -> bytes:
    """Return a digest in short: no other digest's bytes are these, or begin with them."""
    return _hex_bytes(digest) or _text_bytes(digest)


def micros(seconds: float) -> int:
    """Return whole µs."""
    return math.floor(seconds * 1_000_000 + 0.5)


def in_order(keys: Sequence[Any]) -> list[int]:
    """Return the numbers of these keys, counted from 1, as they come when sorted."""
    return [1] if len(keys) == 1 else [place + 1 for place in sorted(range(len(keys)), key=keys.__getitem__)]


def read_record(topic: str, index: str, value: bytes, now: float, blob: bytes = b"") -> Row | None:
    """Return a record, or None where its time is over.

    Args:
        topic: its topic.
        index: its index.
        value: what is stored under them.
        now: µs since the epoch.
        blob: what was stored apart.
    """
    flags, at = _HEAD.unpack_from(value)
    place = _HEAD.size

    def number(is_short: int) -> float:
        nonlocal place
        form = _SHORT_NUMBER if is_short else _NUMBER
        place += form.size
        return float(form.unpack_from(value, place - form.size)[0])

    def text() -> tuple[bool, bytes]:
        nonlocal place
        is_short = value[place] == 0
        place += 1
        size = 16 if is_short else int(number(True))
        place += size
        return is_short, value[place - size : place]

    token = at - number(True) if flags & _NEAR else number(False)
    if flags & _FIRST:
        number(False)
    expires = None
    if not flags & _ENDLESS:
        expires = at + (number(True) * 1_000_000 if flags & _SECONDS else number(False))
        if expires <= now:
            return None
    is_uuid, id = text()
    is_hex, digest = text()
    if flags & _FOLDED:
        place += _LENGTH.size + _LENGTH.unpack_from(value, place)[0]  # the events of its commit
        place += _LENGTH.size
        blob = value[place : place + _LENGTH.unpack_from(value, place - _LENGTH.size)[0]]
    stored = StoredRecord(
        topic=topic,
        index=index,
        id=_uuid(id.hex()) if is_uuid else id.decode(),
        digest=digest.hex() if is_hex else digest.decode(),
        at=at / 1_000_000,
        expires=None if expires is None else expires / 1_000_000,
        blob=blob if flags & _FOLDED else blob or value[place:],
    )
    return Row(at, token, stored)


def read_letter(value: bytes) -> Stored:
    """Return a dead letter."""
    at, size = _LETTER.unpack_from(value)
    return Stored(at / 1_000_000, value[_LETTER.size + size :])


def read_story(events: Sequence[bytes]) -> Iterator[tuple[float, str, bytes]]:
    """Yield (time, kind, note) of each event."""
    for event in events:
        at, _, size = _EVENT.unpack_from(event)
        note = _EVENT.size + size % 64
        yield at / 1_000_000, event[_EVENT.size : note].decode(), event[note:]


def read_answer(answer: list[Any]) -> Granted | Refused:
    """Return what a claim is answered."""
    if answer[0] == b"granted":
        _, token, copy, progress, crashes, now = answer
        return Granted(token, copy, progress, crashes, now / 1_000_000)
    return Refused(Refusal(answer[0].decode()), answer[1] / 1_000_000)


def escape(topic: str) -> str:
    """Return a topic as it stands in keys; one that nobody knows may have a `:`."""
    return topic.replace("%", "%25").replace(":", "%3A")


def _hex_bytes(digits: str) -> bytes | None:
    """Return 32 digits as bytes; None: these are others, or not only digits."""
    if len(digits) != 32:
        return None
    try:
        raw = bytes.fromhex(digits)
    except ValueError:
        return None
    return b"\0" + raw if raw.hex() == digits else None


def _text_bytes(text: str) -> bytes:
    raw = text.encode()
    return b"\1" + _SHORT_NUMBER.pack(len(raw)) + raw


def _uuid(digits: str) -> str:
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
