from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal, TypedDict

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from watch_tasks import Schema, SchemaError
from watch_tasks.schema import PlainSchema, dump, load, schema_of
from watch_tasks.topics import Topic

json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@dataclass(frozen=True)
class OrderData:
    number: int
    lines: list[str] = field(default_factory=list)


class OrderDict(TypedDict):
    number: int
    lines: list[str]


class OrderStruct(msgspec.Struct, frozen=True):
    number: int
    lines: list[str]


class OrderModel(pydantic.BaseModel):
    number: int
    lines: list[str]


class Held(msgspec.Struct):
    raw: msgspec.Raw
    next: Held | None = None


class Words:
    """A schema of somebody's own: words on the wire, a tuple in the handler."""

    def encode(self, data: tuple[str, ...]) -> Any:
        return " ".join(data)

    def decode(self, plain: Any) -> tuple[str, ...]:
        if not isinstance(plain, str):
            raise TypeError(f"expected words, got {plain!r}")
        return tuple(plain.split())


KINDS = [OrderData, OrderDict, OrderStruct, OrderModel]
PLAIN = {"number": 7, "lines": ["a", "b"]}

#: A topic without a schema.
anything: Topic[Any] = Topic("t")


def nested(depth: int) -> list[Any]:
    data: list[Any] = []
    for _ in range(depth):
        data = [data]
    return data


@pytest.mark.parametrize("kind", KINDS)
class TestTypes:
    def test_data_goes_to_plain_values_and_back(self, kind: Any) -> None:
        topic: Topic[Any] = Topic("orders", schema=kind)
        data = kind(**PLAIN)
        assert topic.encode(data) == PLAIN
        assert topic.decode(PLAIN) == data

    def test_data_that_is_of_the_type_already_arrives_as_it_is(self, kind: Any) -> None:
        data = kind(**PLAIN)
        assert Topic("orders", schema=kind).decode(data) == data

    @pytest.mark.parametrize(
        ("plain", "where"),
        [
            ({"number": 7, "lines": ["a", 1]}, "lines"),
            ({"number": "seven", "lines": []}, "number"),
            ({"lines": []}, "number"),
        ],
    )
    def test_a_shape_that_does_not_fit_says_where(self, kind: Any, plain: Any, where: str) -> None:
        with pytest.raises(SchemaError, match=f"(?s)topic `orders`: .*{where}"):
            Topic("orders", schema=kind).decode(plain)

    @pytest.mark.parametrize("plain", [None, [], "text", 5, {}])
    def test_something_else_altogether_is_refused(self, kind: Any, plain: Any) -> None:
        with pytest.raises(SchemaError):
            Topic("orders", schema=kind).decode(plain)

    def test_plain_data_may_be_sent_if_it_fits(self, kind: Any) -> None:
        topic: Topic[Any] = Topic("orders", schema=kind)
        assert topic.encode(PLAIN) == PLAIN
        with pytest.raises(SchemaError):
            topic.encode({"number": 7, "lines": 3})


class TestRefusals:
    @pytest.mark.parametrize("kind", [OrderData, OrderDict, OrderStruct])
    def test_a_sender_learns_what_every_worker_would_refuse(self, kind: Any) -> None:
        """None of these checks anything when it is made."""
        with pytest.raises(SchemaError, match=r"Expected `int`, got `str` - at `\$\.number`"):
            Topic("orders", schema=kind).encode(kind(number="seven", lines=[]))

    def test_a_boolean_is_no_number(self) -> None:
        topic = Topic("numbers", schema=int)
        with pytest.raises(SchemaError):
            topic.encode(True)
        with pytest.raises(SchemaError):
            topic.decode(True)

    def test_whatever_a_schema_raises_means_that_it_does_not_fit(self) -> None:
        with pytest.raises(SchemaError, match="topic `words`: expected words, got 5") as caught:
            Topic("words", schema=Words()).decode(5)
        assert isinstance(caught.value.__cause__, TypeError)

    @pytest.mark.parametrize("schema", [object(), 5, Callable[[int], int], type("Bare", (), {})])
    def test_what_is_no_schema_is_refused_when_the_topic_is_defined(self, schema: Any) -> None:
        with pytest.raises(TypeError, match="`schema` must be a dataclass"):
            schema_of(schema)

    @pytest.mark.parametrize("schema", [msgspec.Raw, list[msgspec.Raw], Held, dict[str, Held | None]])
    def test_of_bytes_that_claim_to_be_json_is_refused(self, schema: Any) -> None:
        with pytest.raises(TypeError, match=r"`msgspec\.Raw` has no plain form"):
            Topic("t", schema=schema)

    def test_the_part_that_cannot_be_described_is_named(self) -> None:
        @dataclass
        class Odd:
            call: Callable[[int], int]

        with pytest.raises(TypeError, match="Callable"):
            schema_of(Odd)


