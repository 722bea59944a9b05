from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from watch_tasks import Attempt, Counters, DeadLetter, Event, Reason, Record

AT = datetime(2027, 1, 15, 8, 0, 0, 123456, tzinfo=UTC)
VALUES = [
    Record(
        topic="orders",
        index="order-17",
        id="m",
        retries=2,
        max_retries=None,
        sent_at=AT,
        handled_at=AT,
        seconds=0.25,
        worker="w",
        digest="ab",
        data={"a": [1, None]},
    ),
    DeadLetter(
        id="m",
        topic=None,
        index=None,
        reason=Reason.UNDECODABLE,
        error="SchemaError: no",
        handler="h",
        crashes=1,
        attempts=(Attempt(at=AT, handler=None, error="E: x", seconds=1.5),),
        handled=("a", "b"),
        raw=b"\xff\x00",
        content_type="application/x-pickle",
        once="index",
        sent_at=AT,
        dead_at=AT,
        copy=3,
    ),
    Event(at=AT, event="retry", topic="orders", index="order-17", id="m", copy=1, error="E: x"),
    Counters(handled=1, duplicates=2, retries=3, dead=4),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
class TestStoredForm:
    def test_every_field_comes_back(self, value: Any) -> None:
        assert msgspec.json.decode(msgspec.json.encode(value), type=type(value)) == value

    def test_a_field_that_a_newer_version_wrote_is_let_pass(self, value: Any) -> None:
        """During a deploy, old workers and commands read what new ones wrote."""
        newer = {**msgspec.to_builtins(value), "since_next_year": 1}
        assert msgspec.json.decode(msgspec.json.encode(newer), type=type(value)) == value

    def test_it_cannot_be_changed(self, value: Any) -> None:
        with pytest.raises(AttributeError):
            value.topic = "other"


@pytest.mark.parametrize(
    ("kind", "needed"),
    [
        (Record, {"topic": "t", "index": "i", "id": "m"}),
        (DeadLetter, {"id": "m", "topic": None, "index": None, "reason": "fatal", "error": ""}),
        (Event, {"at": "2027-01-15T08:00:00Z", "event": "sent", "topic": "t", "index": "i"}),
    ],
)
def test_what_an_older_version_wrote_can_be_read(kind: type, needed: dict[str, Any]) -> None:
    """Whatever is added later needs a default; these are the fields that there always were."""
    assert isinstance(msgspec.convert(needed, kind), kind)


def test_an_event_says_nothing_of_what_it_does_not_know() -> None:
    told = msgspec.json.decode(msgspec.json.encode(Event(at=AT, event="sent", topic="t", index="i")))
    assert set(told) == {"at", "event", "topic", "index"}
