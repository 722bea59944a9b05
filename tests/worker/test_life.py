"""The life of a message on real workers: sent, handled, retried, dead, and what is written down of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from watch_tasks import Reason

from ..workers import Site, until

pytestmark = pytest.mark.worker

MakeSite = Callable[..., Site]

ALARM = """
alarm = topic("alarm", retry=RetryPolicy(max_retries=2))

@alarm.handler
def notify(message):
    note("notify", message, data=message.data)
    if message.data.get("fail"):
        raise ValueError("no")
"""


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_bare_producer_is_enough(make_site: MakeSite, pool: str) -> None:
    site = make_site(ALARM)
    site.worker(pool=pool)

    id = site.send("alarm", {"host": "web-1"})
    named = site.send("alarm", {"host": "web-2"}, index="web-2:down")

    site.until_handled(2)
    record = site.storage.get("alarm", "web-2:down")
    assert record is not None
    assert (record.id, record.data) == (named, {"host": "web-2"})
    assert site.storage.get("alarm", id) is not None, "an index that nobody named is the id"


def test_a_limit_of_one_message_does_not_leak_to_the_next(make_site: MakeSite) -> None:
    site = make_site(ALARM)
    site.worker(concurrency=1)

    first = site.send("alarm", {"fail": True}, max_retries=5)
    site.until_dead(1)
    second = site.send("alarm", {"fail": True})
    site.until_dead(2)

    assert site.calls("id") == {first: 6, second: 3}
    letters = {letter.id: letter for letter in site.dead()}
    assert [len(letters[id].attempts) for id in (first, second)] == [6, 3]
    assert {letter.reason for letter in letters.values()} == {Reason.EXHAUSTED}


def test_a_retry_resumes_at_the_handler_that_failed(make_site: MakeSite) -> None:
    site = make_site(
        """
three = topic("three", retry=RetryPolicy(max_retries=2))

@three.handler
def a(message): note("a", message)

@three.handler
async def b(message):
    note("b", message)
    if message.retries < 2:
        raise RuntimeError("not yet")

@three.handler
def c(message): note("c", message)
"""
    )
    site.worker()

    site.send("three", 1)

    site.until_handled(1)
    assert site.calls() == {"a": 1, "b": 3, "c": 1}


def test_one_index_is_handled_once(make_site: MakeSite) -> None:
    site = make_site(
        """
order = topic("order", once="index")

@order.handler
def pack(message): note("pack", message)
"""
    )
    site.worker()

    site.send("order", {"n": 1}, index="order-17")
    site.until_handled(1)
    site.send("order", {"n": 1}, index="order-17")
    site.send("order", {"n": 2}, index="order-17")

    site.until_dead(1)
    until(lambda: site.storage.counters("order").duplicates == 1, "the duplicate is counted")
    assert [letter.reason for letter in site.dead()] == [Reason.INDEX_CONFLICT]
    assert site.calls() == {"pack": 1}
    events = [event.event for event in site.storage.explain("order", "order-17")]
    assert events[:4] == ["sent", "attempt", "handler", "handled"]
    assert {"suppressed", "dead"} <= set(events[4:])


def test_the_task_shows_the_policy_of_its_topic(make_site: MakeSite) -> None:
    site = make_site(
        """
odd = topic("odd", retry=RetryPolicy(
    max_retries=7, retry_for=(OSError,), give_up_for=(FileNotFoundError,), backoff=0.5, backoff_max=9.0, jitter=False))
odd.handler(lambda message: None, name="nothing") if False else odd.handler(name="nothing")(lambda message: None)
"""
    )
    shown = site.run(
        "-c",
        "import topics_here; from watch_tasks import app\n"
        "t = app.tasks['watch.odd']\n"
        "print(t.max_retries, t.autoretry_for, t.dont_autoretry_for, t.retry_backoff, t.retry_backoff_max,"
        " t.retry_jitter, hasattr(t.run, '__wrapped__'))",
    )

    assert shown.stdout.split("\n")[0] == (
        "7 (<class 'OSError'>,) (<class 'FileNotFoundError'>,) 0.5 9.0 False False"
    ), shown.stderr


def test_verdicts_of_a_handler(make_site: MakeSite) -> None:
    site = make_site(
        """
