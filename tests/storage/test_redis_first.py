"""Messages at their first try go a short way on Redis: in groups, with their story in their state and their record."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from tests.servers import RedisServer
from watch_tasks.message import Once
from watch_tasks.storage.memory import MemoryStorage
from watch_tasks.storage.protocol import Claim, Granted, Refusal, Refused, Step
from watch_tasks.storage.redis import RedisStorage
from watch_tasks.storage.redis_client import open_client
from watch_tasks.testing import ManualClock
from watch_tasks.testing.storage_values import (
    LEASE,
    TOPIC,
    ask,
    finish,
    grant,
    handle,
    kinds,
    record,
    settle,
    unclaimed,
    wait,
)
from watch_tasks.topics import DAY, WEEK

pytestmark = pytest.mark.integration


@pytest.fixture(params=["valkey", "redis_server"])
def server(request: pytest.FixtureRequest) -> RedisServer:
    found: RedisServer = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def storage(server: RedisServer, clock: ManualClock) -> Iterator[RedisStorage]:
    """One that has a record, so that its topic has an order by time."""
    with RedisStorage(open_client(server.url), clock=clock) as storage:
        handle(storage, "m0", index="order-0")
        clock.advance(1)
        yield storage


# -- in groups


@pytest.mark.parametrize("once", ["message", "index"])
@pytest.mark.parametrize("size", [1, 2, 500])
def test_a_group_takes_as_many_commands_as_one(
    server: RedisServer, storage: RedisStorage, clock: ManualClock, size: int, once: Once
) -> None:
    claims = [ask(f"m{number}", index=f"{number}", once=once) for number in range(1, size + 1)]
    before = _commands(server)

    granted = _grant_all(storage, claims)
    clock.advance(1)
    assert all(_finish_all(storage, claims, granted))

    # Leaves of 128 places take four more for each.
    assert _commands(server) - before <= 18 + 4 * (size // 128)
    assert storage.len(TOPIC) == storage.counters(TOPIC).handled == size + 1
    assert sorted(found.id for found in storage.range(TOPIC)) == sorted(["m0", *(claim.id for claim in claims)])


def test_an_index_has_no_key_of_its_own_when_its_message_is_handled(
    server: RedisServer, storage: RedisStorage, clock: ManualClock
) -> None:
    granted = grant(storage, claim := ask("m1"))
    with server.client() as client:
        assert client.get("watch:t:orders:order-1") == b"m1"
    clock.advance(1)
    finish(storage, claim, granted)

    with server.client() as client:
        assert not list(client.scan_iter("*order-1")) + list(client.scan_iter("*:m1"))
    assert kinds(storage) == ["sent", "attempt", "handled"]


def test_of_a_group_each_is_answered_alone(storage: RedisStorage, clock: ManualClock) -> None:
    """Some are in hand, done, dead, or have a story that goes on; the others do not wait for that."""
    running = grant(storage, ask("running", index="running"))
    retried = ask("retried", index="retried")
    storage.commit(settle(Step.RETRY, retried, grant(storage, retried)))
    storage.commit(unclaimed(Step.DEAD, "dead", "dead"))
    names = ["new-0", "new-1", "running", "m0", "new-2", "dead", "retried", "new-3"]
    clock.advance(1)

    answers = storage.claim_many(
        [ask(name, index="order-0" if name == "m0" else name, copy=int(name == "retried")) for name in names]
    )

    found = dict(zip(names, answers, strict=True))
    tokens = [answer.token for answer in answers if isinstance(answer, Granted)]
    assert [name for name in names if isinstance(found[name], Granted)] == [
        "new-0",
        "new-1",
        "new-2",
        "retried",
        "new-3",
    ]
    assert tokens == sorted({*tokens, running.token})[1:]
    assert {name: found[name].why for name in ("running", "m0", "dead")} == {  # type: ignore[union-attr]
        "running": Refusal.BUSY,
        "m0": Refusal.DUPLICATE,
        "dead": Refusal.DUPLICATE,
    }


def test_of_a_group_each_is_settled_alone(storage: RedisStorage, clock: ManualClock) -> None:
    claims = [ask(f"m{number}", index=f"order-{number}") for number in range(1, 7)]
    granted = _grant_all(storage, claims)
    clock.advance(LEASE + 1)
    grant(storage, ask("m2", index="order-2"))  # taken over
    storage.renew("w1", ["m3"], LEASE)
    storage.put(record("order-4", id="by hand", at=clock()))
    commits = [settle(Step.HANDLED, *pair) for pair in zip(claims, granted, strict=True)]
    commits[4] = settle(Step.RETRY, claims[4], granted[4], blob=b"p")
    clock.advance(1)

    assert storage.commit_many(commits) == [True, False, True, True, True, True]

    assert [found.id for found in storage.range(TOPIC, newest_first=False)] == ["m0", "by hand", "m1", "m3", "m6"]
    assert [kinds(storage, f"order-{number}")[-1] for number in range(1, 7)] == [
        "handled",
        "fenced",
        "handled",
        "handled",
        "retry",
        "handled",
    ]
    assert storage.commit_many(commits) == [True, False, True, True, True, True]
    assert storage.counters(TOPIC).handled == 5


@pytest.mark.parametrize("other", [{"index": "order-9"}, {"index": "order-11"}, {"topic": "other"}, {"copy": 1}])
def test_what_is_settled_under_another_name_is_settled_as_in_memory(
    storage: RedisStorage, clock: ManualClock, other: dict[str, Any]
) -> None:
    claims = [ask(f"m{number}", index=f"order-{number}") for number in range(1, 4)]
    told = []
    with MemoryStorage(clock=clock) as memory:
        for kept in (memory, storage):
            commits = [settle(Step.HANDLED, *pair) for pair in zip(claims, _grant_all(kept, claims), strict=True)]
            commits[0] = replace(commits[0], **other)

            accepted = kept.commit_many(commits)

            names = [(TOPIC, claim.index) for claim in claims] + [(commits[0].topic, commits[0].index or "")]
            records = [kept.get(*name) for name in names]
            told.append((accepted, [found and found.id for found in records], [kinds(kept, i, t) for t, i in names]))

    assert told[0] == told[1]


def test_notes_of_many_that_are_alike_come_back(storage: RedisStorage, clock: ManualClock) -> None:
    ids = [f"0123abcd-0123-4123-8123-{number:012x}" for number in range(20)]
    claims = [ask(id, index=f"order-{number}") for number, id in enumerate(ids, 1)]
    notes = [
        tuple((kind, b'{"id":"%b","copy":0,"kind":"%b"}' % (id.encode(), kind.encode())) for kind in "ab") for id in ids
    ]
    granted = _grant_all(storage, claims)
    clock.advance(1)
    commits = [
        replace(settle(Step.HANDLED, *pair), digest=f"{number:032x}", notes=notes[number])
        for number, pair in enumerate(zip(claims, granted, strict=True))
    ]

    assert all(storage.commit_many(commits))

    for number, claim in enumerate(claims):
        found = storage.get(TOPIC, claim.index)
        assert found
        assert (found.id, found.digest) == (ids[number], commits[number].digest)
        assert [event[2] for event in storage._story(TOPIC, claim.index)] == [
            claim.note,
            claim.note,
            *(note for _, note in notes[number]),
        ]


def test_topics_retentions_and_workers_may_differ_in_one_request(storage: RedisStorage, clock: ManualClock) -> None:
    claims = [
        ask(
            f"m{number}",
            index=f"{number}",
            topic=f"topic-{number % 3}",
            retention=WEEK * (1 + number % 2),
            worker=f"w{number % 5}",
        )
        for number in range(1, 61)
    ]
    for part in (claims[:30], claims[30:]):
        granted = _grant_all(storage, part)
        clock.advance(1)
        assert all(_finish_all(storage, part, granted))

    assert [storage.len(f"topic-{number}") for number in range(3)] == [20, 20, 20]
    assert sorted(int(found.index) for found in storage.range("topic-1")) == list(range(1, 61, 3))
    clock.advance(WEEK)
    assert [storage.len(f"topic-{number}") for number in range(3)] == [10, 10, 10]


def test_an_index_in_the_short_form_is_held(storage: RedisStorage, clock: ManualClock) -> None:
    claim = ask("m1", once="index")
    granted = grant(storage, claim)
    other = ask("m2", once="index", digest="d2", worker="w2")

    assert wait(storage, other) == LEASE
    clock.advance(LEASE)
    taken = grant(storage, other)
    assert storage.renew("w1", ["m1"], LEASE) == set()
    assert not storage.commit(settle(Step.HANDLED, claim, granted))
    finish(storage, other, taken)
    assert kinds(storage) == ["sent", "attempt", "busy", "sent", "attempt", "fenced", "handled"]


def test_a_handled_index_is_held_no_longer(server: RedisServer, storage: RedisStorage, clock: ManualClock) -> None:
    claims = [ask(f"m{number}", index=f"{number}", once="index") for number in range(3)]
    granted = _grant_all(storage, claims)
    clock.advance(1)
    _finish_all(storage, claims, granted)

    with server.client() as client:
        assert not list(client.scan_iter("watch:h:*"))
    again = [
        replace(claim, id="other", digest=digest) for claim, digest in zip(claims, ("d1", "d2", "d1"), strict=True)
    ]
    assert [answer.why for answer in storage.claim_many(again)] == [  # type: ignore[union-attr]
        Refusal.DUPLICATE,
        Refusal.CONFLICT,
        Refusal.DUPLICATE,
    ]


@pytest.mark.parametrize("ahead", [0, 5])
def test_what_is_handled_before_the_last_is_listed_before_it(
    storage: RedisStorage, clock: ManualClock, ahead: int
) -> None:
    """As after an import from a server whose clock was ahead."""
    claims = [ask(f"m{number}", index=f"a-{number}") for number in range(1, 4)]
    granted = _grant_all(storage, claims)
    clock.advance(1)
    storage.put(record("b", id="ahead", at=clock() + ahead), retention=WEEK)
    _finish_all(storage, claims, granted)

    assert [found.id for found in storage.range(TOPIC, newest_first=False)] == ["m0", "m1", "m2", "m3", "ahead"]


@pytest.mark.parametrize("twice", ["id", "index"])
def test_what_is_twice_in_a_group_is_settled_one_after_the_other(storage: RedisStorage, twice: str) -> None:
    claims = [ask("m1", index="a"), ask("m1" if twice == "id" else "m2", index="a" if twice == "index" else "b")]

    first, second = storage.claim_many(claims)

    assert isinstance(first, Granted)
    assert isinstance(second, Refused) == (twice == "id")
    assert kinds(storage, "a")[:2] == ["sent", "attempt"]


# -- the short form


def test_a_lease_in_the_short_form_is_renewed(server: RedisServer, storage: RedisStorage, clock: ManualClock) -> None:
    claims = [ask(f"m{number}", index=f"{number}", worker=f"w{number % 2}") for number in range(1, 5)]
    granted = _grant_all(storage, claims)
    clock.advance(LEASE - 1)

    assert storage.renew("w1", ["m1", "m2", "m3", "m0", "unknown"], LEASE) == {"m1", "m3"}

    with server.client() as client:
        assert client.get("watch:t:orders:1") == b"m1"
    clock.advance(2)
    assert wait(storage, ask("m1", index="1", worker="w2")) == LEASE - 2
    assert isinstance(storage.claim(ask("m2", index="2", worker="w2")), Granted)
    assert storage.commit_many([settle(Step.HANDLED, *pair) for pair in zip(claims, granted, strict=True)]) == [
        True,
        False,
        True,
        True,
    ]


def test_an_id_with_a_mark_is_a_duplicate_under_any_index(storage: RedisStorage, clock: ManualClock) -> None:
    handle(storage, "m1")
    storage.remove(TOPIC, "order-1")
    clock.advance(1)

    answers = storage.claim_many([ask("new", index="new"), ask("m1", index="order-2")])

    assert isinstance(answers[0], Granted)
    assert answers[1] == Refused(Refusal.DUPLICATE)
    assert storage.claim(ask("m1", index="order-3")) == Refused(Refusal.DUPLICATE)


def test_an_old_token_settles_nothing(storage: RedisStorage, clock: ManualClock) -> None:
    claim = ask("m1")
    old = handle(storage, "m1", retention=60)
    clock.advance(60)
    storage.tend()
    handle(storage, "m2", index="order-2")
    clock.advance(1)
    granted = grant(storage, claim)
    clock.advance(1)

    assert not storage.commit(settle(Step.HANDLED, claim, old))
    assert storage.get(TOPIC, "order-1") is None
    finish(storage, claim, granted)


def test_asked_again_it_is_the_same_grant(storage: RedisStorage, clock: ManualClock) -> None:
    claims = [ask(f"m{number}", index=f"{number}", nonce=f"n{number}", copy=number) for number in range(1, 4)]
    granted = _grant_all(storage, claims)
    clock.advance(1)

    assert [(one.token, one.copy) for one in _grant_all(storage, claims)] == [(one.token, one.copy) for one in granted]


@pytest.mark.parametrize("started", [True, False])
def test_only_a_started_one_counts_as_crashed(storage: RedisStorage, started: bool) -> None:
    grant(storage, ask("m1", started=started))

    assert storage.release("w2", ["m1"], crashed=True) == [0]
    assert storage.release("w1", ["m1"], crashed=True) == [started]


@pytest.mark.parametrize(
    "id", ["m1", "0123abcd-0123-4123-8123-0123456789ab", "0123ABCD-0123-4123-8123-0123456789AB", '\u00df"', "x" * 300]
)
@pytest.mark.parametrize("copy", [0, 7, 2**31 + 1])
def test_notes_of_any_form_come_back(storage: RedisStorage, clock: ManualClock, id: str, copy: int) -> None:
    notes = [
        b'{"id":"%b","copy":%d,"worker":"w"}' % (id.encode(), copy),
        b'{"copy":1}',
        b"{}",
        b'{"id":"' + b"y" * 40_000,
    ]
    for number, note in enumerate(notes):
        claim = replace(ask(id, index=f"i{number}", copy=copy), note=note, id=f"{id}{number}" if number else id)
        granted = grant(storage, claim)
        commit = replace(settle(Step.HANDLED, claim, granted), notes=(("handler", note), ("handled", notes[0])))
        clock.advance(1)
        expected = [(kind, note) for kind in ("sent", "attempt")]
        assert [event[1:] for event in storage._story(TOPIC, f"i{number}")] == expected
        assert storage.commit(commit)
        clock.advance(1)

        assert [event[1:] for event in storage._story(TOPIC, f"i{number}")] == [*expected, *commit.notes]
        assert storage.get(TOPIC, f"i{number}")


@pytest.mark.parametrize("text", ["x" * 512, "\u00df" * 512, "a:b%c"])
def test_any_index_worker_and_nonce_will_do(storage: RedisStorage, clock: ManualClock, text: str) -> None:
    claim = ask("m1", index=text, worker=text * 50, nonce=text * 50)
    granted = grant(storage, claim)
    clock.advance(1)

    assert storage.renew(claim.worker, ["m1"], LEASE) == {"m1"}
    finish(storage, claim, granted)

    assert [found.index for found in storage.range(TOPIC)] == [text, "order-0"]
    assert kinds(storage, text) == ["sent", "attempt", "handled"]


# -- the story goes on


def test_a_record_written_by_hand_does_not_lose_what_is_in_hand(storage: RedisStorage, clock: ManualClock) -> None:
    granted = grant(storage, claim := ask("m1"))
    storage.commit(unclaimed(Step.HANDLED, "m2"))  # under the same index, without an event
    clock.advance(1)

    finish(storage, claim, granted)

    assert kinds(storage) == ["sent", "attempt", "handled"]
    assert storage.get(TOPIC, "order-1").id == "m2"  # type: ignore[union-attr]  # claimed later
    assert not isinstance(storage.claim(ask("m1")), Granted)
    assert not isinstance(storage.claim(ask("m2")), Granted)


@pytest.mark.parametrize("how", ["handled", "put", "removed", "none"])
def test_a_replaced_record_leaves_its_story(storage: RedisStorage, clock: ManualClock, how: str) -> None:
    for name, index in (("m1", "order-1"), ("x", "x")):
        granted = grant(storage, claim := ask(name, index=index))
        clock.advance(1)
        finish(storage, claim, granted)
    clock.advance(1)
    told = ["sent", "attempt", "handled"]
    match how:
        case "handled":
            handle(storage, "m2")
            expected = [*told, *told]
        case "put":
            storage.put(record("order-1", id="m2", at=clock()))
            expected = told
        case "removed":
            storage.remove(TOPIC, "order-1")
            expected = [*told, "removed"]
        case _:
            expected = told

    assert kinds(storage) == expected
    assert not isinstance(storage.claim(ask("m1")), Granted)
    assert kinds(storage) == [*expected, "suppressed"]
    clock.advance(WEEK - 1)
    storage.tend()
    assert kinds(storage) == [*expected, "suppressed"]
    clock.advance(1)
    assert kinds(storage) == []


def test_a_story_is_kept_as_long_as_its_record_at_least(storage: RedisStorage, clock: ManualClock) -> None:
    granted = grant(storage, claim := ask("m1"))
    clock.advance(1)
    finish(storage, claim, granted)
    storage.claim(replace(claim, retention=DAY))

    clock.advance(DAY * 2)
    storage.claim(replace(claim, retention=DAY))
    clock.advance(WEEK - DAY * 2 - 1)
    assert kinds(storage) == ["sent", "attempt", "handled", "suppressed", "suppressed"]
    clock.advance(1)
    assert kinds(storage) == []


def test_the_newest_200_events_are_told(storage: RedisStorage, clock: ManualClock) -> None:
    granted = grant(storage, claim := ask("m1"))
    clock.advance(1)
    finish(storage, claim, granted)
    for _ in range(198):
        storage.claim(claim)

    assert kinds(storage) == ["attempt", "handled", *["suppressed"] * 198]
    storage.remove(TOPIC, "order-1")
    assert kinds(storage) == ["handled", *["suppressed"] * 198, "removed"]


def test_a_story_that_is_over_does_not_come_back(storage: RedisStorage, clock: ManualClock) -> None:
    granted = grant(storage, claim := ask("m1"))
    clock.advance(1)
    finish(storage, claim, granted)
    clock.advance(WEEK)  # over, and not trimmed

    assert kinds(storage) == []
    assert isinstance(storage.claim(ask("m2")), Granted)
    assert kinds(storage) == ["sent", "attempt"]
    storage.remove(TOPIC, "order-1")
    assert kinds(storage) == ["sent", "attempt"]


def test_a_handled_message_takes_few_bytes_with_its_story(server: RedisServer) -> None:
    with RedisStorage(open_client(server.url)) as storage, server.client() as client:

        def some(first: int, count: int) -> None:
            for start in range(first, first + count, 100):
                claims = [
                    ask(f"0123abcd-0123-4123-8123-{number:012d}", index=f"order-{number:018d}", digest=f"{number:032x}")
                    for number in range(start, start + 100)
                ]
                assert all(_finish_all(storage, claims, _grant_all(storage, claims)))

        some(0, 2_000)
        before = client.info("memory")["used_memory"]
        some(2_000, 10_000)
        slope = (client.info("memory")["used_memory"] - before) / 10_000

    assert slope <= 400


def _grant_all(storage: RedisStorage, claims: list[Claim]) -> list[Granted]:
    answers = storage.claim_many(claims)
    assert all(isinstance(answer, Granted) for answer in answers)
    return answers  # type: ignore[return-value]  # by the line above


def _finish_all(storage: RedisStorage, claims: list[Claim], granted: list[Granted]) -> list[bool]:
    commits = [settle(Step.HANDLED, *pair, retention=pair[0].retention) for pair in zip(claims, granted, strict=True)]
    return storage.commit_many(commits)


def _commands(server: RedisServer) -> int:
    """Return how many commands the server executed, those of scripts among them."""
    with server.client() as client:
        stats = client.info("commandstats")
    return sum(
        found["calls"] for name, found in stats.items() if name not in ("cmdstat_info", "cmdstat_config|resetstat")
    )


def test_a_state_that_somebody_removed_by_hand_is_no_story_and_stops_nobody(
    server: RedisServer, storage: RedisStorage
) -> None:
    claims = [ask("m1", index="order-1"), ask("m2", index="order-2")]
    storage.claim_many(claims)
    with server.client() as client:
        assert client.delete("watch:s:m1") == 1

    assert kinds(storage, "order-1") == []
    granted = storage.claim(ask("m1", index="order-1", worker="other"))
    assert isinstance(granted, Granted)
    assert kinds(storage, "order-1")[-1] == "attempt"
