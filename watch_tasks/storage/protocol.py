"""What the pipeline asks of a storage, and what it is answered: claims and commits as values.

The rules that a storage must keep in answering are those of `docs/protocol.md`; `rules.py` states them in Python, and
`watch_tasks.testing.StorageSuite` is their test.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

from ..message import Once

__all__ = [
    "STORY_LENGTH",
    "Claim",
    "Commit",
    "Granted",
    "Put",
    "Refusal",
    "Refused",
    "Replay",
    "Replayed",
    "Settled",
    "Step",
]

#: Events that are kept of one index: the newest.
STORY_LENGTH: Final = 200


class Claim(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """May this worker handle this copy of a message now?"""

    topic: str
    index: str
    id: str
    copy: int
    #: "message" or "index"; a message under "none" is not claimed.
    once: Once
    #: Who asks; unique to one worker process and its children.
    worker: str
    #: Seconds the claim holds without renewal.
    lease: float
    #: Hex digest of the data: other data under a handled index is a conflict.
    digest: str
    #: Seconds that the story of the index is kept after its last event.
    retention: float | None
    #: Seconds since the epoch, by the sender's clock.
    sent_at: float
    #: Names this asking, unique to its worker: asked again under it, because the answer was lost, it is granted again.
    #: Empty: it never is.
    nonce: str = ""
    #: Whether handlers start at once, so that a crash under this claim counts against the message.
    started: bool = True
    #: JSON object with what an event of this delivery tells beyond its kind and time.
    note: bytes = b"{}"


class Granted(msgspec.Struct, frozen=True, gc=False):
    """Handle it: the claim holds until its lease ends, and counts until somebody else takes over."""

    #: Higher than every token granted before by this storage.
    token: int
    #: The copy it is handled as; higher than the claimed one where that stands in for a copy never published.
    copy: int
    #: What the last commit of this message left, or None.
    progress: bytes | None
    #: How often its handler took a worker down so far.
    crashes: int
    #: The storage's clock, seconds since the epoch.
    now: float


class Refusal(StrEnum):
    """Why a claim is refused."""

    DUPLICATE = "duplicate"  #: the id is done or dead, or the index was handled and the once-rule says once
    STALE = "stale"  #: a newer copy of the message was claimed
    BUSY = "busy"  #: somebody else holds it, or its index, or is about to publish a newer copy
    CONFLICT = "conflict"  #: other data was handled under the index, and the once-rule says once


class Refused(msgspec.Struct, frozen=True, gc=False):
    """Do not handle it."""

    why: Refusal
    #: BUSY: seconds after which asking again makes sense.
    seconds: float = 0.0


class Step(StrEnum):
    """What a commit makes of a message."""

    HANDLED = "handled"  #: record it; `blob` is the rest of the record
    RETRY = "retry"  #: it waits as its next copy, one retry older; `blob` is its progress
    SNOOZED = "snoozed"  #: it waits as its next copy; `blob` is its progress
    DEAD = "dead"  #: bury it; `blob` is the dead letter
    MARK = "mark"  #: a handler finished, it is handled on; `blob` is its progress
    RELEASED = "released"  #: the worker gives it back unfinished, at no cost; `blob` is its progress


class Commit(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Make this of that message, if its token is still the newest.

    Committing the same again (its answer was lost) is accepted and changes nothing.
    """

    step: Step
    topic: str
    #: None for a dead letter whose index cannot be known.
    index: str | None
    id: str
    #: The copy in hand, as granted.
    copy: int
    #: None: unclaimed, nothing is checked: a message under "none", or one that could not be read.
    token: int | None
    blob: bytes = b""
    #: HANDLED: hex digest of the data.
    digest: str = ""
    #: HANDLED: seconds that the record is kept; None: for ever. Else those of the story.
    retention: float | None = None
    #: RETRY, SNOOZED: seconds until the next copy is due.
    delay: float = 0.0
    #: Events, as kind and JSON object, that happen with it.
    notes: tuple[tuple[str, bytes], ...] = ()


class Settled(StrEnum):
    """What became of a commit."""

    ACCEPTED = "accepted"  #: it holds
    REPEATED = "repeated"  #: it holds since an earlier time, whose answer was lost: nothing was changed
    REFUSED = "refused"  #: the token is not the newest: nothing was changed


class Put(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Keep this record, handled elsewhere or earlier."""

    topic: str
    index: str
    id: str
    #: Hex digest of the data.
    digest: str
    #: When it was handled: seconds since the epoch.
    at: float
    #: Seconds after that it is kept; None: for ever.
    retention: float | None
    #: The rest of the record.
    blob: bytes
    #: Leave the record there may be, unless that was handled earlier.
    only_newer: bool = False


class Replay(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """May the dead letter of this id be published as its next copy?"""

    id: str
    #: Seconds for which nobody else may replay it: as long as its publishing may take.
    patience: float = 60.0
    #: Though a newer message of its index was handled.
    force: bool = False
    #: JSON object with what the story tells of it.
    note: bytes = b"{}"


class Replayed(StrEnum):
    """What became of it."""

    ACCEPTED = "accepted"  #: publish it, as the copy that is told
    GONE = "gone"  #: no such letter is listed
    TAKEN = "taken"  #: somebody else is replaying it
    NEWER = "newer"  #: a newer message of its index was handled
