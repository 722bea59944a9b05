"""Packets in real workers: whatever is done to them, each member ends as if it had come alone."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from watch_tasks import DeadLetter, Handled, Message, Reason
from watch_tasks.pipeline import Pipeline
from watch_tasks.topics import Topic
from watch_tasks.work import Work

from ..chaos.harness import leftovers
from ..servers import RedisServer
from ..workers import Site, until
from .packets import members, push_body, send_packet
from .test_faults import GATE, SHORT, pass_time

pytestmark = pytest.mark.worker

MakeSite = Callable[..., Site]

#: What a message's data says, its handler does.
ACTS = """
act = topic("act", retry=RetryPolicy(max_retries=1, backoff=0.05), timeout=5)

@act.handler
def do(message):
    note("do", message)
    match message.data:
        case "kill": os.kill(os.getpid(), signal.SIGKILL)
        case "fail": raise ValueError("never")
        case "discard": raise Discard("no use")
        case "snooze once" if not os.path.exists(os.environ["SITE"] + "/snoozed"):
            open(os.environ["SITE"] + "/snoozed", "w").close()
            raise Snooze(0.1)
        case "open": wait_for("open")
        case float(): time.sleep(message.data)
"""


def ended(site: Site, count: int, timeout: float = 40) -> dict[str, str]:
    """Wait until so many have ended; return how, by id."""

    def found() -> dict[str, str]:
        dead = {letter.id: letter.reason.value for letter in site.dead()}
        return dead | {record.id: "handled" for name in site.storage.topics() for record in site.storage.range(name)}

    until(lambda: len(found()) >= count, f"{count} ended", timeout, lambda: f"{found()}\n{site.report()}")
    return found()


def until_drained(site: Site, server: RedisServer) -> None:
    """Wait until nothing waits, and nothing is in anybody's hand."""
    with server.client() as client:
        until(lambda: not leftovers(client), "nothing is left", 30, lambda: f"{leftovers(client)}\n{site.report()}")


def test_each_member_ends_by_its_own_rule(make_site: MakeSite, valkey: RedisServer) -> None:
    site = make_site(ACTS)
    worker = site.worker(concurrency=1)
    data = ["fine", "fail", "discard", "snooze once", *["fine"] * 10]

    send_packet(site, members("act", data))

    found = ended(site, len(data))
    assert {id: how for id, how in found.items() if how != "handled"} == {"m1": "exhausted", "m2": "discarded"}
    (letter,) = (letter for letter in site.dead() if letter.id == "m1")
    assert letter.retries == 1
    calls = site.calls("id")
    assert (calls["m1"], calls["m3"], {calls[f"m{n}"] for n in range(4, 14)}) == (2, 2, {1})
    until_drained(site, valkey)
    assert worker.is_running()


@pytest.mark.chaos  # Celery looks for lost processes every five seconds
def test_a_killer_dies_alone_after_its_crashes(make_site: MakeSite) -> None:
    site = make_site(ACTS)
    worker = site.worker(concurrency=1)
    send_packet(site, members("act", ["fine", "kill", *["fine"] * 10]))
    found = ended(site, 12)
    assert {id: how for id, how in found.items() if how != "handled"} == {"m1": "killed_worker"}
    assert [letter.crashes for letter in site.dead()] == [3]
    calls = site.calls("id")
    assert calls["m1"] == 4, "once uncounted in its packet, three times alone"
    assert calls["m0"] <= 2, "handled before it, and not recorded yet"
    assert {calls[f"m{n}"] for n in range(2, 12)} == {1}
    assert worker.is_running()


@pytest.mark.chaos
def test_a_lost_packet_counts_against_nobody_and_buries_nobody(make_site: MakeSite) -> None:
    """A member of it died for its own crashes before: its neighbours must not be taken for killers too."""
    site = make_site(ACTS)
    site.worker(concurrency=1)
    before = Message("kill", "act", id="before", index="before")
    site.send("act", "kill", index="before", task_id="before")
    site.until_dead(1)

    send_packet(site, [before, *members("act", ["fine", "kill", "fine", "fine"])])

    found = ended(site, 5)
    assert {id for id, how in found.items() if how != "handled"} == {"before", "m1"}


def test_under_once_none_only_the_killer_is_dead(make_site: MakeSite) -> None:
    site = make_site(ACTS, WATCH_MAX_CRASHES="1")
    site.worker(concurrency=1)
    send_packet(site, members("act", ["fine", "kill", "fine", "fine"], once="none"))
    found = ended(site, 4)
    assert {id: how for id, how in found.items() if how != "handled"} == {"m1": "killed_worker"}


