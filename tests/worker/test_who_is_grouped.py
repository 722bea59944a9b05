"""Which messages go to a child of the prefork pool together, and what the main process makes of how that ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError
from celery import Celery
from celery.app import trace
from celery.local import Proxy

from watch_tasks import Message
from watch_tasks.registry import registry
from watch_tasks.storage import open_storage
from watch_tasks.topics import Topic
from watch_tasks.worker import grouped
from watch_tasks.worker.appetite import Appetite
from watch_tasks.worker.batches import Batch
from watch_tasks.worker.grouped import ALONE
from watch_tasks.worker.groups import Groups
from watch_tasks.worker.request import TopicRequest
from watch_tasks.worker.runtime import runtime_of
from watch_tasks.worker.shared import Shared
from watch_tasks.worker.task import register


class Asked:
    """A request, as far as it matters here."""

    is_over = is_unclaimed = False

    def __init__(self, type: str, size: int = 10, is_revoked: bool = False) -> None:
        self.type, self.id, self.body = type, f"{type}{id(self)}", b"x" * size
        self.request_dict: dict[str, object] = {}
        self.content_type = self.content_encoding = "x"
        self.batch: object = None
        self._apply_result: object = None
        self._is_revoked = is_revoked

    def revoked(self) -> bool:
        return self._is_revoked

    def read(self) -> object:
        return Message(0, self.type)

    def put_back(self) -> None: ...

    def given_back(self) -> None: ...

    def lost(self, error: object, crashes: int) -> None: ...

    def on_accepted(self, *_: object) -> None: ...

    def on_success(self, answer: object) -> None: ...

    def settled(self, outcome: object, answer: object) -> None: ...


class Pool:
    """A pool that keeps what it is given."""

    def __init__(self, num_processes: int) -> None:
        self.num_processes = num_processes
        self.jobs: list[list[str]] = []
        self.callbacks: list[dict[str, Callable[..., None]]] = []

    def apply_async(
        self, run: object, args: tuple[list[tuple[str, object]], object], **callbacks: Callable[..., None]
    ) -> None:
        self.jobs.append([name for name, _ in args[0]])
        self.callbacks.append(callbacks)

    def end(self, job: int, seconds: float) -> None:
        self.callbacks[job]["accept_callback"](1, 0.0)
        self.callbacks[job]["callback"]([((0, "handled", seconds), None)] * len(self.jobs[job]))

    def lose(self, job: int) -> None:
        try:
            raise WorkerLostError
        except WorkerLostError:
            self.callbacks[job]["error_callback"](ExceptionInfo())


def groups_of(pool: Pool) -> Groups:
    app = Celery("here", broker="memory://", set_as_current=False)
    runtime = runtime_of(app)
    runtime.__dict__["storage"] = open_storage("memory://")
    return Groups(runtime, pool, Appetite(lambda: None))  # type: ignore[arg-type]


def add(groups: Groups, *requests: Asked) -> None:
    for request in requests:
        groups.add(request)  # type: ignore[arg-type]
    groups._turn()


def test_who_is_not_known_goes_alone_and_those_behind_wait() -> None:
    pool = Pool(2)
    groups = groups_of(pool)

    add(groups, *(Asked("job") for _ in range(10)))
    assert pool.jobs == [["job"], ["job"]]

    pool.end(0, 0.0001)
    assert [len(job) for job in pool.jobs] == [1, 1, 4]
    pool.end(1, 0.0001)
    assert [len(job) for job in pool.jobs[3:]] == [2, 1], "one more than there are children: each is done in a moment"


def test_no_more_than_can_be_done_with_soon() -> None:
    pool = Pool(1)
    groups = groups_of(pool)
    add(groups, Asked("job"), *(Asked("job") for _ in range(100)))

    pool.end(0, 0.01)

    assert [len(job) for job in pool.jobs] == [1, 5, 5]


def test_a_slow_one_is_remembered_for_a_while() -> None:
    pool = Pool(1)
    groups = groups_of(pool)
    add(groups, Asked("job"))
    pool.end(0, 10.0)

    add(groups, *(Asked("job") for _ in range(20)))

    for job in range(1, 11):
        assert [len(one) for one in pool.jobs[1:]] == [1] * job
        pool.end(job, 0.0001)


def test_no_more_than_its_share_and_no_more_bytes_than_one_fetch() -> None:
    pool = Pool(4)
    groups = groups_of(pool)
    add(groups, *(Asked("job") for _ in range(4)))
    for job in range(4):
        pool.end(job, 0.0001)
    del pool.jobs[:], pool.callbacks[:]

    groups._waiting.extend(Asked("job") for _ in range(1000))  # type: ignore[misc]
    groups._turn()
    assert [len(job) for job in pool.jobs] == [100] * 5, "a fourth would be more than one may have"
    groups._waiting.clear()
    groups._waiting.extend(Asked("job", 700_000) for _ in range(8))  # type: ignore[misc]
    pool.end(0, 0.0001)
    assert [len(job) for job in pool.jobs[5:]] == [1]


def test_the_revoked_are_no_part_of_it() -> None:
    pool = Pool(1)
    groups = groups_of(pool)
    add(groups, Asked("job"))
    add(groups, Asked("job", is_revoked=True), Asked("job", is_revoked=True))

    pool.end(0, 0.0001)

    assert pool.jobs == [["job"]]


def test_one_that_cannot_be_told_as_revoked_keeps_nobody_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(1)
    groups = groups_of(pool)
    add(groups, Asked("job"))
    broken, behind = Asked("job"), Asked("job")
    monkeypatch.setattr(broken, "revoked", lambda: 1 / 0)
    add(groups, broken, behind)

    pool.end(0, 0.0001)

    assert pool.jobs == [["job"], ["job"]]


def test_one_that_cannot_be_settled_is_put_back_and_the_others_are_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(1)
    groups = groups_of(pool)
    add(groups, Asked("job"))
    broken, other = Asked("job"), Asked("job")
    told: list[str] = []
    monkeypatch.setattr(broken, "settled", lambda outcome, answer: 1 / 0)
    monkeypatch.setattr(broken, "put_back", lambda: told.append("put back"))
    monkeypatch.setattr(other, "settled", lambda outcome, answer: told.append("settled"))
    groups._waiting.extend([broken, other])  # type: ignore[list-item]
    pool.end(0, 0.0001)

    pool.end(1, 0.0001)

    assert told == ["put back", "settled"], "else it would stay in hand"
    assert not groups._groups


def test_a_crash_that_cannot_be_counted_leaves_room(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(1)
    groups = groups_of(pool)
    add(groups, Asked("job"))
    pool.end(0, 0.0001)
    add(groups, Asked("job"))
    groups._waiting.extend([Asked("job"), Asked("job")])  # type: ignore[list-item]
    pool.end(1, 0.0001)
    (group,) = groups._groups
    assert group._place
    groups._runtime.shared.tell(group._place, 1)
    monkeypatch.setattr(groups._runtime.clerk, "begin", lambda messages: 1 / 0)

    pool.lose(2)

    assert not groups._groups


def test_each_connection_that_is_lost_leaves_as_many_places_as_before() -> None:
    pool = Pool(1)
    groups = groups_of(pool)
    add(groups, Asked("job"))
    pool.end(0, 0.0001)
    for _ in range(1025):
        groups._waiting.extend([Asked("job"), Asked("job")])  # type: ignore[list-item]
        groups._turn()
        groups.let_go()

    assert groups._runtime.shared.take_place()


def test_what_the_pool_forgets_with_a_connection_leaves_room() -> None:
    pool = Pool(1)
    groups = groups_of(pool)
    add(groups, Asked("job"), Asked("job"))
    assert pool.jobs == [["job"]]

    groups.let_go()
    add(groups, Asked("other"))

    assert pool.jobs == [["job"], ["other"]]


def test_the_crash_of_a_child_that_somebody_ended_counts_against_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Billiard tells this from a crash by itself, as long as nothing comes in between."""
    pool = Pool(1)
    groups = groups_of(pool)
    add(groups, Asked("job"))
    groups._waiting.extend([Asked("job"), Asked("job")])  # type: ignore[list-item]
    pool.end(0, 0.0001)
    (group,) = groups._groups
    assert group._place
    groups._runtime.shared.tell(group._place, 1)
    counted: list[object] = []
    monkeypatch.setattr(groups._runtime.clerk, "begin", lambda messages: counted.append(messages) or [None])
    revoked = Single(Topic("t"))
    revoked.id, revoked.batch = "a", group

    revoked.terminate(pool)
    pool.lose(1)

    assert not counted
    assert not groups._groups


