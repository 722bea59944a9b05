"""The threads pool's share of the work: who takes what, and who may be in whose company."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from watch_tasks.company import Company
from watch_tasks.errors import StorageError
from watch_tasks.message import Message
from watch_tasks.outcome import Handled, Outcome
from watch_tasks.storage.protocol import Commit, Step
from watch_tasks.topics import Topic
from watch_tasks.work import Progress, Settlement, Work
from watch_tasks.worker.hand import Hand
from watch_tasks.worker.threads import ThreadsGathering

from ..servers import RedisServer
from ..workers import Site, until
from .packets import members, send_packet
from .test_gathering import in_hand

MakeSite = Callable[..., Site]


class Pipeline:
    """Claims nothing ahead that takes a while, and stores when it is let."""

    def __init__(self) -> None:
        self.topic: Topic[Any] = Topic("t")
        self.company = Company()
        self.go = threading.Event()
        self.error: StorageError | None = None

    def begin_ahead(self, messages: Sequence[Message[Any]]) -> list[Work]:
        return [Work(self.topic, message, None, b"null", "", "w", Progress()) for message in messages]

    def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        assert self.go.wait(10)
        if self.error:
            raise self.error
        return [settlement.outcome for settlement in settlements]


class Request:
    """A delivery whose handler does nothing."""

    is_new = True

    def __init__(self, number: int) -> None:
        self.id = str(number)
        self.hand = Hand(Message("t", number))
        self.answers: list[Outcome | Exception] = []

    def hold(self) -> None:
        """Its lease is nobody's concern."""

    def start(self, pool: Any, ended: Callable[[Any], object]) -> None:
        commit = Commit(step=Step.HANDLED, topic="t", index=self.id, id=self.id, copy=0, token=1)
        self.hand.settlement = Settlement(commit, Handled(0.0))
        ended("answer")

    def settled(self, outcome: Outcome | Exception, answer: Any) -> None:
        self.answers.append(outcome)


class Pool:
    """Has a thread for each."""

    limit = 4

    def apply_async(self, target: Callable[[], None], *, callback: Any) -> None:
        threading.Thread(target=target).start()


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline()


@pytest.fixture
def gathering(pipeline: Pipeline) -> ThreadsGathering:
    runtime: Any = SimpleNamespace(worker="w", pipeline=lambda worker, can_die: pipeline, is_stopping=lambda: False)
    pool: Any = Pool()
    return ThreadsGathering(runtime, pool)


def run(gathering: Any, *requests: Request) -> None:
    """Give it these, and the turns in which it claims them and finds threads for them."""
    for request in requests:
        gathering.add(request)
    gathering._turn()
    if gathering._claiming:
        gathering._claiming.answer.result(10)
    gathering._turn()


def test_who_is_to_be_alone_waits_until_what_the_others_did_is_recorded(
    gathering: ThreadsGathering, pipeline: Pipeline
) -> None:
    """It may take the worker down, and their effects would be repeated."""
    requests = [Request(number) for number in range(3)]
    run(gathering, *requests)
    until(lambda: all(request.hand.settlement is None for request in requests), "all are handled")

    assert not pipeline.company.enter_alone(0.2)
    assert [request.answers for request in requests] == [[], [], []], "nobody is told before"
    pipeline.go.set()
    assert pipeline.company.enter_alone(10)


@pytest.mark.parametrize("error", [None, StorageError("no such thing")])
def test_each_is_told_and_has_left_when_it_closes(
    gathering: ThreadsGathering, pipeline: Pipeline, error: StorageError | None
) -> None:
    pipeline.error = error
    pipeline.go.set()
    requests = [Request(number) for number in range(20)]
    run(gathering, *requests)
    until(lambda: all(request.answers for request in requests), "all are told")

    gathering.close()

    assert [len(request.answers) for request in requests] == [1] * 20
    assert pipeline.company.enter_alone(0)


JOB = """
job = topic("job")

@job.handler
def work(message):
    note("begin", message, data=message.data)
    if message.data == "gate":
        wait_for("open")
    note("end", message, data=message.data)
"""
MANY = "worker_prefetch_multiplier = 100\n"


@pytest.mark.worker
def test_what_came_together_runs_side_by_side(make_site: MakeSite) -> None:
    site = make_site(JOB, MANY)
    for data in ("gate", "gate", "gate", *range(10)):
        site.send("job", data)

    site.worker(pool="threads", concurrency=4)

    site.until_handled(10)
    assert site.calls() == {"begin": 13, "end": 10}
    site.touch("open")
    site.until_handled(13)


@pytest.mark.worker
def test_a_packet_does_not_wait_for_all_singles_in_hand(make_site: MakeSite, valkey: RedisServer) -> None:
    site = make_site(JOB, MANY)
    for data in ("gate", *range(20)):
        site.send("job", data)
    site.worker(pool="threads", concurrency=1)
    until(lambda: site.calls()["begin"] == 1, "the first one's handler runs")

    send_packet(site, members("job", ["packed"]))
    until(lambda: in_hand(valkey) == 22, "the packet is in hand too")
    site.touch("open")

    site.until_handled(22)
    begun = [line["data"] for line in site.lines() if line["handler"] == "begin"]
    assert begun.index("packed") <= 3, begun
