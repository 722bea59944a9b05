"""JSON lines that come from a file or a pipe: read as they come, each bad one told by its number."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from .output import note, to_json

__all__ = ["Complain", "is_file", "parse", "reading"]

#: Tells what is wrong with the line of this number.
Complain = Callable[[int, str], None]


def parse(text: str | bytes) -> Any:
    """Return the value of one JSON text.

    Raises:
        ValueError: it is none; the text says where.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except UnicodeDecodeError as exc:
        raise ValueError(f"got bytes that are not UTF-8, at {exc.start}") from exc
    except RecursionError as exc:
        raise ValueError("got values nested too deep") from exc
    except json.JSONDecodeError as exc:
        raise ValueError(f"got {exc.doc[:80]!r}: {exc.msg} at character {exc.pos + 1}") from exc


@contextmanager
def reading(source: IO[bytes], told: Callable[[], str]) -> Iterator[tuple[Iterator[bytes], Complain]]:
    """Give the lines, and what tells a bad one on stderr; at a terminal with a bar that moves along.

    Args:
        source: where they come from.
        told: what the bar says beside itself.
    """
    if not sys.stderr.isatty():
        yield iter(source), lambda number, error: note(to_json({"line": number, "error": error}))
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), TextColumn("{task.fields[told]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=_size(source), told=told())

        def lines() -> Iterator[bytes]:
            for line in source:
                yield line
                bar.update(task, advance=len(line), told=told())

        def complain(number: int, error: str) -> None:
            console.print(to_json({"line": number, "error": error}), markup=False, highlight=False, soft_wrap=True)

        yield lines(), complain


def _refuse(constant: str) -> Any:
    raise ValueError(f"got {constant}, which JSON has not")


def is_file(source: IO[bytes]) -> bool:
    """Whether lines come from a file, and not from a pipe or a person."""
    try:
        return stat.S_ISREG(os.fstat(source.fileno()).st_mode)
    except (OSError, ValueError):
        return False


def _size(source: IO[bytes]) -> int | None:
    """Bytes of a file; None for a pipe, which has no end to measure by."""
    try:
        return os.fstat(source.fileno()).st_size or None
    except (OSError, ValueError):
        return None
