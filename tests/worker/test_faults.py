"""What workers do when they are killed, frozen, cut off or fed with messages that kill them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from watch_tasks import Reason

from ..servers import RedisServer
from ..workers import Site, until

pytestmark = pytest.mark.worker

MakeSite = Callable[..., Site]

#: Leases that end soon.
SOON = "watch_lease = 2\nwatch_renew_every = 0.5\n"
SHORT = {"WATCH_LEASE": "2", "WATCH_RENEW_EVERY": "0.5"}

GATE = """
gate = topic("gate", retry=RetryPolicy(max_retries=0))

@gate.handler
def enter(message):
    note("enter", message)
    wait_for("open")
    note("leave", message)
"""


def pass_time(seconds: float) -> None:
    """Let real time go by where that is the fault itself: an outage, a deadline of the broker's."""
    signal.sigtimedwait([], seconds)


def kinds(site: Site, topic: str, index: str) -> list[str]:
    return [event.event for event in site.storage.explain(topic, index)]


def test_a_message_survives_the_kill_of_its_worker(make_site: MakeSite) -> None:
    site = make_site(GATE, SOON, **SHORT)
    first = site.worker()
    site.send("gate", 1, index="a")
    until(lambda: site.calls()["enter"] == 1, "the handler runs")

    first.kill()
    site.touch("open")
    site.worker()

    site.until_handled(1, 120)
    assert site.calls() == {"enter": 2, "leave": 1}
    assert kinds(site, "gate", "a").count("handled") == 1


def test_of_two_workers_one_handles(make_site: MakeSite) -> None:
    site = make_site(GATE, **SHORT)
    site.worker(concurrency=1)
    site.worker(concurrency=1)

    for _ in range(2):
        site.send("gate", 1, index="a", task_id="the-same")
    until(lambda: "busy" in kinds(site, "gate", "a"), "one of them is refused")
    site.touch("open")

    site.until_handled(1)
    until(lambda: site.storage.counters("gate").duplicates == 1, "the other is a duplicate")
    assert site.calls() == {"enter": 1, "leave": 1}


def test_a_handler_that_outlasts_its_lease_is_not_started_again(make_site: MakeSite) -> None:
    site = make_site(GATE, SOON, **SHORT)
    site.worker(concurrency=2)
    site.worker(concurrency=2)
    site.send("gate", 1, index="a")
    until(lambda: site.calls()["enter"] == 1, "the handler runs")

    pass_time(7)  # more than three leases
    site.touch("open")

    site.until_handled(1)
    assert site.calls() == {"enter": 1, "leave": 1}
    assert "busy" not in kinds(site, "gate", "a")


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_frozen_worker_that_wakes_is_fenced(make_site: MakeSite, pool: str) -> None:
    site = make_site(GATE, SOON, **SHORT)
    frozen = site.worker(concurrency=1, pool=pool)
    site.send("gate", 1, index="a")
    until(lambda: site.calls()["enter"] == 1, "the handler runs")

    frozen.signal(signal.SIGSTOP, children=True)
    site.worker(concurrency=1, pool=pool)
    until(lambda: site.calls()["enter"] == 2, "another took over", 120, site.report)
    tokens = [line["token"] for line in site.lines()]
    site.touch("open")
    site.until_handled(1)
    frozen.signal(signal.SIGCONT, children=True)

    until(lambda: "fenced" in kinds(site, "gate", "a"), "the frozen one is refused", 60, site.report)
    assert tokens[1] > tokens[0]
    assert site.storage.counters("gate").handled == 1
    assert frozen.is_running()


def test_a_killer_of_workers_is_dead_after_three(make_site: MakeSite) -> None:
    site = make_site(
        """
mixed = topic("mixed")

@mixed.handler
def run(message):
    note("run", message)
    if message.data == "kill":
        os.kill(os.getpid(), 9)
"""
    )
    worker = site.worker()

    neighbours = [site.send("mixed", number) for number in range(10)]
    killer = site.send("mixed", "kill")
    neighbours += [site.send("mixed", number) for number in range(10)]

    site.until_dead(1, 60)
    site.until_handled(20, 60)
    (letter,) = site.dead()
    assert (letter.id, letter.reason, letter.crashes, letter.data) == (killer, Reason.KILLED_WORKER, 3, "kill")
    assert site.calls("id")[killer] == 3
    assert {site.calls("id")[id] for id in neighbours} == {1}
    assert worker.is_running()


def test_a_killer_of_whole_workers_is_dead_after_three(make_site: MakeSite) -> None:
    site = make_site(
        """
deadly = topic("deadly")

@deadly.handler
def run(message):
    note("run", message)
    os.kill(os.getpid(), 9)
""",
        SOON,
        **SHORT,
    )
    site.send("deadly", 1)

    for tries in (1, 2, 3):
        worker = site.worker(pool="solo")
        until(lambda: site.calls()["run"] == tries, f"try {tries}", 60, site.report)  # noqa: B023
        worker.process.wait(20)
    site.worker(pool="solo")

    site.until_dead(1, 60)
    assert [(letter.reason, letter.crashes) for letter in site.dead()] == [(Reason.KILLED_WORKER, 3)]


