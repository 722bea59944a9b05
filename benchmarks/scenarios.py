"""What is measured. A scenario has a line for each contender in each of its pools."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from .contenders import CONTENDERS, WATCH_BULK, Contender, Pool

KIB = 1024


class Kind(StrEnum):
    """How it is measured; each is a function of `measure`."""

    SEND = "send"  #: messages a second that one process sends
    HANDLE = "handle"  #: messages a second that workers take from a full queue
    LATENCY = "latency"  #: from send to handled, at a rate
    MEMORY = "memory"  #: of all processes of the workers


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One table of the report."""

    name: str
    title: str
    kind: Kind
    #: What stands below the title.
    text: str = ""
    #: Which of a contender's pools: one, two, hundred; None where no worker runs.
    pools: str | None = None
    work: str = "noop"
    #: Bytes beside the number that each message carries.
    payload: int = 0
    in_bulk: bool = False
    #: Whether only the first of a contender's pools is measured.
    only_first_pool: bool = False
    #: Whether our messages are measured once more as sent in bulk.
    with_bulk: bool = False
    #: How many messages of those are handled in one measurement at least.
    least_in_bulk: int = 0
    #: Messages of the first round, which is not counted, and at most of any other.
    first: int = 1000
    most: int = 300_000

    def lines(self, names: Iterable[str]) -> Iterator[Line]:
        """Yield the lines of those contenders."""
        for contender in CONTENDERS:
            if contender.name not in names or (contender is WATCH_BULK and not self.with_bulk):
                continue
            pools = getattr(contender, self.pools) if self.pools else (None,)
            for pool in pools[:1] if self.only_first_pool else pools:
                yield Line(self, contender, pool)


@dataclass(frozen=True)
class Line:
    """What one measurement is of."""

    scenario: Scenario
    contender: Contender
    pool: Pool | None

    @property
    def where(self) -> str:
        """Return what the report names the pool by; without workers, how it is sent."""
        if self.pool:
            return self.pool.label
        return self.contender.bulk if self.scenario.in_bulk else "one process, one by one"

    @property
    def least(self) -> int:
        """Return how many messages are handled in one measurement at least."""
        return max(self.contender.least, self.scenario.least_in_bulk if self.contender is WATCH_BULK else 0)

    def __str__(self) -> str:
        return f"{self.scenario.name}: {self.contender.name} ({self.where})"


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        name="send",
        title="Send, one by one",
        kind=Kind.SEND,
        text="One process sends messages one after the other; each send returns when the server has the message.",
    ),
    Scenario(
        name="send-bulk",
        title="Send, in bulk",
        kind=Kind.SEND,
        text="One process sends an iterable in the best way the library itself has for many.",
        in_bulk=True,
        first=2000,
    ),
    Scenario(
        name="handle-one",
        title="Handle a no-op, one process",
        kind=Kind.HANDLE,
        text="Workers take messages that need nothing done from a full queue.",
        pools="one",
    ),
    Scenario(
        name="handle-two",
        title="Handle a no-op, two processes",
        kind=Kind.HANDLE,
        text=(
            "The same with two processes. Nobody else has messages in bulk, so what `send_many` sent is compared with "
            "the single messages of the others."
        ),
        pools="two",
        with_bulk=True,
        first=2000,
    ),
    Scenario(
        name="io",
        title="1 ms of I/O, a hundred at a time",
        kind=Kind.HANDLE,
        text=(
            "Each message sleeps for a millisecond, in one process that handles a hundred at a time where it can. "
            "Nobody else has messages in bulk, so what `send_many` sent is compared with the single messages of the "
            "others: a hundred packets at a time, the messages of each one after the other."
        ),
        pools="hundred",
        work="io",
        with_bulk=True,
        # Two full packets for each thread.
        least_in_bulk=100_000,
    ),
    Scenario(
        name="cpu",
        title="1 ms of computing, two processes",
        kind=Kind.HANDLE,
        text=(
            "Each message takes a millisecond of processor time. Two processes that did nothing else, on two cores, "
            "would handle 2,000 messages a second: the efficiency is what part of that is reached. What `send_many` "
            "sent is compared with the single messages of the others, as above."
        ),
        pools="two",
        work="cpu",
        with_bulk=True,
        first=600,
    ),
    Scenario(
        name="payload-1k",
        title="Payload of 1 KiB, one process",
        kind=Kind.HANDLE,
        text="A no-op, with 1 KiB in each message.",
        pools="one",
        payload=KIB,
    ),
    Scenario(
        name="payload-100k",
        title="Payload of 100 KiB, one process",
        kind=Kind.HANDLE,
        text="A no-op, with 100 KiB in each message.",
        pools="one",
        payload=100 * KIB,
        first=300,
        most=3000,
    ),
    Scenario(
        name="latency",
        title="Latency from send to handled, one process",
        kind=Kind.LATENCY,
        pools="one",
    ),
    Scenario(
        name="memory",
        title="Memory, two processes",
        kind=Kind.MEMORY,
        text=(
            "Proportional set size of all processes of the workers, main processes too: what they share counts once. "
            "Idle is after a hundred messages; growth is from half of the messages to all of them."
        ),
        pools="two",
        only_first_pool=True,
    ),
)
