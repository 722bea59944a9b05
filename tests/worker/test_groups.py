"""Single messages that go to a child of the prefork pool in groups: what each keeps of its own, and what faults make.

What they have in common with messages that one process has in hand is in `test_gathering.py`.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import redis

from watch_tasks import Reason
from watch_tasks.storage.protocol import Claim, Refusal, Refused

from ..servers import RedisServer
from ..workers import Site, until
from .test_batches import events_of
from .test_gathering import MANY, in_hand, kinds, send, waiting

pytestmark = pytest.mark.worker

MakeSite = Callable[..., Site]

SHORT = {"WATCH_LEASE": "2", "WATCH_RENEW_EVERY": "0.5"}

#: Messages that teach a worker how long its handler takes.
WARM = 20

#: Has any pace below a second count as quick: on a busy machine a child may take some time for any message.
PATIENT = """
from watch_tasks.worker import appetite, groups
groups.SPAN = appetite.SPAN = 60.0
appetite._QUICK = appetite._SLOW
"""

#: `job` is quick but for what its data says; while `gate` has the child, messages wait.
JOB = (
    PATIENT
    + """
from celery import current_task, signals

gate = topic("gate")
job = topic("job", retry=RetryPolicy(max_retries=1, backoff=0.01), timeout=TIMEOUT)

@gate.handler
def keep(message):
    note("gate", message)
    wait_for(message.data)

@job.handler
def work(message):
    note("begin", message, data=message.data, task=current_task.request.id)
    if message.data == "kill":
        os.kill(os.getpid(), 9)
    if message.data == "slow":
        wait_for("slow")
    if message.data == "slow too":
        wait_for("slow too")
    if message.data == "hang":
        time.sleep(30)
    if message.data == "fail":
        raise ValueError("no")
    if message.data == "discard":
        raise Discard("no")
    if message.data == "snooze" and not message.copy:
        raise Snooze(0.1)
    note("end", message, data=message.data)

@signals.task_prerun.connect
def before(task_id, **_):
    note("prerun", Message(0, "job", index=task_id))

@signals.task_postrun.connect
def after(task_id, state, **_):
    note("postrun", Message(0, "job", index=task_id), state=state)
""".replace("TIMEOUT", "None")
)


def gather(site: Site, *data: object, warm: int = WARM) -> list[str]:
    """Send `job` messages that all wait when the only child of the worker is free, and is known to be quick."""
    for number in range(warm):
        site.send("job", f"warm {number}")
    site.until_handled(warm, topic="job")
    gates = site.calls()["gate"]
    site.send("gate", "open")
    until(lambda: site.calls()["gate"] == gates + 1, "the child is taken", report=site.report)
    ids = send(site, *data)
    until(lambda: all(f"[{id}] received" in site.report() for id in ids), "all have come", report=site.report)
    site.touch("open")
    return ids


def together(site: Site, ids: list[str]) -> int:
    """How many were claimed at one time."""
    attempts = Counter(event.at for id in ids for event in site.storage.explain("job", id) if event.event == "attempt")
    return max(attempts.values())


def begun(site: Site) -> Counter[str]:
    return Counter(line["id"] for line in site.lines() if line["handler"] == "begin")


def answers(site: Site) -> bool:
    """Whether a worker answers. A connection of kombu's pool may have been closed since its last use."""
    with suppress(redis.ConnectionError):
        return bool(site.bare.control.ping(timeout=2, limit=1))
    return False


def test_what_waits_goes_to_a_child_together(make_site: MakeSite, valkey: RedisServer) -> None:
    site = make_site(JOB, MANY, **SHORT)
    worker = site.worker(concurrency=1)

    ids = gather(site, *range(20))

    site.until_handled(WARM + 20, topic="job")
    until(lambda: in_hand(valkey) == 0, "all are acked")
    assert together(site, ids) == 20
    assert [line["id"] for line in site.lines() if line["handler"] == "begin"][WARM:] == ids, "in their order"
    assert all(kinds(site, id) == {"sent": 1, "attempt": 1, "handler": 1, "handled": 1} for id in ids)
    assert worker.is_running()


def test_quick_ones_go_together_at_their_own_pace(make_site: MakeSite) -> None:
    site = make_site(JOB.replace(PATIENT, ""), MANY, **SHORT)
    site.worker(concurrency=1)
    # The first ones are slow: they make the child's connections.
    ids = gather(site, *range(20), warm=200)
    site.until_handled(220, topic="job")
    assert together(site, ids) > 1


