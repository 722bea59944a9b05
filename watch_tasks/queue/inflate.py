"""Compressed bodies, inflated under a cap: a few hundred bytes may stand for gigabytes."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Final

__all__ = ["KINDS", "inflate"]


def _zlib(body: bytes, most: int) -> bytes:
    return zlib.decompressobj().decompress(body, most)


def _bz2(body: bytes, most: int) -> bytes:
    return bz2.BZ2Decompressor().decompress(body, most)


def _lzma(body: bytes, most: int) -> bytes:
    # The memory that the format asks for is bounded as well: its dictionary may be as large as it likes.
    return lzma.LZMADecompressor(memlimit=max(16 * most, 64 * 1024 * 1024)).decompress(body, most)


#: Content type, as kombu names it, → what inflates it up to a number of bytes. What kombu calls gzip is zlib.
KINDS: Final[dict[str, Callable[[bytes, int], bytes]]] = {
    "application/x-gzip": _zlib,
    "application/x-bz2": _bz2,
    "application/x-lzma": _lzma,
}


def inflate(kind: object, body: bytes, most: int) -> bytes:
    """Return a compressed body as it was, or one byte more than the most of it.

    Raises:
        ValueError: nobody here knows this kind, or the bytes are not of it.
    """
    decoder = KINDS.get(kind) if isinstance(kind, str) else None
    if decoder is None:
        raise ValueError(f"the compression must be {', '.join(KINDS)} or none, got {kind!r}"[:300])
    try:
        return decoder(body, most + 1)
    except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as exc:
        raise ValueError(f"the body must be compressed by {kind!r}: {exc}"[:300]) from exc
