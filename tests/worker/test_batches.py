"""Batch handlers on real workers: collected across messages, handled in one call, each acked by its own outcome."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from watch_tasks import Reason

from ..workers import Site, until

pytestmark = pytest.mark.worker

MakeSite = Callable[..., Site]

#: Notes each call with all it got. Data says what a message does: `fail`, `kill` its process, `hang`.
ROWS = """
rows = topic("rows", retry=RetryPolicy(max_retries=1), timeout=TIMEOUT, once="ONCE")

@rows.batch_handler(size=SIZE, seconds=SECONDS)
def store(messages):
    note("store", messages[0], data=[message.data for message in messages], tokens=[m.token for m in messages])
    if "slow" in [message.data for message in messages]:
        wait_for("go")
    if "kill" in [message.data for message in messages]:
        os.kill(os.getpid(), signal.SIGKILL)
    if "raise" in [message.data for message in messages]:
        raise RuntimeError("bad row")
    return {m.id: Snooze(0.1) if m.data == "snooze" and not m.copy else Discard("no") if m.data == "discard" else
            ValueError("no") if m.data == "fail" else None for m in messages}
"""


def rows(size: int = 10, seconds: float = 1.0, timeout: float | None = None, once: str = "message") -> str:
    settings = {"SIZE": size, "SECONDS": seconds, "TIMEOUT": timeout, "ONCE": once}
    text = ROWS
    for name, value in settings.items():
        text = text.replace(name, str(value))
    return text


def waiting(site: Site) -> int:
    """How many messages wait in the queue; those that a worker has in hand do not."""
    with site.bare.connection_for_read() as connection:
        return int(connection.default_channel.client.llen("celery"))


def in_hand(site: Site) -> int:
    """How many messages workers have in hand."""
    with site.bare.connection_for_read() as connection:
        client = connection.default_channel.client
        return sum(int(client.hlen(key)) for key in client.keys("watch.held:*"))


@contextmanager
def events_of(site: Site) -> Iterator[list[dict[str, Any]]]:
    """What Flower is told meanwhile."""
    seen: list[dict[str, Any]] = []
    over = threading.Event()

    def listen() -> None:
        with site.bare.connection_for_read() as connection:
            receiver = site.bare.events.Receiver(connection, handlers={"*": seen.append})
            with receiver.consumer_context() as (reading, _, _):
                while not over.is_set():
                    with suppress(TimeoutError):
                        reading.drain_events(timeout=0.2)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    until(lambda: bool(seen), "a heartbeat of the worker is heard")
    try:
        yield seen
    finally:
        over.set()
        thread.join(10)


def batches(site: Site) -> list[list[Any]]:
    """What each call got."""
    return [line["data"] for line in site.lines()]


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_full_batch_does_not_wait(make_site: MakeSite, pool: str) -> None:
    site = make_site(rows(size=10, seconds=60))
    site.worker(pool=pool)

    for number in range(30):
        site.send("rows", number)

    site.until_handled(30)
    assert sorted(map(len, batches(site))) == [10, 10, 10]
    assert sorted(data for call in batches(site) for data in call) == list(range(30))


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_what_is_no_full_batch_waits_for_so_long(make_site: MakeSite, pool: str) -> None:
    site = make_site(rows(size=100, seconds=1.0))
    site.worker(pool=pool)

    for number in range(7):
        site.send("rows", number)

    site.until_handled(7)
    (call,) = batches(site)
    assert sorted(call) == list(range(7))


def test_each_message_has_an_outcome_of_its_own(make_site: MakeSite) -> None:
    site = make_site(rows(size=5, seconds=0.5))
    site.worker()

    for data in ("a", "fail", "snooze", "discard", "b"):
        site.send("rows", data, index=data)

    site.until_handled(3)
    site.until_dead(2)
    assert {letter.index: (letter.reason, letter.retries) for letter in site.dead()} == {
        "fail": (Reason.EXHAUSTED, 1),
        "discard": (Reason.DISCARDED, 0),
    }
    calls = Counter(data for call in batches(site) for data in call)
    assert calls == {"a": 1, "b": 1, "discard": 1, "fail": 2, "snooze": 2}
    until(lambda: waiting(site) + in_hand(site) == 0, "everything is acked")


def test_a_bad_message_is_found_and_the_others_are_handled(make_site: MakeSite) -> None:
    site = make_site(rows(size=16, seconds=2))
    site.worker()

    for number in range(16):
        site.send("rows", "raise" if number == 11 else number, max_retries=0)

    site.until_handled(15)
    site.until_dead(1)
    assert [letter.error for letter in site.dead()] == ["RuntimeError: bad row"]
    assert sorted(map(len, batches(site))) == [1, 1, 2, 2, 4, 4, 8, 8, 16]
    until(lambda: waiting(site) + in_hand(site) == 0, "everything is acked")


#: Unclaimed, nobody can say who of a batch was started: the crash of a whole batch is not counted.
@pytest.mark.parametrize(("once", "crashes"), [("message", 3), ("none", 4)])
def test_a_message_that_kills_its_process_takes_no_neighbour_along(
    make_site: MakeSite, once: str, crashes: int
) -> None:
    site = make_site(rows(size=20, seconds=0.5, once=once))
    worker = site.worker()

    for number in range(20):
        site.send("rows", "kill" if number == 7 else number, index=f"i{number}")

    site.until_handled(19, 60)
    site.until_dead(1, 60)
    assert [(letter.index, letter.reason) for letter in site.dead()] == [("i7", Reason.KILLED_WORKER)]
    calls = Counter(data for call in batches(site) for data in call)
    assert {data: count for data, count in calls.items() if count > 2} == {"kill": crashes}
    assert all(len(call) == 1 for call in batches(site)[1:]), "after a crash each is called alone"
    until(lambda: waiting(site) + in_hand(site) == 0, "everything is acked")
    assert worker.is_running()


def test_where_one_crash_is_one_too_many_nobody_has_company(make_site: MakeSite) -> None:
    site = make_site(rows(size=5, seconds=0.5), "watch_max_crashes = 1\n")
    site.worker()

    for data in ("a", "kill", "b", "c"):
        site.send("rows", data, index=data)

    site.until_handled(3, 60)
    site.until_dead(1, 60)
    assert [(letter.index, letter.reason) for letter in site.dead()] == [("kill", Reason.KILLED_WORKER)]
    assert all(len(call) == 1 for call in batches(site))


def test_alone_in_a_solo_worker_it_is_a_batch_of_one(make_site: MakeSite) -> None:
    site = make_site(rows(size=5, seconds=60), "watch_max_crashes = 1\n")
    site.worker(pool="solo")

    for data in ("a", "b"):
        site.send("rows", data)

    site.until_handled(2)
    assert sorted(batches(site)) == [["a"], ["b"]]


def test_flower_is_told_of_each_message(make_site: MakeSite) -> None:
    site = make_site(rows(size=3, seconds=1))
    site.worker("-E")

    with events_of(site) as seen:
        ids = {data: site.send("rows", data) for data in ("a", "fail", "discard")}
        site.until_handled(1)
        site.until_dead(2)
        ended = {"task-succeeded": {"a": 1}, "task-failed": {"fail": 1, "discard": 1}, "task-retried": {"fail": 1}}

        def told(kind: str) -> Counter[str]:
            names = {id: data for data, id in ids.items()}
            return Counter(names[event["uuid"]] for event in seen if event["type"] == kind)

        until(lambda: all(told(kind) == expected for kind, expected in ended.items()), "all are told", 10)
        assert told("task-received") == {"a": 1, "fail": 2, "discard": 1}
        assert told("task-started") == {"a": 1, "fail": 2, "discard": 1}


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_a_stop_puts_back_what_is_collected(make_site: MakeSite, pool: str) -> None:
    site = make_site(rows(size=100, seconds=60))
    worker = site.worker(pool=pool)
    for number in range(5):
        site.send("rows", number)
    until(lambda: in_hand(site) == 5, "they are collected")

    assert worker.stop() == 0

    assert (waiting(site), in_hand(site), batches(site)) == (5, 0, [])


def test_a_stop_lets_a_batch_end_that_has_begun(make_site: MakeSite) -> None:
    site = make_site(rows(size=3, seconds=60))
    worker = site.worker(concurrency=1)
    for data in ("slow", 1, 2, 3, 4):
        site.send("rows", data)
    until(lambda: len(batches(site)) == 1 and in_hand(site) == 5, "one batch runs, another is collected")

    worker.process.terminate()
    until(lambda: "Warm shutdown" in worker.text(), "it stops")
    site.touch("go")
    assert worker.stop() == 0

    assert (site.handled(), waiting(site), in_hand(site)) == (3, 2, 0)
    assert len(batches(site)) == 1


def test_a_cold_stop_in_a_call_costs_its_messages_nothing(make_site: MakeSite) -> None:
    site = make_site(rows(size=3, seconds=60))
    worker = site.worker(concurrency=1)
    for data in ("slow", 1, 2):
        site.send("rows", data)
    until(lambda: len(batches(site)) == 1, "a batch runs")

    worker.signal(signal.SIGQUIT)
    worker.process.wait(60)
    site.touch("go")
    site.worker()

    site.until_handled(3, 60)
    assert [sorted(map(str, call)) for call in batches(site)] == [["1", "2", "slow"]] * 2, "no crash is counted"


def test_the_room_follows_the_size_and_has_an_end(make_site: MakeSite) -> None:
    site = make_site(rows(size=30, seconds=60))
    for _ in range(200):
        site.send("rows", "slow")

    site.worker(concurrency=2)

    until(lambda: len(batches(site)) == 2, "each process has a batch")
    until(lambda: in_hand(site) >= 90, "and one more is collected")
    assert in_hand(site) <= 3 * 30 + 2
    site.touch("go")
    site.until_handled(180)
    assert list(map(len, batches(site))) == [30] * 6


def test_plain_topics_do_not_wait_for_what_is_collected(make_site: MakeSite) -> None:
    site = make_site(
        rows(size=100, seconds=60)
        + """
