"""Many messages in one worker's hand: claimed together, recorded together, and what faults may make of that."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable

import pytest

from watch_tasks import Reason

from ..servers import RedisServer
from ..workers import Site, Worker, until

pytestmark = pytest.mark.worker

MakeSite = Callable[..., Site]

#: Room for many, and leases that end soon; one crash is enough to be dead, so that none can be counted unseen.
MANY = "worker_prefetch_multiplier = 100\n"
SHORT = {"WATCH_LEASE": "2", "WATCH_RENEW_EVERY": "0.5", "WATCH_MAX_CRASHES": "1"}

JOB = """
job = topic("job")

@job.handler
def work(message):
    note("begin", message, data=message.data)
    if message.data == "gate":
        wait_for("open")
    if message.data == "kill":
        os.kill(os.getpid(), 9)
    note("end", message, data=message.data)
"""

#: Takes its own claim away, as the takeover by another worker would.
FENCED = """
import redis
job = topic("job")

@job.handler
def work(message):
    note("begin", message, data=message.data)
    if message.data == "stolen" and not os.path.exists(os.path.join(os.environ["SITE"], "stole")):
        open(os.path.join(os.environ["SITE"], "stole"), "w").close()
        redis.Redis.from_url(os.environ["CELERY_BROKER_URL"]).delete(f"watch:s:{message.id}")