def test_a_warm_stop_ends_after_the_member_in_hand(make_site: MakeSite, valkey: RedisServer) -> None:
    site = make_site(ACTS)
    worker = site.worker(concurrency=1)
    send_packet(site, members("act", [0.3] * 30))
    until(lambda: len(site.lines()) >= 3, "it is at work")

    began = time.monotonic()
    assert worker.stop(20) == 0
    took, done = time.monotonic() - began, len(site.lines())

    assert took < 8
    assert site.handled() == done < 30
    with valkey.client() as client:
        assert sum(leftovers(client).values()) == 2, "what was not begun is there in two packets"
    site.worker(concurrency=2)
    assert set(ended(site, 30).values()) == {"handled"}
    assert set(site.calls("id").values()) == {1}
    assert {line["retries"] for line in site.lines()} == {0}


@pytest.mark.chaos
def test_what_takes_long_is_spread_over_all_processes(make_site: MakeSite) -> None:
    site = make_site(ACTS)
    worker = site.worker(concurrency=2)
    send_packet(site, members("act", [0.3] * 60))

    assert set(ended(site, 60).values()) == {"handled"}

    assert set(site.calls("id").values()) == {1}
    assert sorted(site.calls("pid").values())[0] > 15
    assert worker.text().count("Task watch._bulk") <= 2 * 20, "few packets, received and succeeded"


def test_the_members_of_a_packet_in_hand_are_nobody_elses(make_site: MakeSite, valkey: RedisServer) -> None:
    """For longer than two leases: the packet is renewed at the broker, and its members' claims are."""
    site = make_site(ACTS, **SHORT)
    site.worker(concurrency=1)
    site.worker(concurrency=1)
    send_packet(site, members("act", ["open", "fine", "fine"]))
    until(lambda: len(site.lines()) == 1, "it is at work")

    pass_time(4.5)  # more than two leases
    assert len(site.lines()) == 1
    site.touch("open")

    assert set(ended(site, 3).values()) == {"handled"}
    until_drained(site, valkey)
    assert set(site.calls("id").values()) == {1}
    assert "busy" not in [event.event for n in range(3) for event in site.storage.explain("act", f"i{n}")]


@pytest.mark.parametrize("thief", ["handles it", "dies"])
def test_a_member_that_somebody_takes_over_is_fenced_alone(
    make_site: MakeSite, valkey: RedisServer, thief: str
) -> None:
    site = make_site(ACTS, **SHORT)
    site.worker(concurrency=1)
    messages = members("act", ["fine", "open", "fine", "fine"])
    send_packet(site, messages)
    until(lambda: len(site.lines()) == 2, "it is at work")
    (name,) = {event.worker for event in site.storage.explain("act", "i1") if event.event == "attempt"}
    topic: Topic[Any] = Topic("act")
    topic.handler(name="do")(lambda message: None)
    other = Pipeline(site.storage, {"act": topic}.get, worker="thief", lease=2)

    site.storage.release(str(name), ["m1"], crashed=False)
    if thief == "dies":
        # Were the packet acked, nobody would have its message any more.
        assert isinstance(other.begin([messages[1]])[0], Work)
    else:
        assert isinstance(other.handle(messages[1]), Handled)
    site.touch("open")

    assert set(ended(site, 4).values()) == {"handled"}
    until_drained(site, valkey)
    assert site.storage.counters("act").handled == 4
    story = site.storage.explain("act", "i1")
    assert "fenced" in [event.event for event in story]
    (record,) = (record for record in site.storage.range("act") if record.id == "m1")
    assert (record.worker == "thief") == (thief == "handles it")
    assert site.calls("id") == {"m0": 1, "m1": 1 if thief == "handles it" else 2, "m2": 1, "m3": 1}


def test_members_that_go_on_alone_wait_for_a_broker_that_is_away(
    make_site: MakeSite, valkey: RedisServer, own_valkey: RedisServer
) -> None:
    site = make_site(ACTS, url=own_valkey.url, **SHORT, WATCH_STORAGE_BACKEND=valkey.url)
    worker = site.worker(concurrency=1)
    send_packet(site, members("act", ["fail", "snooze once", "open", "fine"]))
    until(lambda: len(site.lines()) == 3, "it is at work", report=site.report)
    own_valkey.stop()
    site.touch("open")
    until(lambda: "could not publish a copy" in worker.text(), "it is missed", 20, worker.text)
    own_valkey.start()

    found = ended(site, 4)
    assert {id: how for id, how in found.items() if how != "handled"} == {"m0": "exhausted"}
    until_drained(site, own_valkey)
    assert site.calls("id") == {"m0": 2, "m1": 2, "m2": 1, "m3": 1}
    assert worker.is_running()


