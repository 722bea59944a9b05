"""A rolling deploy (F17): old and new workers, and old and new senders, side by side; nothing is forgotten."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from watch_tasks import Reason

from ..servers import RedisServer
from ..worker.test_garbage import envelope
from ..workers import Site, Worker, until

pytestmark = [pytest.mark.chaos, pytest.mark.worker, pytest.mark.timeout(600)]

KEPT = """
kept = topic("kept")

@kept.handler
def keep(message):
    note("keep", message)
    time.sleep(0.02)
"""
#: What the next release does not know any more, and what it brings.
OLD = KEPT + '\ngone = topic("gone")\n\n@gone.handler\ndef go(message): note("go", message)\n'
NEW = KEPT + '\nfresh = topic("fresh")\n\n@fresh.handler\ndef come(message): note("come", message)\n'

#: Seconds; longer than the deploy takes.
GRACE = "30"


@pytest.fixture
def sites(tmp_path: Path, own_valkey: RedisServer) -> Iterator[tuple[Site, Site]]:
    """The old release and the new one, on one server."""
    made = [
        Site(tmp_path / name, own_valkey.url, topics, WATCH_UNKNOWN_GRACE=GRACE)
        for name, topics in (("old", OLD), ("new", NEW))
    ]
    yield made[0], made[1]
    for site in made:
        site.close()


def test_what_is_sent_during_a_deploy_is_handled_or_dead(sites: tuple[Site, Site]) -> None:
    old, new = sites
    sent: dict[str, str] = {}

    def send(topic: str, count: int) -> None:
        sent.update((old.send(topic, number), topic) for number in range(count))

    workers: list[Worker] = [old.worker(concurrency=2) for _ in range(3)]
    send("kept", 30)
    send("gone", 10)
    while workers:
        send("kept", 30)
        send("fresh", 10)  # new senders first: for a while only old workers see these
        assert workers.pop(0).stop() == 0
        new.worker(concurrency=2)
    send("gone", 5)  # by a sender that was forgotten
    until(lambda: len(new.dead()) >= 5, "what nobody knows any more is dead", 90, new.report)
    with new.bare.connection().channel() as channel:
        tomorrow = envelope(task="watch.kept", watch={"version": 2})
        channel.client.lpush("celery", json.dumps(tomorrow))
    sent[tomorrow["headers"]["id"]] = "tomorrow's envelope"

    def ended() -> set[str]:
        return {letter.id for letter in new.dead()} | {record.id for record in new.storage.range()}

    until(lambda: ended() >= sent.keys(), "all have ended", 60, new.report)
    dead = {letter.id: letter.reason for letter in new.dead()}
    print(f"F17: {len(sent)} sent, {len(sent) - len(dead)} handled, {len(dead)} dead")
    for id, topic in sent.items():
        if topic in ("kept", "fresh"):
            assert id not in dead, f"{topic}: {dead[id]}"
    assert {dead[id] for id, topic in sent.items() if topic == "gone" and id in dead} == {Reason.UNKNOWN_TOPIC}
    assert dead[tomorrow["headers"]["id"]] is Reason.MALFORMED