def test_a_handler_that_nothing_cuts_off_ends_its_process(make_site: MakeSite) -> None:
    site = make_site(
        """
import signal as _signal
stuck = topic("stuck", timeout=0.3)

@stuck.handler
def hang(message):
    note("hang", message)
    _signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGALRM})
    time.sleep(60)
""",
        WATCH_KILL_AFTER="0.5",
        WATCH_MAX_CRASHES="2",
    )
    site.worker()

    site.send("stuck", 1)

    site.until_dead(1, 60)
    assert [(letter.reason, letter.crashes) for letter in site.dead()] == [(Reason.KILLED_WORKER, 2)]


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_storage_away_at_commit_repeats_nothing(make_site: MakeSite, own_valkey: RedisServer, pool: str) -> None:
    site = make_site(GATE, **SHORT, WATCH_STORAGE_BACKEND=own_valkey.url)
    site.worker(concurrency=2, pool=pool)
    for number in range(4):
        site.send("gate", number, index=str(number))
    until(lambda: site.calls()["enter"] == 2, "handlers run", report=site.report)

    own_valkey.stop()
    site.touch("open")
    until(lambda: site.calls()["leave"] == 2, "they end while the storage is away")
    pass_time(8)
    own_valkey.start()

    site.until_handled(4, 60)
    assert set(site.calls("index").values()) == {2}, "each entered and left once"


def test_a_stop_while_the_storage_is_away_sends_what_is_known_along(
    make_site: MakeSite, own_valkey: RedisServer
) -> None:
    site = make_site(GATE, **SHORT, WATCH_STORAGE_BACKEND=own_valkey.url)
    worker = site.worker(concurrency=1)
    site.send("gate", 1, index="a")
    until(lambda: site.calls()["enter"] == 1, "the handler runs")

    own_valkey.stop()
    site.touch("open")
    until(lambda: site.calls()["leave"] == 1, "it ends while the storage is away")
    until(lambda: "the storage is away" in worker.text(), "its outcome cannot be stored")
    assert worker.stop(40) == 0, worker.text()
    own_valkey.start()
    site.worker()

    site.until_handled(1, 60)
    assert site.calls() == {"enter": 1, "leave": 1}


def test_an_unknown_topic_is_put_back_and_then_dead(make_site: MakeSite) -> None:
    site = make_site(GATE, WATCH_UNKNOWN_GRACE="1.5")
    worker = site.worker()

    id = site.send("nosuch", {"n": 1})

    site.until_dead(1)
    (letter,) = site.dead()
    assert (letter.id, letter.topic, letter.reason) == (id, "nosuch", Reason.UNKNOWN_TOPIC)
    assert letter.raw
    assert b'"n": 1' in letter.raw
    assert worker.is_running()


def test_a_new_worker_takes_what_an_old_one_does_not_know(make_site: MakeSite) -> None:
    site = make_site(GATE)
    old = site.worker()
    site.send("fresh", 1)
    until(lambda: "fresh" in old.text() or not site.storage.topics(), "the old worker has seen it")

    with (site.folder / "topics_here.py").open("a") as module:
        module.write('\nfresh = topic("fresh")\n@fresh.handler\ndef look(message): note("look", message)\n')
    site.worker()

    site.until_handled(1, 40)
    assert site.dead() == []


def test_expired_and_revoked_messages_are_kept(make_site: MakeSite) -> None:
    site = make_site(GATE)
    site.worker(concurrency=1)
    running = site.send("gate", 1)
    until(lambda: site.calls()["enter"] == 1, "the worker is at work")

    expired = site.send("gate", 2, index="late", expires=0.5)
    revoked = site.send("gate", 3, index="unwanted")
    site.bare.control.revoke(revoked)
    pass_time(1)
    site.touch("open")

    site.until_dead(2)
    assert {(letter.id, letter.index, letter.reason, letter.data) for letter in site.dead()} == {
        (expired, "late", Reason.EXPIRED, 2),
        (revoked, "unwanted", Reason.REVOKED, 3),
    }
    site.until_handled(1)
    assert site.calls("id") == {running: 2}


def test_a_warm_stop_loses_nothing(make_site: MakeSite) -> None:
    site = make_site(
        """
quick = topic("quick")

@quick.handler
def work(message):
    note("work", message)
    time.sleep(0.05)
"""
    )
    for number in range(60):
        site.send("quick", number, index=str(number))

    for _ in range(3):
        worker = site.worker()
        before = site.handled()
        until(lambda: site.handled() > before + 5, "some are handled")  # noqa: B023
        assert worker.stop() == 0
    site.worker()

    site.until_handled(60)
    assert set(site.calls("index").values()) == {1}


