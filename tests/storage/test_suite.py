"""The suite itself: it fails a wrong storage, and no storage is without it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from watch_tasks.storage import _SCHEMES, open_storage
from watch_tasks.testing import ManualClock, StorageSuite

from .wrong import CheckThenWriteStorage

_URLS = {
    "memory": "memory://",
    "redis": "redis://localhost/0",
    "rediss": "rediss://localhost/0",
    "redis+socket": "redis+socket:///run/redis.sock",
    "unix": "unix:///run/redis.sock",
    "sentinel": "sentinel://localhost/0?master_name=main",
    "sqlite": "sqlite:///watch.db",
    "postgresql": "postgresql://localhost/watch",
}


@pytest.mark.parametrize(
    "race",
    [
        StorageSuite.test_of_many_that_claim_a_message_at_once_one_is_granted,
        StorageSuite.test_of_many_that_claim_an_index_at_once_one_is_granted,
    ],
)
def test_a_storage_that_checks_and_then_writes_fails_the_suite(race: object) -> None:
    storage = CheckThenWriteStorage(clock=ManualClock())

    with pytest.raises(AssertionError):
        race(StorageSuite(), storage)  # type: ignore[operator]


def test_alone_it_looks_right() -> None:
    suite, storage = StorageSuite(), CheckThenWriteStorage(clock=ManualClock())

    suite.test_once_message_holds_no_index(storage)
    suite.test_a_released_index_is_free(CheckThenWriteStorage(clock=ManualClock()))


@pytest.mark.parametrize("scheme", _SCHEMES)
def test_each_scheme_opens_a_storage_that_has_a_suite(scheme: str) -> None:
    for path in Path(__file__).parent.glob("test_*.py"):
        import_module(f"{__package__}.{path.stem}")
    tested = {getattr(suite, "backend", None) for suite in _descendants(StorageSuite)}

    with open_storage(_URLS[scheme]) as storage:
        assert type(storage) in tested


def _descendants(suite: type) -> set[type]:
    return {suite, *(deeper for child in suite.__subclasses__() for deeper in _descendants(child))}
