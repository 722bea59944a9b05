"""Short ways to write the claims and commits that the storage suite is made of."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from ..message import Once
from ..outcome import Reason
from ..record import DeadLetter, Record
from ..storage.base import Storage
from ..storage.protocol import Claim, Commit, Granted, Refusal, Refused, Step
from ..storage.stored import encode_letter, encode_record
from ..topics import WEEK

__all__ = [
    "LEASE",
    "TOPIC",
    "ask",
    "finish",
    "grant",
    "handle",
    "kinds",
    "letter",
    "record",
    "refusal",
    "settle",
    "unclaimed",
    "wait",
]

TOPIC = "orders"
#: Seconds that claims hold.
LEASE = 8.0


def ask(
    id: str = "m1",
    *,
    index: str = "order-1",
    copy: int = 0,
    once: Once = "message",
    worker: str = "w1",
    nonce: str = "",
    digest: str = "d1",
    started: bool = True,
    topic: str = TOPIC,
    retention: float | None = WEEK,
) -> Claim:
    """Return a claim."""
    return Claim(
        topic=topic,
        index=index,
        id=id,
        copy=copy,
        once=once,
        worker=worker,
        lease=LEASE,
        digest=digest,
        retention=retention,
        sent_at=1_799_999_990.0,
        nonce=nonce,
        started=started,
        note=msgspec.json.encode({"id": id, "copy": copy, "worker": worker}),
    )


def grant(storage: Storage, claim: Claim) -> Granted:
    """Make a claim that must be granted."""
    answer = storage.claim(claim)
    assert isinstance(answer, Granted), f"expected the claim to be granted, got {answer}"
    return answer


def refusal(storage: Storage, claim: Claim) -> Refusal:
    """Make a claim that must be refused, and return why it was."""
    answer = storage.claim(claim)
    assert isinstance(answer, Refused), f"expected the claim to be refused, got {answer}"
    return answer.why


def wait(storage: Storage, claim: Claim) -> float:
    """Make a claim that must be refused as busy, and return for how many seconds."""
    answer = storage.claim(claim)
    assert isinstance(answer, Refused), f"expected the claim to be busy, got {answer}"
    assert answer.why is Refusal.BUSY, f"expected the claim to be busy, got {answer}"
    return answer.seconds


def settle(
    step: Step, claim: Claim, granted: Granted, *, blob: bytes = b"", delay: float = 0.0, retention: float | None = WEEK
) -> Commit:
    """Return the commit that ends a granted claim in a step."""
    if step is Step.HANDLED:
        blob = blob or encode_record(record(claim.index, topic=claim.topic, id=claim.id, digest=claim.digest))
    if step is Step.DEAD:
        blob = blob or encode_letter(letter(claim.id, topic=claim.topic, index=claim.index, copy=granted.copy))
    return Commit(
        step=step,
        topic=claim.topic,
        index=claim.index,
        id=claim.id,
        copy=granted.copy,
        token=granted.token,
        blob=blob,
        digest=claim.digest,
        retention=retention,
        delay=delay,
        notes=((step.value, msgspec.json.encode({"id": claim.id, "copy": granted.copy})),),
    )


def unclaimed(
    step: Step, id: str = "m1", index: str | None = "order-1", *, topic: str = TOPIC, error: str = ""
) -> Commit:
    """Return a commit of a message that was never claimed."""
    if step is Step.DEAD:
        blob = encode_letter(letter(id, topic=topic or None, index=index, error=error))
    else:
        blob = encode_record(record(index or id, topic=topic, id=id))
    return Commit(step=step, topic=topic, index=index, id=id, copy=0, token=None, blob=blob, retention=WEEK)


def finish(storage: Storage, claim: Claim, granted: Granted, *, retention: float | None = WEEK) -> None:
    """Commit that a claimed message was handled; it must be accepted."""
    assert storage.commit(settle(Step.HANDLED, claim, granted, retention=retention)), "the commit was refused"


def handle(storage: Storage, id: str = "m1", *, retention: float | None = WEEK, **fields: Any) -> Granted:
    """Take one message all the way."""
    claim = ask(id, retention=retention, **fields)
    granted = grant(storage, claim)
    finish(storage, claim, granted, retention=retention)
    return granted


def record(
    index: str,
    *,
    topic: str = TOPIC,
    id: str = "m1",
    at: float = 1_800_000_000.0,
    data: Any = None,
    digest: str = "d1",
) -> Record:
    """Return a record."""
    handled_at = datetime.fromtimestamp(at, UTC)
    return Record(topic=topic, index=index, id=id, handled_at=handled_at, digest=digest, data=data)


def letter(
    id: str,
    *,
    topic: str | None = TOPIC,
    index: str | None = "order-1",
    copy: int = 0,
    error: str = "",
    raw: bytes | None = None,
) -> DeadLetter:
    """Return a dead letter."""
    return DeadLetter(
        id=id, topic=topic, index=index, reason=Reason.FATAL, error=error or "ValueError: no", copy=copy, raw=raw
    )


def kinds(storage: Storage, index: str = "order-1", topic: str = TOPIC) -> list[str]:
    """Return the story of an index, as the names of its events."""
    return [event.event for event in storage.explain(topic, index)]