def test_each_is_a_task_of_its_own(make_site: MakeSite) -> None:
    site = make_site(JOB, MANY, **SHORT)
    site.worker("-E", concurrency=1)

    with events_of(site) as seen:
        ids = gather(site, 1, "fail", 2, "discard", 3, "snooze")
        site.until_handled(WARM + 4, topic="job")
        site.until_dead(2)
        wanted = {ids[0]: "task-succeeded", ids[1]: "task-retried", ids[3]: "task-failed", ids[5]: "task-retried"}
        until(
            lambda: all(
                (id, kind) in {(event.get("uuid"), event["type"]) for event in seen} for id, kind in wanted.items()
            ),
            "Flower is told of each",
        )

    assert together(site, ids) >= 4
    assert {(letter.reason, letter.retries) for letter in site.dead()} == {
        (Reason.EXHAUSTED, 1),
        (Reason.DISCARDED, 0),
    }
    begins = [line for line in site.lines() if line["handler"] == "begin"]
    assert all(line["task"] == line["id"] for line in begins)
    runs = Counter(
        (line["handler"], line["index"]) for line in site.lines() if line["handler"] in ("prerun", "postrun")
    )
    assert all(runs["prerun", id] == runs["postrun", id] == begun(site)[id] for id in ids)


@pytest.mark.parametrize("most", [1, 3])
def test_the_crash_of_a_child_counts_against_the_one_that_ran(
    make_site: MakeSite, valkey: RedisServer, most: int
) -> None:
    site = make_site(JOB, f"{MANY}watch_max_crashes = {most}\n", **SHORT)
    worker = site.worker(concurrency=1)

    ids = gather(site, 1, 2, "kill", 3, 4)

    site.until_dead(1, 60)
    site.until_handled(WARM + 4, 60, topic="job")
    until(lambda: waiting(valkey) + in_hand(valkey) == 0, "all are acked")
    (letter,) = site.dead()
    assert (letter.id, letter.reason, letter.crashes) == (ids[2], Reason.KILLED_WORKER, most)
    assert together(site, ids[:3]) == 3
    assert begun(site)[ids[2]] == most, "counted from its first run on"
    assert max(begun(site)[id] for id in ids[:2]) <= 2, "handled and not recorded yet when their child was killed"
    assert {begun(site)[id] for id in ids[3:]} == {1}
    assert all(kinds(site, id)["handled"] == 1 for id in ids if id != ids[2])
    assert worker.is_running()


def test_a_child_that_somebody_else_kills_costs_what_it_ran_one_crash(make_site: MakeSite) -> None:
    site = make_site(JOB, MANY, **SHORT)
    worker = site.worker(concurrency=1)

    ids = gather(site, 1, "slow", 2)
    until(lambda: begun(site)[ids[1]] == 1, "it runs")
    os.kill(worker.children()[0], signal.SIGKILL)
    until(lambda: begun(site)[ids[1]] == 2, "it runs again", report=site.report)
    site.touch("slow")

    site.until_handled(WARM + 3, topic="job")
    assert not site.dead()
    assert begun(site)[ids[2]] == 1


def test_a_worker_that_is_killed_costs_a_group_nothing(make_site: MakeSite, valkey: RedisServer) -> None:
    site = make_site(JOB, f"{MANY}watch_max_crashes = 1\n", **SHORT)
    first = site.worker(concurrency=1)
    ids = gather(site, 1, "slow", 2, 3)
    until(lambda: begun(site)[ids[1]] == 1, "it runs")
    assert together(site, ids) == 4

    first.kill()
    site.worker(concurrency=1)
    until(lambda: begun(site)[ids[1]] == 2, "it runs again", report=site.report)
    site.touch("slow")

    site.until_handled(WARM + 4, topic="job")
    until(lambda: waiting(valkey) + in_hand(valkey) == 0, "all are acked")
    assert not site.dead()
    assert begun(site)[ids[0]] <= 2, "handled, and perhaps not recorded yet"
    assert [begun(site)[id] for id in ids[1:]] == [2, 1, 1]


def test_who_stands_behind_a_slow_one_is_given_back_and_what_is_done_is_recorded(make_site: MakeSite) -> None:
    site = make_site(JOB, MANY, **SHORT)
    site.worker(concurrency=1)

    ids = gather(site, 1, 2, "slow", *range(3, 13))
    site.until_handled(WARM + 2, topic="job")
    assert begun(site)[ids[2]] == 1
    assert not set(begun(site)) & set(ids[3:])
    site.touch("slow")

    site.until_handled(WARM + 13, topic="job")
    assert together(site, ids) >= 5
    assert begun(site) == {**begun(site), **dict.fromkeys(ids, 1)}
    assert kinds(site, ids[3])["attempt"] == 2, "it was claimed once more, by itself"


def test_a_message_that_hangs_is_cut_off_and_its_neighbours_are_handled(make_site: MakeSite) -> None:
    site = make_site(JOB.replace("timeout=None", "timeout=0.5"), MANY, **SHORT)
    site.worker(concurrency=1)

    ids = gather(site, 1, "hang", 2)

    site.until_handled(WARM + 2, topic="job")
    site.until_dead(1)
    assert site.dead()[0].id == ids[1]
    assert "HandlerTimeoutError" in site.dead()[0].error


