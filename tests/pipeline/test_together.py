"""Settlements of several messages: stored in one round trip, and in the end each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest

from watch_tasks.errors import StorageError, StorageUnavailableError
from watch_tasks.outcome import Busy
from watch_tasks.pipeline import Pipeline
from watch_tasks.storage.protocol import Commit, Step
from watch_tasks.testing.storage_values import unclaimed
from watch_tasks.together import Together, settle_each
from watch_tasks.work import Settlement

from .driver import done

Make = Callable[..., Pipeline]


class Stumbling:
    """Stores by name; a group with a bad one in it fails whole."""

    def __init__(self, *bad: str) -> None:
        self.bad = set(bad)
        self.groups: list[list[str]] = []

    def __call__(self, settlements: Sequence[Settlement]) -> list[str]:
        ids = [settlement.commit.id for settlement in settlements]
        self.groups.append(ids)
        if self.bad.intersection(ids):
            raise ValueError(", ".join(ids))
        return [f"stored {id}" for id in ids]


def settlement(id: str) -> Settlement:
    return Settlement(unclaimed(Step.DEAD, id), Busy(0.0))


def test_all_are_stored_in_one_round_trip() -> None:
    store = Stumbling()
    assert settle_each(store, [settlement("a"), settlement("b")]) == ["stored a", "stored b"]
    assert store.groups == [["a", "b"]]


def test_what_the_storage_stumbles_over_fails_alone_and_in_its_place() -> None:
    first, bad, last = settle_each(Stumbling("bad"), [settlement(id) for id in ("first", "bad", "last")])
    assert (first, last) == ("stored first", "stored last")
    assert isinstance(bad, ValueError)
    assert str(bad) == "bad"


def test_what_could_not_be_stored_is_stored_with_the_next(pipe: Make) -> None:
    store = Stumbling("a")
    together: Together[int, str] = Together(pipe(done), store)
    together.put(1, settlement("a"))
    with pytest.raises(ValueError, match="a"):
        together.settle()
    assert together.answers == []
    store.bad.clear()
    together.put(2, settlement("b"))
    together.settle()
    together.settle()
    assert together.answers == [(1, "stored a"), (2, "stored b")]
    assert store.groups == [["a"], ["a", "b"], []]


def test_what_is_put_while_others_are_stored_goes_with_the_next(pipe: Make) -> None:
    is_under_way, may_go_on = threading.Event(), threading.Event()
    store = Stumbling()

    def slow(settlements: Sequence[Settlement]) -> list[str]:
        is_under_way.set()
        assert may_go_on.wait(10)
        return store(settlements)

    together: Together[int, str] = Together(pipe(done), slow)
    together.put(1, settlement("a"))
    early = threading.Thread(target=together.settle)
    early.start()
    assert is_under_way.wait(10)
    together.put(2, settlement("b"))
    may_go_on.set()
    early.join(10)
    assert together.answers == [(1, "stored a")]
    together.settle()
    assert together.answers == [(1, "stored a"), (2, "stored b")]
    assert store.groups == [["a"], ["b"]]


@pytest.mark.parametrize("error", [StorageError, StorageUnavailableError])
def test_an_ending_process_stores_what_it_can_and_goes_on_to_end(
    pipe: Make, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    pipeline = pipe(done)
    together: Together[int, str] = Together(pipeline, Stumbling())
    stored: list[str] = []

    def commit_many(commits: Sequence[Commit]) -> list[bool]:
        ids = [commit.id for commit in commits]
        if "bad" in ids:
            raise error("bad")
        stored.extend(ids)
        return [True] * len(ids)

    monkeypatch.setattr(pipeline.storage, "commit_many", commit_many)
    for number, id in enumerate(("first", "bad", "last")):
        together.put(number, settlement(id))

    together.give_back([])

    assert stored == (["first", "last"] if error is StorageError else [])