plain = topic("plain")

@plain.handler
def enter(message): note("enter", message, data=message.data)
"""
    )
    site.worker()
    for number in range(10):
        site.send("rows", number)
    for number in range(10):
        site.send("plain", number)

    site.until_handled(10, topic="plain")
    assert site.handled("rows") == 0


def test_what_travels_together_is_called_in_batches(make_site: MakeSite) -> None:
    site = make_site(rows(size=20, seconds=60))
    site.worker()

    done = site.run("-c", "import topics_here; print(topics_here.rows.send_many(range(60)))")

    assert "sent=60" in done.stdout, done.stderr
    site.until_handled(60)
    assert sorted(map(len, batches(site))) == [20, 20, 20]


def test_a_killer_that_travels_with_others_takes_none_along(make_site: MakeSite) -> None:
    site = make_site(rows(size=20, seconds=0.5))
    site.worker()

    done = site.run("-c", "import topics_here; topics_here.rows.send_many([*range(20), 'kill', *range(20, 40)])")

    assert done.returncode == 0, done.stderr
    site.until_handled(40, 60)
    site.until_dead(1, 60)
    assert [(letter.data, letter.reason) for letter in site.dead()] == [("kill", Reason.KILLED_WORKER)]
    until(lambda: waiting(site) + in_hand(site) == 0, "everything is acked")


def test_a_killed_workers_batch_and_collection_go_to_others(make_site: MakeSite) -> None:
    site = make_site(rows(size=3, seconds=1), "watch_lease = 2\nwatch_renew_every = 0.5\n")
    first = site.worker(concurrency=1)
    for data in ("slow", 1, 2, 3, 4):
        site.send("rows", data)
    until(lambda: len(batches(site)) == 1, "a batch runs")

    first.kill()
    site.touch("go")
    site.worker()

    site.until_handled(5, 60)
    until(lambda: waiting(site) + in_hand(site) == 0, "everything is acked")


def test_leases_are_kept_while_a_batch_runs(make_site: MakeSite) -> None:
    site = make_site(rows(size=3, seconds=1), "watch_lease = 1\nwatch_renew_every = 0.3\n")
    site.worker(concurrency=1)
    site.worker(concurrency=1)
    for data in ("slow", 1, 2):
        site.send("rows", data)
    until(lambda: len(batches(site)) >= 1, "a batch runs")

    threading.Event().wait(4)  # four leases
    site.touch("go")

    site.until_handled(3)
    assert Counter(data for call in batches(site) for data in call) == {"slow": 1, 1: 1, 2: 1}


def test_a_revoked_message_leaves_its_batch(make_site: MakeSite) -> None:
    site = make_site(rows(size=4, seconds=60))
    site.worker()
    first, *_ = [site.send("rows", data, index=str(data)) for data in range(3)]
    until(lambda: in_hand(site) == 3, "they are collected")

    site.bare.control.revoke(first)
    until(lambda: site.bare.control.inspect().revoked() != {}, "the worker knows")
    site.send("rows", 3)

    site.until_handled(3)
    assert [(letter.index, letter.reason) for letter in site.dead()] == [("0", Reason.REVOKED)]
    assert [sorted(call) for call in batches(site)] == [[1, 2, 3]]


def test_who_ends_one_of_a_running_batch_does_not_hurt_the_others(make_site: MakeSite) -> None:
    site = make_site(rows(size=3, seconds=60))
    site.worker()
    ids = [site.send("rows", data, index=str(data)) for data in ("slow", 1, 2)]
    until(lambda: len(batches(site)) == 1, "the batch runs")

    site.bare.control.revoke(ids[0], terminate=True, signal="SIGKILL")

    site.until_dead(1)
    assert [(letter.index, letter.reason) for letter in site.dead()] == [("slow", Reason.REVOKED)]
    site.send("rows", 3)
    site.until_handled(3)
    assert [sorted(call) for call in batches(site)[1:]] == [[1, 2, 3]], "no crash is counted, so none is alone"


def test_a_hanging_call_is_cut_off_and_halved(make_site: MakeSite) -> None:
    site = make_site(rows(size=4, seconds=1, timeout=0.5))
    site.worker()

    for data in ("a", "b", "c", "slow"):
        site.send("rows", data, max_retries=0)

    site.until_handled(3)
    site.until_dead(1)
    (letter,) = site.dead()
    assert "HandlerTimeoutError" in letter.error


def test_its_name_is_among_the_handlers_of_its_topic(make_site: MakeSite) -> None:
    site = make_site(rows())
    site.worker()
    shown = site.run("-m", "watch_tasks", "topics", "--json")
    assert '"handlers": ["store"]' in shown.stdout or '"handlers":["store"]' in shown.stdout