def test_leases_of_a_group_are_renewed(make_site: MakeSite) -> None:
    site = make_site(JOB, MANY, **SHORT)
    site.worker(concurrency=1)
    ids = gather(site, 1, "slow", 2)
    until(lambda: begun(site)[ids[1]] == 1, "it runs")

    signal.sigtimedwait([], 5)  # more than two leases
    rest: dict[str, Any] = {"lease": 2.0, "digest": "", "retention": 86_400.0, "sent_at": 0.0}
    asked = [
        Claim(topic="job", index=id, id=id, copy=0, once="message", worker="somebody else", **rest) for id in ids[1:]
    ]
    answers = site.storage.claim_many(asked)
    site.touch("slow")

    assert [answer.why for answer in answers if isinstance(answer, Refused)] == [Refusal.BUSY] * 2
    site.until_handled(WARM + 3, topic="job")
    assert begun(site) == {**begun(site), **dict.fromkeys(ids, 1)}


def test_a_connection_that_breaks_repeats_nothing_that_runs_and_loses_nothing(
    make_site: MakeSite, own_valkey: RedisServer
) -> None:
    site = make_site(JOB, MANY, url=own_valkey.url, **SHORT)
    worker = site.worker(concurrency=1)
    ids = gather(site, 1, "slow", 2)
    until(lambda: begun(site)[ids[1]] == 1, "it runs")
    ids += send(site, *range(10))
    until(lambda: all(f"[{id}] received" in worker.text() for id in ids), "all have come")

    with own_valkey.client() as client:
        client.client_kill_filter(_type="normal", skipme=True)
        client.client_kill_filter(_type="pubsub", skipme=True)
    until(lambda: worker.text().count("Connected to") == 2, "it connects again", report=site.report)
    again = [f"[{id}] received" for id in ids[3:]]
    until(lambda: all(worker.text().count(text) == 2 for text in again), "what no child had comes again", 5)
    site.touch("slow")

    site.until_handled(WARM + 13, 60, topic="job")
    until(lambda: waiting(own_valkey) + in_hand(own_valkey) == 0, "all are acked", 60)
    assert begun(site) == {**begun(site), **dict.fromkeys(ids, 1)}


def test_what_a_child_gave_back_and_no_other_has_goes_back_with_a_connection(
    make_site: MakeSite, own_valkey: RedisServer
) -> None:
    site = make_site(JOB, MANY, url=own_valkey.url, **SHORT)
    worker = site.worker(concurrency=1)
    ids = gather(site, 1, "slow", "slow too", 2, 3)
    site.until_handled(WARM + 1, topic="job")  # a second later: what the child did not begin, it gives back
    site.touch("slow")
    until(lambda: begun(site)[ids[2]] == 1, "it runs, and the others wait for it", report=site.report)

    with own_valkey.client() as client:
        client.client_kill_filter(_type="normal", skipme=True)
        client.client_kill_filter(_type="pubsub", skipme=True)
    until(lambda: worker.text().count("Connected to") == 2, "it connects again", report=site.report)
    site.touch("slow too")

    site.until_handled(WARM + 5, topic="job")
    until(lambda: waiting(own_valkey) + in_hand(own_valkey) == 0, "all are acked", 60)
    assert begun(site) == {**begun(site), **dict.fromkeys(ids, 1)}


