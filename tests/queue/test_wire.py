from __future__ import annotations

import ast
import bz2
import json
import zlib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watch_tasks import Message, MessageError, Reason, SchemaError, TooLargeError, TopicError
from watch_tasks.queue import Unreadable, wire
from watch_tasks.queue.envelope import Envelope, pack, unpack

SENT = Message(
    {"n": 1}, "alarm", index="web-1", id="m1", retries=2, max_retries=5, once="index", handled=("a",), copy=3
)


def fields(**changes: Any) -> dict[str, Any]:
    return {"id": "m1", "task": "watch.alarm", **wire.headers(SENT), **changes}


def read(
    args: Any = ({"n": 1},), keywords: Any = None, *, headers: dict[str, Any] | None = None, **changes: Any
) -> Message[Any]:
    return wire.read(fields(**changes) if headers is None else headers, args, {} if keywords is None else keywords)


class TestWire:
    def test_a_message_survives_the_wire(self) -> None:
        args, keywords = wire.arguments(SENT)
        assert wire.read(fields(), args, keywords) == SENT

    def test_the_wire_is_json(self) -> None:
        json.dumps([wire.arguments(SENT), wire.headers(SENT), wire.reprs(SENT)])

    def test_only_what_was_named_becomes_a_keyword(self) -> None:
        assert wire.arguments(Message(1, "alarm", id="m1"))[1] == {"index": "m1"}

    def test_a_bare_call_is_named_by_its_id(self) -> None:
        message = read(headers={"id": "m1", "task": "watch.alarm"})
        assert (message.index, message.retries, message.copy, message.handled) == ("m1", 0, 0, ())

    def test_celerys_own_count_of_retries_is_not_trusted(self) -> None:
        assert read(headers={"id": "m1", "task": "watch.alarm", "retries": 99}).retries == 0

    def test_a_keyword_beats_the_header(self) -> None:
        assert read(keywords={"index": "other"}).index == "other"

    def test_what_flower_shows_is_a_literal_with_the_index_and_without_the_data(self) -> None:
        shown = wire.reprs(Message("secret", "alarm", index="o'clock \"\\ ☃"))
        assert ast.literal_eval(shown["kwargsrepr"]) == {"index": "o'clock \"\\ ☃"}
        assert "secret" not in str(shown)

    def test_a_time_without_a_zone_is_utc(self) -> None:
        message = read(watch={"sent_at": "2026-01-02T03:04:05"})
        assert message.sent_at == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

    @pytest.mark.parametrize("task", ["watch.alarm", "watch.a.b-c_d"])
    def test_names_of_tasks_and_topics_belong_together(self, task: str) -> None:
        topic = wire.topic_of(task)
        assert topic is not None
        assert wire.task_name(topic) == task

    @pytest.mark.parametrize("task", ["shop.send", "watch", "", None, 7, b"watch.x"])
    def test_other_tasks_have_no_topic(self, task: object) -> None:
        assert wire.topic_of(task) is None

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"id": None}, "`id` must be"),
            ({"id": ""}, "`id` must be"),
            ({"id": 7}, "`id` must be"),
            ({"id": "x" * 256}, "`id` must be"),
            ({"id": "a\nforged log line"}, "`id` must be"),
            ({"task": None}, "`task` must be"),
            ({"task": "shop.send"}, "another program's task"),
            ({"task": "watch."}, "`task` must be"),
            ({"task": "watch._internal"}, "`task` must be"),
            ({"task": "watch.A B"}, "`task` must be"),
            ({"args": ()}, "one positional argument, the data, got 0"),
            ({"args": (1, 2)}, "one positional argument, the data, got 2"),
            ({"args": None}, "got 'NoneType'"),
            ({"args": "x"}, "got 'str'"),
            ({"keywords": {"x": 1}}, "no keywords but index, max_retries, once, got 'x'"),
            ({"keywords": [1]}, "got 'list'"),
            ({"keywords": {"index": ""}}, "got ''"),
            ({"keywords": {"index": "x" * 513}}, "513 characters"),
            ({"keywords": {"index": "a\r\n\x1b[31m\x00"}}, "printable"),
            ({"keywords": {"index": 7}}, "printable"),
            ({"keywords": {"max_retries": -1}}, "max_retries"),
            ({"keywords": {"max_retries": "3"}}, "max_retries"),
            ({"keywords": {"max_retries": True}}, "max_retries"),
            ({"keywords": {"once": "sometimes"}}, "once"),
            ({"keywords": {"once": ["index"]}}, "once"),
            ({"watch": 7}, "header `watch` does not fit"),
            ({"watch": {"copy": "3"}}, "header `watch` does not fit"),
            ({"watch": {"copy": -1}}, "copy"),
            ({"watch": {"version": 2}}, "version 2, this worker knows 1"),
        ],
    )
    def test_what_is_no_message_says_what_was_expected(self, changes: dict[str, Any], text: str) -> None:
        args, keywords = changes.pop("args", (1,)), changes.pop("keywords", {})
        with pytest.raises(MessageError) as caught:
            wire.read(fields(**changes), args, keywords)
        assert text in str(caught.value)

    def test_the_id_of_bytes_is_always_the_same(self) -> None:
        assert wire.bytes_id(b"x") == wire.bytes_id(b"x") != wire.bytes_id(b"y")
        assert wire.is_id(wire.bytes_id(b""))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


