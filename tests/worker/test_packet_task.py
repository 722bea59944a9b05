"""The task of packets, called in this process."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from celery import Celery
from celery.exceptions import Reject

from watch_tasks import Reason, Topic
from watch_tasks.packets import Member, Packet
from watch_tasks.queue import bulk
from watch_tasks.registry import registry
from watch_tasks.storage import Storage
from watch_tasks.testing import ManualClock
from watch_tasks.worker.bulk import PacketTask, register_packets
from watch_tasks.worker.runtime import runtime_of

from ..pipeline.trouble import TroubledStorage


@pytest.fixture
def storage() -> TroubledStorage:
    return TroubledStorage(ManualClock())


@pytest.fixture
def run(storage: Storage) -> Callable[[bytes], str]:
    """Runs a body as the task would, in a worker that is asked to stop."""
    app = Celery("here", broker="memory://", set_as_current=False)
    register_packets(app)
    topic: Topic[object] = Topic("t")
    topic.handler(name="h")(lambda message: None)
    registry.add(topic, __name__)
    runtime = runtime_of(app)
    runtime.__dict__["storage"] = storage
    runtime.shared.stop()
    task = app.tasks[PacketTask.name]

    def call(raw: bytes) -> str:
        task.push_request(id="p", delivery_info={})
        try:
            return str(task.run(raw))
        finally:
            task.pop_request()

    return call


def test_one_that_cannot_be_buried_before_the_stop_comes_again(
    run: Callable[[bytes], str], storage: TroubledStorage
) -> None:
    """It is no message, so no copy can carry it: acked with its packet, it would be nowhere."""
    raw = bulk.body(Packet("t", [Member("", "", msgspec.Raw(b"1"))]))
    storage.away = {"dead"}
    with pytest.raises(Reject) as raised:
        run(raw)
    assert raised.value.requeue

    storage.away = set()
    assert run(raw) == "1 dead"
    assert [letter.raw for letter in storage.dead()] == [b"1"]


def test_what_is_no_packet_is_not_asked_for_again_and_again(
    run: Callable[[bytes], str], storage: TroubledStorage
) -> None:
    assert run(b"7") == "1 dead"
    assert [(letter.reason, letter.raw) for letter in storage.dead()] == [(Reason.MALFORMED, b"7")]
