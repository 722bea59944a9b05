"""Packets on the wire, and what comes there that is none."""

from __future__ import annotations

import ast
import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from watch_tasks import Message, MessageError, Reason
from watch_tasks.packets import MOST_BYTES, Member, More, Packet, member_of, read_member
from watch_tasks.queue import Unreadable, bulk, wire
from watch_tasks.queue.envelope import Envelope, pack_packet, unpack, unpack_member
from watch_tasks.schema import dump

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SENT = [
    Message({"n": 1}, "alarm", index="straße/☃", id="m1", sent_at=AT),
    Message(None, "alarm", id="m2", sent_at=AT),
    Message([1.5, "x"], "alarm", id="m3", retries=2, max_retries=0, once="none", handled=("a", "b"), copy=3),
]
PACKET = Packet("alarm", [member_of(message, dump(message.data), AT) for message in SENT], "p1", AT)


def fields(**changes: Any) -> dict[str, Any]:
    return {"id": "p1", "task": bulk.TASK, **bulk.headers(PACKET), **changes}


def body(*members: Any, topic: Any = "alarm", keywords: Any = None) -> bytes:
    return json.dumps([[topic, list(members)], keywords or {}, {}]).encode()


def messages(packet: Packet) -> list[Message[Any] | Unreadable]:
    return [unpack_member(packet, member) for member in packet.members]


class TestRoundTrip:
    def test_a_packet_survives_the_wire(self) -> None:
        packet = bulk.read(bulk.body(PACKET), fields())
        assert (packet.topic, packet.id, packet.sent_at) == ("alarm", "p1", AT)
        assert messages(packet) == SENT

    def test_and_its_envelope(self) -> None:
        found, wait = unpack(pack_packet(PACKET))
        assert isinstance(found, Packet)
        assert (found, wait) == (PACKET, 0.0)

    def test_a_delay_survives_it(self) -> None:
        _, left = unpack(pack_packet(PACKET, delay=60))
        assert 59 < left <= 60

    def test_the_wire_is_json_of_celerys_form(self) -> None:
        args, keywords, embed = json.loads(bulk.body(PACKET))
        assert args[0] == "alarm"
        assert args[1][:2] == [["m1", "straße/☃", {"n": 1}, None], ["m2", "", None, None]]
        assert (keywords, embed) == ({}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None})

    def test_the_header_says_how_many_there_are(self) -> None:
        assert bulk.headers(PACKET) == {"watch": {"version": 1, "sent_at": AT.isoformat(), "messages": 3}}

    def test_what_flower_shows_is_a_literal_without_the_data(self) -> None:
        shown = bulk.reprs(PACKET)
        assert ast.literal_eval(shown["kwargsrepr"]) == {"topic": "alarm", "messages": 3}
        assert ast.literal_eval(shown["argsrepr"]) == ()

    def test_ids_are_found_without_the_members(self) -> None:
        assert bulk.names(bulk.body(PACKET)) == ["m1", "m2", "m3"]

    @given(
        st.lists(
            st.tuples(
                st.text(min_size=1),
                st.recursive(
                    st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                    max_leaves=8,
                ),
            )
        )
    )
    def test_any_data_survives_it(self, sent: list[tuple[str, Any]]) -> None:
        made = [Message(data, "alarm", index="i", handled=(name,)) for name, data in sent]
        packet = Packet("alarm", [member_of(message, dump(message.data)) for message in made])
        assert messages(bulk.read(bulk.body(packet), fields())) == made

    @pytest.mark.parametrize("data", ["\ud800", {"\udfff": ["\x00", "\\"]}, 2**63, "é" * 1000])
    def test_data_that_only_python_writes_survives_it(self, data: Any) -> None:
        packet = Packet("alarm", [member_of(Message(each, "alarm"), dump(each)) for each in (1, data, 2)])
        read = [unpack_member(packet, member) for member in bulk.read(bulk.body(packet), fields()).members]
        assert [message.data for message in read if isinstance(message, Message)] == [1, data, 2]