@pytest.mark.parametrize("by", ["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("number", [1, 2], ids=["runs", "waits behind"])
def test_a_revoked_one_takes_its_child_along_and_costs_its_neighbours_nothing(
    make_site: MakeSite, number: int, by: str
) -> None:
    site = make_site(JOB, f"{MANY}watch_max_crashes = 1\n", **SHORT)
    site.worker(concurrency=1)
    ids = gather(site, 1, "slow", 2)
    until(lambda: begun(site)[ids[1]] == 1, "it runs")

    site.bare.control.revoke(ids[number], terminate=True, signal=by)

    site.until_dead(1)
    site.touch("slow")
    site.until_handled(WARM + 2, topic="job")
    assert [(letter.id, letter.reason) for letter in site.dead()] == [(ids[number], Reason.REVOKED)]


def test_a_stop_waits_for_what_runs_and_not_for_what_the_child_has_next(
    make_site: MakeSite, valkey: RedisServer
) -> None:
    site = make_site(JOB, MANY, **SHORT)
    worker = site.worker(concurrency=1)
    ids = gather(site, "slow", 1)
    until(lambda: begun(site)[ids[0]] == 1, "it runs")
    ids += send(site, 2)
    until(lambda: f"[{ids[2]}] received" in worker.text(), "the next has come")

    worker.process.terminate()
    signal.sigtimedwait([], 2)  # the event loop looks each second
    site.touch("slow")
    worker.process.wait(60)

    assert set(begun(site)) & set(ids) == {ids[0]}
    site.worker(concurrency=1)
    site.until_handled(WARM + 3, topic="job")
    until(lambda: waiting(valkey) + in_hand(valkey) == 0, "all are acked")
    assert begun(site) == {**begun(site), **dict.fromkeys(ids, 1)}


@pytest.mark.parametrize("is_killed", [True, False], ids=["the child is killed", "the worker is stopped"])
def test_nothing_is_acked_before_it_is_recorded(
    make_site: MakeSite, valkey: RedisServer, own_valkey: RedisServer, is_killed: bool
) -> None:
    site = make_site(JOB, MANY, WATCH_STORAGE_BACKEND=own_valkey.url, **SHORT)
    worker = site.worker(concurrency=1)
    ids = gather(site, 1, "slow", 2)
    until(lambda: begun(site)[ids[1]] == 1, "it runs")
    held = in_hand(valkey)

    own_valkey.signal(signal.SIGSTOP)
    site.touch("slow")
    until(lambda: [line["id"] for line in site.lines() if line["handler"] == "end"][-1] in ids[1:], "it is handled")
    signal.sigtimedwait([], 2)
    assert in_hand(valkey) == held
    if is_killed:
        os.kill(worker.children()[0], signal.SIGKILL)
    else:  # what is handled goes on by copies that say so
        worker.stop()
    own_valkey.signal(signal.SIGCONT)

    if not is_killed:
        site.worker(concurrency=1)
    site.until_handled(WARM + 3, 60, topic="job")
    until(lambda: waiting(valkey) + in_hand(valkey) == 0, "all are acked", 60)
    assert all(kinds(site, id)["handled"] == 1 for id in ids)
    assert not site.dead()
    if not is_killed:
        assert begun(site) == {**begun(site), **dict.fromkeys(ids, 1)}


def test_who_is_revoked_while_it_waits_behind_a_slow_one_takes_no_child_along(make_site: MakeSite) -> None:
    site = make_site(JOB, f"{MANY}watch_max_crashes = 1\n", **SHORT)
    site.worker(concurrency=1)
    ids = gather(site, 1, "slow", "slow too", "hang")
    site.until_handled(WARM + 1, topic="job")  # a second later: what the child did not begin, it gives back
    site.touch("slow")
    until(lambda: begun(site)[ids[2]] == 1, "it runs, and the last one waits for it", report=site.report)

    site.bare.control.revoke(ids[3], terminate=True, signal="SIGKILL")
    until(lambda: answers(site), "it was told: it hears of one thing after the other")
    site.touch("slow too")

    site.until_dead(1)
    site.until_handled(WARM + 3, topic="job")
    assert [(letter.id, letter.reason) for letter in site.dead()] == [(ids[3], Reason.REVOKED)]
    assert begun(site)[ids[2]] == 1


@pytest.mark.parametrize("count", [1, 2])
def test_who_waits_goes_to_a_child_that_is_added(make_site: MakeSite, count: int) -> None:
    site = make_site(JOB, MANY, **SHORT)
    worker = site.worker(concurrency=1)
    if count == 1:  # of which the only one is taken away first
        site.bare.control.broadcast("pool_shrink", arguments={"n": 1}, reply=True)
    else:
        site.send("gate", "open")
        until(lambda: site.calls()["gate"] == 1, "the child is taken", report=site.report)
    ids = send(site, 1, 2, 3)
    until(lambda: all(f"[{id}] received" in site.report() for id in ids), "all have come", report=site.report)

    site.bare.control.broadcast("pool_grow", arguments={"n": 1}, reply=True)

    site.until_handled(3, topic="job")
    assert worker.is_running()


@pytest.mark.parametrize(
    ("topics", "config"),
    [
        (JOB, MANY + "worker_max_tasks_per_child = 1000\n"),
        (JOB.replace('topic("job", ', 'topic("job", once="none", '), MANY),
        (
            JOB.replace(PATIENT, "").replace(
                'if message.data == "kill"', "time.sleep(0.06)\n    if message.data == 'kill'"
            ),
            MANY,
        ),
    ],
    ids=["children that are replaced", "unclaimed", "slow of late"],
)
def test_some_always_go_one_by_one(make_site: MakeSite, topics: str, config: str) -> None:
    site = make_site(topics, config, **SHORT)
    site.worker(concurrency=1)

    ids = gather(site, *range(5))

    site.until_handled(WARM + 5, topic="job")
    if 'once="none"' not in topics:
        assert together(site, ids) == 1
    assert begun(site) == {**begun(site), **dict.fromkeys(ids, 1)}