STOPPED = """
import traceback
from celery.signals import worker_shutting_down

@worker_shutting_down.connect(weak=False)
def tell(**_):
    with open("stack", "w") as file:
        file.write("".join(traceback.format_stack()))

quick = topic("quick")

@quick.handler
def work(message):
    note("work", message)
    time.sleep(0.02)
"""


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_cold_stop_comes_at_a_turn_of_the_loop_and_loses_nothing(make_site: MakeSite, pool: str) -> None:
    site = make_site(STOPPED)
    worker = site.worker(pool=pool)
    for number in range(150):
        site.send("quick", number, index=str(number))
    until(lambda: site.handled() > 20, "some are handled")

    worker.signal(signal.SIGQUIT)

    until(lambda: not worker.is_running(), "the worker ends", 20, worker.text)
    stack = (site.folder / "stack").read_text()
    assert "cold.py" in stack, f"where the signal came, it would be: {stack}"
    for trouble in ("Unrecoverable", "Error on", "Error in timer", "Traceback"):
        assert trouble not in worker.text()
    site.worker(pool=pool)
    site.until_handled(150, 60)
    assert not site.dead()


@pytest.mark.parametrize("size", [1, 300_000], ids=["sent", "sent by half"])
def test_a_stop_is_swift_where_a_child_was_sent_what_it_has_not_taken_yet(make_site: MakeSite, size: int) -> None:
    site = make_site(GATE)
    worker = site.worker(concurrency=1)
    (child,) = worker.children()
    os.kill(child, signal.SIGSTOP)
    site.touch("open")
    site.send("gate", "x" * size)
    until(lambda: "received" in worker.text(), "the child is sent it")

    worker.process.terminate()
    until(lambda: "Warm shutdown" in worker.text(), "the worker is stopped")
    pass_time(1)
    os.kill(child, signal.SIGCONT)

    assert worker.stop(15) == 0, "Celery's pool would wait for 30 s"
    site.worker()
    site.until_handled(1)
    assert site.calls() == {"enter": 1, "leave": 1}
    assert "without a word" not in worker.text(), "the child gave it back"


def test_a_worker_that_cannot_work_says_all_that_is_wrong(make_site: MakeSite) -> None:
    site = make_site('empty = topic("empty")\n', "watch_leese = 3\n", WATCH_RENEW_EVERY="soon")

    ended = site.run("-m", "celery", "-A", "watch_tasks", "worker", "-c", "1")

    assert ended.returncode == 1
    assert "unknown setting `watch_leese`, did you mean `watch_lease`?" in ended.stderr
    assert "setting `watch_renew_every` must be seconds above 0, got 'soon'" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("redis://:s3c/ret@localhost:6379/0", "it cannot be read; characters such as / and #"),
        ("nosuch://localhost", "there is no transport `nosuch`"),
    ],
)
def test_a_broker_url_that_is_none_is_a_complaint_without_its_password(
    make_site: MakeSite, url: str, complaint: str
) -> None:
    site = make_site(GATE, CELERY_BROKER_URL=url, WATCH_STORAGE_BACKEND="memory://")

    ended = site.run("-m", "celery", "-A", "watch_tasks", "worker", "-P", "solo")

    assert ended.returncode == 1
    assert f"setting `broker_url` must be the URL of a broker, such as redis://localhost:6379/0: {complaint}" in (
        ended.stderr
    )
    assert "s3c" not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_storage_that_cannot_keep_the_promises_is_one_complaint_of_all(make_site: MakeSite) -> None:
    site = make_site('empty = topic("empty")\n', WATCH_STORAGE_BACKEND="db+mysql://user:s3cret@localhost/results")

    ended = site.run("-m", "celery", "-A", "watch_tasks", "worker", "-c", "1")

    assert ended.returncode == 1
    assert "setting `watch_storage_backend`: storage `db+mysql` cannot keep the promises" in ended.stderr
    assert "topic `empty` has no handlers" in ended.stderr
    assert "s3cret" not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_transactional_topic_on_a_storage_without_transactions_is_a_complaint(make_site: MakeSite) -> None:
    site = make_site(
        """
paid = topic("paid", transactional=True)

@paid.handler
def pay(message):
    note("pay", message)
"""
    )

    ended = site.run("-m", "celery", "-A", "watch_tasks", "worker", "-c", "1")

    assert ended.returncode == 1
    assert (
        f"topic `paid` is transactional, and storage `{site.storage!r}` has no transactions for handlers: use "
        "postgresql://… or sqlite:///…"
    ) in ended.stderr
    assert "Traceback" not in ended.stderr
