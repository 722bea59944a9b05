"""`watch-tasks dead`, `explain`, `topics` and `check`: what is told of messages and of the whole."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from celery import Celery
from kombu.simple import SimpleQueue

from watch_tasks import Attempt, DeadLetter, Message, Reason, Record, SendUnknownError, topic
from watch_tasks.cli import replay
from watch_tasks.cli.check import mask
from watch_tasks.storage import Storage
from watch_tasks.storage.protocol import Commit, Replay, Replayed, Step
from watch_tasks.worker.outlet import CeleryOutlet

from ..servers import RedisServer
from ..workers import Site
from .conftest import Order, Run, lines, runner

FIELDS = [
    "id", "topic", "index", "reason", "error", "handler", "retries", "crashes", "attempts", "data", "raw",
    "content_type", "sent_at", "dead_at",
]  # fmt: skip
EVENT = ["at", "event", "topic", "index", "id", "copy", "retries", "handler", "worker", "seconds", "error", "by"]


def bury(storage: Storage, letter: DeadLetter) -> None:
    note = msgspec.json.encode({"id": letter.id, "error": letter.error})
    commit = Commit(
        step=Step.DEAD,
        topic=letter.topic or "",
        index=letter.index,
        id=letter.id,
        copy=0,
        token=None,
        blob=msgspec.json.encode(letter),
        retention=86400.0,
        notes=(("dead", note),),
    )
    assert storage.commit(commit)


@pytest.fixture
def letters(storage: Storage) -> None:
    tried = Attempt(at=datetime.now(UTC), handler="pay", error="ValueError: no \x1b[31m", seconds=0.5)
    bury(
        storage,
        DeadLetter(
            id="aaaaaaaa-1", topic="orders", index="o-1", reason=Reason.EXHAUSTED, error=tried.error, retries=1,
            attempts=(tried, tried), data={"n": 1}, handler="pay",
        ),
    )  # fmt: skip
    bury(
        storage,
        DeadLetter(id="bbbbbbbb-2", topic=None, index=None, reason=Reason.UNDECODABLE, error="Bad: x", raw=b"\xff\x1b"),
    )


@pytest.mark.usefixtures("letters")
def test_list_gives_every_field(run: Run) -> None:
    found = {line["id"]: line for line in lines(run("dead", "list", "--json"))}

    assert all(list(line) == FIELDS for line in found.values())
    assert base64.b64decode(found["bbbbbbbb-2"]["raw"]) == b"\xff\x1b"
    assert found["aaaaaaaa-1"]["reason"] == "exhausted"
    assert set(found["aaaaaaaa-1"]["attempts"][0]) == {"at", "handler", "error", "seconds"}


@pytest.mark.usefixtures("letters")
def test_table_shows_tries_and_the_last_error_without_its_control_characters(run: Run) -> None:
    printed = run("dead", "list", "--topic", "orders").stdout.splitlines()

    assert printed[1].split() == ["aaaaaaaa", "orders", "o-1", "exhausted", "2", "0s", "ValueError:", "no", "\\x1b[31m"]
    assert printed[-1] == "1 dead letter"


@pytest.mark.usefixtures("letters")
def test_letters_are_found_by_their_error(run: Run) -> None:
    assert [line["id"] for line in lines(run("dead", "list", "--error", "BAD", "--json"))] == ["bbbbbbbb-2"]


@pytest.mark.usefixtures("letters")
def test_show_takes_the_short_id_of_the_table(run: Run) -> None:
    assert lines(run("dead", "show", "aaaaaaaa", "--json"))[0]["id"] == "aaaaaaaa-1"
    shown = run("dead", "show", "bbbbbbbb").stdout
    assert "\\xff\\x1b" in shown
    assert "\x1b" not in shown
    assert run("dead", "show", "cccccccc").exit_code == 3
    assert "to 8 characters at the fewest" in run("dead", "show", "aaaa").stderr


@pytest.mark.usefixtures("letters")
def test_remove_asks_first(run: Run, storage: Storage) -> None:
    assert run("dead", "remove", "--all").exit_code == 4
    assert run("dead", "remove", "--all", "--dry-run").exit_code == 0
    assert run("dead", "remove").exit_code == 2
    assert run("dead", "remove", "--all", "aaaaaaaa").exit_code == 2

    assert len(list(storage.dead())) == 2


@pytest.mark.usefixtures("letters")
def test_remove_throws_away_what_it_names(run: Run, storage: Storage) -> None:
    assert run("dead", "remove", "aaaaaaaa", "--yes").stdout == "1 dead letter removed\n"
    assert [letter.id for letter in storage.dead()] == ["bbbbbbbb-2"]

    assert run("dead", "remove", "--error", "bad", "--yes").exit_code == 0
    assert list(storage.dead()) == []


@pytest.mark.usefixtures("letters")
def test_remove_of_what_is_not_there_has_its_code(run: Run) -> None:
    assert run("dead", "remove", "cccccccc", "--yes").exit_code == 3


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asked for a letter has it for half a second."""
    monkeypatch.setattr(replay, "PATIENCE", 0.5)
    monkeypatch.setattr(replay, "POLL", 0.05)


