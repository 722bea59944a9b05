"""The storage suite: who may publish a dead letter again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from msgspec.structs import replace

from ..storage.base import Storage
from ..storage.protocol import Claim, Refusal, Replay, Replayed, Step
from .clock import ManualClock
from .storage_values import TOPIC, ask, grant, handle, refusal, settle, unclaimed

__all__ = ["ReplayPromises"]


class ReplayPromises:
    """Protocol §6."""

    def test_a_replay_is_told_its_copy_and_the_letter_stays_until_that_is_claimed(self, storage: Storage) -> None:
        _bury(storage)

        answer = _replay(storage)

        assert answer == (Replayed.ACCEPTED, 1)
        assert storage.dead_get("m1") is not None
        grant(storage, ask(copy=1))
        assert storage.dead_get("m1") is None

    def test_a_replaying_message_is_still_a_duplicate_as_the_copy_that_died(self, storage: Storage) -> None:
        _bury(storage)
        _replay(storage)

        assert refusal(storage, ask()) is Refusal.DUPLICATE

    def test_of_many_that_replay_at_once_one_wins(self, storage: Storage) -> None:
        _bury(storage)

        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: _replay(storage)[0], range(8)))

        assert sorted(answers) == [Replayed.ACCEPTED] + [Replayed.TAKEN] * 7

    def test_a_replay_that_was_never_published_is_repeated_as_the_same_copy(
        self, storage: Storage, clock: ManualClock
    ) -> None:
        _bury(storage)
        _replay(storage)
        clock.advance(59)
        within = _replay(storage)
        clock.advance(1)

        assert (within, _replay(storage)) == ((Replayed.TAKEN, 0), (Replayed.ACCEPTED, 1))

    def test_what_is_not_listed_is_gone(self, storage: Storage) -> None:
        _bury(storage)
        _replay(storage)
        grant(storage, ask(copy=1))

        assert storage.replay_many([Replay(id="m1"), Replay(id="none")]) == [(Replayed.GONE, 0)] * 2

    def test_an_overtaken_message_is_replayed_only_by_force(self, storage: Storage) -> None:
        _bury(storage)
        handle(storage, "m2")

        refused = _replay(storage)

        assert refused == (Replayed.NEWER, 0)
        assert _replay(storage, force=True) == (Replayed.ACCEPTED, 1)

    def test_a_message_that_was_never_claimed_is_replayed(self, storage: Storage) -> None:
        assert storage.commit(unclaimed(Step.DEAD))

        assert _replay(storage) == (Replayed.ACCEPTED, 1)

    def test_a_replay_that_dies_unread_may_be_replayed_again_at_once(self, storage: Storage) -> None:
        assert storage.commit(unclaimed(Step.DEAD))
        _replay(storage)
        assert storage.commit(replace(unclaimed(Step.DEAD), copy=1))

        assert _replay(storage) == (Replayed.ACCEPTED, 2)

    def test_a_letter_that_is_removed_while_it_replays_is_not_written_again_for_the_copy_that_died(
        self, storage: Storage
    ) -> None:
        assert storage.commit(unclaimed(Step.DEAD))
        _replay(storage)
        storage.dead_remove("m1")

        assert storage.commit(unclaimed(Step.DEAD))

        assert storage.dead_get("m1") is None

    def test_the_story_tells_who_replayed(self, storage: Storage) -> None:
        claim = _bury(storage)
        storage.replay_many([Replay(id="m1", note=b'{"by":"ann"}')])

        told = list(storage.explain(TOPIC, claim.index))

        assert (told[-1].event, told[-1].by) == ("replayed", "ann")


def _bury(storage: Storage) -> Claim:
    claim = ask()
    assert storage.commit(settle(Step.DEAD, claim, grant(storage, claim)))
    return claim


def _replay(storage: Storage, *, force: bool = False) -> tuple[Replayed, int]:
    return storage.replay_many([Replay(id="m1", force=force)])[0]
