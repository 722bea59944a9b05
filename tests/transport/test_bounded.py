"""Compressed bodies that kombu inflates under a cap."""

from __future__ import annotations

import bz2
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from kombu import compression
from kombu.message import Message

from watch_tasks import TooLargeError
from watch_tasks.transport import bounded
from watch_tasks.transport.bounded import bound_decoders

#: The cap, bytes.
MOST = 1_000_000

KINDS = [("application/x-bz2", bz2.compress), ("application/x-gzip", zlib.compress)]


@pytest.fixture(autouse=True)
def cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "_decoders", dict(compression._decoders))
    monkeypatch.setattr(bounded, "_most", None)
    bound_decoders(MOST)


def received(kind: str, body: bytes) -> Message:
    """Return what kombu makes of a compressed body."""
    return Message(body, headers={"compression": kind}, content_type="application/data", content_encoding="binary")


@pytest.mark.parametrize(("kind", "compress"), KINDS)
class TestBound:
    def test_a_body_of_the_most_is_inflated(self, kind: str, compress: Callable[[bytes], bytes]) -> None:
        assert received(kind, compress(b"0" * MOST)).body == b"0" * MOST

    def test_one_byte_more_is_an_error_that_kombu_keeps(self, kind: str, compress: Callable[[bytes], bytes]) -> None:
        body = compress(b"0" * (MOST + 1))
        message = received(kind, body)
        assert message.body == body
        with pytest.raises(TooLargeError, match=f"takes {MOST + 1} bytes"):
            message._reraise_error()

    def test_what_is_refused_takes_no_memory_while_it_is_in_hand(
        self, kind: str, compress: Callable[[bytes], bytes]
    ) -> None:
        body = compress(b"0" * (10 * MOST))
        received(kind, body)
        tracemalloc.start()
        try:
            in_hand = [received(kind, body) for _ in range(20)]
            size, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert all(message.errors for message in in_hand)
        assert size < MOST


def test_a_bound_that_is_not_firm_leaves_one_that_was_set() -> None:
    bound_decoders(10, firmly=False)
    assert received("application/x-gzip", zlib.compress(b"0" * MOST)).body == b"0" * MOST
    bound_decoders(10)
    assert received("application/x-gzip", zlib.compress(b"0" * MOST)).errors
