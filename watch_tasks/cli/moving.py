"""Records as JSON lines, by which they move from one storage to another, in constant memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import IO, TYPE_CHECKING, Annotated, Any, Final

import click
import msgspec
from msgspec import UNSET, Meta, UnsetType

from ..errors import MessageError, TopicError
from ..message import check_index
from ..record import Record
from ..registry import registry
from ..schema import dump
from ..storage.base import PAGE
from ..topics import WEEK, check_topic
from ..work import digest_of
from .lines import Complain, parse, reading
from .output import count, emit, to_json

if TYPE_CHECKING:
    from .program import Program

__all__ = ["Counts", "export_lines", "import_lines", "read_record"]

#: Characters of what is said about a bad line.
_ERROR: Final = 300
#: Years that every clock, and every storage, can write down: the last one, as a float, might end in year 10,000.
_YEARS: Final = range(1970, 9999)

_Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Time = Annotated[datetime, Meta(tz=True)]


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    """A record as a line has it. Lines of other programs may leave out what has a default."""

    topic: str
    index: str
    id: Annotated[str, Meta(min_length=1)]
    handled_at: _Time
    retries: _Count = 0
    max_retries: _Count | None = None
    sent_at: _Time | None = None
    seconds: Annotated[float, Meta(ge=0, le=1e12)] = 0.0
    worker: str = ""
    data: Any = None
    #: None: to be computed.
    digest: Annotated[str, Meta(pattern=r"^[0-9a-f]*\Z")] | None = None
    #: None: never; UNSET: by the topic's retention.
    expires_at: _Time | UnsetType | None = UNSET


_decode = msgspec.json.Decoder(_Line).decode


@dataclass(slots=True)
class Counts:
    """What became of the lines so far."""

    imported: int = 0
    #: Overtaken by a newer record, there already, or over.
    skipped: int = 0
    refused: int = 0
    started: float = field(default_factory=time.monotonic)

    def fields(self) -> dict[str, Any]:
        """Return them as a JSON line has them."""
        return {
            "imported": self.imported,
            "skipped": self.skipped,
            "refused": self.refused,
            "seconds": round(time.monotonic() - self.started, 3),
        }

    def told(self) -> str:
        """Return them in a few words."""
        return f"{count(self.imported, 'record')} imported, {self.skipped} skipped, {self.refused} refused"


def export_lines(records: Iterator[Record]) -> int:
    """Print each record as a line with all its fields; return how many there were."""
    exported = 0
    # A page at a time: printing ends in a system call, which ten million records need not make each.
    while page := [to_json(msgspec.structs.asdict(record)) for record in islice(records, PAGE)]:
        click.echo("\n".join(page))
        exported += len(page)
    return exported


def import_lines(program: Program, source: IO[bytes]) -> Counts:
    """Keep the record of every line; print bad lines to stderr and the counts to stdout, however it ends.

    Args:
        program: into whose storage.
        source: JSON lines. Empty ones are passed over.

    Raises:
        StorageUnavailableError: the storage went away; the lines counted before were imported.
    """
    storage, counts = program.storage, Counts()
    try:
        with reading(source, counts.told) as (lines, complain):
            records = _records(program, lines, counts, complain)
            while page := list(islice(records, PAGE)):
                kept = storage.restore(page)
                counts.imported += kept
                counts.skipped += len(page) - kept
    finally:
        if program.as_json:
            emit(counts.fields())
        else:
            click.echo(counts.told())
    return counts


def _records(program: Program, lines: Iterator[bytes], counts: Counts, complain: Complain) -> Iterator[Record]:
    """Yield the record of each good line."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = read_record(line, lambda topic: _retention(program, topic))
        except (ValueError, TopicError) as exc:  # MessageError is a ValueError
            counts.refused += 1
            complain(number, str(exc)[:_ERROR])
            continue
        yield record


def read_record(line: bytes, retention: Callable[[str], float | None]) -> Record:
    """Return the record that a line holds.

    Args:
        line: a JSON object. Without `digest`, that of its data is taken, if it has any; without `expires_at`, the
            record ends as one of its topic does.
        retention: seconds that a topic's records are kept, by its name; None: for ever.

    Raises:
        ValueError: it is no JSON, or no record; the text says where.
        TopicError: its topic is no name of one.
    """
    got = _read(line)
    topic, index = check_topic(got.topic), check_index(got.index)
    for name, text in (("id", got.id), ("worker", got.worker)):
        _check_text(name, text)
    handled_at = _check_time("handled_at", got.handled_at)
    # Taken here, once: what has no JSON form is this line's fault, and must not end the import.
    plain = dump(got.data)
    return Record(
        topic=topic,
        index=index,
        id=got.id,
        retries=got.retries,
        max_retries=got.max_retries,
        sent_at=_check_time("sent_at", got.sent_at) if got.sent_at else None,
        handled_at=handled_at,
        expires_at=_expiry(got.expires_at, handled_at, lambda: retention(topic)),
        seconds=got.seconds,
        worker=got.worker,
        digest=(digest_of(plain) if got.data is not None else "") if got.digest is None else got.digest,
        data=None if got.data is None else msgspec.Raw(plain),
    )


def _read(line: bytes) -> _Line:
    try:
        try:
            return _decode(line)
        except msgspec.ValidationError:
            raise
        except (msgspec.DecodeError, RecursionError):
            # Half a surrogate pair in its data, which only Python's own parser lets pass; or no JSON at all.
            return msgspec.convert(parse(line), _Line)
    except msgspec.ValidationError as exc:
        raise MessageError(f"expected a record, {exc}") from exc
    except ValueError as exc:
        raise MessageError(f"expected JSON, {exc}") from exc


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MessageError(f"`{name}` must be a text that UTF-8 can write, got {text!r}") from None


def _check_time(name: str, time: datetime) -> datetime:
    try:
        moment = time.astimezone(UTC)
    except OverflowError:
        moment = None
    if moment is None or moment.year not in _YEARS:
        raise MessageError(f"`{name}` must be between {_YEARS[0]} and {_YEARS[-1]}, got {time.isoformat()}")
    return moment


def _expiry(
    given: datetime | UnsetType | None, handled_at: datetime, retention: Callable[[], float | None]
) -> datetime | None:
    if given is not UNSET:
        return _check_time("expires_at", given) if given else None
    seconds = retention()
    try:
        end = None if seconds is None else handled_at + timedelta(seconds=seconds)
    except OverflowError:
        end = None
    return end if end and end.year in _YEARS else None  # past the end of the calendar is for ever


def _retention(program: Program, topic: str) -> float | None:
    program.load_topics()
    loaded = registry.get(topic)
    return loaded.retention if loaded else WEEK