def queued(app: Celery) -> list[Any]:
    """Take what is in the queue out of it."""
    found = []
    with app.connection_for_read() as connection, SimpleQueue(connection, "celery") as queue, suppress(queue.Empty):  # type: ignore[no-untyped-call]
        while True:
            found.append(queue.get_nowait())
            found[-1].ack()
    return found


@pytest.mark.usefixtures("letters")
def test_replay_publishes_what_the_letter_keeps_as_its_next_copy(run: Run, app: Celery) -> None:
    result = run("dead", "replay", "aaaaaaaa", "--json")

    assert result.exit_code == 0
    (line,) = lines(result)
    assert (line["id"], line["result"], line["copy"], line["detail"]) == ("aaaaaaaa-1", "replayed", 1, None)
    (message,) = queued(app)
    assert message.payload[:2] == [[{"n": 1}], {"index": "o-1"}]
    assert (message.headers["id"], message.headers["retries"]) == ("aaaaaaaa-1", 0)
    assert message.headers["watch"]["copy"] == 1


@pytest.mark.usefixtures("letters")
def test_replay_of_many_asks_first_and_a_dry_run_changes_nothing(run: Run, storage: Storage, app: Celery) -> None:
    assert run("dead", "replay", "--all").exit_code == 4
    assert run("dead", "replay").exit_code == 2
    shown = run("dead", "replay", "--topic", "orders", "--dry-run", "--json")

    assert [line["id"] for line in lines(shown)] == ["aaaaaaaa-1"]
    assert queued(app) == []
    assert storage.replay_many([Replay(id="aaaaaaaa-1")]) == [(Replayed.ACCEPTED, 1)]


@pytest.mark.usefixtures("letters")
def test_replay_refuses_what_holds_no_message_and_goes_on(run: Run) -> None:
    alone = run("dead", "replay", "bbbbbbbb")
    assert alone.exit_code == 4
    assert "there is no message in it to handle" in alone.stderr

    together = run("dead", "replay", "--all", "--yes")
    assert together.exit_code == 5
    assert together.stdout == "1 dead letter replayed, 1 refused\n"


def test_replay_of_what_does_not_fit_its_topic_is_refused(run: Run, storage: Storage) -> None:
    topic("bills", schema=Order).handler(print)
    bury(
        storage, DeadLetter(id="b", topic="bills", index="b", reason=Reason.UNDECODABLE, error="Bad: x", data={"no": 1})
    )

    assert run("dead", "replay", "b").exit_code == 4
    assert storage.replay_many([Replay(id="b")]) == [(Replayed.ACCEPTED, 1)]


@pytest.mark.usefixtures("letters")
def test_replay_of_what_is_not_there_has_its_code(run: Run) -> None:
    assert run("dead", "replay", "cccccccc").exit_code == 3
    assert run("dead", "replay", "--topic", "none", "--yes").exit_code == 0


@pytest.mark.usefixtures("letters")
def test_replay_is_refused_where_a_newer_message_was_handled(run: Run, storage: Storage, app: Celery) -> None:
    storage.put(Record(topic="orders", index="o-1", id="newer", handled_at=datetime.now(UTC)))

    refused = run("dead", "replay", "aaaaaaaa")

    assert refused.exit_code == 4
    assert "a newer message of its index was handled; see --force" in refused.stderr
    assert queued(app) == []
    assert run("dead", "replay", "aaaaaaaa", "--force").exit_code == 0
    assert len(queued(app)) == 1


def test_replay_of_an_unknown_topic_keeps_its_bytes(run: Run, storage: Storage, app: Celery) -> None:
    raw = b'[[{"n": 1.50}], {"index": "o-7"}, {"chain": [{"task": "next"}]}]'
    bury(storage, DeadLetter(id="u", topic="late", index=None, reason=Reason.UNKNOWN_TOPIC, error="Bad: x", raw=raw))

    assert run("dead", "replay", "u").exit_code == 0

    (message,) = queued(app)
    assert message.body == raw
    assert (message.headers["task"], message.headers["id"]) == ("watch.late", "u")
    assert message.headers["watch"]["copy"] == 1


