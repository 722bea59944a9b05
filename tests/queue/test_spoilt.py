"""A packet of which one member is no JSON, or nested too deep to be read: the others do not pay for it."""

from __future__ import annotations

import random

import msgspec
import pytest

from watch_tasks import MessageError
from watch_tasks.packets import StrangeMember
from watch_tasks.queue import bulk

FIELDS = {"id": "p", "watch": {"version": 1, "sent_at": "2026-01-02T03:04:05Z"}}
GOOD = [b'["a","i",1]', b'["b","",{"x":["}",1]}]', b'["c","j","\\"[",{"copy":1}]']


def body(*members: bytes, topic: bytes = b'"t"') -> bytes:
    return b"[[" + topic + b",[" + b",".join(members) + b"]],{},null]"


def deep(levels: int) -> bytes:
    return b'["deep","",' + b"[" * levels + b"]" * levels + b"]"


@pytest.mark.parametrize(
    "spoilt",
    [
        b"",
        b"nothing",
        b'["x","i",nothing]',
        b'["x\nx","i",1]',
        b'["x","i",1,{"once":}]',
        b'["x\xff","",1]',
        deep(100_000),
        b'["x","",' + b'{"a":' * 5_000 + b"1" + b"}" * 5_000 + b"]",
    ],
    ids=lambda value: str(value)[:30],
)
def test_one_that_no_decoder_reads_is_told_apart(spoilt: bytes) -> None:
    first, second, third = GOOD
    raw = body(first, spoilt, second, b" " + third)

    found = bulk.read(raw, FIELDS).members

    assert [one.id for one in found if not isinstance(one, StrangeMember)] == ["a", "b", "c"]
    assert [bytes(one.data) for one in found if not isinstance(one, StrangeMember)] == [
        b"1",
        b'{"x":["}",1]}',
        b'"\\"["',
    ]
    assert [bytes(one.data) for one in found if isinstance(one, StrangeMember)] == [spoilt]
    assert {"a", "b", "c"} <= set(bulk.names(raw))


def test_beside_it_half_a_surrogate_pair_is_as_good_as_ever() -> None:
    found = bulk.read(body(b'["a","",{"x":"\\ud800"}]', b"nothing"), FIELDS).members
    assert [isinstance(one, StrangeMember) for one in found] == [False, True]
    assert found[0].id == "a"


@pytest.mark.parametrize(
    "raw",
    [
        b'[["t",[["a","",1]],{},null]',
        b'[["t",[["a","",1],7',
        b'[["t",[["a","",nothing]],nothing,null]',
        body(b"nothing", topic=b'"A topic"'),
        body(b"nothing", topic=b"[[]]"),
        body(b'["x,1]'),
        body(b'["x","",{"a":1]'),
        b"[" * 100_000,
        # Each quote would be looked for an end from, over and over.
        body(b'["' + b'\\"' * 250_000),
    ],
    ids=lambda raw: str(raw)[:40],
)
def test_what_is_no_packet_is_refused(raw: bytes) -> None:
    with pytest.raises(MessageError):
        bulk.read(raw, FIELDS)
    with pytest.raises(MessageError):
        bulk.names(raw)


def test_whatever_the_bytes_are_each_is_a_member_or_told_apart() -> None:
    """Mutants: none raises anything else, and what is a member was one in the bytes."""
    chance = random.Random(5)
    base = body(*GOOD, *(msgspec.json.encode([f"m{n}", f"i{n}", {"n": n, "s": "]}\\,[{"}]) for n in range(20)))
    refused = partly = 0
    for _ in range(2000):
        raw = bytearray(base)
        for _ in range(chance.choice((1, 1, 2, 4))):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        try:
            found = bulk.read(bytes(raw), FIELDS).members
        except MessageError:
            refused += 1
            continue
        strange = [one for one in found if isinstance(one, StrangeMember)]
        partly += 0 < len(strange) < len(found)
        assert len(found) <= 2 * len(GOOD) + 20
    assert refused < 1500
    assert partly > 200
