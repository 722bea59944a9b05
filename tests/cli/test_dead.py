"""`watch-tasks dead`, `explain`, `topics` and `check`: what is told of messages and of the whole."""

from __future__ import annotations

import base64
from datetime import UTC, datetime

import msgspec
import pytest
from celery import Celery

from watch_tasks import Attempt, DeadLetter, Reason, topic
from watch_tasks.cli.check import mask
from watch_tasks.storage import Storage
from watch_tasks.storage.protocol import Commit, Step

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