verdict = topic("verdict", retry=RetryPolicy(max_retries=0))
seen = []

@verdict.handler
def judge(message):
    note("judge", message)
    if message.data == "discard":
        raise Discard("nobody wants it")
    if message.data == "snooze" and len([1 for line in open(os.environ["LEDGER"]) if message.id in line]) < 3:
        raise Snooze(0.2)
"""
    )
    site.worker()

    discarded = site.send("verdict", "discard")
    snoozed = site.send("verdict", "snooze")

    site.until_dead(1)
    site.until_handled(1)
    assert [(letter.id, letter.reason, letter.error) for letter in site.dead()] == [
        (discarded, Reason.DISCARDED, "Discard: nobody wants it")
    ]
    assert site.calls("id")[snoozed] == 3, "a snooze costs no retry"
    record = site.storage.get("verdict", snoozed)
    assert record is not None
    assert record.retries == 0


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_whatever_a_handler_raises_is_one_failure(make_site: MakeSite, pool: str) -> None:
    site = make_site(
        """
bad = topic("bad", retry=RetryPolicy(max_retries=1))

@bad.handler
def fail(message):
    note("fail", message)
    raise {"exit": SystemExit(3), "memory": MemoryError("much"), "interrupt": KeyboardInterrupt()}[message.data]
"""
    )
    worker = site.worker(pool=pool)

    ids = [site.send("bad", kind) for kind in ("exit", "memory", "interrupt")]

    site.until_dead(3)
    assert site.calls("id") == dict.fromkeys(ids, 2)
    assert {letter.reason for letter in site.dead()} == {Reason.EXHAUSTED}
    assert worker.is_running()


def test_a_timeout_cuts_a_handler_off(make_site: MakeSite) -> None:
    site = make_site(
        """
slow = topic("slow", timeout=0.5, retry=RetryPolicy(max_retries=0))

@slow.handler
def sleep(message):
    note("sleep", message)
    if message.data == "stubborn":
        try:
            time.sleep(20)
        except Exception:
            pass
    time.sleep(20)
""",
        WATCH_KILL_AFTER="60",
    )
    site.worker()

    site.send("slow", "plain")
    site.send("slow", "stubborn")

    site.until_dead(2, 15)
    assert {letter.error.partition(":")[0] for letter in site.dead()} == {"HandlerTimeoutError"}


def test_a_topic_may_have_a_queue_of_its_own(make_site: MakeSite) -> None:
    site = make_site(
        """
own = topic("own", queue="apart")

@own.handler
def look(message):
    note("look", message)
    if message.retries == 0 and message.data == "again":
        raise ValueError("again")
"""
    )
    site.worker()

    site.run("-c", "import topics_here; topics_here.own.send('again', index='a')")
    site.send("own", "to the default queue")
    site.send("own", "to its own", queue="apart")

    site.until_handled(3)
    assert len(site.lines()) == 4


def test_topics_run_under_a_foreign_app(make_site: MakeSite) -> None:
    site = make_site(ALARM)
    (site.folder / "theirs.py").write_text(
        "from celery import Celery\n"
        "from watch_tasks.worker import install\n"
        "app = Celery('theirs')\n"
        "app.conf.task_default_queue = 'theirs'\n"
        "install(app)\n"
        "import topics_here\n"
        "@app.task(name='add')\n"
        "def add(x, y):\n"
        "    open('added', 'w').write(str(x + y))\n"
    )
    site.worker(app="theirs")

    site.run("-c", "import theirs; theirs.topics_here.alarm.send({}, index='a'); theirs.add.delay(2, 3)")

    site.until_handled(1)
    until(lambda: (site.folder / "added").exists(), "their own task has run")
    assert (site.folder / "added").read_text() == "5"


def test_children_may_be_spawned(make_site: MakeSite) -> None:
    site = make_site(ALARM, 'worker_pool_start_method = "spawn"\n')
    site.worker()

    site.send("alarm", {"n": 1}, index="a")

    site.until_handled(1)