class TestWhatIsNoPacket:
    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            b"\xff\xfe",
            b"null",
            b"[]",
            b'"abc"',
            b'[["alarm", [',
            b'[["alarm"], {}, {}]',
            b'[["alarm", {}], {}, {}]',
            b'[["alarm", null], {}, {}]',
            b'[["alarm", []], []]',
            b"[[7, []], {}, {}]",
            b'[["_bulk", []], {}, {}]',
            b'[["A B", []], {}, {}]',
            b'[["", []], {}, {}]',
            b'[["alarm\\n", []], {}, {}]',
            b"[" * 100_000,
            b'[["alarm", [["m1", "", ' + b"[" * 100_000,
        ],
    )
    def test_it_says_what_was_expected(self, raw: bytes) -> None:
        with pytest.raises(MessageError, match=r"the body must be \[\[topic, members\], \{\}, embed\]"):
            bulk.read(raw, fields())
        with pytest.raises(MessageError):
            bulk.names(raw)

        found, wait = unpack(Envelope(fields(), raw))
        assert isinstance(found, Unreadable)
        assert (found.reason, found.raw, found.id, wait) == (Reason.MALFORMED, raw, "p1", 0.0)

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"id": None}, "`id` must be"),
            ({"id": "x" * 256}, "`id` must be"),
            ({"id": "a\nb"}, "`id` must be"),
            ({"watch": 7}, "header `watch` does not fit"),
            ({"watch": {"sent_at": "soon"}}, "header `watch` does not fit"),
            ({"watch": {"version": 2}}, "version 2, this worker knows 1"),
        ],
    )
    def test_headers_that_do_not_fit_are_told(self, changes: dict[str, Any], text: str) -> None:
        with pytest.raises(MessageError) as caught:
            bulk.read(bulk.body(PACKET), fields(**changes))
        assert text in str(caught.value)
        with pytest.raises(MessageError):
            bulk.check_headers(fields(**changes))

    def test_too_many_bytes_are_not_read(self) -> None:
        found, _ = unpack(Envelope(fields(), b" " * (bulk.most_bytes(10) + 1)), limit=10)
        assert isinstance(found, Unreadable)
        assert found.reason is Reason.TOO_LARGE

    def test_a_full_packet_is_read_however_little_one_message_may_have(self) -> None:
        member = Member("m", "i" * 100, msgspec.Raw(b'"' + b"x" * 1000 + b'"'))
        packet = Packet("alarm", [member] * (MOST_BYTES // 1100))
        assert isinstance(unpack(pack_packet(packet), limit=10)[0], Packet)

    @given(st.binary(max_size=200), st.dictionaries(st.sampled_from(["id", "watch", "eta", "expires"]), st.text()))
    def test_nothing_makes_it_raise(self, raw: bytes, headers: dict[str, Any]) -> None:
        unpack(Envelope({"task": bulk.TASK, **headers}, raw))
        unpack(Envelope({"task": bulk.TASK, **headers}, bulk.body(PACKET)))


class TestMembers:
    """What is no message keeps no other from being one."""

    @pytest.mark.parametrize(
        "strange",
        [
            None,
            7,
            "m1",
            {},
            [],
            ["m1"],
            ["m1", ""],
            [7, "", 1],
            ["m1", None, 1],
            ["m1", "", 1, 7],
            ["m1", "", 1, {"copy": "3"}],
            ["m1", "", 1, {"once": "sometimes"}],
            ["m1", "", 1, {"sent_at": "soon"}],
            ["m1", "", 1, {"handled": [7]}],
        ],
    )
    def test_one_of_another_form_is_unreadable_with_its_bytes(self, strange: Any) -> None:
        raw = body(["m0", "", 1], strange, ["m2", "", 3])

        first, bad, last = messages(bulk.read(raw, fields()))

        assert [one.id for one in (first, last)] == ["m0", "m2"]
        assert isinstance(bad, Unreadable)
        assert (bad.reason, bad.topic, json.loads(bad.raw)) == (Reason.MALFORMED, "alarm", strange)
        assert bad.id == wire.bytes_id(bad.raw)
        assert "a member of a packet must be [id, index, data, more]" in bad.error
        assert bulk.names(raw)[::2] == ["m0", "m2"]

    @pytest.mark.parametrize(
        ("member", "text"),
        [
            (["", "", 1], "the id must be"),
            (["x" * 1_000_000, "", 1], "the id must be"),
            (["a\nb", "", 1], "the id must be"),
            (["\ud800", "\ud800", 1], "the id must be"),
            (["m1", "x" * 513, 1], "513 characters"),
            (["m1", "a\nb", 1], "printable"),
            (["m1", "", 1, {"copy": -1}], "copy"),
            (["m1", "", 1, {"max_retries": -1}], "max_retries"),
        ],
    )
    def test_one_whose_values_do_not_fit_is_unreadable(self, member: list[Any], text: str) -> None:
        (bad,) = messages(bulk.read(body(member), fields()))
        assert isinstance(bad, Unreadable)
        assert (bad.reason, bad.raw) == (Reason.MALFORMED, b"1")
        assert text in bad.error
        assert wire.is_id(bad.id)
        assert len(bad.error) < 1000

    def test_two_without_an_id_are_told_apart(self) -> None:
        one, other = messages(bulk.read(body(["", "a", 1], ["", "b", 1]), fields()))
        assert one.id != other.id

    def test_one_with_too_much_data_is_too_large(self) -> None:
        packet = bulk.read(body(["m1", "", "x" * 99], ["m2", "", 1]), fields())
        large, fine = (unpack_member(packet, member, limit=100) for member in packet.members)
        assert isinstance(large, Unreadable)
        assert (large.reason, large.id) == (Reason.TOO_LARGE, "m1")
        assert isinstance(fine, Message)

    def test_one_may_be_there_twice(self) -> None:
        first, second = messages(bulk.read(body(["m1", "", 1], ["m1", "", 1]), fields()))
        assert first == second

    def test_what_a_newer_version_adds_is_passed_over(self) -> None:
        raw = body(["m1", "i", 1, {"copy": 2, "colour": "red"}, "more"], topic="alarm")
        header = {"watch": {"version": 1, "sent_at": AT.isoformat(), "messages": 1, "colour": "red"}}
        (message,) = messages(bulk.read(raw, fields(**header)))
        assert isinstance(message, Message)
        assert (message.id, message.index, message.copy, message.sent_at) == ("m1", "i", 2, AT)

    def test_what_an_older_one_left_out_is_not_missed(self) -> None:
        packet = bulk.read(body(["m1", "", 1]), {"id": "p1"})
        (message,) = messages(packet)
        assert isinstance(message, Message)
        assert (message.index, message.copy, message.sent_at) == ("m1", 0, packet.sent_at)

    def test_a_time_without_a_zone_is_utc(self) -> None:
        raw = body(["m1", "", 1, {"sent_at": "2026-01-02T03:04:05"}], ["m2", "", 1])
        packet = bulk.read(raw, fields(watch={"sent_at": "2026-01-02T03:04:05"}))
        assert [read_member(member, "alarm", packet.sent_at).sent_at for member in packet.members] == [AT, AT]

    def test_what_is_rarely_said_takes_no_room(self) -> None:
        assert member_of(SENT[0], b"1", AT).more is None
        assert member_of(SENT[2], b"1", SENT[2].sent_at).more == More(3, 2, ("a", "b"), 0, "none")
