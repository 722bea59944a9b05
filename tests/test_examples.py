"""The examples: GitHub's events are all known and handled once, and the feed is bounded, repeatable and polite."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from watch_tasks import Duplicate, Handled, MemoryStorage, Message, SendFailedError
from watch_tasks.examples import feed, flaky
from watch_tasks.examples.github_events import EVENTS, SCHEMAS, TOPICS
from watch_tasks.outcome import Dead, Retry
from watch_tasks.pipeline import Pipeline
from watch_tasks.topics import Topic

DELIVERIES = Path(__file__).parents[2] / "shared" / "data" / "github_webhooks.jsonl"


@pytest.fixture(scope="module")
def deliveries() -> list[dict[str, Any]]:
    """Real webhook payloads, which are not part of this project."""
    if not DELIVERIES.exists():
        pytest.skip("the folder of real webhook payloads is not beside this checkout")
    return [json.loads(line) for line in DELIVERIES.read_text().splitlines()]


@pytest.fixture
def journal() -> Path:
    return Path(os.environ["WATCH_DIR"]) / "github_events.jsonl"


@pytest.fixture
def pipeline() -> Iterator[Pipeline]:
    with MemoryStorage() as storage:
        yield Pipeline(storage, {**TOPICS, "demo.flaky": flaky.flaky}.get, worker="test")


class Outbox:
    """An outlet that keeps what it is given."""

    def __init__(self) -> None:
        self.messages: list[Message[Any]] = []

    def push(self, message: Message[Any], *, delay: float = 0.0) -> None:
        self.messages.append(message)


class Away:
    """An outlet whose broker cannot be reached."""

    def push(self, message: Message[Any], *, delay: float = 0.0) -> None:
        raise SendFailedError("nobody listens there")


def bind(monkeypatch: pytest.MonkeyPatch, outlet: Any) -> None:
    topics: list[Topic[Any]] = [*TOPICS.values(), flaky.flaky]
    for topic in topics:
        monkeypatch.setattr(topic, "_outlet", outlet)


# -- GitHub's events


def test_every_event_has_one_topic_of_its_name() -> None:
    assert len(EVENTS) == len(set(EVENTS)) == len(TOPICS)
    assert all(topic.name == name and topic.once == "index" for name, topic in TOPICS.items())
    assert set(SCHEMAS) <= set(EVENTS)


def test_every_kind_of_the_real_deliveries_has_a_topic(deliveries: list[dict[str, Any]]) -> None:
    assert {delivery["event"] for delivery in deliveries} <= set(TOPICS)


def test_each_real_delivery_is_handled_once_however_often_it_comes(
    deliveries: list[dict[str, Any]], pipeline: Pipeline, journal: Path
) -> None:
    def deliver() -> Counter[type]:
        return Counter(
            type(pipeline.handle(Message(one["payload"], one["event"], index=one["delivery"]))) for one in deliveries
        )

    first, second = deliver(), deliver()

    assert (first, second) == ({Handled: len(deliveries)}, {Duplicate: len(deliveries)})
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert Counter(line["delivery"] for line in lines) == Counter(one["delivery"] for one in deliveries)
    assert all(line["says"] for line in lines)


@pytest.mark.parametrize("event", sorted({*EVENTS} - {*SCHEMAS}))
def test_an_event_that_says_little_of_itself_is_handled(event: str, pipeline: Pipeline, journal: Path) -> None:
    outcome = pipeline.handle(Message({}, event, index="delivery-1"))

    assert isinstance(outcome, Handled)
    assert json.loads(journal.read_text()) == {
        "event": event,
        "delivery": "delivery-1",
        "says": f"GitHub: {event.replace('_', ' ')}",
    }


def test_typed_events_say_what_happened_in_a_sentence() -> None:
    common = {"repository": {"full_name": "tidepool-labs/barnacle", "new": 1}, "sender": {"login": "esi", "id": 7}}
    rows = {
        "push": ({"ref": "refs/heads/main", "commits": []}, "esi pushed 0 commits: refs/heads/main of"),
        "issues": ({"action": "opened", "issue": {"number": 3, "title": "It leaks"}}, "esi opened"),
        "pull_request": (
            {"action": "closed", "pull_request": {"number": 4, "title": "Mend it", "merged": True}},
            "esi merged tidepool-labs/barnacle#4: Mend it",
        ),
        "star": ({"action": "deleted"}, "esi unstarred tidepool-labs/barnacle"),
        "ping": ({"zen": "Slowly.", "hook_id": 5}, "hook 5 works: Slowly."),
    }

    for event, (payload, sentence) in rows.items():
        assert str(TOPICS[event].decode({**payload, **common})).startswith(sentence)
    assert set(rows) == set(SCHEMAS)


# -- the feed


def test_the_feed_makes_the_same_events_from_the_same_seed_and_others_from_another() -> None:
    assert list(feed.events(60, seed=1)) == list(feed.events(60, seed=1))
    assert not {event.index for event in feed.events(60, seed=1)} & {event.index for event in feed.events(60, seed=2)}


def test_what_is_fed_fits_its_topic_and_shows_retries_and_dead_letters(pipeline: Pipeline) -> None:
    outcomes: Counter[type] = Counter()

    for event in feed.events(60, seed=1):
        outcome = pipeline.handle(Message(event.topic.encode(event.data), event.topic.name, index=event.index))
        outcomes[type(outcome)] += 1
        while isinstance(outcome, Retry):
            outcome = pipeline.handle(outcome.message)
            outcomes[type(outcome)] += 1

    # Ten jobs that fail 1, 9, 2 times in turn: three die after 3 retries each, the others need 1 or 2.
    assert outcomes[Dead] == 3
    assert outcomes[Handled] == 57
    assert outcomes[Retry] == 3 * 3 + 4 * 1 + 3 * 2


def test_the_feed_sends_with_the_delivery_as_index_and_prints_one_line_of_totals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outbox = Outbox()
    bind(monkeypatch, outbox)

    code = feed.main(["--count", "12", "--rate", "0", "--seed", "5"])

    assert code == 0
    assert [message.index for message in outbox.messages] == [event.index for event in feed.events(12, seed=5)]
    line = capsys.readouterr().out
    assert line.startswith("fed 10 GitHub events of ")
    assert line.endswith(" kinds and 2 flaky jobs (--seed 5 repeats them)\n")


def test_a_broker_that_is_away_ends_the_feed_with_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bind(monkeypatch, Away())

    code = feed.main(["--count", "3"])

    assert code == 69
    assert "0 events sent, then the broker failed: nobody listens there" in capsys.readouterr().err


def test_importing_the_examples_connects_to_nothing() -> None:
    code = """
import sys
import watch_tasks.examples.feed, watch_tasks.examples.github_events
print(sorted({"celery", "kombu", "redis"} & set(sys.modules)))
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
