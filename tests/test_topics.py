from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest

from watch_tasks import (
    BatchAnswer,
    Message,
    MessageError,
    QueueFullError,
    SchemaError,
    SendFailedError,
    SendReport,
    SendUnknownError,
    TooLargeError,
    TopicError,
    Verdict,
    topic,
)
from watch_tasks.registry import registry
from watch_tasks.topics import DAY, BatchHandler, Topic


@dataclass(frozen=True)
class Alarm:
    """An Indexer."""

    host: str

    def index(self) -> str:
        return self.host


ALARMS = Topic("t", schema=Alarm, index=lambda data: "topic")


class Desk:
    """An outlet that notes what it is given, and fails by the data."""

    def __init__(self) -> None:
        self.pushed: list[tuple[Message[Any], float]] = []

    def push(self, message: Message[Any], *, delay: float = 0.0) -> None:
        match message.data:
            case "full":
                raise QueueFullError("full")
            case "large":
                raise TooLargeError("t", 2, 1)
            case "lost":
                raise SendUnknownError("the answer was lost", message)
            case "down":
                raise SendFailedError("the broker is down")
        self.pushed.append((message, delay))

    @property
    def data(self) -> list[Any]:
        return [message.data for message, _ in self.pushed]


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
def bound(desk: Desk) -> Topic[Any]:
    made: Topic[Any] = Topic("t")
    made.bind(desk)
    return made


class TestName:
    @pytest.mark.parametrize("name", ["a", "0", "orders.created", "a_b-c.d", "a" * 64])
    def test_a_name_may_have_these_forms(self, name: str) -> None:
        assert Topic(name).name == name

    @pytest.mark.parametrize(
        "name", ["", "A", ".a", "_x", "-a", "a b", "a/b", "é", "٣", "a\n", "a" * 65, "watch.*", None, 5, b"a"]
    )
    def test_any_other_is_refused_and_shown(self, name: Any) -> None:
        with pytest.raises(TopicError) as caught:
            Topic(name)
        assert f"got {name!r}" in str(caught.value)


class TestIndex:
    """Who names a message: the sender, the data, the topic, or nobody."""

    def test_the_sender_goes_first(self) -> None:
        assert ALARMS.message(Alarm("data"), index="sender").index == "sender"

    def test_a_message_with_an_index_has_a_sender_who_named_it(self) -> None:
        named = Message(Alarm("data"), "t", index="sender")
        assert ALARMS.message(named).index == "sender"

    def test_then_the_data(self) -> None:
        assert ALARMS.message(Alarm("data")).index == "data"

    def test_then_the_topic(self) -> None:
        by_key: Topic[dict[str, str]] = Topic("t", index=lambda data: data["key"])
        assert by_key.message({"key": "k"}).index == "k"
        assert by_key.message(Message({"key": "k"}, "t")).index == "k"

    def test_and_else_it_is_the_id(self) -> None:
        loose: Topic[Any] = Topic("t")
        message = loose.message({"key": "k"})
        assert message.index == message.id

    def test_a_list_has_an_index_too_and_is_not_asked(self) -> None:
        lists: Topic[list[int]] = Topic("t")
        message = lists.message([1, 2])
        assert message.index == message.id

    def test_what_the_topic_says_is_checked(self) -> None:
        with pytest.raises(MessageError, match=r"got 7 \(int\)"):
            Topic("t", index=lambda data: 7).message(1)  # type: ignore[arg-type,return-value]

    def test_an_index_function_that_fails_is_named_with_its_error(self) -> None:
        by_key: Topic[dict[str, str]] = Topic("t", index=lambda data: data["key"])
        with pytest.raises(MessageError, match="topic `t`: finding the index failed: KeyError: 'key'") as caught:
            by_key.message({})
        assert isinstance(caught.value.__cause__, KeyError)