class TestEnvelope:
    @given(plain)
    def test_any_json_data_survives_it(self, data: Any) -> None:
        sent = Message(data, "alarm")
        assert unpack(pack(sent)) == (sent, 0.0)

    def test_a_message_survives_it_whole(self) -> None:
        assert unpack(pack(SENT)) == (SENT, 0.0)

    def test_a_delay_survives_it(self) -> None:
        _, left = unpack(pack(SENT, delay=60))
        assert 59 < left <= 60

    def test_data_is_brought_into_plain_form(self) -> None:
        message, _ = unpack(pack(Message(datetime(2026, 1, 2, tzinfo=UTC), "alarm")))
        assert isinstance(message, Message)
        assert message.data == "2026-01-02T00:00:00Z"

    def test_data_without_a_json_form_is_refused(self) -> None:
        with pytest.raises(SchemaError, match="topic `alarm`"):
            pack(Message(object(), "alarm"))

    def test_a_message_without_a_topic_is_refused(self) -> None:
        with pytest.raises(TopicError):
            pack(Message(1))

    def test_the_limit_counts_the_bytes_of_the_data(self) -> None:
        pack(Message("x" * 98, "alarm"), limit=100)
        with pytest.raises(TooLargeError) as caught:
            pack(Message("x" * 99, "alarm"), limit=100)
        assert (caught.value.size, caught.value.limit) == (101, 100)

    def test_what_may_be_sent_may_be_read(self) -> None:
        sent = Message("x" * 98, "alarm", index="☃" * 512)
        assert unpack(pack(sent, limit=100), limit=100)[0] == sent

    @pytest.mark.parametrize(
        ("body", "reason", "text"),
        [
            (b"", Reason.UNDECODABLE, "must be JSON"),
            (b'{"a": ', Reason.UNDECODABLE, "must be JSON"),
            (b'[[{"n":"\xff\xfe"}],{},{}]', Reason.UNDECODABLE, "must be JSON"),
            (b"[" * 100_000, Reason.UNDECODABLE, "must be JSON"),
            (b"null", Reason.MALFORMED, "list of 3: args, kwargs and embed, got NoneType"),
            (b"[]", Reason.MALFORMED, "list of 3: args, kwargs and embed, got 0"),
            (b'"abc"', Reason.MALFORMED, "list of 3: args, kwargs and embed, got str"),
            (b"[[1, 2], {}, {}]", Reason.MALFORMED, "one positional argument"),
            (b" " * 2_000_000, Reason.TOO_LARGE, "most that are read"),
        ],
    )
    def test_a_body_that_is_none_is_unreadable(self, body: bytes, reason: Reason, text: str) -> None:
        message, left = unpack(Envelope(fields(), body))
        assert isinstance(message, Unreadable)
        assert (message.reason, message.raw, message.id, left) == (reason, body, "m1", 0.0)
        assert (message.topic, message.index) == ("alarm", "web-1")
        assert text in message.error

    @pytest.mark.parametrize("kind", [None, "", "application/x-python-serialize", "application/foo", "text/json"])
    def test_only_json_is_read(self, kind: str | None) -> None:
        message, _ = unpack(Envelope(fields(), pack(SENT).body, kind))
        assert isinstance(message, Unreadable)
        assert message.reason is Reason.UNDECODABLE

    def test_a_charset_may_be_named(self) -> None:
        assert unpack(Envelope(fields(), pack(SENT).body, "application/JSON; charset=utf-8"))[0] == SENT

    def test_what_has_no_id_is_named_by_its_bytes(self) -> None:
        message, _ = unpack(Envelope({}, b"x"))
        assert (message.id, message.topic, message.index) == (wire.bytes_id(b"x"), None, None)

    @pytest.mark.parametrize("name", ["eta", "expires"])
    @pytest.mark.parametrize("value", ["soon", 7, "", [], {}, True])
    def test_a_time_that_is_none_is_malformed(self, name: str, value: object) -> None:
        message, _ = unpack(Envelope(fields(**{name: value}), pack(SENT).body))
        assert isinstance(message, Unreadable)
        assert message.reason is Reason.MALFORMED
        assert f"header `{name}`" in message.error

    def test_what_expires_later_is_read(self) -> None:
        later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        assert unpack(Envelope(fields(expires=later), pack(SENT).body))[0] == SENT

    @pytest.mark.parametrize(
        ("compression", "compress"), [("application/x-gzip", zlib.compress), ("application/x-bz2", bz2.compress)]
    )
    class TestCompression:
        def test_it_is_undone(self, compression: str, compress: Any) -> None:
            body = compress(pack(SENT).body)
            assert unpack(Envelope(fields(compression=compression), body))[0] == SENT

        def test_a_bomb_is_not_inflated(self, compression: str, compress: Any) -> None:
            message, _ = unpack(Envelope(fields(compression=compression), compress(b" " * 3_000_000)))
            assert isinstance(message, Unreadable)
            assert message.reason is Reason.TOO_LARGE

        def test_what_is_not_compressed_is_undecodable(self, compression: str, compress: Any) -> None:
            message, _ = unpack(Envelope(fields(compression=compression), b"[[1],{},{}]"))
            assert isinstance(message, Unreadable)
            assert message.reason is Reason.UNDECODABLE

    @pytest.mark.parametrize("compression", ["application/x-brotli", 7, ["x"]])
    def test_another_compression_is_undecodable(self, compression: object) -> None:
        message, _ = unpack(Envelope(fields(compression=compression), pack(SENT).body))
        assert isinstance(message, Unreadable)
        assert message.reason is Reason.UNDECODABLE

    @given(st.binary(max_size=200), st.dictionaries(st.sampled_from(["id", "task", "watch", "eta", "expires"]), plain))
    def test_nothing_makes_it_raise(self, body: bytes, headers: dict[str, Any]) -> None:
        unpack(Envelope(headers, body))
        unpack(Envelope(headers, pack(SENT).body))
