"""compose.yaml as it stands, four workers wide, with a topic of the tests' own that takes its time."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from watch_tasks import Storage, open_storage

from ..nodes.suite import TOPICS
from ..servers import free_port, in_ci
from ..workers import until

ROOT = Path(__file__).parents[2]

#: What a user would put in their own: here, what a killed worker had in hand comes back after 10 s instead of 60.
CONFIG = """
imports = ("watch_tasks.examples.github_events", "watch_tasks.examples.flaky", "topics_here")
watch_lease = 4
watch_renew_every = 1
"""

#: How topics of one's own get into a worker's container; docs/containers.md shows the same.
OVERRIDE = """
services:
  worker:
    volumes:
      - "{folder}/celeryconfig.py:/app/celeryconfig.py:ro"
      - "{folder}/topics_here.py:/app/topics_here.py:ro"
"""

WORKERS = 4
#: Seconds between SIGTERM and SIGKILL: the worker's `stop_grace_period`.
GRACE = 30
#: Exit code of what SIGKILL ended.
KILLED = 137


class Stack:
    """The project of compose, under a name and on ports of its own."""

    def __init__(self, folder: Path, client: Any, command: list[str]) -> None:
        self.client = client
        self.ports = {"VALKEY_PORT": free_port(), "FLOWER_PORT": free_port()}
        settings = {**self.ports, "VALKEY_PASSWORD": "of-valkey", "FLOWER_PASSWORD": "of-flower"}
        (folder / "env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        (folder / "celeryconfig.py").write_text(CONFIG)
        (folder / "topics_here.py").write_text(TOPICS)
        (folder / "override.yaml").write_text(OVERRIDE.format(folder=folder))
        self._command = [*command, "-p", "watch-tests", "--env-file", str(folder / "env")]
        self._command += ["-f", str(ROOT / "compose.yaml"), "-f", str(folder / "override.yaml")]
        self.broker = f"redis://:of-valkey@127.0.0.1:{self.ports['VALKEY_PORT']}/0"
        self._storage: Storage | None = None

    def run(self, *arguments: str) -> str:
        done = subprocess.run([*self._command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def containers(self, service: str) -> list[Any]:
        return [self.client.containers.get(id) for id in self.run("ps", "-q", service).split()]

    def until_healthy(self, service: str, count: int = 1) -> None:
        def states() -> list[str]:
            return [container.attrs["State"]["Health"]["Status"] for container in self.containers(service)]

        until(lambda: states() == ["healthy"] * count, f"{count} healthy: {service}", 90, lambda: str(states()))

    @property
    def storage(self) -> Storage:
        if self._storage is None:
            self._storage = open_storage(self.broker)
        return self._storage

    def send(self, jobs: dict[str, float]) -> set[str]:
        """Send jobs, each of which ends at its time, as a producer that never heard of this package."""
        with Celery("bare", broker=self.broker, set_as_current=False) as app, app.connection_for_write() as connection:
            for index, end in jobs.items():
                app.send_task("watch.job", [{"until": end}], {"index": index}, connection=connection)
        return set(jobs)

    def handled(self) -> set[str]:
        return {record.index for record in self.storage.range("job")}

    def until_handled(self, indexes: set[str], timeout: float) -> None:
        until(lambda: self.handled() >= indexes, "all handled", timeout, lambda: f"missing {indexes - self.handled()}")

    def flower(self, path: str, login: str = "") -> int:
        """Return the status of Flower's answer."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.ports['FLOWER_PORT']}{path}")
        if login:
            request.add_header("Authorization", f"Basic {b64encode(login.encode()).decode()}")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as exc:
            exc.close()
            return exc.code

    def close(self) -> None:
        if self._storage:
            self._storage.close()
        self.run("down", "--volumes", "--remove-orphans", "--timeout", "1")