def test_replay_sends_the_oldest_first(run: Run, storage: Storage) -> None:
    for id in ("m1", "m2", "m3"):
        bury(storage, DeadLetter(id=id, topic="orders", index="o", reason=Reason.FATAL, error="Bad: x", data=1))

    assert [line["id"] for line in lines(run("dead", "replay", "--all", "--yes", "--json"))] == ["m1", "m2", "m3"]


def test_replay_goes_past_the_bound_of_a_queue(run: Run, storage: Storage, app: Celery) -> None:
    topic("narrow", max_waiting=1).handler(print)
    for id in ("m1", "m2"):
        bury(storage, DeadLetter(id=id, topic="narrow", index=id, reason=Reason.FATAL, error="Bad: x", data=1))

    assert run("dead", "replay", "--all", "--yes").exit_code == 0
    assert [message.headers["id"] for message in queued(app)] == ["m1", "m2"]


@pytest.mark.usefixtures("letters", "hurried")
def test_replay_with_a_lost_answer_is_told_and_can_be_repeated(
    run: Run, app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(_: Any, message: Message[Any], raw: bytes | None) -> None:
        raise SendUnknownError("the answer was lost", message)

    with monkeypatch.context() as patch:
        patch.setattr(CeleryOutlet, "push_replay", lose)
        lost = run("dead", "replay", "aaaaaaaa", "--json")
    again = run("dead", "replay", "aaaaaaaa", "--json")

    assert (lost.exit_code, lines(lost)[0]["result"]) == (69, "unknown")
    assert (again.exit_code, lines(again)[0]["copy"]) == (0, 1)
    assert [message.headers["watch"]["copy"] for message in queued(app)] == [1]


@pytest.mark.usefixtures("letters", "hurried")
def test_replay_waits_for_what_was_begun_and_never_published(run: Run, storage: Storage, app: Celery) -> None:
    storage.replay_many([Replay(id="aaaaaaaa-1", patience=1.0)])

    result = run("dead", "replay", "--topic", "orders", "--yes", "--json")

    assert result.exit_code == 0
    assert "waiting at most" in result.stderr
    assert [(line["result"], line["copy"]) for line in lines(result)] == [("replayed", 1)]
    assert [message.headers["watch"]["copy"] for message in queued(app)] == [1]


@pytest.mark.usefixtures("letters")
def test_replay_can_be_interrupted_while_it_waits(
    run: Run, storage: Storage, app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    storage.replay_many([Replay(id="aaaaaaaa-1", patience=1.0)])
    with monkeypatch.context() as patch:
        patch.setattr(replay, "time", SimpleNamespace(sleep=interrupt, monotonic=time.monotonic))
        result = run("dead", "replay", "aaaaaaaa")

    assert result.exit_code == 130
    assert storage.dead_get("aaaaaaaa-1") is not None
    assert queued(app) == []


#: Dies at its second handler until the test makes the file `well`.
PAY = """
pay = topic("pay", retry=RetryPolicy(max_retries=0))

@pay.handler
def book(message): note("book", message)

@pay.handler
def charge(message):
    note("charge", message)
    if not os.path.exists(os.path.join(os.environ["SITE"], "well")):
        raise ValueError("no money")
"""


@pytest.fixture
def site(tmp_path: Path, valkey: RedisServer) -> Iterator[Site]:
    site = Site(tmp_path / "site", valkey.url, PAY)
    yield site
    site.close()


def kill_off(site: Site, number: int) -> None:
    """Have messages die, and remove the cause."""
    site.worker()
    for place in range(number):
        site.send("pay", place, index=f"p-{place}")
    site.until_dead(number)
    site.touch("well")


@pytest.mark.worker
def test_a_replayed_message_is_handled_from_where_it_failed(site: Site) -> None:
    kill_off(site, 1)

    result = site.run("-m", "watch_tasks", "dead", "replay", site.dead()[0].id, "--json")

    assert (result.returncode, result.stderr.splitlines()[-1]) == (
        0,
        '{"replayed":1,"refused":0,"gone":0,"unknown":0}',
    )
    site.until_handled(1)
    assert site.calls() == {"book": 1, "charge": 2}
    assert site.dead() == []
    told = [(event.event, event.by) for event in site.storage.explain("pay", "p-0")]
    assert ("replayed", "watch-tasks dead replay") in told


@pytest.mark.worker
def test_of_two_replays_at_once_each_letter_is_handled_once(site: Site) -> None:
    kill_off(site, 20)

    with ThreadPoolExecutor(2) as threads:
        command = ("-m", "watch_tasks", "dead", "replay", "--all", "--yes", "--json")
        results = list(threads.map(lambda _: site.run(*command), range(2)))

    site.until_handled(20)
    assert [result.returncode for result in results] == [0, 0], results
    assert sum(len(result.stdout.splitlines()) for result in results) == 20
    assert site.calls() == {"book": 20, "charge": 40}
    assert site.dead() == []


@pytest.mark.worker
def test_a_replay_that_was_killed_before_it_published_is_picked_up(site: Site) -> None:
    kill_off(site, 3)
    site.storage.replay_many([Replay(id=letter.id, patience=2.0) for letter in site.dead()[:2]])

    result = site.run("-m", "watch_tasks", "dead", "replay", "--all", "--yes")

    assert (result.returncode, result.stdout) == (0, "3 dead letters replayed\n")
    site.until_handled(3)
    assert site.calls() == {"book": 3, "charge": 6}
    assert site.dead() == []


@pytest.mark.usefixtures("letters")
def test_explain_tells_every_event(run: Run) -> None:
    (event,) = lines(run("explain", "orders", "o-1", "--json"))

    assert list(event) == EVENT
    assert event["event"] == "dead"
    assert "1 event" in run("explain", "orders", "o-1").stdout


def test_explain_of_what_nobody_knows_has_its_code(run: Run) -> None:
    assert run("explain", "orders", "o-9").exit_code == 3


@pytest.mark.usefixtures("letters")
def test_topics_tells_rules_and_numbers_and_names_unknown_ones(run: Run) -> None:
    topic("bills", schema=Order, timeout=3, queue="money").handler(print)
    run("send", "bills", '{"number": 1}')

    bills, orders = lines(run("topics", "--json"))

    assert bills == {
        "topic": "bills",
        "task": "watch.bills",
        "queue": "money",
        "once": "message",
        "max_retries": 3,
        "timeout": 3,
        "handlers": ["print"],
        "waiting": 1,
        "handled": 0,
        "duplicates": 0,
        "retries": 0,
        "dead": 0,
    }
    assert (orders["topic"], orders["dead"]) == ("orders", 1)
    assert [orders[name] for name in ("queue", "once", "max_retries", "timeout", "handlers", "waiting")] == [None] * 6
    assert run("topics").stdout.splitlines()[-1] == "2 topics"


def test_check_is_content_with_what_is_well(run: Run, app: Celery) -> None:
    topic("bills").handler(print)

    result = run("check", "--json")

    assert result.exit_code == 0
    found = lines(result)
    assert all(list(line) == ["check", "ok", "detail", "fix"] for line in found)
    (broker,) = [line for line in found if line["check"] == "broker"]
    assert broker["detail"] == app.conf.broker_url


def test_check_complains_of_a_topic_without_handlers_and_of_settings(app: Celery) -> None:
    topic("bills")
    app.conf.watch_lease = "soon"

    result = runner(app)("check", "--json")

    assert result.exit_code == 1
    bad = [line for line in lines(result) if not line["ok"]]
    assert {line["check"] for line in bad} == {"settings", "topics"}
    assert all(line["fix"] for line in bad)


def test_check_of_a_broker_that_is_away_has_its_code(run: Run, app: Celery) -> None:
    app.conf.broker_url = "redis://:secret@127.0.0.1:1/0"

    result = run("check", "--json")

    assert result.exit_code == 69
    assert "secret" not in result.output
    (broker,) = [line for line in lines(result) if line["check"] == "broker"]
    assert broker["detail"].startswith("redis://:**@127.0.0.1:1/0")
    assert not broker["ok"]


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("redis://localhost/0", "redis://localhost/0"),
        ("redis://:pw@localhost/0", "redis://:**@localhost/0"),
        ("amqp://user:p@s/s@host//", "amqp://user:**@host//"),
        ("sentinel://:a@h1:1;sentinel://:b@h2:2", "sentinel://:**@h1:1;sentinel://:**@h2:2"),
        ("redis://h/0?ssl_keyfile_password=x&a=b", "redis://h/0?ssl_keyfile_password=**&a=b"),
    ],
)
def test_passwords_are_masked(url: str, masked: str) -> None:
    assert mask(url) == masked
