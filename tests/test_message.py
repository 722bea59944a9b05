from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from watch_tasks import Indexer, Message, MessageError
from watch_tasks.message import MAX_INDEX, check_index, index_of


@dataclass(frozen=True)
class Alarm:
    host: str

    def index(self) -> str:
        return self.host


class Point(NamedTuple):
    x: int
    y: int


class Level(StrEnum):
    HIGH = "high"


class TestIndex:
    def test_an_indexer_names_its_message(self) -> None:
        assert Message(Alarm("web-1"), "alarm").index == "web-1"

    def test_a_given_index_goes_before_the_indexer(self) -> None:
        assert Message(Alarm("web-1"), "alarm", index="other").index == "other"

    def test_what_nobody_named_is_named_by_its_id(self) -> None:
        message = Message(1, "t")
        assert message.index == message.id

    @pytest.mark.parametrize("data", [[1], (1,), "text", b"bytes", range(3), {"index": 1}, None, 5])
    def test_a_builtin_is_never_asked(self, data: object) -> None:
        assert index_of(data) is None

    @pytest.mark.parametrize("data", [Point(1, 2), Level.HIGH, deque([1])])
    def test_nor_is_an_index_asked_that_comes_from_a_builtin(self, data: object) -> None:
        assert index_of(data) is None

    def test_an_index_that_is_a_field_is_not_called(self) -> None:
        @dataclass
        class Row:
            index: int = 3

        assert index_of(Row()) is None

    def test_an_indexer_is_known_by_its_method(self) -> None:
        assert isinstance(Alarm("a"), Indexer)

    @pytest.mark.parametrize("index", ["a", "é☃𝄞", "a b", "x" * MAX_INDEX, "*?{}:/'\""])
    def test_printable_characters_are_an_index(self, index: str) -> None:
        assert check_index(index) == index

    @pytest.mark.parametrize("index", ["", "a\nb", "\x00", "\ud800", "a\u2028b", 7, None, b"a"])
    def test_anything_else_is_refused_and_shown(self, index: object) -> None:
        with pytest.raises(MessageError) as caught:
            check_index(index)
        assert f"got {index!r} ({type(index).__name__})" in str(caught.value)

    def test_of_one_that_is_too_long_only_the_length_is_shown(self) -> None:
        with pytest.raises(MessageError, match="got 513 characters"):
            check_index("x" * 513)

    def test_what_an_indexer_says_is_checked(self) -> None:
        with pytest.raises(MessageError):
            Message(Alarm("a\nb"), "alarm")

    @given(st.text(max_size=MAX_INDEX + 10))
    def test_a_text_is_an_index_or_refused_but_never_changed(self, text: str) -> None:
        try:
            assert check_index(text) == text
        except MessageError:
            assert not text.isprintable() or not 0 < len(text) <= MAX_INDEX


class TestValues:
    def test_each_message_has_its_own_id(self) -> None:
        assert Message(1, "t").id != Message(1, "t").id

    def test_it_knows_when_it_was_made_in_utc(self) -> None:
        before = datetime.now(UTC)
        assert before <= Message(1, "t").sent_at <= datetime.now(UTC)

    def test_it_cannot_be_changed(self) -> None:
        with pytest.raises(AttributeError, match="immutable"):
            Message(1, "t").data = 2  # type: ignore[misc]

    def test_only_data_and_topic_may_be_positional(self) -> None:
        with pytest.raises(TypeError):
            Message(1, "t", "index")  # type: ignore[call-arg]

    @pytest.mark.parametrize("name", ["retries", "copy", "max_retries"])
    @pytest.mark.parametrize("value", [-1, 1.0, "1", True, 10**9 + 1, 10**30])
    def test_a_count_is_a_whole_number(self, name: str, value: object) -> None:
        with pytest.raises(MessageError, match=f"`{name}` must be a whole number, 0 to 1000000000, got {value!r}"):
            Message(1, "t", **{name: value})  # type: ignore[arg-type]

    def test_no_limit_of_its_own_and_a_limit_of_none_are_two_things(self) -> None:
        assert Message(1, "t").max_retries is None
        assert Message(1, "t", max_retries=0).max_retries == 0

    def test_an_unknown_once_rule_is_refused(self) -> None:
        with pytest.raises(MessageError, match=r"`once` must be .* got 'twice'"):
            Message(1, "t", once="twice")  # type: ignore[arg-type]

    @pytest.mark.parametrize("copied", [lambda m: pickle.loads(pickle.dumps(m)), replace])
    def test_a_copy_of_it_is_equal(self, copied: Callable[[Message[Any]], Message[Any]]) -> None:
        message = Message({"a": [1]}, "t", index="i", retries=1, handled=("h",), copy=2)
        assert copied(message) == message


class TestNextCopy:
    @pytest.fixture
    def handled(self) -> Message[int]:
        """As a handler has it."""
        return Message(
            1,
            "t",
            index="i",
            max_retries=7,
            once="index",
            copy=3,
            deadline=datetime.now(UTC),
            token=9,
            idempotency_key="key",
        )

    def test_it_travels_under_the_same_name(self, handled: Message[int]) -> None:
        after = handled.next_copy(retries=2, handled=("a",))
        assert (after.copy, after.retries, after.handled) == (4, 2, ("a",))
        for name in ("data", "topic", "index", "id", "max_retries", "once", "sent_at"):
            assert getattr(after, name) == getattr(handled, name)

    def test_it_leaves_behind_what_belongs_to_the_attempt(self, handled: Message[int]) -> None:
        after = handled.next_copy(retries=2, handled=())
        assert (after.deadline, after.token, after.idempotency_key) == (None, None, "")