class TestSend:
    def test_the_outlet_gets_plain_data_and_the_caller_his_own(self, desk: Desk) -> None:
        alarms = Topic("alarm", schema=Alarm)
        alarms.bind(desk)

        sent = alarms.send(Alarm("web-1"), max_retries=5, once="index", delay=2.5)

        ((pushed, delay),) = desk.pushed
        assert sent.data == Alarm("web-1")
        assert pushed.data == {"host": "web-1"}
        assert (pushed.id, pushed.index, pushed.topic) == (sent.id, "web-1", "alarm")
        assert (pushed.max_retries, pushed.once, delay) == (5, "index", 2.5)

    def test_a_message_sent_again_keeps_its_id(self, desk: Desk, bound: Topic[Any]) -> None:
        sent = bound.send(1)
        again = bound.send(sent)
        assert again == sent
        assert [message.id for message, _ in desk.pushed] == [sent.id, sent.id]

    def test_so_does_one_whose_answer_was_lost(self, desk: Desk, bound: Topic[Any]) -> None:
        with pytest.raises(SendUnknownError) as caught:
            bound.send("lost", index="i")
        desk.push = lambda message, **options: desk.pushed.append((message, 0.0))  # type: ignore[method-assign]
        again = bound.send(caught.value.message)
        assert (again.id, again.index) == (caught.value.message.id, "i")
        assert desk.data == ["lost"]

    def test_a_messages_own_rules_are_kept_unless_the_send_says_otherwise(self, bound: Topic[Any]) -> None:
        message = Message(1, "t", max_retries=9, once="none")
        assert (bound.send(message).max_retries, bound.send(message).once) == (9, "none")
        changed = bound.send(message, max_retries=0, once="index")
        assert (changed.max_retries, changed.once) == (0, "index")

    def test_a_message_without_a_topic_takes_this_one(self, bound: Topic[Any]) -> None:
        assert bound.send(Message(1)).topic == "t"

    def test_a_message_of_another_topic_is_a_mistake(self, desk: Desk, bound: Topic[Any]) -> None:
        with pytest.raises(TopicError, match="of topic `other` cannot be sent as `t`"):
            bound.send(Message(1, "other"))
        assert desk.pushed == []

    def test_what_does_not_fit_is_not_sent(self, desk: Desk) -> None:
        alarms = Topic("alarm", schema=Alarm)
        alarms.bind(desk)
        with pytest.raises(SchemaError, match=r"topic `alarm`: .*`\$\.host`"):
            alarms.send(Alarm(5), index="i")  # type: ignore[arg-type]
        assert desk.pushed == []

    @pytest.mark.parametrize(
        ("data", "error"), [("full", QueueFullError), ("down", SendFailedError), ("large", TooLargeError)]
    )
    def test_what_the_outlet_raises_reaches_the_sender(
        self, bound: Topic[Any], data: str, error: type[Exception]
    ) -> None:
        with pytest.raises(error):
            bound.send(data)


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"retry": 3}, "`retry` must be a RetryPolicy, got 3"),
        ({"index": "host"}, "`index` must be a callable .*'host'"),
    ],
)
def test_rules_that_are_none_are_told_where_the_topic_is_defined(rules: dict[str, Any], told: str) -> None:
    with pytest.raises(TypeError, match=f"topic `t`: {told}"):
        Topic("t", **rules)


class TestSendMany:
    def test_every_item_is_counted(self, desk: Desk, bound: Topic[Any]) -> None:
        assert bound.send_many(range(3)) == SendReport(sent=3)
        assert desk.data == [0, 1, 2]

    def test_one_that_cannot_be_sent_does_not_keep_the_others_back(self, desk: Desk, bound: Topic[Any]) -> None:
        report = bound.send_many([1, "full", 2, "lost", 3, "large", object()])
        assert report == SendReport(sent=3, refused=3, unknown=1)
        assert desk.data == [1, 2, 3]

    def test_each_verdict_is_told_with_its_message(self, bound: Topic[Any]) -> None:
        told: list[tuple[Any, Verdict]] = []
        bound.send_many([1, "full", "lost"], on_verdict=lambda message, verdict: told.append((message.data, verdict)))
        assert told == [(1, Verdict.SENT), ("full", Verdict.REFUSED), ("lost", Verdict.UNKNOWN)]

    def test_what_ended_unknown_may_be_sent_again_under_its_id(self, desk: Desk, bound: Topic[Any]) -> None:
        unknown: list[Message[Any]] = []
        bound.send_many(["lost"], on_verdict=lambda message, verdict: unknown.append(message))
        desk.push = lambda message, **options: desk.pushed.append((message, 0.0))  # type: ignore[method-assign]
        assert bound.send_many(unknown).sent == 1
        assert desk.pushed[0][0].id == unknown[0].id

    def test_an_item_whose_index_is_unusable_is_refused_and_shown(self, desk: Desk, bound: Topic[Any]) -> None:
        told: list[Any] = []
        items = [Alarm("a\nb"), Message(Alarm("a\nb"), "t", index="fine")]
        report = bound.send_many(items, on_verdict=lambda message, verdict: told.append((message.data, verdict)))
        assert report == SendReport(sent=1, refused=1)
        assert told[0] == (Alarm("a\nb"), Verdict.REFUSED)

    def test_a_broker_that_is_down_ends_it(self, desk: Desk, bound: Topic[Any]) -> None:
        with pytest.raises(SendFailedError):
            bound.send_many([1, "down", 2])
        assert desk.data == [1]

    def test_items_are_read_as_they_are_sent(self, desk: Desk, bound: Topic[Any]) -> None:
        def items() -> Iterator[int]:
            for number in count():
                assert len(desk.pushed) == number
                if number == 3:
                    return
                yield number

        assert bound.send_many(items()).sent == 3

    def test_nothing_to_send_is_fine(self, bound: Topic[Any]) -> None:
        assert bound.send_many([]) == SendReport()