@pytest.mark.parametrize("at", [pytest.param("claim", marks=pytest.mark.chaos), "commit"])
def test_a_storage_away_is_waited_for(make_site: MakeSite, own_valkey: RedisServer, at: str) -> None:
    site = make_site(ACTS, **SHORT, WATCH_STORAGE_BACKEND=own_valkey.url)
    worker = site.worker(concurrency=1)
    if at == "claim":
        own_valkey.stop()
    send_packet(site, members("act", ["fine", "open", "fine"]))
    if at == "commit":
        until(lambda: len(site.lines()) == 2, "it is at work")
        own_valkey.signal(signal.SIGSTOP)
        site.touch("open")
    until(lambda: "the storage is away" in worker.text(), "it is missed", 20, worker.text)
    pass_time(3)
    assert len(site.lines()) == (0 if at == "claim" else 3)
    own_valkey.start() if at == "claim" else own_valkey.signal(signal.SIGCONT)
    site.touch("open")

    assert set(ended(site, 3).values()) == {"handled"}
    assert set(site.calls("id").values()) == {1}


def test_a_server_without_memory_acks_nothing_that_is_not_recorded(
    make_site: MakeSite, own_valkey: RedisServer
) -> None:
    site = make_site(ACTS, url=own_valkey.url, **SHORT)
    worker = site.worker(concurrency=1)
    send_packet(site, members("act", ["fine", "open", "fail", "fine"]))
    until(lambda: len(site.lines()) == 2, "it is at work")
    with own_valkey.client() as client:
        client.config_set("maxmemory", "1")
        site.touch("open")
        until(lambda: "the storage is away" in worker.text(), "it is refused", 20, worker.text)
        pass_time(3)
        assert sum(leftovers(client).values()) == 1, "the packet is in hand"
        assert site.handled() <= 1, "what was handled before, at most"
        client.config_set("maxmemory", "0")

    found = ended(site, 4)
    assert {id: how for id, how in found.items() if how != "handled"} == {"m2": "exhausted"}
    until_drained(site, own_valkey)
    calls = site.calls("id")
    assert (calls.pop("m2"), set(calls.values())) == (2, {1})


def test_a_revoked_packet_is_a_dead_letter_for_each(make_site: MakeSite, valkey: RedisServer) -> None:
    site = make_site(GATE + ACTS)
    site.worker(concurrency=1)
    site.send("gate", 1)
    until(lambda: site.calls()["enter"] == 1, "the worker is at work")
    send_packet(site, members("act", ["fine", {"n": 1}]))
    site.bare.control.revoke("packet")
    pass_time(0.5)
    site.touch("open")
    site.until_dead(2)

    letters: dict[str, DeadLetter] = {letter.id: letter for letter in site.dead()}
    assert {id: (one.reason, one.index, one.data) for id, one in letters.items()} == {
        "m0": (Reason.REVOKED, "i0", "fine"),
        "m1": (Reason.REVOKED, "i1", {"n": 1}),
    }
    assert site.calls()["do"] == 0
    replayed = site.run("-m", "watch_tasks", "dead", "replay", "-I", "topics_here", "m1")
    assert replayed.returncode == 0, replayed.stderr
    site.until_handled(1, topic="act")
    assert site.calls("id")["m1"] == 1
    assert [letter.id for letter in site.dead()] == ["m0"]