@pytest.fixture(scope="module")
def stack(docker_client: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """All of it, up and healthy."""
    stack = Stack(tmp_path_factory.mktemp("compose"), docker_client, _compose())
    try:
        stack.run("up", "--detach", "--build", "--scale", f"worker={WORKERS}")
        stack.until_healthy("worker", WORKERS)
        stack.until_healthy("flower")
        yield stack
    finally:
        stack.close()


def _compose() -> list[str]:
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose"]
    message = "neither docker-compose nor docker compose is on this machine"
    if in_ci():
        pytest.fail(message)
    pytest.skip(message)


def test_what_the_demo_feeds_is_handled_or_a_dead_letter(stack: Stack) -> None:
    stack.run(
        "--profile", "demo", "run", "--rm", "-T", "feed", "python", "-m", "watch_tasks.examples.feed", "--rate", "0"
    )

    def counted(*command: str) -> list[Any]:
        told = stack.run("exec", "-T", "worker", "watch-tasks", *command, "--json")
        return [json.loads(line) for line in told.splitlines()]

    # Of its 60 events ten are flaky jobs, of which three fail too often.
    until(lambda: counted("handled", "count")[-1]["count"] + len(counted("dead", "list")) == 60, "all 60 done", 60)
    assert [letter["reason"] for letter in counted("dead", "list")] == ["exhausted"] * 3


def test_flower_refuses_whoever_has_not_its_password(stack: Stack) -> None:
    assert [stack.flower("/"), stack.flower("/", "watch:wrong"), stack.flower("/api/workers")] == [401, 401, 401]
    assert [stack.flower("/", "watch:of-flower"), stack.flower("/healthcheck")] == [200, 200]


def test_valkey_refuses_whoever_has_not_its_password(stack: Stack) -> None:
    with redis.Redis(port=stack.ports["VALKEY_PORT"]) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()


def test_nothing_is_published_beyond_loopback(stack: Stack) -> None:
    published = {
        service: {port: [each["HostIp"] for each in at] for port, at in container.ports.items() if at}
        for service in ("valkey", "worker", "flower")
        for container in stack.containers(service)
    }

    assert published == {"valkey": {"6379/tcp": ["127.0.0.1"]}, "worker": {}, "flower": {"5555/tcp": ["127.0.0.1"]}}


def test_our_processes_run_as_the_fixed_user_and_can_write_only_where_they_must(stack: Stack) -> None:
    for service in ("worker", "flower"):
        for container in stack.containers(service):
            assert container.exec_run("id -u").output.strip() == b"10001"
            assert container.exec_run("touch /app/here /opt/watch/here").exit_code != 0


def test_a_killed_worker_container_loses_nothing(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    now = time.time()
    # One second's worth for eight places, ten times.
    jobs = stack.send({f"kill-{number}": now + 1 + number // 8 for number in range(80)})
    killed = stack.containers("worker")[0]
    until(lambda: _in_hand(killed) != set(), "the first worker has jobs", 20)

    killed.kill()

    began = time.monotonic()
    lost = _in_hand(killed)
    stack.until_handled(lost, 60)
    recovery = time.monotonic() - began
    stack.until_handled(jobs, 60)
    assert lost
    with capsys.disabled():
        print(f"\n{len(jobs)} sent, {len(lost)} in the killed worker's hands: 0 lost, recovered after {recovery:.1f} s")


def test_stop_ends_within_the_grace_period_and_loses_nothing(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    now = time.time()
    soon = stack.send({f"soon-{number}": now + 6 for number in range(3)})
    late = stack.send({f"late-{number}": now + 35 for number in range(3)})
    workers = [worker for worker in stack.containers("worker") if worker.status == "running"]
    until(lambda: set().union(*map(_in_hand, workers)) >= soon | late, "all are in hand", 20)

    began = time.monotonic()
    stack.run("stop")
    seconds = time.monotonic() - began

    codes = [worker.wait()["StatusCode"] for worker in workers]
    stack.run("start")
    stack.until_handled(soon | late, 60)
    calls = Counter(note["index"] for worker in workers for note in _notes(worker) if note["what"] == "began")
    assert seconds < GRACE
    assert KILLED not in codes
    assert {index: calls[index] for index in soon} == dict.fromkeys(soon, 1)
    with capsys.disabled():
        print(f"\nstopped in {seconds:.1f} s of {GRACE} s: {len(soon)} finished, {len(late)} given back, 0 lost")


def _notes(container: Any) -> list[dict[str, Any]]:
    lines = container.logs().decode(errors="replace").splitlines()
    return [json.loads(line[5:]) for line in lines if line.startswith("note ")]


def _in_hand(container: Any) -> set[str]:
    """What this worker began and has not ended."""
    notes = _notes(container)
    ended = {note["index"] for note in notes if note["what"] == "ended"}
    return {note["index"] for note in notes} - ended
