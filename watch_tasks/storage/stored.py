"""Records and dead letters as backends keep them: what a backend has to know, and opaque bytes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from ..errors import SchemaError
from ..record import DeadLetter, Record
from ..schema import dump, load

__all__ = [
    "Stored",
    "StoredRecord",
    "encode_letter",
    "encode_record",
    "encode_rest",
    "letter_of",
    "record_of",
    "time_of",
]


@dataclass(frozen=True, slots=True)
class Stored:
    """A dead letter as a backend gives it back: opaque bytes."""

    #: Seconds since the epoch, by the storage's clock.
    at: float
    blob: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRecord:
    """A record as a backend gives it back: what the backend has to know of it, and the rest as opaque bytes."""

    topic: str
    index: str
    id: str
    #: Hex digest of the data.
    digest: str
    #: When it was handled: seconds since the epoch, by the storage's clock.
    at: float
    #: When it ends, by the same clock; None: never.
    expires: float | None
    blob: bytes


class _Rest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a record holds beyond a `StoredRecord`. As few bytes as will do: there may be ten million."""

    retries: int
    max_retries: int | None
    sent_at: datetime | None
    seconds: float
    worker: str
    #: As JSON; None: null, or not kept.
    data: bytes | None


_encode = msgspec.msgpack.Encoder().encode


def encode_record(record: Record) -> bytes:
    """Return what backends keep of a record beside its topic, index, id, digest and times.

    Raises:
        SchemaError: its data has no JSON form.
    """
    data = None if record.data is None else dump(record.data)
    return encode_rest(record.retries, record.max_retries, record.sent_at, record.seconds, record.worker, data)


def encode_rest(
    retries: int, max_retries: int | None, sent_at: datetime | None, seconds: float, worker: str, data: bytes | None
) -> bytes:
    """Return the same of a record that nobody has made; its data is JSON, or None: not kept."""
    return _encode(_Rest(retries, max_retries, sent_at, seconds, worker, data))


def encode_letter(letter: DeadLetter) -> bytes:
    """Return a dead letter as the bytes that backends keep.

    Raises:
        SchemaError: its data has no JSON form.
    """
    return msgspec.json.encode(msgspec.structs.replace(letter, data=msgspec.Raw(dump(letter.data))))


def record_of(stored: StoredRecord) -> Record:
    """Return a record as people read it.

    Raises:
        SchemaError: another version of this package wrote it.
    """
    try:
        rest = _decode_rest(stored.blob)
    except msgspec.DecodeError as exc:
        raise SchemaError(f"the storage holds a record that this version cannot read: {exc}") from exc
    return Record(
        topic=stored.topic,
        index=stored.index,
        id=stored.id,
        retries=rest.retries,
        max_retries=rest.max_retries,
        sent_at=rest.sent_at,
        handled_at=time_of(stored.at),
        expires_at=None if stored.expires is None else time_of(stored.expires),
        seconds=rest.seconds,
        worker=rest.worker,
        digest=stored.digest,
        data=None if rest.data is None else load(rest.data),
    )


_decode_rest = msgspec.msgpack.Decoder(_Rest).decode


def letter_of(stored: Stored) -> DeadLetter:
    """Return a dead letter as people read it.

    Raises:
        SchemaError: another version of this package wrote it.
    """
    try:
        letter = msgspec.json.decode(stored.blob, type=DeadLetter)
    except msgspec.ValidationError as exc:
        raise SchemaError(f"the storage holds a dead letter that this version cannot read: {exc}") from exc
    except msgspec.DecodeError:
        letter = msgspec.convert(load(stored.blob), DeadLetter)
    return msgspec.structs.replace(letter, dead_at=time_of(stored.at))


def time_of(seconds: float) -> datetime:
    """Return seconds since the epoch as a time in UTC."""
    return datetime.fromtimestamp(seconds, UTC)
