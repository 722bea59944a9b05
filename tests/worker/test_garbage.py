"""Messages that are none: each ends as a dead letter with its bytes, and no worker ends of them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from watch_tasks import Reason

from ..workers import Site, until

pytestmark = pytest.mark.worker

MakeSite = Callable[..., Site]

PROBE = """
probe = topic("probe")

@probe.handler
def look(message): note("look", message)
"""

SHARED = Path(__file__).parents[3] / "shared" / "data" / "malformed.jsonl"


def envelope(body: bytes | None = None, properties: dict[str, Any] | None = None, **headers: Any) -> dict[str, Any]:
    """Return a good message as kombu's Redis transport keeps it; keywords change its headers."""
    id = str(uuid4())
    content = json.dumps([[{"n": 1}], {}, {"callbacks": None}]).encode() if body is None else body
    return {
        "body": base64.b64encode(content).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": "watch.probe", "id": id, "root_id": id, "retries": 0} | headers,
        "properties": {
            "correlation_id": id,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "celery"},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": str(uuid4()),
            **(properties or {}),
        },
    }


GARBAGE = {
    "not JSON": (envelope(b"{"), Reason.UNDECODABLE),
    "no utf-8": (envelope(b'[["\xff\xfe"],{},{}]'), Reason.UNDECODABLE),
    "nested too deep": (envelope(b"[" * 100_000 + b"]" * 100_000), Reason.UNDECODABLE),
    "a body of null": (envelope(b"null"), Reason.MALFORMED),
    "a body of two parts": (envelope(b"[[1],{}]"), Reason.MALFORMED),
    "two arguments": (envelope(b"[[1,2],{},{}]"), Reason.MALFORMED),
    "a strange keyword": (envelope(b'[[1],{"x":1},{}]'), Reason.MALFORMED),
    "an index that cannot be printed": (envelope(b'[[1],{"index":"a\\nb"},{}]'), Reason.MALFORMED),
    "an index too long": (envelope(json.dumps([[1], {"index": "x" * 513}, {}]).encode()), Reason.MALFORMED),
    "a limit below 0": (envelope(b'[[1],{"max_retries":-1},{}]'), Reason.MALFORMED),
    "an unknown once-rule": (envelope(b'[[1],{"once":"twice"},{}]'), Reason.MALFORMED),
    "an eta that is none": (envelope(eta="soon"), Reason.MALFORMED),
    "an expiry that is none": (envelope(expires={"in": 3}), Reason.MALFORMED),
    "stamps that nobody can look up": (envelope(stamped_headers=["a"], stamps={"a": [[]]}), Reason.MALFORMED),
    "a limit of time that is none": (envelope(timelimit="soon"), Reason.MALFORMED),
    "an id of null": (envelope(id=None), Reason.MALFORMED),
    "our header of another shape": (envelope(watch={"copy": "x"}), Reason.MALFORMED),
    "our header of a later version": (envelope(watch={"version": 99}), Reason.MALFORMED),
    "no base64": ({**envelope(), "body": "%%%not-base64%%%"}, Reason.UNDECODABLE),
    "a task that is no text": (envelope(task=["x"]), Reason.MALFORMED),
    "no headers": ({**envelope(), "headers": {}}, Reason.MALFORMED),
    "pickle": ({**envelope(b"cos\nsystem\n."), "content-type": "application/x-python-serialize"}, Reason.UNDECODABLE),
    "too large": (envelope(json.dumps([["x" * 1_200_000], {}, {}]).encode()), Reason.TOO_LARGE),
}


def raw_of(item: dict[str, Any]) -> bytes:
    """Return the bytes that are to be kept of an item."""
    try:
        return base64.b64decode(item["body"])
    except ValueError:
        return str(item["body"]).encode()


def test_garbage_is_dead_with_its_bytes(make_site: MakeSite) -> None:
    site = make_site(PROBE)
    worker = site.worker()

    with site.bare.connection().channel() as channel:
        for item, _ in GARBAGE.values():
            channel.client.lpush("celery", json.dumps(item))
        channel.client.lpush("celery", json.dumps(envelope()))

    site.until_dead(len(GARBAGE), 60)
    site.until_handled(1)
    by_raw = {letter.raw: letter for letter in site.dead()}
    ended = {name: by_raw[raw_of(item)].reason for name, (item, _) in GARBAGE.items()}
    # Those whose bodies are good share them, and differ in their headers only.
    good = raw_of(envelope())
    shared = {name for name, (item, _) in GARBAGE.items() if raw_of(item) == good}
    assert {name: reason for name, reason in ended.items() if name not in shared} == {
        name: reason for name, (_, reason) in GARBAGE.items() if name not in shared
    }
    assert sum(letter.raw == good for letter in site.dead()) == len(shared)
    assert worker.is_running()
    assert site.calls() == {"look": 1}


