"""Items are written as kombu writes them, in less time."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from kombu.utils.json import dumps, loads

from watch_tasks.queue.envelope import Envelope
from watch_tasks.queue.item import envelope_of, make_item, open_item, without_eta

PROPERTIES = {"delivery_tag": "t", "delivery_info": {"exchange": "", "routing_key": "q"}}
TIME = datetime(2030, 1, 2, tzinfo=UTC)


def payload(body: Any, **headers: Any) -> dict[str, Any]:
    return {"body": body, "headers": {"eta": None, **headers}, "properties": PROPERTIES}


class TestWithoutEta:
    @pytest.mark.parametrize(
        "body",
        [
            base64.b64encode(bytes(range(256))).decode(),
            '[["a\\"b\\\\"], {}, null]',
            "",
            'x", "headers": {"task": "other"}, "y": "',
            "\n\t\x00",
            "\ud800",
            None,
            10**30,
            b"bytes",
            {"a": [1]},
        ],
    )
    def test_an_item_is_what_kombu_makes_of_it(self, body: Any) -> None:
        assert without_eta(payload(body, id="ü")) == dumps(payload(body, id="ü")).encode()

    def test_a_body_that_is_no_ascii_means_the_same(self) -> None:
        assert json.loads(without_eta(payload("straße ☃ 🎉 \x7f"))) == payload("straße ☃ 🎉 \x7f")

    def test_an_item_without_a_body_stays_one(self) -> None:
        bare = {"headers": {"eta": None}, "properties": PROPERTIES}
        assert without_eta(bare) == dumps(bare).encode()

    def test_a_time_in_the_headers_is_one_again(self) -> None:
        assert loads(without_eta(payload("b", expires=TIME)).decode())["headers"]["expires"] == TIME


class TestMakeItem:
    def test_what_is_made_can_be_opened(self) -> None:
        sent = Envelope({"id": "m", "task": "watch.t"}, '[["☃"], {}, {}]'.encode())
        made = open_item(make_item(sent, "q", correlation_id="m"), "q")
        assert envelope_of(made) == sent
        assert made["properties"]["correlation_id"] == "m"
        assert made["properties"]["delivery_info"] == {"exchange": "", "routing_key": "q"}