class TestShapes:
    def test_an_object_with_encode_and_decode_is_a_schema_as_it_is(self) -> None:
        words = Words()
        assert isinstance(words, Schema)
        assert schema_of(words) is words
        topic = Topic("words", schema=words)
        assert topic.decode(topic.encode(("a", "b"))) == ("a", "b")

    def test_fields_may_have_the_types_that_json_lacks(self) -> None:
        @dataclass(frozen=True)
        class Rich:
            at: datetime
            id: uuid.UUID
            price: Decimal
            raw: bytes
            level: Literal["a", "b"]
            seen: frozenset[int]
            by_number: dict[int, str]
            inner: OrderData | None = None

        topic = Topic("rich", schema=Rich)
        data = Rich(
            datetime(2027, 1, 1, tzinfo=UTC),
            uuid.UUID(int=5),
            Decimal("3.10"),
            b"\x00\xff",
            "a",
            frozenset({1}),
            {1: "one"},
            OrderData(1),
        )
        assert topic.decode(load(dump(topic.encode(data)))) == data

    def test_an_attrs_class_is_a_schema(self) -> None:
        attrs = pytest.importorskip("attrs")
        fields = {"number": attrs.field(type=int), "lines": attrs.field(type=list[str])}
        order = attrs.make_class("Order", fields, frozen=True)
        topic: Topic[Any] = Topic("orders", schema=order)
        assert topic.decode(topic.encode(order(**PLAIN))) == order(**PLAIN)
        with pytest.raises(SchemaError, match=r"\$\.number"):
            topic.encode(order("seven", []))

    def test_a_type_may_be_an_alias(self) -> None:
        topic: Topic[dict[str, int]] = Topic("counts", schema=dict[str, int])
        assert topic.decode({"a": 1}) == {"a": 1}
        with pytest.raises(SchemaError, match=r"\$\[\.\.\.\]"):
            topic.decode({"a": "1"})

    def test_a_field_that_a_newer_sender_added_is_let_pass(self) -> None:
        """Producers are deployed before workers, or after them."""
        assert Topic("orders", schema=OrderData).decode({"number": 1, "new": True}) == OrderData(1)


class TestPlain:
    @pytest.mark.parametrize("data", [OrderData(1, ["a"]), OrderStruct(1, ["a"]), OrderModel(number=1, lines=["a"])])
    def test_without_a_schema_objects_are_sent_as_json_objects(self, data: Any) -> None:
        assert anything.encode(data) == {"number": 1, "lines": ["a"]}

    def test_a_model_may_stand_among_other_values(self) -> None:
        assert anything.encode([OrderModel(number=1, lines=[])]) == [{"number": 1, "lines": []}]

    @given(json)
    def test_json_values_go_through_unchanged(self, data: Any) -> None:
        schema = PlainSchema()
        assert schema.decode(schema.encode(data)) == data

    @pytest.mark.parametrize("data", [object(), print, 1j, {"a": [object()]}])
    def test_what_has_no_json_form_is_refused(self, data: Any) -> None:
        with pytest.raises(SchemaError, match="topic `t`"):
            anything.encode(data)

    def test_data_nested_beyond_all_reason_is_refused(self) -> None:
        with pytest.raises(SchemaError):
            anything.encode(nested(100_000))


@dataclass(frozen=True)
class Reading:
    value: float
    by_number: dict[int, str]
    extra: Any = None


@dataclass(frozen=True)
class Strict:
    number: int

    def __post_init__(self) -> None:
        if self.number < 0:
            raise LookupError(self.number)


class Tagged(msgspec.Struct, frozen=True, tag="t", rename="camel", omit_defaults=True):
    z_last: int
    other_one: int = 0


class Shouted(PlainSchema):
    """A schema of somebody's own, by way of the plain one."""

    def encode(self, data: Any) -> Any:
        return str(data).upper()


class Word(str):
    """What derives from text is not text alone."""


#: Two equal sets, each in an order of its own: as sets of text are in two processes.
SOME, OTHERWISE = set([0, 8]), set([8, 0])  # noqa: C405 - the order of a literal's values is its maker's business