class Single(TopicRequest):
    """A delivery of a topic that somebody had before, or not."""

    is_new = True  # type: ignore[assignment]

    def __init__(self, topic: Topic[object], is_new: bool = True) -> None:
        self._task = SimpleNamespace(topic=topic)
        self.__dict__["is_new"] = is_new


def test_only_what_may_be_claimed_ahead_is_grouped() -> None:
    batched: Topic[object] = Topic("t")
    batched.batch_handler(size=2)(lambda messages: None)

    takes = groups_of(Pool(1)).takes
    assert takes(Single(Topic("t")))
    assert not takes(Single(Topic("t"), is_new=False))
    assert not takes(Single(Topic("t", transactional=True)))
    assert not takes(Single(Topic("t", once="none")))
    assert not takes(Single(batched))


def test_a_stop_ends_a_group_behind_what_runs_and_lets_none_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    app = Celery("here", broker="memory://", set_as_current=False)
    for module in (grouped, trace):
        monkeypatch.setattr(module, "current_app", Proxy(lambda: app))
    runtime = runtime_of(app)
    storage = runtime.__dict__["storage"] = open_storage("memory://")
    topic: Topic[object] = Topic("t")
    topic.handler(name="h")(lambda message: runtime.shared.stop())
    registry.add(topic, __name__)
    register(app, topic)
    headers = {"delivery_info": {}, "retries": 0}
    members = [("watch.t", (id, headers, [[0], {}, {}], None, None)) for id in "abc"]

    first, *rest = grouped.run_group(members, None)
    alone = grouped.run_group(members[1:2], None)

    assert first is not None
    assert first[0][1] == "'handled'"
    assert [*rest, *alone] == [ALONE] * 3
    assert [record.index for record in storage.range("t")] == ["a"]


