"""What commands print: aligned tables for people, one JSON object a line for programs.

Indexes, errors and data come from anybody. Nothing of them reaches a terminal as a control sequence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import click
import msgspec

from ..schema import dump

__all__ = ["age", "clean", "count", "emit", "listed", "note", "table", "to_json", "when"]

#: What JSON lets stand as it is and terminals obey: C1 controls, marks of direction, line separators.
_UNSEEN: Final = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")

#: Names that one line shows.
NAMES: Final = 10

_UNITS: Final = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))


def to_json(fields: dict[str, Any]) -> str:
    """Return a JSON object on one line: times RFC 3339 in UTC, bytes base64, `data` as it came."""
    try:
        if "data" in fields:
            fields = {**fields, "data": msgspec.Raw(dump(fields["data"]))}
        text = msgspec.json.encode(fields).decode()
    except UnicodeError:  # half a surrogate pair, which only Python's own encoder writes
        plain = {**fields, "data": json.loads(bytes(fields["data"]))} if "data" in fields else fields
        text = json.dumps(msgspec.to_builtins(plain), separators=(",", ":"))
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def emit(fields: dict[str, Any]) -> None:
    """Print one JSON line."""
    click.echo(to_json(fields))


def note(text: str) -> None:
    """Tell the person at the terminal something that is not data."""
    click.echo(clean(text), err=True)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """Print rows under a header, each column as wide as its widest cell, but the last cut off at a terminal's edge.

    Args:
        head: the header.
        rows: cells; None shows as `-`.
        right: headers of the columns that are numbers.
    """
    from rich.cells import cell_len, set_cell_size

    lines = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    edge = _edge()
    for line in lines:
        cells = [
            " " * (width - cell_len(cell)) + cell if name in right else cell + " " * (width - cell_len(cell))
            for name, cell, width in zip(head, line, widths, strict=True)
        ]
        text = "  ".join(cells).rstrip()
        if edge and cell_len(text) > edge:
            text = set_cell_size(text, edge - 1) + "…"
        click.echo(text)


def count(number: int, noun: str) -> str:
    """Return `1 record`, `2 records`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: Sequence[str]) -> str:
    """Return names with commas between them; of many, the first few and how many more there are."""
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return ", ".join(names[:NAMES]) + more


def clean(text: str) -> str:
    """Return a text on one line, with everything that a terminal might obey written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def when(time: datetime | None) -> str | None:
    """Return a time to the second, RFC 3339 in UTC."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if time else None


def age(time: datetime | None) -> str | None:
    """Return how long ago something was, in its largest unit: `2h`."""
    if time is None:
        return None
    seconds = max(0, int((datetime.now(UTC) - time).total_seconds()))
    return next((f"{seconds // size}{unit}" for size, unit in _UNITS if seconds >= size), "0s")


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    return clean(f"{value:.3f}" if isinstance(value, float) else str(value))


def _edge() -> int | None:
    """Columns of the terminal that stdout is, or None."""
    import shutil
    import sys

    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
