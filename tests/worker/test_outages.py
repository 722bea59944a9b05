"""The broker stalls, hangs up, or goes away while workers work: nothing is started twice, and nothing is lost."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..servers import RedisServer
from ..workers import Site, until

pytestmark = pytest.mark.worker

MakeSite = Callable[..., Site]

#: Leases that end soon.
SHORT = {"WATCH_LEASE": "2", "WATCH_RENEW_EVERY": "0.5"}

GATE = """
gate = topic("gate")

@gate.handler
def enter(message):
    note("enter", message)
    wait_for("open")
    note("leave", message)
"""

QUICK = """
quick = topic("quick")

@quick.handler
def run(message):
    note("run", message)
"""


def pass_time(seconds: float) -> None:
    """Let real time go by where that is the fault itself."""
    signal.sigtimedwait([], seconds)


@pytest.mark.parametrize(
    ("seconds", "leases"),
    [pytest.param(7, SHORT, id="short leases"), pytest.param(20, {}, id="20 s", marks=pytest.mark.chaos)],
)
def test_a_stall_of_the_server_for_three_leases_starts_nothing_twice(
    make_site: MakeSite, own_valkey: RedisServer, seconds: float, leases: dict[str, str]
) -> None:
    site = make_site(GATE, url=own_valkey.url, **leases)
    site.worker(concurrency=2)
    site.worker(concurrency=2)
    for number in range(4):
        site.send("gate", number, index=str(number))
    until(lambda: site.calls()["enter"] == 4, "the handlers run")

    own_valkey.signal(signal.SIGSTOP)
    pass_time(seconds)
    own_valkey.signal(signal.SIGCONT)
    pass_time(seconds * 0.4)  # longer than a lease
    assert site.calls() == {"enter": 4}
    site.touch("open")

    site.until_handled(4, 60)
    assert site.calls() == {"enter": 4, "leave": 4}


def test_a_server_that_is_killed_and_comes_back_goes_on_with_everything(
    make_site: MakeSite, lasting_valkey: RedisServer
) -> None:
    site = make_site(QUICK, url=lasting_valkey.url)
    worker = site.worker(concurrency=2)
    sent = []
    for round_number in range(3):
        for number in range(40):
            sent.append(site.send("quick", number, index=f"{round_number}-{number}"))
        lasting_valkey.stop(signal.SIGKILL)
        pass_time(0.5)
        lasting_valkey.start()

    until(lambda: site.handled() == len(sent), "all are handled", 90, site.report)
    assert {line["id"] for line in site.lines()} == set(sent)
    assert "Warning" not in worker.text(), "nothing that this makes no difference to"


@pytest.mark.parametrize("kinds", [("normal", "pubsub"), ("pubsub",)], ids=["all", "that of broadcasts"])
def test_a_connection_that_breaks_under_a_handler_does_not_start_it_again(
    make_site: MakeSite, own_valkey: RedisServer, kinds: tuple[str, ...]
) -> None:
    site = make_site(GATE, url=own_valkey.url, **SHORT)
    site.worker(concurrency=1)
    site.worker(concurrency=1)
    site.send("gate", 1, index="a")
    until(lambda: site.calls()["enter"] == 1, "the handler runs")
    for _ in range(2):
        with own_valkey.client() as client:
            for kind in kinds:
                client.client_kill_filter(_type=kind, skipme=True)
        pass_time(3)
    assert "busy" not in {event.event for event in site.storage.explain("gate", "a")}, "nobody else was given it"
    site.touch("open")
    site.until_handled(1, 60)
    pass_time(1)
    assert site.calls() == {"enter": 1, "leave": 1}
    with own_valkey.client() as client:
        until(lambda: not _in_hand(client), "its ack came by another connection", 30)


def test_where_only_events_cannot_be_sent_messages_are_handled_all_the_same(
    make_site: MakeSite, own_valkey: RedisServer
) -> None:
    site = make_site(GATE, url=own_valkey.url)
    worker = site.worker(concurrency=1)
    for number in range(3):
        site.send("gate", number)
    until(lambda: site.calls()["enter"] == 1, "the handler runs")
    with own_valkey.client() as client, client.pubsub() as told:
        told.psubscribe("*celeryev*")
        told.get_message(timeout=5)
        sending = [one["id"] for one in client.client_list() if one["cmd"] == "publish"]
        usual = client.config_get("maxclients")["maxclients"]
        client.config_set("maxclients", 1)  # nobody new gets in
        for number in sending:
            client.client_kill_filter(_id=number)
        pass_time(3)  # longer than from one sign of life to the next
        site.touch("open")

        until(lambda: site.calls()["leave"] == 3, "all are handled", 20, worker.text)
        until(lambda: not _in_hand(client), "all are acked", 20, worker.text)
        client.config_set("maxclients", usual)
        succeeded: set[str] = set()
        until(lambda: succeeded.update(_succeeded(told)) or len(succeeded) == 3, "what happened meanwhile is told", 20)
    assert worker.stop(20) == 0


def test_where_only_an_answer_to_a_command_cannot_be_sent_messages_are_handled_all_the_same(
    make_site: MakeSite, own_valkey: RedisServer
) -> None:
    site = make_site(GATE, url=own_valkey.url)
    worker = site.worker("--without-heartbeat", concurrency=1)
    site.send("gate", 1)
    until(lambda: site.calls()["enter"] == 1, "the handler runs")
    with own_valkey.client() as client, client.pubsub() as told:
        told.psubscribe("*pidbox*")
        told.get_message(timeout=5)
        site.bare.control.ping(destination=["another@test"], timeout=0.1)
        command = told.get_message(timeout=5)
        assert command
        envelope = json.loads(command["data"])
        body = {**json.loads(base64.b64decode(envelope["body"])), "destination": None}
        envelope["body"] = base64.b64encode(json.dumps(body).encode()).decode()
        usual = client.config_get("maxclients")["maxclients"]
        client.config_set("maxclients", 1)  # nobody new gets in
        client.publish(command["channel"], json.dumps(envelope))
        until(lambda: "could not answer a control command: max number of" in worker.text(), "it cannot answer", 10)
        site.touch("open")

        until(lambda: not _in_hand(client), "it is handled and acked", 20, worker.text)
        client.config_set("maxclients", usual)
    assert site.bare.control.ping(timeout=2) == [{"w1@test": {"ok": "pong"}}]
    assert worker.stop(20) == 0


def test_a_send_to_a_server_that_hangs_ends_and_sending_again_is_safe(
    make_site: MakeSite, own_valkey: RedisServer
) -> None:
    site = make_site(QUICK, url=own_valkey.url)
    program = site.folder / "send_once.py"
    program.write_text(
        "import json, sys, time\n"
        "from topics_here import quick\n"
        "from watch_tasks import Message, SendUnknownError, SendFailedError\n"
        "import watch_tasks; watch_tasks.app\n"
        "message = Message(1, 'quick', index='a')\n"
        "began = time.monotonic()\n"
        "try:\n"
        "    quick.send(message)\n"
        "except SendUnknownError as exc:\n"
        "    kind, message = 'unknown', exc.message\n"
        "except SendFailedError:\n"
        "    kind = 'failed'\n"
        "print(json.dumps([kind, time.monotonic() - began]), flush=True)\n"
        "sys.stdin.readline()\n"
        "quick.send(message)\n"
    )
    own_valkey.signal(signal.SIGSTOP)
    sender: Any = subprocess.Popen(
        [sys.executable, program.name],
        cwd=Path(site.folder),
        env=site.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    kind, seconds = json.loads(sender.stdout.readline())
    assert kind in ("unknown", "failed")
    assert seconds < 15
    own_valkey.signal(signal.SIGCONT)
    sender.communicate("\n", timeout=60)
    assert sender.returncode == 0
    site.worker(concurrency=1)
    site.until_handled(1)
    assert site.calls() == {"run": 1}


def _in_hand(client: Any) -> int:
    return sum(client.hlen(key) for key in client.scan_iter("watch.held:*"))


def _succeeded(told: Any) -> Iterator[str]:
    """Yield the ids of tasks that events say succeeded."""
    while message := told.get_message(ignore_subscribe_messages=True):
        body = json.loads(base64.b64decode(json.loads(message["data"])["body"]))
        for event in body if isinstance(body, list) else [body]:
            if event["type"] == "task-succeeded":
                yield event["uuid"]