def test_what_is_no_member_is_dead_alone_and_what_is_no_packet_as_a_whole(
    make_site: MakeSite, valkey: RedisServer
) -> None:
    site = make_site(ACTS, WATCH_UNKNOWN_GRACE="0.5")
    worker = site.worker(concurrency=1)
    deep = b'["deep","",' + b"[" * 100_000 + b"]" * 100_000 + b"]"
    huge = b'["huge","i",2,{"copy":%d}]' % (10**30)
    spoilt = [b"7", b'["a","i",1,{"copy":"x"}]', b'["b","i",nothing]', deep, b'["","",1]', huge]
    good = [b'["g%d","g%d","fine"]' % (n, n) for n in range(6)]
    mixed = [part for pair in zip(good, spoilt, strict=True) for part in pair]
    body = b'[["act",[' + b",".join(mixed) + b"]],{},null]"
    whole = {
        "no body": (b"null", {}),
        "no topic": (b'[["A topic",[["x","x",1]]],{},null]', {}),
        "another header": (body, {"watch": {"sent_at": 7}}),
        "a later version": (body, {"watch": {"version": 9, "sent_at": "2026-01-02T03:04:05Z"}}),
    }

    push_body(valkey, body, "mixed")
    for id, (raw, headers) in whole.items():
        push_body(valkey, raw, id, **headers)
    push_body(valkey, b'[["nosuch",[["u","u",1]]],{},null]', "unknown")

    found = ended(site, len(good) + len(spoilt) + len(whole) + 1)
    assert {id for id, how in found.items() if how == "handled"} == {f"g{n}" for n in range(6)}
    letters = {letter.id: letter for letter in site.dead()}
    for id, (raw, _) in whole.items():
        assert (letters[id].raw, letters[id].reason) == (raw, Reason.MALFORMED)
    raws = {letter.raw for letter in letters.values()}
    assert {*spoilt[:4], b"1", b"2"} <= raws
    assert letters["u"].reason is Reason.UNKNOWN_TOPIC
    until_drained(site, valkey)
    assert worker.is_running()


def test_a_worker_without_any_topic_buries_each_member_and_not_the_packet(
    make_site: MakeSite, valkey: RedisServer
) -> None:
    site = make_site("", WATCH_UNKNOWN_GRACE="0.5")
    worker = site.worker(concurrency=1)

    push_body(valkey, b'[["nosuch",[["u1","i1",1],["u2","i2",2]]],{},null]', "unknown")

    site.until_dead(2)
    assert {(letter.id, letter.topic, letter.reason) for letter in site.dead()} == {
        ("u1", "nosuch", Reason.UNKNOWN_TOPIC),
        ("u2", "nosuch", Reason.UNKNOWN_TOPIC),
    }
    until_drained(site, valkey)
    assert worker.is_running()
    assert "no topics are loaded" in worker.text()


def test_packets_are_larger_than_one_message_may_be(make_site: MakeSite) -> None:
    site = make_site(ACTS, WATCH_MAX_PAYLOAD="2000")
    site.worker(concurrency=1)
    script = "from topics_here import act; from watch_tasks.celery import app; print(act.send_many(['x' * 1500] * 200))"
    sent = site.run("-c", script)
    assert "sent=200" in sent.stdout, sent.stderr
    site.until_handled(200)
    assert not site.dead()


STUCK = """
stuck = topic("stuck", timeout=0.5)

@stuck.handler
def hang(message):
    note("hang", message)
    if message.data == "deaf":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(60)
    if message.data == "slow":
        time.sleep(60)
"""


@pytest.mark.chaos
def test_one_that_nothing_cuts_off_dies_alone(make_site: MakeSite) -> None:
    site = make_site(STUCK, WATCH_KILL_AFTER="0.5", WATCH_MAX_CRASHES="2")
    worker = site.worker(concurrency=1)
    messages = members("stuck", ["fine", "slow", "deaf", "fine", "fine"], max_retries=0)

    send_packet(site, messages)

    found = ended(site, 5)
    assert {id: how for id, how in found.items() if how != "handled"} == {"m1": "exhausted", "m2": "killed_worker"}
    calls = site.calls("id")
    assert calls["m2"] == 3, "once uncounted in its packet, twice alone"
    assert (calls["m3"], calls["m4"]) == (1, 1)
    assert worker.is_running()


@pytest.mark.chaos
def test_many_packets_leave_no_memory_behind(make_site: MakeSite) -> None:
    site = make_site('plain = topic("plain")\n\n@plain.handler\ndef look(message): pass\n')
    worker = site.worker(concurrency=1)
    script = "from topics_here import plain; from watch_tasks.celery import app; plain.send_many(range({count}))"

    def memory() -> tuple[float, float]:
        (child,) = worker.children()
        status = Path(f"/proc/{child}/status").read_text()
        return worker.memory(), int(status.split("VmRSS:")[1].split()[0]) / 1024

    site.run("-c", script.format(count=10_000))
    site.until_handled(10_000, 60)
    before = memory()
    site.run("-c", script.format(count=50_000))
    site.until_handled(60_000, 120)
    after = memory()
    print(f"main process and child: {before} MiB after 10,000 messages, {after} MiB after 60,000")
    assert after[0] - before[0] < 8
    assert after[1] - before[1] < 8