class TestHandlers:
    def test_they_are_kept_in_order_under_their_names(self, bound: Topic[Any]) -> None:
        @bound.handler
        def first(message: Message[Any]) -> None: ...

        @bound.handler(name="kept")
        async def second(message: Message[Any]) -> None: ...

        assert [handler.name for handler in bound.handlers] == ["first", "kept"]
        assert [handler.function for handler in bound.handlers] == [first, second]
        assert repr(bound) == "<Topic t: first, kept>"

    def test_what_has_no_name_is_called_by_its_type(self, bound: Topic[Any]) -> None:
        bound.handler(functools.partial(print, "got"))
        assert bound.handlers[0].name == "partial"

    def test_two_of_a_name_are_refused(self, bound: Topic[Any]) -> None:
        bound.handler(print)
        with pytest.raises(TopicError, match="topic `t` has a handler `print` already"):
            bound.handler(print)
        with pytest.raises(TopicError):
            bound.handler(name="print")(len)
        assert len(bound.handlers) == 1

    def test_the_same_function_may_have_two_names(self, bound: Topic[Any]) -> None:
        bound.handler(print)
        bound.handler(name="again")(print)
        assert [handler.name for handler in bound.handlers] == ["print", "again"]

    def test_what_cannot_be_called_is_refused(self, bound: Topic[Any]) -> None:
        with pytest.raises(TypeError, match="topic `t`: a handler must be callable, got 'print'"):
            bound.handler("print")  # type: ignore[call-overload]

    def test_a_generator_is_no_handler(self) -> None:
        def steps(message: object) -> Iterator[int]:
            yield 1

        with pytest.raises(TypeError, match="topic `t`: handler `steps` must not yield"):
            Topic("t").handler(steps)


