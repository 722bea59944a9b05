"""The members of a packet on their way: claimed in one round trip, handled in order, recorded in groups.

What becomes of each is decided as for a single message, and told for each alone. Only one thing differs: they are
claimed before their handlers start. So a crash counts against none of them; after one, the packet is taken apart.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import msgspec

from . import points
from .errors import MessageError
from .message import Message
from .outcome import Busy, Outcome, Reason
from .packets import Member, Packet, read_member
from .pipeline import Pipeline
from .queue import bulk
from .storage.protocol import Step
from .together import Together
from .work import Settlement, Work

__all__ = ["Members", "Taken"]

logger = logging.getLogger(__name__)

#: Seconds after which a packet's members that are not begun are left to others: by then there may be workers with
#: nothing to do.
_ENOUGH: Final = 2.0


class Taken(msgspec.Struct, frozen=True):
    """What became of one member."""

    member: Member
    #: None: it is no message, and buried.
    message: Message[Any] | None
    outcome: Outcome
    #: Whether it was given back untouched, because the worker is asked to stop or is long at the packet already.
    is_left: bool = False


class Members:
    """Takes the members of packets all the way. May be used by several threads.

    Args:
        pipeline: decides what becomes of each.
        stopping: whether the worker is asked to stop: then the member in hand is the last.
    """

    def __init__(self, pipeline: Pipeline, stopping: Callable[[], bool]) -> None:
        self._pipeline, self._stopping = pipeline, stopping

    def handle(self, packet: Packet) -> list[Taken]:
        """Handle each member. What is not settled by that leaves as a message of its own, or as a packet."""
        taken: list[Taken] = []
        until: float | None = None
        with self._pipeline.company:
            waiting = list(self._read(packet, taken))
            while waiting:
                # What a member before it may decide waits until that is recorded.
                now, waiting = _apart(waiting, self._pipeline)
                part = _Round(self._pipeline, self._stopping, until)
                taken += part.handle(now)
                until = part.until
        return taken

    def take_apart(self, packet: Packet) -> list[Taken]:
        """Find out which members are left, and run none: each of those is Busy, and leaves as a message of its own.

        For a packet that came back: one of its members may have taken the worker down, and must not take the others
        with it once more.
        """
        taken: list[Taken] = []
        pairs = list(self._read(packet, taken))
        try:
            begun = self._begin(pairs)
        except Exception:
            # One of them is more than the storage can take, or we made a mistake: let it be alone with that.
            logger.exception("could not claim the members of packet %s, each goes on alone", packet.id)
            return taken + [Taken(member, message, Busy(0.0)) for member, message in pairs]
        claimed = [work for work in begun if isinstance(work, Work)]
        self._pipeline.settle([Settlement(work.commit(Step.RELEASED), Busy(0.0)) for work in claimed])
        return taken + [
            Taken(member, message, Busy(0.0) if isinstance(work, Work) else work)
            for (member, message), work in zip(pairs, begun, strict=True)
        ]

    def bury(self, packet: Packet, reason: Reason, error: BaseException | str) -> list[Taken]:
        """Make a dead letter of each member, unless its id is settled."""
        taken: list[Taken] = []
        for member, message in self._read(packet, taken):
            taken.append(Taken(member, message, self._pipeline.bury_message(message, reason, error)))
        return taken

    def _begin(self, pairs: Sequence[tuple[Member, Message[Any]]]) -> list[Work | Outcome]:
        return _begin(self._pipeline, pairs)

    def _read(self, packet: Packet, taken: list[Taken]) -> Iterator[tuple[Member, Message[Any]]]:
        """Yield the members that are messages; bury the others."""
        for member in packet.members:
            try:
                yield member, read_member(member, packet.topic, packet.sent_at)
            except (MessageError, ValueError, RecursionError) as exc:
                reason = Reason.MALFORMED if isinstance(exc, MessageError) else Reason.UNDECODABLE
                outcome = self._pipeline.bury(
                    reason,
                    exc,
                    id=bulk.id_of(member),
                    topic=packet.topic,
                    raw=bytes(member.data),
                    content_type="application/json",
                    sent_at=packet.sent_at,
                )
                taken.append(Taken(member, None, outcome))


class _Round:
    """Some members at once, of which none decides on another."""

    def __init__(self, pipeline: Pipeline, stopping: Callable[[], bool], until: float | None) -> None:
        self._pipeline, self._stopping = pipeline, stopping
        #: When it is enough; None: nothing has begun yet.
        self.until = until
        self._outcomes: dict[int, Outcome] = {}
        self._together: Together[int, Outcome] = Together(pipeline, pipeline.settle)

    def handle(self, pairs: Sequence[tuple[Member, Message[Any]]]) -> list[Taken]:
        begun = _begin(self._pipeline, pairs)
        if self.until is None:
            # From here on: were the first one left because it took long to claim them, nobody would ever begin.
            self.until = time.monotonic() + _ENOUGH
        works = deque((number, work) for number, work in enumerate(begun) if isinstance(work, Work))
        left: set[int] = set()
        try:
            self._run(works, left)
        except points.Crash:
            raise  # as of a process that is gone, nothing comes after it
        except BaseException:
            # This process is being ended: what is done is kept, what is not begun goes back.
            # The first of these is the one in hand: whoever interrupted it has said what becomes of it.
            self._together.give_back([work for _, work in works][1:])
            raise
        self._outcomes.update(self._together.answers)
        return [
            Taken(member, message, outcome if isinstance(outcome, Outcome) else self._outcomes[number], number in left)
            for number, ((member, message), outcome) in enumerate(zip(pairs, begun, strict=True))
        ]

    def _run(self, works: deque[tuple[int, Work]], left: set[int]) -> None:
        batch = works[0][1].topic.batch if works else None
        if batch:
            self._run_batches(works, left, batch.size)
            return
        while works:
            with self._together.for_a_while() as is_time:
                while works and is_time():
                    number, work = works[0]
                    is_enough = self._enough()
                    if is_enough:
                        left.add(number)
                    # One with crashes: its next try must count, and hurt nobody else.
                    is_run = not is_enough and not work.crashes
                    ended = self._pipeline.run(work) if is_run else Settlement(work.commit(Step.RELEASED), Busy(0.0))
                    works.popleft()
                    self._together.put(number, ended)
            self._together.settle()

    def _enough(self) -> bool:
        return self._stopping() or (self.until is not None and time.monotonic() > self.until)

    def _run_batches(self, works: deque[tuple[int, Work]], left: set[int], size: int) -> None:
        # As above: their next try must count, and hurt nobody else.
        suspects = [(number, work) for number, work in works if work.crashes]
        whole = [(number, work) for number, work in works if not work.crashes]
        works.clear()
        works.extend(whole)
        self._release(suspects)
        while works:
            if self._enough():
                left.update(number for number, _ in works)
                self._release(list(works))
                works.clear()
                return
            part = [works.popleft() for _ in range(min(size, len(works)))]
            works.appendleft(part[0])  # for `give_back`, which leaves out the first: whoever interrupts it settles all
            outcomes = self._pipeline.run_batch([work for _, work in part])
            works.popleft()
            self._outcomes.update(zip((number for number, _ in part), outcomes, strict=True))

    def _release(self, works: Sequence[tuple[int, Work]]) -> None:
        if works:
            outcomes = self._pipeline.settle([Settlement(work.commit(Step.RELEASED), Busy(0.0)) for _, work in works])
            self._outcomes.update(zip((number for number, _ in works), outcomes, strict=True))


def _begin(pipeline: Pipeline, pairs: Sequence[tuple[Member, Message[Any]]]) -> list[Work | Outcome]:
    plains = [bytes(member.data) for member, _ in pairs]
    return pipeline.begin([message for _, message in pairs], plains=plains, started=False)


_Pairs = list[tuple[Member, Message[Any]]]


def _apart(pairs: _Pairs, pipeline: Pipeline) -> tuple[_Pairs, _Pairs]:
    """Return those that can be claimed at once, and those that must wait: for their id, or under their index."""
    now: _Pairs = []
    later: _Pairs = []
    ids: set[str] = set()
    indexes: set[str] = set()
    once = pipeline.once_of(pairs[0][1].topic)  # they are all of one topic
    for member, message in pairs:
        index = message.index if (message.once or once) == "index" else None
        if message.id in ids or index in indexes:
            later.append((member, message))
            continue
        now.append((member, message))
        ids.add(message.id)
        if index is not None:
            indexes.add(index)
    return now, later