def packet(*members: Any, topic: Any = "probe", body: bytes | None = None, **headers: Any) -> dict[str, Any]:
    """Return a packet as kombu's Redis transport keeps it."""
    content = json.dumps([[topic, list(members)], {}, {}]).encode() if body is None else body
    return envelope(content, task="watch._bulk", **headers)


def test_garbage_in_a_packet_keeps_no_other_member_from_being_handled(make_site: MakeSite) -> None:
    strange = [None, 7, ["x"], ["", "", 1], ["a\nb", "", 2], ["x" * 100_000, "", 3], ["m1", "", 1, {"copy": "3"}]]
    site = make_site(PROBE)
    worker = site.worker()

    with site.bare.connection().channel() as channel:
        channel.client.lpush("celery", json.dumps(packet(["good1", "", 1], *strange, ["good2", "", "\ud800"])))

    site.until_handled(2, 60)
    site.until_dead(len(strange))
    assert {letter.reason for letter in site.dead()} == {Reason.MALFORMED}
    assert all(0 < len(letter.id) <= 255 and letter.id.isprintable() for letter in site.dead())
    assert site.calls("id") == {"good1": 1, "good2": 1}
    assert worker.is_running()


def test_what_claims_to_be_a_packet_and_is_none_is_dead_with_its_bytes(make_site: MakeSite) -> None:
    items = {
        "not JSON": packet(body=b"{"),
        "no members": packet(body=b'[["probe"],{},{}]'),
        "members that are no list": packet(body=b'[["probe",{}],{},{}]'),
        "no topic's name": packet(["m1", "", 1], topic="_bulk"),
        "our header of a later version": packet(["m2", "", 1], watch={"version": 99}),
        "an id that cannot be printed": packet(["m3", "", 1], id="a\nb"),
    }
    site = make_site(PROBE)
    worker = site.worker()

    with site.bare.connection().channel() as channel:
        for item in items.values():
            channel.client.lpush("celery", json.dumps(item))
        channel.client.lpush("celery", json.dumps(envelope()))

    site.until_dead(len(items), 60)
    site.until_handled(1)
    assert {letter.raw for letter in site.dead()} == {raw_of(item) for item in items.values()}
    assert worker.is_running()


def test_a_full_packet_is_handled_where_one_message_may_have_little(make_site: MakeSite) -> None:
    site = make_site(PROBE, WATCH_MAX_PAYLOAD="2000")
    site.worker()

    with site.bare.connection().channel() as channel:
        members = [[f"m{number}", f"{number:0100}", "x" * 1_000] for number in range(200)]
        channel.client.lpush("celery", json.dumps(packet(*members)))

    site.until_handled(200, 60)
    assert not site.dead()


@pytest.mark.skipif(not SHARED.exists(), reason="the shared examples of garbage are not here")
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_the_shared_garbage_ends_as_it_should(make_site: MakeSite, pool: str) -> None:
    rows = [json.loads(line) for line in SHARED.read_text().splitlines()]
    site = make_site(PROBE, WATCH_UNKNOWN_GRACE="1")
    worker = site.worker(pool=pool)
    ended: dict[str, str] = {}

    with site.bare.connection().channel() as channel:
        for row in rows:
            dead, handled = len(site.dead()), site.handled()
            channel.client.lpush("celery", row["item"])
            until(
                lambda: len(site.dead()) > dead or site.handled() > handled,  # noqa: B023
                f"{row['name']} ends",
                20,
                site.report,
            )
            ended[row["name"]] = "dead" if len(site.dead()) > dead else "handled"

    assert {name: end for name, end in ended.items() if end not in expected(rows, name)} == {}
    assert worker.is_running()
    assert "Restarting" not in worker.text()


def expected(rows: list[dict[str, Any]], name: str) -> list[str]:
    return next(row["expect"] for row in rows if row["name"] == name)
