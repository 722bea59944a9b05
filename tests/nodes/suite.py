"""What a broker and two workers promise together, whatever they run in: processes here, containers in `tests/docker`.

Both are nodes of pytest-celery; which ones, the fixtures beside the subclass of `NodeSuite` say.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, _state
from pytest_celery import CeleryTestSetup, CeleryTestWorker

from watch_tasks import Reason, Storage, open_storage

from ..workers import until

#: The topics of every worker here. Handlers note what they do in their node's log, past Celery's own, in one write.
TOPICS = """
import json, os, time
from watch_tasks import RetryPolicy, topic

def note(what, message):
    line = {"what": what, "index": message.index, "id": message.id, "retries": message.retries}
    os.write(1, f"note {json.dumps(line)}\\n".encode())

job = topic("job", retry=RetryPolicy(max_retries=3))

@job.handler
def work(message):
    note("began", message)
    if message.retries < message.data.get("failures", 0):
        raise ValueError("not yet")
    time.sleep(max(0.0, message.data.get("until", 0.0) - time.time()))
    note("ended", message)
"""

#: The configuration of every worker here: what takes a minute by default takes seconds.
CONFIG = """
imports = ("topics_here",)
worker_soft_shutdown_timeout = 2
watch_lease = 2
watch_renew_every = 0.5
"""
REDIS_CONFIG = "watch_lease = 2\nwatch_renew_every = 0.5\n"
# Seconds after which RabbitMQ gives a silent connection up, and hands out again what it held.
RABBITMQ_CONFIG = "broker_heartbeat = 2\n"

#: Each worker has two places, so that four messages fill both.
WORKER = ["celery", "-A", "watch_tasks", "worker", "-l", "INFO", "-c", "2", "--without-gossip", "--without-mingle"]
PLACES = 4


class NodeSetup(CeleryTestSetup):
    """pytest-celery's setup, whose app does not become that of the tests that follow."""

    @classmethod
    def create_setup_app(cls, celery_setup_config: dict[str, Any], celery_setup_app_name: str) -> Celery:
        app = Celery(celery_setup_app_name, set_as_current=False)
        app.config_from_object(celery_setup_config)
        return app


class Nodes:
    """The nodes of a test, seen from outside: a producer, the storage, and what handlers noted in the logs."""

    def __init__(self, setup: CeleryTestSetup) -> None:
        self.broker = setup.broker
        self.workers: list[CeleryTestWorker] = list(setup.worker_cluster)
        self._keeper = setup.backend or setup.broker
        self._app: Celery | None = None
        self._storage: Storage | None = None

    @property
    def app(self) -> Celery:
        """Knows the broker and nothing else, as a producer that never heard of this package."""
        if self._app is None:
            self._app = Celery("bare", broker=self.broker.config()["host_url"], set_as_current=False)
        return self._app

    @property
    def storage(self) -> Storage:
        if self._storage is None:
            self._storage = open_storage(self._keeper.config()["host_url"])
        return self._storage

    def send(self, index: str, *, until: float = 0.0, failures: int = 0, **keywords: Any) -> str:
        """Send a job that ends at that time, or fails that often; return its id."""
        data = {"until": until, "failures": failures}
        return self._send([data], {"index": index, **keywords})

    def send_malformed(self) -> str:
        return self._send([], {})

    def _send(self, arguments: list[Any], keywords: dict[str, Any]) -> str:
        # No pool: those of kombu are the whole process's, and a broker that restarts may have another address.
        with self.app.connection_for_write() as connection:
            return str(self.app.send_task("watch.job", arguments, keywords, connection=connection).id)

    def restart_broker(self) -> None:
        self.close()
        self.broker.restart()

    def notes(self, *workers: CeleryTestWorker) -> list[dict[str, Any]]:
        """What handlers noted: in these workers, or in all."""
        logs = (worker.logs() for worker in workers or self.workers)
        return [json.loads(line[5:]) for log in logs for line in log.splitlines() if line.startswith("note ")]

    def indexes(self, what: str, *workers: CeleryTestWorker) -> Counter[str]:
        return Counter(note["index"] for note in self.notes(*workers) if note["what"] == what)

    def handled(self) -> set[str]:
        return {record.index for record in self.storage.range("job")}

    def until_begun(self, count: int) -> None:
        until(lambda: self.indexes("began").total() >= count, f"{count} begun", 30, self.report)

    def until_handled(self, indexes: set[str], timeout: float = 60) -> None:
        until(lambda: self.handled() >= indexes, f"all of {sorted(indexes)} handled", timeout, self.report)

    def report(self) -> str:
        logs = "\n".join(f"--- {worker.name()}\n{worker.logs()[-6000:]}" for worker in self.workers)
        return f"handled {sorted(self.handled())}, dead {list(self.storage.dead())}\n{logs}"

    def close(self) -> None:
        """Let go of the servers; the next call finds them where they are then."""
        if self._app:
            self._app.close()
        if self._storage:
            self._storage.close()
        self._app = self._storage = None


class NodeSuite:
    """The promises."""

    @pytest.fixture
    def celery_setup_cls(self) -> type[CeleryTestSetup]:
        return NodeSetup

    @pytest.fixture
    def nodes(self, celery_setup: CeleryTestSetup) -> Iterator[Nodes]:
        current = _state._tls.current_app
        assert celery_setup.ready()
        nodes = Nodes(celery_setup)
        yield nodes
        nodes.close()
        _state._set_current_app(current)  # a node that restarts makes its app the current one

    def test_what_a_bare_producer_sends_is_handled_once(self, nodes: Nodes) -> None:
        indexes = {f"job-{number}" for number in range(30)}

        for index in indexes:
            nodes.send(index)

        nodes.until_handled(indexes)
        assert nodes.indexes("began") == Counter(indexes)

    def test_what_fails_is_tried_again_and_what_fails_too_often_is_kept(self, nodes: Nodes) -> None:
        nodes.send("mends", failures=2)
        exhausted = nodes.send("never mends", failures=9, max_retries=1)
        malformed = nodes.send_malformed()

        nodes.until_handled({"mends"})
        until(lambda: len(list(nodes.storage.dead())) == 2, "two dead letters", 30, nodes.report)
        letters = {letter.id: letter for letter in nodes.storage.dead()}
        assert nodes.indexes("began") == {"mends": 3, "never mends": 2}
        assert {id: letter.reason for id, letter in letters.items()} == {
            exhausted: Reason.EXHAUSTED,
            malformed: Reason.MALFORMED,
        }
        assert [attempt.error for attempt in letters[exhausted].attempts] == ["ValueError: not yet"] * 2

    def test_a_killed_worker_loses_nothing(self, nodes: Nodes) -> None:
        killed, _ = nodes.workers
        held = self._fill(nodes, seconds=4)
        waiting = {f"waiting-{number}" for number in range(4)}
        for index in waiting:
            nodes.send(index)

        killed.kill()

        lost = set(nodes.indexes("began", killed))
        assert len(lost) == PLACES / 2
        nodes.until_handled(held | waiting)
        assert nodes.indexes("ended") == Counter(held | waiting)
        assert {index for index, calls in nodes.indexes("began").items() if calls > 1} == lost

    def test_a_paused_worker_is_overtaken_and_its_late_end_refused(self, nodes: Nodes) -> None:
        nodes.send("slow", until=time.time() + 3)
        nodes.until_begun(1)
        (paused,) = (worker for worker in nodes.workers if nodes.notes(worker))

        paused.container.pause()
        nodes.until_handled({"slow"})
        overtaken = nodes.storage.get("job", "slow")
        paused.container.unpause()

        until(lambda: nodes.indexes("ended", paused).total() == 1, "the paused one ended too", 20, nodes.report)
        until(lambda: "fenced" in self._story(nodes, "slow"), "its end was refused", 20, nodes.report)
        assert nodes.storage.get("job", "slow") == overtaken
        assert self._story(nodes, "slow").count("handled") == 1

    def test_a_broker_that_restarts_loses_nothing(self, nodes: Nodes) -> None:
        held = self._fill(nodes, seconds=3)
        waiting = {f"waiting-{number}" for number in range(6)}
        for index in waiting:
            nodes.send(index)

        nodes.restart_broker()
        nodes.send("after")

        nodes.until_handled(held | waiting | {"after"})
        assert set(nodes.indexes("ended")) == held | waiting | {"after"}
        for worker in nodes.workers:
            worker.container.reload()
            assert worker.container.status == "running"

    def test_a_worker_that_is_stopped_ends_soon_and_gives_back_what_it_has(self, nodes: Nodes) -> None:
        stopped, other = nodes.workers
        held = self._fill(nodes, seconds=6)

        stopped.kill(signal="SIGTERM", reload_container=False)

        def ended() -> bool:
            stopped.container.reload()
            return bool(stopped.container.status == "exited")

        until(ended, "the stopped worker ended within its grace", 5, nodes.report)
        nodes.until_handled(held)
        assert nodes.indexes("ended", stopped) == {}
        assert set(nodes.indexes("ended", other)) == held

    def _fill(self, nodes: Nodes, seconds: float) -> set[str]:
        """Give every worker as many jobs as it can have in hand, and wait until they have begun."""
        held = {f"held-{number}" for number in range(PLACES)}
        end = time.time() + seconds
        for index in held:
            nodes.send(index, until=end)
        nodes.until_begun(PLACES)
        return held

    def _story(self, nodes: Nodes, index: str) -> list[str]:
        return [str(event.event) for event in nodes.storage.explain("job", index)]