class TestBatchHandler:
    def test_it_is_the_one_handler_of_its_topic(self, bound: Topic[Any]) -> None:
        @bound.batch_handler(size=50, seconds=0.2)
        def store(messages: list[Message[Any]]) -> None: ...

        assert bound.batch == BatchHandler("store", store, 50, 0.2)
        assert bound.handlers == (bound.batch,)

    def test_bare_it_gets_a_hundred_and_waits_a_second(self, bound: Topic[Any]) -> None:
        @bound.batch_handler
        async def store(messages: list[Message[Any]]) -> BatchAnswer:
            return None

        assert bound.batch == BatchHandler("store", store, 100, 1.0)

    def test_its_name_may_be_given(self, bound: Topic[Any]) -> None:
        bound.batch_handler(name="kept")(lambda messages: None)
        assert bound.batch
        assert bound.batch.name == "kept"

    def test_beside_it_there_is_no_other(self, bound: Topic[Any]) -> None:
        bound.batch_handler(name="first")(lambda messages: None)
        with pytest.raises(TopicError, match="has a handler `first` already, so it can have no `print`: a topic has"):
            bound.handler(print)
        with pytest.raises(TopicError, match="so it can have no `second`"):
            bound.batch_handler(name="second")(lambda messages: None)

    def test_plain_handlers_leave_no_place_for_it(self, bound: Topic[Any]) -> None:
        bound.handler(print)
        assert bound.batch is None
        with pytest.raises(TopicError, match="has a handler `print` already, so it can have no `second`"):
            bound.batch_handler(name="second")(lambda messages: None)

    def test_a_transactional_topic_cannot_have_one(self) -> None:
        with pytest.raises(TopicError, match="topic `t` is transactional and can have no batch handler"):
            Topic("t", transactional=True).batch_handler(lambda messages: None)

    @pytest.mark.parametrize("size", [0, -1, True, 1.5, "9"])
    def test_a_size_is_a_whole_number_above_0(self, bound: Topic[Any], size: Any) -> None:
        with pytest.raises(ValueError, match="topic `t`: `size` must be a whole number above 0"):
            bound.batch_handler(size=size)

    @pytest.mark.parametrize("seconds", [-1, float("inf"), float("nan")])
    def test_seconds_are_0_or_more(self, bound: Topic[Any], seconds: float) -> None:
        with pytest.raises(ValueError, match="topic `t`: `seconds` must be 0 or more"):
            bound.batch_handler(seconds=seconds)


class TestRules:
    @pytest.mark.parametrize("retention", [DAY, DAY + 1, None])
    def test_records_are_kept_for_a_day_at_least_or_for_ever(self, retention: float | None) -> None:
        assert Topic("t", retention=retention).retention == retention

    @pytest.mark.parametrize("retention", [0, -1, DAY - 1, float("inf"), float("nan"), "86400", True])
    def test_a_shorter_retention_would_lose_records_to_copies_in_flight(self, retention: Any) -> None:
        with pytest.raises(ValueError, match=r"topic `t`: `retention` must be at least 86400 seconds"):
            Topic("t", retention=retention)

    @pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan"), "5", True])
    def test_a_timeout_that_is_none_is_refused(self, timeout: Any) -> None:
        with pytest.raises(ValueError, match="`timeout` must be seconds above 0, or None"):
            Topic("t", timeout=timeout)

    @pytest.mark.parametrize("most", [0, -1, 1.5, "5", True])
    def test_a_bound_that_is_no_count_is_refused(self, most: Any) -> None:
        with pytest.raises(ValueError, match="topic `t`: `max_waiting` must be at least 1, or None"):
            Topic("t", max_waiting=most)

    @pytest.mark.parametrize("queue", ["", 3, b"q"])
    def test_a_queue_that_is_no_name_is_refused(self, queue: Any) -> None:
        with pytest.raises(ValueError, match="topic `t`: `queue` must be the name of a queue, or None"):
            Topic("t", queue=queue)

    @pytest.mark.parametrize("delay", ["5", "", None, float("nan"), float("inf"), 1e12, True])
    def test_a_delay_that_is_no_time_is_refused_before_anything_is_sent(
        self, desk: Desk, bound: Topic[Any], delay: Any
    ) -> None:
        with pytest.raises(ValueError, match="`delay` must be seconds, a hundred years at most, got"):
            bound.send(1, delay=delay)
        assert desk.pushed == []

    def test_an_unknown_once_rule_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"topic `t`: `once` must be"):
            Topic("t", once="twice")  # type: ignore[arg-type]


class TestBinding:
    def test_the_last_binding_wins(self, desk: Desk, bound: Topic[Any]) -> None:
        other = Desk()
        bound.bind(other)
        bound.send(1)
        assert (desk.data, other.data) == ([], [1])

    def test_an_unbound_topic_takes_the_default_at_its_first_send(
        self, desk: Desk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []

        def default() -> Desk:
            asked.append("asked")
            return desk

        monkeypatch.setattr(registry, "_default", default)
        late: Topic[Any] = topic("late")
        assert (late.is_bound, asked) == (False, [])

        late.send(1)
        late.send(2)

        assert (late.is_bound, asked, desk.data) == (True, ["asked"], [1, 2])

    def test_topic_registers_what_it_makes_and_the_class_does_not(self) -> None:
        made: Topic[Any] = topic("made")
        Topic("loose")
        assert [*registry] == [made]
