"""The scripts in `redis_scripts/`: what each is put together from, how it is called, how much it is given at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any, Final

from redis.exceptions import NoScriptError

__all__ = ["Script", "cut", "pack", "read_script"]

#: Items that one call of a script takes, and bytes: while it runs, the server does nothing else.
_MOST_ITEMS: Final = 500
_MOST_BYTES: Final = 16 * 1024 * 1024

#: What each script needs before its own text; what it does not need would cost some µs with every call.
_STATES: Final = ("counts", "forms", "records", "stories", "states")
_CHANGING: Final = (*_STATES, "orders", "changes")
_PARTS: Final = {
    "claim": ("forms", "claim_first", "counts", "records", "stories", "states"),
    "commit": ("counts", "forms", "commit_first", *_CHANGING[2:]),
    "count": ("forms", "orders"),
    "drop_letter": _STATES,
    "get": ("forms", "records"),
    "page_records": ("forms", "records", "orders"),
    "put": _CHANGING,
    "release": _STATES,
    "remove": _CHANGING,
    "renew": _STATES,
    "replay": _STATES,
    "scan": ("forms", "orders"),
    "story": _STATES,
    "tend": _CHANGING,
}


def read_script(name: str) -> str:
    """Return the text of a script with all its parts."""
    folder = files(__package__) / "redis_scripts"
    parts = ("common", *_PARTS.get(name, ()), name)
    return "\n".join((folder / f"{part}.lua").read_text(encoding="utf-8") for part in parts)


class Script:
    """A script by its digest; the server is told its text when it does not know it."""

    def __init__(self, text: str) -> None:
        self._text = text.encode()
        self._digest = hashlib.sha1(self._text, usedforsecurity=False).hexdigest()

    def __call__(self, execute: Callable[..., Any], *args: bytes | str) -> Any:
        try:
            return execute("EVALSHA", self._digest, 0, *args)
        except NoScriptError:
            return execute("EVAL", self._text, 0, *args)


def pack(command: Sequence[bytes | str | int]) -> bytes:
    """Return a command as it goes over the wire (RESP2, an array of bulk strings)."""
    parts = [b"*%d\r\n" % len(command)]
    for word in command:
        data = word if isinstance(word, bytes) else str(word).encode()
        parts += (b"$%d\r\n" % len(data), data, b"\r\n")
    return b"".join(parts)


def cut(items: Sequence[Any], blob: Callable[[Any], bytes] = lambda item: b"") -> Iterator[Sequence[Any]]:
    """Cut what is too much for one script; usually it is one part."""
    if len(items) <= _MOST_ITEMS and sum(map(len, map(blob, items))) <= _MOST_BYTES:
        yield items
        return
    part: list[Any] = []
    total = 0
    for item in items:
        if part and (len(part) == _MOST_ITEMS or total > _MOST_BYTES):
            yield part
            part, total = [], 0
        part.append(item)
        total += len(blob(item))
    yield part