class TestDumped:
    """What a topic dumps is what `dump` makes of what it encodes, whichever way that takes."""

    @given(json)
    def test_of_json_values(self, data: Any) -> None:
        assert anything.dump(data) == dump(anything.encode(data))

    @pytest.mark.parametrize(
        "data",
        [
            {2: "a", 10: "b"},
            {1: "a", "1": "b"},
            {"b": 1, "a": {"d": 1, "c": 2}},
            {"b": "\ud800", "a": "\udfff"},
            ["\ud800"],
            "\ud800",
            [math.nan, math.inf, 2**64, -0.0, True, None],
            {Word("w"): 1},
            OrderData(1, ["a"]),
            [OrderModel(number=1, lines=["a"])],
            (1, "a"),
            b"bytes",
        ],
    )
    def test_of_whatever_has_a_json_form(self, data: Any) -> None:
        assert anything.dump(data) == dump(anything.encode(data))

    @pytest.mark.parametrize(
        "data", [object(), [object()], {"a": 1j}, {(1, 2): 3}, Word("w"), {"w": Word("w")}, nested(100_000)]
    )
    def test_what_has_no_json_form_is_refused(self, data: Any) -> None:
        with pytest.raises(SchemaError, match="topic `t`"):
            anything.dump(data)

    @pytest.mark.parametrize("data", [msgspec.Raw(b"{"), [msgspec.Raw(b"{")], {"a": msgspec.Raw(b"{")}])
    def test_bytes_that_claim_to_be_json_are_not_taken_at_their_word(self, data: Any) -> None:
        with pytest.raises(SchemaError, match="topic `t`"):
            anything.dump(data)

    @pytest.mark.parametrize(
        ("schema", "data"),
        [
            *((kind, kind(**PLAIN)) for kind in KINDS),
            *((kind, PLAIN) for kind in KINDS),
            (OrderData, {**PLAIN, "new": {"b": 1, "a": 2}}),
            (OrderData, OrderData(2**70, ["\ud800"])),
            (Reading, Reading(1.5, {2: "b", 10: "a"})),
            (Reading, Reading(3, {})),
            (Reading, Reading(math.nan, {})),
            (Reading, Reading(1e300, {}, extra={"z": datetime(2027, 1, 1, tzinfo=UTC), "a": b"\xff"})),
            (Reading, Reading(0.1, {}, extra=[uuid.UUID(int=5), Decimal("3.10"), OrderData(1), OrderStruct(1, [])])),
            (Tagged, Tagged(2)),
            (Tagged, Tagged(2, other_one=5)),
            (dict[str, int], {"b": 1, "a": 2}),
            (set[int], OTHERWISE),
            (Reading, Reading(0.5, {}, extra=[OTHERWISE])),
            (int, 5),
            (Shouted(), "flat"),
            (Words(), ("a", "b")),
        ],
    )
    def test_of_what_a_schema_encodes(self, schema: Any, data: Any) -> None:
        topic: Topic[Any] = Topic("t", schema=schema)
        assert topic.dump(data) == dump(topic.encode(data))

    @pytest.mark.parametrize("schema", [None, set[int]])
    def test_equal_sets_are_one_whatever_order_they_are_in(self, schema: Any) -> None:
        topic: Topic[Any] = Topic("t", schema=schema)
        assert list(SOME) != list(OTHERWISE)
        assert dump(topic.encode(SOME)) == dump(topic.encode(OTHERWISE)) == topic.dump(OTHERWISE) == b"[0,8]"

    def test_a_set_of_what_has_no_order_is_sent_all_the_same(self) -> None:
        assert set(anything.encode({1, "a"})) == {1, "a"}

    @pytest.mark.parametrize(
        ("schema", "data"),
        [
            *((kind, {"number": 7, "lines": 3}) for kind in KINDS),
            (OrderData, OrderData("seven")),  # type: ignore[arg-type]
            (OrderData, OrderData(1.5)),  # type: ignore[arg-type]
            (OrderData, OrderData(True)),
            (OrderData, None),
            (Reading, Reading("1.5", {})),  # type: ignore[arg-type]
            (Reading, Reading(1.5, {}, extra=object())),
            (Reading, Reading(1.5, {}, extra=msgspec.Raw(b"{"))),
            (Strict, {"number": -1}),
            (dict[str, int], {"a": "1"}),
            (Words(), 5),
        ],
    )
    def test_what_no_worker_would_read_is_refused_as_ever(self, schema: Any, data: Any) -> None:
        topic: Topic[Any] = Topic("t", schema=schema)
        with pytest.raises(SchemaError) as encoding:
            topic.encode(data)
        with pytest.raises(SchemaError) as dumping:
            topic.dump(data)
        assert str(dumping.value) == str(encoding.value)


class TestStoredForm:
    @given(json)
    def test_what_is_dumped_is_loaded(self, data: Any) -> None:
        assert load(dump(data)) == data

    @pytest.mark.parametrize(
        "data",
        ["\ud800", {"\udfff": "\ud800"}, 10**30, -(2**63) - 1, 2**64, [1.5e308, {"n": 10**30}], "\x00", "\u2028"],
    )
    def test_so_is_what_json_parsers_let_pass(self, data: Any) -> None:
        assert load(dump(data)) == data

    def test_the_order_of_keys_makes_no_difference(self) -> None:
        assert dump({"a": 1, "b": {"c": 2, "d": 3}}) == dump({"b": {"d": 3, "c": 2}, "a": 1})
        assert dump({"a": "\ud800", "b": 1}) == dump({"b": 1, "a": "\ud800"})

    @pytest.mark.parametrize("data", [object(), {1: 2, "a": 3}, nested(100_000)])
    def test_what_has_no_json_form_is_refused(self, data: Any) -> None:
        with pytest.raises(SchemaError, match="must have a JSON form"):
            dump(data)

    def test_nesting_that_fits_is_kept(self) -> None:
        assert load(dump(nested(100))) == nested(100)

    def test_a_model_is_dumped_as_its_plain_form(self) -> None:
        assert dump(OrderModel(number=1, lines=[])) == dump({"number": 1, "lines": []})

    def test_infinity_is_nothing_in_json(self) -> None:
        assert load(dump([math.inf, math.nan])) == [None, None]
