from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from watch_tasks import Message
from watch_tasks.pipeline import Pipeline
from watch_tasks.storage import Storage
from watch_tasks.testing import ManualClock
from watch_tasks.topics import Topic

from .driver import LEASE, Function
from .trouble import TroubledStorage


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def storage(clock: ManualClock) -> Iterator[TroubledStorage]:
    with TroubledStorage(clock) as storage:
        yield storage


@pytest.fixture
def pipe(storage: Storage) -> Callable[..., Pipeline]:
    """Makes a pipeline for a topic `t` with these handlers, called h0, h1, …; options are the topic's."""

    def make(
        *functions: Function, worker: str = "w", settings: dict[str, Any] | None = None, **options: Any
    ) -> Pipeline:
        topic: Topic[Any] = Topic("t", **options)
        for number, function in enumerate(functions):
            topic.handler(name=f"h{number}")(function)
        return Pipeline(storage, {"t": topic}.get, worker=worker, lease=LEASE, **(settings or {}))

    return make


@pytest.fixture
def noting(storage: TroubledStorage) -> Callable[[str], Function]:
    """Makes a handler that notes its call between those of the storage."""

    def make(name: str) -> Function:
        def handler(message: Message[Any]) -> None:
            storage.log.append(f"{name} runs")

        return handler

    return make
