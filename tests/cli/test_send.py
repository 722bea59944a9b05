"""`watch-tasks send`: what is sent, what is refused, and by which code."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from tests.servers import RedisServer
from watch_tasks import Message, topic
from watch_tasks.queue.redis import RedisQueue

from .conftest import Order, Run, lines


def queued(valkey: RedisServer, queue: str = "celery") -> list[dict[str, Any]]:
    """Return the headers and arguments of what waits, in its order."""
    with valkey.client() as client:
        items = [json.loads(item) for item in reversed(client.lrange(queue, 0, -1))]
    return [{"headers": item["headers"], "body": json.loads(base64.b64decode(item["body"]))} for item in items]


def waiting(valkey: RedisServer) -> list[Message[Any]]:
    """Take every message that waits, in its order, those of packets too."""
    found: list[Message[Any]] = []
    with RedisQueue(valkey.url) as queue:
        while queue.len() and (delivery := queue.next(timeout=10)):
            assert isinstance(delivery.message, Message)
            found.append(delivery.message)
            delivery.ack()
    return found


@pytest.fixture
def small_payloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCH_MAX_PAYLOAD", "10")


def test_message_is_sent_with_the_index_of_its_data(run: Run, valkey: RedisServer) -> None:
    topic("orders", schema=Order)

    result = run("send", "orders", '{"number": 17}', "--json")

    assert result.exit_code == 0
    (line,) = lines(result)
    assert set(line) == {"topic", "index", "id", "sent_at"}
    assert (line["topic"], line["index"]) == ("orders", "order-17")
    (sent,) = queued(valkey)
    assert sent["headers"]["task"] == "watch.orders"
    assert sent["headers"]["id"] == line["id"]
    assert sent["body"][:2] == [[{"number": 17}], {"index": "order-17"}]


def test_options_travel_with_the_message(run: Run, valkey: RedisServer) -> None:
    topic("orders", schema=Order)

    run("send", "orders", '{"number": 17}', "--index", "x", "--once", "index", "--max-retries", "0")

    (sent,) = queued(valkey)
    assert sent["body"][1] == {"index": "x", "once": "index", "max_retries": 0}


def test_data_is_read_from_stdin(run: Run, valkey: RedisServer) -> None:
    topic("orders", schema=Order)

    assert run("send", "orders", "-", input='{"number": 3}').exit_code == 0

    assert queued(valkey)[0]["body"][0] == [{"number": 3}]


def test_unknown_topic_is_sent_as_plain_json_with_a_warning(run: Run, valkey: RedisServer) -> None:
    result = run("send", "nobody", '{"a": 1}', "--json")

    assert result.exit_code == 0
    assert "no loaded module defines topic `nobody`" in result.stderr
    assert queued(valkey)[0]["headers"]["task"] == "watch.nobody"


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["send", "orders", "{"], 2, "expected the data as JSON"),
        (["send", "orders", "NaN"], 2, "NaN, which JSON has not"),
        (["send", "orders"], 2, "expected a topic and its data"),
        (["send", "Orders", "1"], 2, "the name of a topic must be"),
        (["send", "orders", '{"number": "x"}'], 4, "Expected `int`, got `str` - at `$.number`"),
        (["send", "orders", '{"number": 1}', "--index", "a\nb"], 4, "an index must be"),
        (["send", "orders", '{"number": 1}', "--index", ""], 4, "an index must be"),
        (["send", "orders", '{"number": 1}', "--dry-run"], 2, "need --from"),
        (["send", "--from", "-", "--topic", "orders", "--index", ""], 2, "give no TOPIC, JSON, --index"),
        (["send", "--from", "no.jsonl", "--topic", "orders"], 2, "no.jsonl"),
    ],
)
def test_what_cannot_be_sent_is_refused_with_its_code(
    run: Run, valkey: RedisServer, args: list[str], code: int, said: str
) -> None:
    topic("orders", schema=Order)

    result = run(*args)

    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr
    assert queued(valkey) == []


@pytest.mark.usefixtures("small_payloads")
def test_too_large_data_is_refused(run: Run, valkey: RedisServer) -> None:
    topic("orders", schema=Order)

    assert run("send", "orders", '{"number": 123456789}').exit_code == 4
    assert run("send", "--from", "-", "--topic", "orders", input='{"number": 123456789}').exit_code == 1
    assert queued(valkey) == []


def test_lines_go_to_the_topics_they_name_in_their_order(run: Run, valkey: RedisServer, tmp_path: Path) -> None:
    topic("a")
    topic("b")
    file = tmp_path / "events.jsonl"
    events = [{"kind": kind, "key": key, "body": {"n": key}} for key, kind in enumerate("aabab")]
    file.write_text("\n".join(map(json.dumps, events)) + "\n\n")

    result = run("send", "--from", str(file), "--topic-field", "kind", "--index-field", "key", "--data-field", "body")

    assert result.exit_code == 0
    (counts,) = lines(result)
    assert counts == {"sent": 5, "refused": 0, "unknown": 0, "seconds": counts["seconds"]}
    assert [(sent.topic, sent.index, sent.data) for sent in waiting(valkey)] == [
        (kind, str(n), {"n": n}) for n, kind in enumerate("aabab")
    ]


def test_bad_lines_are_named_and_keep_no_other_from_being_sent(run: Run, valkey: RedisServer) -> None:
    topic("orders", schema=Order)
    text = b'{"number": 1}\nrubbish\n{"number": "x"}\n\xff\n[1]\n{"number": 2}\n'

    result = run("send", "--from", "-", "--topic", "orders", input=text)

    assert result.exit_code == 5
    bad = [json.loads(line) for line in result.stderr.splitlines()]
    assert [line["line"] for line in bad] == [2, 3, 4, 5]
    assert all(set(line) == {"line", "error"} for line in bad)
    assert lines(result)[-1]["sent"] == 2
    assert lines(result)[-1]["refused"] == 4
    assert [message.data for message in waiting(valkey)] == [{"number": 1}, {"number": 2}]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"key": "x"}', "expected the field `kind`"),
        ('{"kind": 7, "key": "x"}', "the name of a topic must be"),
        ('{"kind": "a"}', "expected the field `key`"),
        ('{"kind": "a", "key": null}', "must be a text or a whole number"),
        ('["a"]', "expected an object with the field `kind`"),
    ],
)
def test_line_without_its_fields_is_refused(run: Run, line: str, said: str) -> None:
    topic("a")

    result = run("send", "--from", "-", "--topic-field", "kind", "--index-field", "key", input=line)

    assert result.exit_code == 1
    assert said in json.loads(result.stderr)["error"]


def test_all_bad_lines_are_a_failure_and_none_at_all_is_not(run: Run) -> None:
    topic("orders", schema=Order)

    assert run("send", "--from", "-", "--topic", "orders", input="1\n2\n").exit_code == 1
    assert run("send", "--from", "-", "--topic", "orders", input="").exit_code == 0


def test_dry_run_checks_and_sends_nothing(run: Run, valkey: RedisServer) -> None:
    topic("orders", schema=Order)

    result = run("send", "--from", "-", "--topic", "orders", "--dry-run", input='{"number": 1}\n{}\n')

    assert result.exit_code == 5
    assert lines(result)[-1]["sent"] == 1
    assert queued(valkey) == []


def test_broker_that_is_away_has_its_code(run: Run, app: Celery) -> None:
    topic("orders", schema=Order)
    app.conf.broker_url = "redis://127.0.0.1:1/0"

    assert run("send", "orders", '{"number": 1}').exit_code == 69
    result = run("send", "--from", "-", "--topic", "orders", input='{"number": 1}\n')
    assert result.exit_code == 69
    assert lines(result)[-1]["sent"] == 0
