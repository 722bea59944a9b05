"""`watch-tasks send`: what is sent, what is refused, and by which code."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from tests.servers import RedisServer
from tests.workers import until
from watch_tasks import Message, SendUnknownError, topic
from watch_tasks.cli.pace import Pace
from watch_tasks.packets import Packet
from watch_tasks.queue.redis import RedisQueue
from watch_tasks.worker.outlet import CeleryOutlet

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
        # Counted once: what is left of a packet after two seconds is left to others, in another order.
        for _ in range(queue.len()):
            delivery = queue.next(timeout=10)
            assert delivery
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
    assert "did you mean" not in result.stderr
    assert queued(valkey)[0]["headers"]["task"] == "watch.nobody"


def test_a_misspelt_topic_is_told_which_one_it_is_like(run: Run, valkey: RedisServer) -> None:
    topic("orders", schema=Order)

    result = run("send", "ordres", '{"number": 3}')

    assert result.exit_code == 0
    assert "its data is sent unchecked, did you mean `orders`?" in result.stderr


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


class TestManyLines:
    """`send --from`: as they come, many at a time, each with its verdict."""

    def test_a_file_goes_in_full_packets(self, run: Run, valkey: RedisServer, tmp_path: Path) -> None:
        topic("log")
        file = tmp_path / "log.jsonl"
        file.write_text("".join(f'{{"n": {n}}}\n' for n in range(600)))

        result = run("send", "--from", str(file), "--topic", "log")

        assert (result.exit_code, lines(result)[-1]["sent"]) == (0, 600)
        assert [item["headers"]["watch"]["messages"] for item in queued(valkey)] == [500, 100]
        assert [message.data["n"] for message in waiting(valkey)] == list(range(600))

    def test_rules_of_the_lines_go_with_them(self, run: Run, valkey: RedisServer) -> None:
        topic("log")
        run("send", "--from", "-", "--topic", "log", "--once", "index", "--max-retries", "0", input="1\n2\n")
        assert [(message.once, message.max_retries) for message in waiting(valkey)] == [("index", 0)] * 2

    def test_a_pipe_is_sent_as_it_comes(self, run: Run, valkey: RedisServer) -> None:
        topic("log")
        reading, writing = os.pipe()
        with ThreadPoolExecutor() as pool, os.fdopen(reading, "rb") as source:
            try:
                running = pool.submit(run, "send", "--from", "-", "--topic", "log", input=source)
                for n in range(3):
                    os.write(writing, b"%d\n" % n)
                    with valkey.client() as client:
                        until(lambda n=n: client.llen("celery") == n + 1, "it is sent")  # type: ignore[misc]
            finally:
                os.close(writing)
            assert lines(running.result(20))[-1]["sent"] == 3
        assert [message.data for message in waiting(valkey)] == [0, 1, 2]

    def test_no_more_are_sent_a_second_than_the_rate(self, run: Run) -> None:
        topic("log")
        began = time.monotonic()
        result = run("send", "--from", "-", "--topic", "log", "--rate", "50", input="1\n" * 21)
        assert lines(result)[-1]["sent"] == 21
        assert time.monotonic() - began >= 20 / 50 - 0.051  # what may be made up for at once

    @pytest.mark.parametrize("rate", ["0", "-1", "fast"])
    def test_a_rate_that_is_none_is_refused(self, run: Run, rate: str) -> None:
        assert run("send", "--from", "-", "--topic", "log", "--rate", rate, input="1\n").exit_code == 2

    def test_a_rate_is_for_many(self, run: Run) -> None:
        result = run("send", "log", "1", "--rate", "5")
        assert result.exit_code == 2
        assert "--rate" in result.stderr

    def test_a_broker_that_is_away_is_told_of_each_line(self, run: Run, app: Celery) -> None:
        topic("log")
        app.conf.broker_url = "redis://127.0.0.1:1/0"

        result = run("send", "--from", "-", "--topic", "log", input="1\n2\n3\n")

        assert result.exit_code == 69
        assert {name: lines(result)[-1][name] for name in ("sent", "refused")} == {"sent": 0, "refused": 3}
        *told, error = result.stderr.splitlines()
        assert [json.loads(line) for line in told] == [
            {"line": line, "error": "not sent: the broker could not be reached"} for line in (1, 2, 3)
        ]
        assert "was not sent" in error

    def test_a_line_that_waited_for_another_topic_is_told_too(self, run: Run, app: Celery) -> None:
        topic("a")
        topic("b")
        app.conf.broker_url = "redis://127.0.0.1:1/0"

        result = run("send", "--from", "-", "--topic-field", "t", input='{"t": "a"}\n{"t": "b"}\n')

        assert result.exit_code == 69
        assert [json.loads(line)["line"] for line in result.stderr.splitlines()[:2]] == [1, 2]
        assert lines(result)[-1]["refused"] == 2

    def test_a_full_queue_is_told(self, run: Run, app: Celery, valkey: RedisServer) -> None:
        topic("log", max_waiting=2)
        app.conf.watch_send_wait = 0.1

        result = run("send", "--from", "-", "--topic", "log", input="1\n2\n3\n")

        assert result.exit_code == 5
        assert json.loads(result.stderr) == {
            "line": 3,
            "error": "not sent: the queue is full, or the broker could not be reached",
        }
        assert [message.data for message in waiting(valkey)] == [1, 2]

    def test_a_lost_answer_is_told_of_each_line(self, run: Run, app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
        def lose(self: object, packet: Packet, request: object = None) -> None:
            raise SendUnknownError("lost", Message(1, "log"))

        topic("log")
        monkeypatch.setattr(CeleryOutlet, "push_packet", lose)

        result = run("send", "--from", "-", "--topic", "log", input="1\nx\n2\n")

        assert result.exit_code == 1
        assert {name: lines(result)[-1][name] for name in ("sent", "refused", "unknown")} == {
            "sent": 0,
            "refused": 1,
            "unknown": 2,
        }
        assert sorted(json.loads(line)["line"] for line in result.stderr.splitlines()) == [1, 2, 3]

    @pytest.mark.parametrize("rate", [(), ("--rate", "2")])
    def test_at_ctrl_c_what_was_read_is_sent(self, valkey: RedisServer, tmp_path: Path, rate: tuple[str, ...]) -> None:
        environment = {
            **os.environ,
            "CELERY_BROKER_URL": valkey.url,
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "watch_tasks", "send", "--from", "-", "--topic", "log", *rate],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            assert process.stdin
            process.stdin.write(b"1\n2\n3\n")
            process.stdin.flush()
            with RedisQueue(valkey.url) as queue:
                until(lambda: queue.len() >= (1 if rate else 3), "what came is sent", 60)
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=20)
                assert process.returncode == 130
                assert json.loads(out.splitlines()[-1])["sent"] == queue.len() >= 1
            assert err.splitlines()[-1] == b"Error: interrupted"
        finally:
            process.kill()
            process.wait()


class TestPace:
    def passed(self, rate: float | None, gaps: list[float]) -> list[float]:
        """Return when each passes, whose next line comes so many seconds after it."""
        clock = ManualSeconds()
        pace = Pace(rate, clock=clock.now, sleep=clock.sleep)
        times = []
        for gap in gaps:
            pace.wait()
            times.append(round(clock.now(), 6))
            pace.count()
            clock.sleep(gap)
        return times

    def test_it_is_even(self) -> None:
        assert self.passed(10, [0.0] * 4) == [0, 0.1, 0.2, 0.3]

    def test_a_writer_that_is_slower_is_not_held_back(self) -> None:
        assert self.passed(10, [0.5] * 3) == [0, 0.5, 1.0]

    def test_after_a_pause_only_a_moment_is_made_up_for(self) -> None:
        times = self.passed(100, [10, *[0.0] * 20])
        assert sum(time <= 10 for time in times[1:]) == 6
        assert times[-1] == pytest.approx(10 - 0.05 + 0.19)

    def test_without_a_rate_nothing_waits(self) -> None:
        assert self.passed(None, [0.0] * 3) == [0, 0, 0]


class ManualSeconds:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds
