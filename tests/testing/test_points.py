"""Crash points: what arms them, what they end, and that they are nothing when off."""

from __future__ import annotations

import subprocess
import sys
import timeit
from collections.abc import Iterator
from pathlib import Path

import pytest

from watch_tasks import ConfigurationError, Handled, MemoryStorage, Message, points
from watch_tasks.pipeline import Pipeline
from watch_tasks.testing.plugin import CrashPoints
from watch_tasks.topics import Topic

from ..servers import RedisServer
from ..workers import Site, until

TOPICS = """
job = topic("job")

@job.handler
def work(message):
    note("work", message)
"""


@pytest.fixture
def site(tmp_path: Path, valkey: RedisServer) -> Iterator[Site]:
    site = Site(tmp_path / "site", valkey.url, TOPICS)
    yield site
    site.close()


@pytest.fixture
def pipeline() -> Iterator[Pipeline]:
    topic: Topic[object] = Topic("t")
    topic.handler(name="h")(lambda message: None)
    with MemoryStorage() as storage:
        yield Pipeline(storage, {"t": topic}.get, worker="w")


class TestReading:
    def test_a_point_alone_acts_at_its_first_visit(self) -> None:
        assert points.read("after_claim") == [points.Trigger("after_claim", n=1)]

    def test_options_say_when_and_what(self) -> None:
        assert points.read("in_handler:p=0.25:seed=7:main, before_ack:n=3") == [
            points.Trigger("in_handler", n=None, p=0.25, seed=7, main=True),
            points.Trigger("before_ack", n=3),
        ]

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("after_clam", "no crash point `after_clam`, did you mean `after_claim`"),
            ("somewhere:n=1", "there are after_fetch, after_claim, in_handler"),
            ("after_claim:n=0", "`n=0` of `after_claim` is none of"),
            ("after_claim:p=2", "`p=2` of `after_claim` is none of"),
            ("after_claim:often", "`often` of `after_claim` is none of"),
            ("after_claim:n=1:p=0.5", "takes n or p, not both"),
        ],
    )
    def test_what_cannot_be_is_refused(self, text: str, complaint: str) -> None:
        with pytest.raises(ConfigurationError, match=complaint):
            points.read(text)

    def test_the_same_seed_acts_at_the_same_visits(self) -> None:
        one, other = (points.read("after_claim:p=0.5:seed=7")[0] for _ in range(2))
        assert [one.is_due() for _ in range(50)] == [other.is_due() for _ in range(50)]


class TestInOneProcess:
    def test_off_a_visit_costs_less_than_a_microsecond(self) -> None:
        assert min(timeit.repeat(lambda: points.reach("after_claim"), number=1000, repeat=20)) < 1e-3

    def test_the_environment_is_read_by_workers_only(self, monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline) -> None:
        monkeypatch.setenv(points.VARIABLE, "after_claim")
        assert isinstance(pipeline.handle(Message(1, "t")), Handled)

    @pytest.mark.parametrize(
        ("point", "records"), [("after_claim", 0), ("in_handler", 0), ("after_effect", 0), ("after_commit", 1)]
    )
    def test_a_point_raises_once_and_what_was_committed_stays(
        self, crash_point: CrashPoints, pipeline: Pipeline, point: str, records: int
    ) -> None:
        crash_point.raises(point, n=2)
        pipeline.handle(Message(1, "t"))
        with pytest.raises(points.Crash, match=point):
            pipeline.handle(Message(2, "t"))
        assert pipeline.storage.len() == 1 + records
        pipeline.handle(Message(3, "t"))


class TestWorkers:
    pytestmark = pytest.mark.worker

    @pytest.mark.parametrize(("point", "main"), [("after_claim", False), ("after_effect", True), ("before_ack", False)])
    def test_a_point_kills_and_nothing_is_lost(
        self, crash_point: CrashPoints, site: Site, point: str, main: bool
    ) -> None:
        worker = site.worker(concurrency=1, **crash_point(point, main=main, n=2))
        for number in range(3):
            site.send("job", number, index=str(number))

        until(lambda: f"crash point {point} ends process" in worker.text(), "it is killed", report=site.report)
        if main or point == "before_ack":
            assert worker.process.wait(20) == -9
        else:
            assert worker.is_running()
            worker.kill()
        site.worker()
        site.until_handled(3)

        assert site.dead() == []

    def test_a_point_that_is_none_ends_the_start(self, tmp_path: Path, site: Site) -> None:
        ended = subprocess.run(
            [sys.executable, "-m", "celery", "-A", "watch_tasks", "worker", "-c", "1"],
            cwd=site.folder,
            env={**site.environment, points.VARIABLE: "after_clam"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.returncode == 1
        assert "no crash point `after_clam`, did you mean `after_claim`" in ended.stderr