"""


def kinds(site: Site, index: str) -> Counter[str]:
    return Counter(event.event for event in site.storage.explain("job", index))


def send(site: Site, *data: object) -> list[str]:
    """Send them under their ids, before there is a worker: its first fetch brings all."""
    return [site.send("job", value) for value in data]


@pytest.fixture(params=["solo", "threads"])
def pool(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["solo", "threads", "prefork"])
def any_pool(request: pytest.FixtureRequest) -> str:
    """Those, and children: what more they do is in `test_groups.py`."""
    return str(request.param)


def work(site: Site, pool: str, *, at_once: int = 1) -> Worker:
    """Start a worker that runs so many handlers at once."""
    return site.worker(pool=pool, concurrency=at_once)


def in_hand(server: RedisServer) -> int:
    with server.client() as client:
        return sum(int(client.hlen(key)) for key in client.scan_iter("watch.held:*"))  # type: ignore[arg-type]


def waiting(server: RedisServer) -> int:
    with server.client() as client:
        return int(client.llen("celery"))  # type: ignore[arg-type]


def test_all_that_came_together_are_handled_in_their_order(make_site: MakeSite, any_pool: str) -> None:
    site = make_site(JOB, MANY, **SHORT)
    ids = send(site, *range(50))

    work(site, any_pool)

    site.until_handled(50)
    assert [line["id"] for line in site.lines() if line["handler"] == "begin"] == ids
    assert all(kinds(site, id) == {"sent": 1, "attempt": 1, "handler": 1, "handled": 1} for id in ids)


def test_a_killer_is_found_out_and_no_crash_counts_against_its_neighbours(make_site: MakeSite, pool: str) -> None:
    site = make_site(JOB, MANY, **SHORT)
    before = send(site, *range(15))
    (killer,) = send(site, "kill")
    after = send(site, *range(15, 30))

    for _ in range(2):
        work(site, pool).process.wait(60)
    work(site, pool)

    site.until_dead(1, 60)
    site.until_handled(30, 60)
    (letter,) = site.dead()
    assert (letter.id, letter.reason, letter.crashes) == (killer, Reason.KILLED_WORKER, 1)
    begun = Counter(line["id"] for line in site.lines() if line["handler"] == "begin")
    assert begun[killer] == 2, "its first run is not counted, its second is the last"
    assert {begun[id] for id in after} == {1}
    assert max(begun[id] for id in before) <= 2, "handled and not recorded yet when the worker was killed"
    assert all(kinds(site, id)["handled"] == 1 for id in [*before, *after])


def test_a_lone_killer_is_counted_from_its_first_run_on(make_site: MakeSite, pool: str) -> None:
    site = make_site(JOB, MANY, **SHORT)
    send(site, "kill")

    work(site, pool).process.wait(60)
    work(site, pool)

    site.until_dead(1, 60)
    assert site.calls() == {"begin": 1}


def test_one_that_was_taken_over_is_not_acked_and_the_others_are(
    make_site: MakeSite, valkey: RedisServer, any_pool: str
) -> None:
    site = make_site(FENCED, MANY, **SHORT)
    others = send(site, *range(5))
    (stolen,) = send(site, "stolen")
    others += send(site, *range(5, 10))

    work(site, any_pool)

    site.until_handled(11)
    until(lambda: in_hand(valkey) == 0, "all are acked")
    assert kinds(site, stolen)["fenced"] == 1
    assert site.calls("id") == {**dict.fromkeys(others, 1), stolen: 2}


def test_nothing_is_acked_while_the_storage_is_away(
    make_site: MakeSite, own_valkey: RedisServer, valkey: RedisServer, any_pool: str
) -> None:
    site = make_site(JOB, MANY, **SHORT, WATCH_STORAGE_BACKEND=own_valkey.url)
    ids = send(site, "gate", *range(5))
    work(site, any_pool)
    until(lambda: site.calls()["begin"] == 1, "the first one's handler runs")

    own_valkey.stop()
    site.touch("open")
    until(lambda: site.calls()["end"] >= 1, "it ends while the storage is away")
    signal.sigtimedwait([], 3)
    held = in_hand(valkey)
    own_valkey.start()

    site.until_handled(6, 60)
    until(lambda: in_hand(valkey) == 0, "all are acked")
    assert held == 6
    assert site.calls("id") == dict.fromkeys(ids, 2), "each began and ended once"


def test_a_stop_records_what_is_handled_and_gives_back_the_rest(
    make_site: MakeSite, valkey: RedisServer, any_pool: str
) -> None:
    site = make_site(JOB, MANY, **{**SHORT, "WATCH_LEASE": "30"})
    ids = send(site, 0, 1, "gate", *range(2, 9))
    worker = work(site, any_pool)
    until(lambda: site.calls()["begin"] == 3, "the third one's handler runs")

    worker.process.terminate()
    until(lambda: "Warm shutdown" in worker.text(), "it stops")
    signal.sigtimedwait([], 2)  # the event loop looks each second, and children learn of it then
    site.touch("open")
    worker.process.wait(30)

    assert (site.handled(), waiting(valkey), in_hand(valkey)) == (3, 7, 0)
    site.worker(concurrency=1)
    site.until_handled(10, 15)  # no lease has to end first
    assert all(kinds(site, id)["busy"] == 0 for id in ids)
    assert site.calls("id") == dict.fromkeys(ids, 2), "each began and ended once"


def test_a_stop_while_the_storage_is_away_sends_along_what_was_handled(
    make_site: MakeSite, own_valkey: RedisServer, any_pool: str
) -> None:
    site = make_site(JOB, MANY, **SHORT, WATCH_STORAGE_BACKEND=own_valkey.url)
    ids = send(site, "gate", *range(5))
    worker = work(site, any_pool)
    until(lambda: site.calls()["begin"] == 1, "the first one's handler runs")

    own_valkey.stop()
    site.touch("open")
    until(lambda: "the storage is away" in worker.text(), "an outcome cannot be stored")
    assert worker.stop(40) == 0, worker.text()
    own_valkey.start()
    work(site, any_pool)

    site.until_handled(6, 60)
    assert site.calls("id") == dict.fromkeys(ids, 2), "each began and ended once"


def test_what_is_handled_does_not_wait_for_a_handler_that_takes_long(make_site: MakeSite, any_pool: str) -> None:
    site = make_site(JOB, MANY, **SHORT)
    send(site, 0, 1, 2, "gate", 3)
    work(site, any_pool)

    until(lambda: site.calls() == {"begin": 4, "end": 3}, "the fourth one's handler runs", report=site.report)
    site.until_handled(3)
    site.touch("open")
    site.until_handled(5)


def test_leases_of_those_that_wait_are_renewed(make_site: MakeSite, pool: str) -> None:
    site = make_site(JOB, MANY, **SHORT)
    ids = send(site, "gate", *range(5))
    work(site, pool)
    until(lambda: site.calls()["begin"] == 1, "the first one's handler runs")

    signal.sigtimedwait([], 5)  # more than two leases
    site.worker(concurrency=1)
    for id in ids[1:]:
        site.send("job", "sent twice", task_id=id)
    until(lambda: sum(kinds(site, id)["busy"] for id in ids) >= 5, "the other is refused", report=site.report)
    site.touch("open")

    site.until_handled(6)
    until(lambda: site.storage.counters("job").duplicates >= 5, "each is known", report=site.report)
    assert site.calls("id") == dict.fromkeys(ids, 2), "each began and ended once"


def test_the_same_index_twice_is_settled_after_the_first(make_site: MakeSite, any_pool: str) -> None:
    site = make_site(JOB.replace('topic("job")', 'topic("job", once="index")'), MANY, **SHORT)
    for number in (1, 2, 3, 3, 3):
        site.send("job", number, index=f"i{number}")

    work(site, any_pool)

    until(lambda: site.storage.counters("job").duplicates == 2, "two are duplicates", report=site.report)
    assert site.handled() == 3
    assert site.calls() == {"begin": 3, "end": 3}


def test_a_failure_among_them_is_tried_again(make_site: MakeSite, any_pool: str) -> None:
    site = make_site(
        """
job = topic("job", retry=RetryPolicy(max_retries=2, backoff=0.01))

@job.handler
def work(message):
    note("begin", message)
    if message.data % 3 == 0:
        raise ValueError("no")
""",
        MANY,
        **SHORT,
    )
    send(site, *range(1, 31))

    work(site, any_pool)

    site.until_handled(20)
    site.until_dead(10)
    assert site.calls() == {"begin": 20 + 30}


def test_one_that_expires_while_it_waits_is_dead(make_site: MakeSite, any_pool: str) -> None:
    site = make_site(JOB, MANY, **SHORT)
    send(site, "gate")
    late = site.send("job", 1, expires=2)
    send(site, 2)
    work(site, any_pool)
    until(lambda: site.calls()["begin"] == 1, "the first one's handler runs")

    signal.sigtimedwait([], 2)
    site.touch("open")

    site.until_handled(2)
    site.until_dead(1)
    (letter,) = site.dead()
    assert (letter.id, letter.reason) == (late, Reason.EXPIRED)
    assert site.calls() == {"begin": 2, "end": 2}
