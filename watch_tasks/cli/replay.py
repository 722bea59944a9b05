"""Publishing dead letters again, page by page: one of all who replay a letter at once publishes it (protocol §6)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import msgspec
from msgspec.structs import replace

from ..errors import MessageError, SendUnknownError, TooLargeError, TopicError
from ..message import Message
from ..outcome import Reason
from ..queue import wire
from ..record import DeadLetter
from ..registry import registry
from ..schema import dump, load
from ..storage.protocol import Replay, Replayed
from .output import count, note

if TYPE_CHECKING:
    from .program import Program

__all__ = ["Chosen", "Counts", "Replayer", "Result"]

#: Letters that are asked for in one round trip, and bytes of data among them that are held in memory.
PAGE: Final = 500
PAGE_BYTES: Final = 8 * 1024 * 1024
#: Seconds for which what was asked for is ours alone: a page is published in far less.
PATIENCE: Final = 60.0
#: Seconds past the patience of others that are waited for what they took, and seconds between two looks at it.
GRACE: Final = 10.0
POLL: Final = 1.0

BY: Final = "watch-tasks dead replay"


class Result(StrEnum):
    """What became of one letter."""

    REPLAYED = "replayed"  #: the broker has its next copy
    REFUSED = "refused"  #: nothing was changed
    GONE = "gone"  #: it is not listed any more: handled elsewhere, removed, or dead anew
    UNKNOWN = "unknown"  #: the broker's answer was lost: replay it again, it is handled once


class Chosen(NamedTuple):
    """One letter as it was when it was chosen: what dies again later is another one."""

    id: str
    dead_at: datetime


class Told(Protocol):
    """Takes what became of a letter; called once for each."""

    def __call__(self, letter: DeadLetter, result: Result, copy: int, detail: str) -> None: ...


@dataclass(slots=True)
class Counts:
    """What became of the letters so far."""

    replayed: int = 0
    refused: int = 0
    gone: int = 0
    unknown: int = 0

    def note(self, result: Result) -> None:
        """Count one letter."""
        setattr(self, result.value, getattr(self, result.value) + 1)

    def fields(self) -> dict[str, Any]:
        """Return them by their names."""
        return asdict(self)


class Replayer:
    """Replays letters of one program.

    Args:
        program: whose storage and broker.
        force: also those whose index has a newer record.
        tell: told of each that was replayed, refused or is unknown.

    Raises:
        ConfigurationError: the broker's URL cannot be used. Nothing was asked for yet.
        QueueUnavailableError: no broker is configured, and no embedded server answers.
    """

    def __init__(self, program: Program, *, force: bool, tell: Told) -> None:
        self.counts = Counts()
        #: Of those that are gone: somebody else was replaying them.
        self.elsewhere = 0
        self._program = program
        self._storage = program.storage
        self._outlet = program.outlet
        self._force = force
        self._tell = tell
        self._topics: set[str] = set()
        self._taken: list[Chosen] = []

    def run(self, chosen: Iterable[Chosen]) -> None:
        """Replay letters in their order, then those that somebody else had taken and did not publish.

        Ended at any point, it leaves every letter listed or published: the same call again goes on from there.

        Raises:
            SendError: the broker is away; what was asked for and not published can be replayed again.
            StorageError: the storage is away.
        """
        self._replay(chosen)
        gone, deadline = self.counts.gone, time.monotonic() + PATIENCE + GRACE
        if self._taken:
            number = count(len(self._taken), "dead letter")
            note(
                f"waiting at most {PATIENCE + GRACE:.0f} s for {number} that somebody else replays, or began to replay"
            )
        while self._taken and time.monotonic() < deadline:
            time.sleep(POLL)
            taken, self._taken = self._taken, []
            self._replay(taken)
            self.elsewhere = self.counts.gone - gone
        for letter in self._letters(self._taken):
            self._settle(letter, Result.REFUSED, detail="somebody else is replaying it: see what became of it later")

    def message(self, letter: DeadLetter) -> Message[Any]:
        """Return the message that a letter keeps, with its data in plain form.

        Raises:
            MessageError: there is nothing to handle in it; the text says what to do.
        """
        if letter.raw is not None:
            return _read(letter)
        try:
            topic = self._topic(letter.topic or "")
        except TopicError as exc:
            raise MessageError(str(exc)) from exc
        if topic is not None:
            topic.decode(letter.data)
        return Message(
            letter.data,
            letter.topic or "",
            index=letter.index or "",
            id=letter.id,
            max_retries=letter.max_retries,
            once=letter.once,
            handled=letter.handled,
            sent_at=letter.sent_at or datetime.now(UTC),
        )

    def _topic(self, name: str) -> Any:
        if name not in self._topics:
            self._program.topic(name)  # loads its module, or warns
            self._topics.add(name)
        return registry.get(name)

    def _replay(self, chosen: Iterable[Chosen]) -> None:
        for page in self._pages(self._letters(chosen)):
            started = time.monotonic()
            answers = self._storage.replay_many([self._request(letter) for letter, _ in page])
            for (letter, message), (why, copy) in zip(page, answers, strict=True):
                is_ours = why is Replayed.ACCEPTED and time.monotonic() - started < PATIENCE
                if is_ours:
                    self._publish(letter, replace(message, copy=copy))
                elif why in (Replayed.TAKEN, Replayed.ACCEPTED):
                    self._taken.append(Chosen(letter.id, letter.dead_at))
                elif why is Replayed.GONE:
                    self.counts.note(Result.GONE)
                else:
                    self._settle(letter, Result.REFUSED, detail="a newer message of its index was handled; see --force")

    def _letters(self, chosen: Iterable[Chosen]) -> Iterator[DeadLetter]:
        for id, dead_at in chosen:
            letter = self._storage.dead_get(id)
            if letter and letter.dead_at == dead_at:
                yield letter
            else:
                self.counts.note(Result.GONE)

    def _pages(self, letters: Iterator[DeadLetter]) -> Iterator[list[tuple[DeadLetter, Message[Any]]]]:
        page, size, limit = [], 0, self._program.settings.max_payload
        for letter in letters:
            try:
                message = self.message(letter)
                payload = len(dump(message.data))
                if payload > limit:
                    raise TooLargeError(message.topic, payload, limit)
            except MessageError as exc:
                self._settle(letter, Result.REFUSED, detail=str(exc))
                continue
            page.append((letter, message))
            size += payload
            if len(page) >= PAGE or size >= PAGE_BYTES:
                yield page
                page, size = [], 0
        if page:
            yield page

    def _request(self, letter: DeadLetter) -> Replay:
        told = msgspec.json.encode({"id": letter.id, "by": BY})
        return Replay(id=letter.id, patience=PATIENCE, force=self._force, note=told)

    def _publish(self, letter: DeadLetter, message: Message[Any]) -> None:
        try:
            self._outlet.push_replay(message, letter.raw)
        except SendUnknownError as exc:
            self._settle(letter, Result.UNKNOWN, message.copy, str(exc))
        else:
            self._settle(letter, Result.REPLAYED, message.copy)

    def _settle(self, letter: DeadLetter, result: Result, copy: int = 0, detail: str = "") -> None:
        self.counts.note(result)
        self._tell(letter, result, copy, detail)


def _read(letter: DeadLetter) -> Message[Any]:
    """Return the message in the original bytes of a letter whose topic nobody knew."""
    if letter.reason is Reason.TOO_LARGE:
        raise MessageError(
            "it is larger than a payload may be: raise `watch_max_payload` or store the data elsewhere, have it sent "
            "anew, and remove the letter"
        )
    if letter.reason is not Reason.UNKNOWN_TOPIC or letter.topic is None:
        raise MessageError(
            f"there is no message in it to handle ({letter.reason.value}): look at it with "
            f"`watch-tasks dead show {letter.id}`, have it sent anew as it was meant, and remove the letter"
        )
    header = {"index": letter.index} if letter.index else {}
    try:
        args, keywords, _ = load(letter.raw or b"")
    except (ValueError, TypeError, RecursionError) as exc:
        raise MessageError(f"its body must be [args, kwargs, embed] in JSON: {exc}"[:300]) from exc
    return wire.read({"id": letter.id, "task": wire.task_name(letter.topic), wire.HEADER: header}, args, keywords)