def test_who_goes_alone_belongs_to_the_group_that_it_is_now() -> None:
    pool = Pool(1)
    groups = groups_of(pool)
    add(groups, Asked("job"))
    first, second = Asked("job"), Asked("job")
    groups._waiting.extend([first, second])  # type: ignore[list-item]
    pool.end(0, 0.0001)

    pool.callbacks[1]["callback"]([((0, "handled", 0.1), None), None])

    assert pool.jobs == [["job"], ["job", "job"], ["job"]]
    assert first.batch is None
    assert second.batch in groups._groups, "or it would be ended without a word when somebody revokes it"


def test_of_others_none_is_grouped() -> None:
    takes = groups_of(Pool(1)).takes
    assert not takes(object())
    assert not takes(Batch("t", runtime_of(Celery("here", set_as_current=False)), print))


def test_places_are_of_one_at_a_time_and_seen_by_children() -> None:
    shared = Shared()
    first, second = shared.take_place(), shared.take_place()
    assert first is not None
    assert second is not None
    assert first != second
    shared.stop()
    if os.fork() == 0:
        shared.tell(first, 7)
        shared.tell(second, 1_000_000)
        os._exit(0)
    os.wait()

    assert (shared.told(first), shared.told(second), shared.is_stopping) == (7, 1_000_000, True)
    shared.give_back(first)
    places = []
    while (place := shared.take_place()) is not None:
        places.append(place)
    assert places[-1] == first, "who had it may still tell: it is taken last"
    assert shared.told(first) == -1
    shared.go_on()
    assert not shared.is_stopping
