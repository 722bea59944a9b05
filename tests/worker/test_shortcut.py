"""The short way of a message to Redis: it writes what `app.send_task` would, and is left where one could tell."""

from __future__ import annotations

import base64
import functools
import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import celery.app.base
import kombu
import kombu.messaging
import kombu.pools
import pytest
from celery import Celery, signals
from celery._state import _task_stack
from celery.exceptions import AlwaysEagerIgnored
from kombu.transport.redis import Channel as StockChannel

from watch_tasks import Message, SendFailedError, SendUnknownError, Topic, topic
from watch_tasks.errors import ConfigurationError
from watch_tasks.worker import install
from watch_tasks.worker.shortcut import Shortcut

from ..servers import RedisServer, free_port
from ..workers import Site

pytestmark = pytest.mark.integration

MakeApp = Callable[..., Celery]
Ways = list[bool]

#: What each item has of its own.
FRESH = "delivery_tag"


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Ways:
    """Of each send, whether it went the short way."""
    seen: Ways = []
    send = Shortcut.send

    def watched(self: Shortcut, message: Message[Any], options: dict[str, Any]) -> bool:
        is_sent = False
        try:
            is_sent = send(self, message, options)
        finally:
            seen.append(is_sent)
        return is_sent

    monkeypatch.setattr(Shortcut, "send", watched)
    return seen


@pytest.fixture
def make_app(valkey: RedisServer) -> Iterator[MakeApp]:
    """Makes an app with our topics under it; by default its broker is the shared server."""
    made: list[Celery] = []

    def make(kind: type[Celery] = Celery, broker: str | None = valkey.url, **config: Any) -> Celery:
        made.append(install(kind("short", broker=broker, set_as_current=False)))
        made[-1].conf.update(config)
        return made[-1]

    yield make
    for app in made:
        app.close()
    kombu.pools.reset()


def connect(app: Celery) -> None:
    """Have a connection in the pool, as after a first send."""
    with app.pool.acquire() as connection:
        assert connection.default_channel


def items(server: RedisServer, match: str = "*") -> list[tuple[str, dict[str, Any]]]:
    """What lies in the server's lists, each with its key, the eldest first."""
    with server.client() as client:
        keys = sorted(key.decode() for key in client.scan_iter(match, _type="list"))
        return [(key, json.loads(item)) for key in keys for item in reversed(client.lrange(key, 0, -1))]


def body(item: dict[str, Any]) -> Any:
    return json.loads(base64.b64decode(item["body"]))


def data(server: RedisServer) -> list[Any]:
    return [body(item)[0][0] for _, item in items(server)]


@contextmanager
def watched_publish() -> Iterator[list[str]]:
    """Somebody who has a say in what is sent, and says nothing."""
    seen: list[str] = []

    def look(sender: str, **_: Any) -> None:
        seen.append(sender)

    signals.before_task_publish.connect(look)
    try:
        yield seen
    finally:
        signals.before_task_publish.disconnect(look)


def assert_both_ways_write_the_same(
    app: Celery, server: RedisServer, ways: Ways, sent: Topic[Any], message: Message[Any]
) -> dict[str, Any]:
    """Send by both ways, and return the item."""
    connect(app)
    sent.send(message)
    with watched_publish():
        sent.send(message)

    (short_key, short), (long_key, long) = items(server)
    assert ways == [True, False]
    assert short_key == long_key
    assert short["properties"].pop(FRESH) != long["properties"].pop(FRESH)
    # Compared as they are written: no NaN is equal to another.
    assert base64.b64decode(short["body"]) == base64.b64decode(long["body"])
    assert short == long
    return short


class TestWhatIsWritten:
    @pytest.mark.parametrize(
        "message",
        [
            pytest.param(Message({"host": "web-1", "load": [1, 0.5, None, True]}), id="plain"),
            pytest.param(Message(None), id="nothing"),
            pytest.param(Message(1, index="web-1"), id="index"),
            pytest.param(Message(1, index="Überwachung ☃ 'x'"), id="index that is not ASCII"),
            pytest.param(Message(1, max_retries=0), id="max_retries"),
            pytest.param(Message(1, once="index"), id="once"),
            pytest.param(Message(1, retries=2, copy=3, handled=("a", "b")), id="copy"),
            pytest.param(Message({"größe": "☃ 𝄞\u2028\x00</script>"}), id="text that is not ASCII"),
            pytest.param(Message("half \ud83d of a pair"), id="half a surrogate pair"),
            pytest.param(Message([math.nan, math.inf, -0.0]), id="NaN"),
            pytest.param(Message(2**70), id="a large number"),
            pytest.param(Message("x" * 200_000), id="200 KB"),
        ],
    )
    def test_it_is_what_celery_writes(
        self, make_app: MakeApp, valkey: RedisServer, ways: Ways, message: Message[Any]
    ) -> None:
        app, alarm = make_app(), topic("alarm")

        item = assert_both_ways_write_the_same(app, valkey, ways, alarm, message)

        assert repr(body(item)[0]) == repr([message.data])
        assert item["headers"]["id"] == message.id

    def test_the_queue_of_a_topic_is_kept_to(self, make_app: MakeApp, valkey: RedisServer, ways: Ways) -> None:
        app, slow = make_app(), topic("slow", queue="slow-ones")

        assert_both_ways_write_the_same(app, valkey, ways, slow, Message(1))

        assert [key for key, _ in items(valkey)] == ["slow-ones"] * 2

    def test_a_prefix_of_keys_is_kept_to(self, make_app: MakeApp, valkey: RedisServer, ways: Ways) -> None:
        app, alarm = make_app(broker_transport_options={"global_keyprefix": "mine:"}), topic("alarm")

        assert_both_ways_write_the_same(app, valkey, ways, alarm, Message(1))

        assert [key for key, _ in items(valkey)] == ["mine:celery"] * 2

    @pytest.mark.parametrize("root", [None, "the root"])
    def test_what_a_task_sends_names_it(
        self, make_app: MakeApp, valkey: RedisServer, ways: Ways, root: str | None
    ) -> None:
        app, alarm = make_app(), topic("alarm")
        task = app.tasks["watch.alarm"]
        _task_stack.push(task)
        task.push_request(id="the parent", root_id=root, called_directly=False)

        try:
            item = assert_both_ways_write_the_same(app, valkey, ways, alarm, Message(1))
        finally:
            task.pop_request()
            _task_stack.pop()

        assert (item["headers"]["root_id"], item["headers"]["parent_id"]) == (root or "the parent", "the parent")

    def test_kombu_finds_the_queue_by_its_exchange(self, make_app: MakeApp, valkey: RedisServer, ways: Ways) -> None:
        app, slow = make_app(), topic("slow", queue="slow-ones")
        connect(app)
        slow.send(1)
        with app.connection_for_write() as connection:
            app.amqp.Producer(connection).publish("besides", exchange="slow-ones", routing_key="slow-ones")
        assert ways == [True]
        assert len(items(valkey)) == 2


FORWARDING = """
from watch_tasks.worker.shortcut import Shortcut

first, second = topic("first"), topic("second", queue="elsewhere")
ways = []
send = Shortcut.send

def watched(self, message, options):
    ways.append(send(self, message, options))
    return ways[-1]

Shortcut.send = watched

@second.handler
def wait(message):
    note("never", message)

@first.handler
def forward(message):
    second.send("by the long way, which connects")
    second.send("by the short one")
    note("forward", message, ways=ways)
"""


@pytest.mark.worker
def test_what_a_handler_sends_in_a_worker_names_its_message(
    make_site: Callable[..., Site], valkey: RedisServer
) -> None:
    site = make_site(FORWARDING)
    site.worker("-Q", "celery", concurrency=1)
    id = site.send("first", 1, root_id="the root")
    site.until_handled(1)

    sent = [item["headers"] for _, item in items(valkey, "elsewhere")]

    assert [line["ways"] for line in site.lines()] == [[False, True]]
    assert [(headers["root_id"], headers["parent_id"]) for headers in sent] == [("the root", id)] * 2


def by_argument(name: str, args: Any, kwargs: Any, options: Any, task: Any = None, **_: Any) -> dict[str, Any]:
    return {"queue": "vip" if args[0] == "urgent" else "other"}


#: Settings of Celery that have a say in a message, and where it shows in the item.
SAYING: list[Any] = [
    pytest.param({"task_compression": "zlib"}, "headers.compression", "application/x-gzip", id="task_compression"),
    pytest.param({"task_default_priority": 3}, "properties.priority", 3, id="task_default_priority"),
    pytest.param({"task_inherit_parent_priority": True}, "properties.priority", 0, id="task_inherit_parent_priority"),
    pytest.param({"task_default_delivery_mode": "transient"}, "properties.delivery_mode", 1, id="transient"),
    pytest.param({"task_default_delivery_mode": 1}, "properties.delivery_mode", 1, id="transient by its number"),
    pytest.param({"task_protocol": 1}, "headers.watch.version", 1, id="task_protocol"),
    pytest.param({"task_send_sent_event": True}, "properties.priority", 0, id="task_send_sent_event"),
    pytest.param({"task_routes": {"watch.alarm": {"priority": 3}}}, "properties.priority", 3, id="route: priority"),
    pytest.param(
        {"task_routes": {"watch.alarm": {"queue": "vip", "priority": 3}}},
        "properties.priority",
        3,
        id="route: queue and priority",
    ),
    pytest.param(
        {"task_routes": {"watch.*": {"exchange": "other", "routing_key": "key"}}},
        "properties.delivery_info",
        {"exchange": "other", "routing_key": "key"},
        id="route: exchange",
    ),
    pytest.param(
        {"task_routes": {"watch.alarm": {"delivery_mode": 1}}}, "properties.delivery_mode", 1, id="route: transient"
    ),
    pytest.param(
        {"task_routes": by_argument},
        "properties.delivery_info",
        {"exchange": "", "routing_key": "vip"},
        id="route: function",
    ),
    pytest.param(
        {"task_annotations": {"watch.alarm": {"priority": 4}}}, "properties.priority", 4, id="annotation: priority"
    ),
    pytest.param(
        {"task_annotations": {"*": {"expires": 60}}}, "properties.expiration", "60000", id="annotation: expires"
    ),
    pytest.param(
        {"task_queues": [kombu.Queue("celery", kombu.Exchange("t", "topic"), routing_key="#")]},
        "properties.delivery_info.exchange",
        "t",
        id="topic exchange",
    ),
    pytest.param(
        {"task_queues": [kombu.Queue("celery", kombu.Exchange("d", delivery_mode=1), routing_key="celery")]},
        "properties.delivery_mode",
        1,
        id="transient exchange",
    ),
    pytest.param({"broker_pool_limit": None}, "properties.priority", 0, id="no pool"),
    pytest.param({"broker_pool_limit": 0}, "properties.priority", 0, id="no pool by its number"),
]


def dig(item: dict[str, Any], path: str) -> Any:
    return functools.reduce(lambda value, name: value[name], path.split("."), item)


class TestWhoHasASay:
    def test_nobody_has_by_default(self, make_app: MakeApp, valkey: RedisServer, ways: Ways) -> None:
        app, alarm = make_app(), topic("alarm")
        connect(app)
        for number in range(3):
            alarm.send(number)
        assert ways == [True] * 3
        assert data(valkey) == [0, 1, 2]

    def test_the_first_send_connects_the_long_way(self, make_app: MakeApp, valkey: RedisServer, ways: Ways) -> None:
        make_app()
        alarm = topic("alarm")
        for number in range(3):
            alarm.send(number)
        assert ways == [False, True, True]
        assert data(valkey) == [0, 1, 2]

    @pytest.mark.parametrize(("config", "path", "value"), SAYING)
    def test_a_setting_is_followed(
        self, make_app: MakeApp, valkey: RedisServer, ways: Ways, config: dict[str, Any], path: str, value: Any
    ) -> None:
        app, alarm = make_app(**config), topic("alarm")
        connect(app)
        with app.connection_for_write() as connection:
            kombu.Queue("bound", kombu.Exchange("other"), "key").declare(channel=connection.default_channel)

        alarm.send("urgent")

        ((_, item),) = items(valkey)
        assert ways == [False]
        assert dig(item, path) == value

    @pytest.mark.parametrize(
        "routes", [{"watch.alarm": "vip"}, {"watch.a*": {"queue": "vip"}}, ([("watch.a*", "vip")],)]
    )
    def test_a_route_that_names_a_queue_is_gone_the_short_way(
        self, make_app: MakeApp, valkey: RedisServer, ways: Ways, routes: Any
    ) -> None:
        app, alarm, other, slow = make_app(task_routes=routes), topic("alarm"), topic("other"), topic("s", queue="slow")
        connect(app)

        for number, sent in enumerate((alarm, other, slow)):
            sent.send(number)

        assert ways == [True] * 3
        assert [(key, body(item)[0][0]) for key, item in items(valkey)] == [("celery", 1), ("slow", 2), ("vip", 0)]

    def test_a_router_is_asked_once_a_message(self, make_app: MakeApp, valkey: RedisServer, ways: Ways) -> None:
        """One that takes turns would otherwise take the same turn always."""
        asked: list[str] = []

        def take_turns(name: str, *args: Any, **keywords: Any) -> dict[str, Any]:
            asked.append(name)
            return {"queue": f"turn-{len(asked) % 2}"}

        make_app(task_routes=take_turns)
        alarm = topic("alarm")
        for number in range(4):
            alarm.send(number)
        assert Counter(key for key, _ in items(valkey)) == {"turn-0": 2, "turn-1": 2}
        assert len(asked) == 4

    @pytest.mark.parametrize("name", ["before_task_publish", "after_task_publish", "task_sent"])
    def test_a_receiver_of_a_signal_is_called(
        self, make_app: MakeApp, valkey: RedisServer, ways: Ways, name: str
    ) -> None:
        app, alarm = make_app(), topic("alarm")
        connect(app)
        seen: list[str] = []

        def look(sender: str, **_: Any) -> None:
            seen.append(sender)

        published = getattr(signals, name)
        published.connect(look)
        try:
            alarm.send(1)
        finally:
            published.disconnect(look)
        alarm.send(2)

        assert seen == ["watch.alarm"]
        assert ways == [False, True]
        assert data(valkey) == [1, 2]

    def test_a_receiver_may_change_what_is_sent(self, make_app: MakeApp, valkey: RedisServer) -> None:
        app, alarm = make_app(), topic("alarm")
        connect(app)

        def stamp(headers: dict[str, Any], **_: Any) -> None:
            headers["trace"] = "abc"

        signals.before_task_publish.connect(stamp)
        alarm.send(1)
        signals.before_task_publish.disconnect(stamp)

        ((_, item),) = items(valkey)
        assert item["headers"]["trace"] == "abc"

    def test_the_event_of_a_message_that_is_sent_comes(self, make_app: MakeApp, valkey: RedisServer) -> None:
        app, alarm = make_app(task_send_sent_event=True), topic("alarm")
        connect(app)
        with valkey.client() as client, client.pubsub(ignore_subscribe_messages=True) as listener:
            listener.psubscribe("*")
            listener.get_message(timeout=5)
            message = alarm.send(1)
            told = listener.get_message(timeout=5)
        event = body(json.loads(told["data"]))
        assert (event["type"], event["uuid"], event["queue"]) == ("task-sent", message.id, "celery")

    def test_who_would_have_it_done_at_once_is_warned(self, make_app: MakeApp, valkey: RedisServer, ways: Ways) -> None:
        app, alarm = make_app(task_always_eager=True), topic("alarm")
        connect(app)
        with pytest.warns(AlwaysEagerIgnored):
            alarm.send(1)
        assert ways == [False]
        assert data(valkey) == [1]

    def test_a_delay_waits_at_the_server(self, make_app: MakeApp, valkey: RedisServer, ways: Ways) -> None:
        app, alarm = make_app(), topic("alarm")
        connect(app)
        alarm.send(1, delay=3600)
        assert ways == []
        assert items(valkey) == []
        with valkey.client() as client:
            assert client.zcard("celery\x06\x16later") == 1

    @pytest.mark.parametrize("options", [{"expires": 60.0}, {"queue_arguments": {"x-expires": 60_000}}])
    def test_a_queue_that_goes_away_unused_does_so(
        self, make_app: MakeApp, valkey: RedisServer, ways: Ways, options: dict[str, Any]
    ) -> None:
        """Also where a connection has sent to another queue first, and knows nothing of this one yet."""
        queues = [kombu.Queue("celery"), kombu.Queue("brief", kombu.Exchange("brief"), "brief", **options)]
        app, alarm, brief = make_app(task_queues=queues), topic("alarm"), topic("brief", queue="brief")
        connect(app)
        lasts = []

        def send() -> None:
            alarm.send(1)
            brief.send(2)
            with valkey.client() as client:
                lasts.append(client.pttl("brief"))
                client.delete("brief")

        send()
        with app.pool.acquire():
            connect(app)  # by another connection
            send()

        assert ways == [True, False] * 2
        assert all(0 < last <= 60_000 for last in lasts)

    def test_another_transport_knows_nothing_of_it(self, make_app: MakeApp, ways: Ways) -> None:
        app, alarm = make_app(broker="memory://"), topic("alarm")
        connect(app)
        alarm.send(1)
        assert ways == [False]
        with app.connection_for_read() as connection:
            received = connection.SimpleQueue("celery").get(timeout=5)
            received.ack()
        assert received.payload[0] == [1]

    def test_kombus_own_transport_knows_nothing_of_it(self, make_app: MakeApp, valkey: RedisServer, ways: Ways) -> None:
        app, alarm = make_app(broker_transport="kombu.transport.redis:Transport"), topic("alarm")
        with app.pool.acquire() as connection:
            assert type(connection.default_channel) is StockChannel
        alarm.send(1)
        assert ways == [False]
        assert data(valkey) == [1]


class Proxy:
    """Looks like what it stands for, as the wrappers of the `wrapt` package do."""

    def __init__(self, wrapped: Any, seen: list[str]) -> None:
        self._wrapped, self._seen = wrapped, seen

    @property
    def __class__(self) -> Any:
        return type(self._wrapped)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def __get__(self, instance: Any, owner: Any) -> Any:
        return Proxy(self._wrapped.__get__(instance, owner), self._seen)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        self._seen.append(self._wrapped.__name__)
        return self._wrapped(*args, **keywords)


def wrapped(function: Any, seen: list[str]) -> Any:
    """Return a function in the manner of instrumentation."""

    @functools.wraps(function)
    def wrapper(*args: Any, **keywords: Any) -> Any:
        seen.append(function.__name__)
        return function(*args, **keywords)

    return wrapper


class TestWhoWraps:
    @pytest.mark.parametrize("wrap", [wrapped, Proxy])
    @pytest.mark.parametrize(
        ("owner", "name"),
        [(celery.app.base.Celery, "send_task"), (kombu.messaging.Producer, "publish")],
        ids=["send_task", "publish"],
    )
    def test_a_wrapper_of_a_class_sees_every_message(
        self,
        make_app: MakeApp,
        valkey: RedisServer,
        ways: Ways,
        monkeypatch: pytest.MonkeyPatch,
        owner: Any,
        name: str,
        wrap: Any,
    ) -> None:
        app, alarm = make_app(), topic("alarm")
        connect(app)
        alarm.send(0)
        seen: list[str] = []
        monkeypatch.setattr(owner, name, wrap(owner.__dict__[name], seen))
        alarm.send(1)
        monkeypatch.undo()

        assert seen == [name]
        assert ways == [True, False]
        assert data(valkey) == [0, 1]

    @pytest.mark.parametrize("wrap", [wrapped, Proxy])
    @pytest.mark.parametrize("name", ["send_task", "amqp.send_task_message"])
    def test_a_wrapper_in_the_app_sees_every_message(
        self, make_app: MakeApp, valkey: RedisServer, ways: Ways, name: str, wrap: Any
    ) -> None:
        app, alarm = make_app(), topic("alarm")
        connect(app)
        seen: list[str] = []
        *path, last = name.split(".")
        owner = functools.reduce(getattr, path, app)
        setattr(owner, last, wrap(getattr(owner, last), seen))
        alarm.send(1)
        assert seen == [last]
        assert ways == [False]
        assert data(valkey) == [1]

    def test_an_app_with_a_send_task_of_its_own_has_it_called(
        self, make_app: MakeApp, valkey: RedisServer, ways: Ways
    ) -> None:
        class Own(Celery):
            def send_task(self, name: str, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
                options["headers"]["tenant"] = "a"
                return super().send_task(name, args, kwargs, **options)

        app, alarm = make_app(Own), topic("alarm")
        connect(app)
        alarm.send(1)

        ((_, item),) = items(valkey)
        assert item["headers"]["tenant"] == "a"
        assert ways == [False]


class TestTrouble:
    def test_a_server_that_never_was_there_is_a_failed_send(self, make_app: MakeApp) -> None:
        make_app(broker=f"redis://127.0.0.1:{free_port()}/0")
        alarm = topic("alarm")
        began = time.monotonic()
        with pytest.raises(SendFailedError, match="refused"):
            alarm.send(1)
        assert time.monotonic() - began < 5

    @pytest.mark.parametrize("max_waiting", [None, 5])
    def test_where_no_broker_is_configured_it_says_what_to_do(
        self, make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_waiting: int | None
    ) -> None:
        monkeypatch.delenv("CELERY_BROKER_URL", raising=False)
        monkeypatch.setenv("WATCH_DIR", str(tmp_path))
        make_app(broker=None)
        alarm = topic("alarm", max_waiting=max_waiting)
        with pytest.raises(SendFailedError, match=f"answers in {tmp_path}: start it with `watch-tasks up`"):
            alarm.send(1)

    def test_a_url_that_cannot_be_read_is_a_sentence_without_the_password(self, make_app: MakeApp, ways: Ways) -> None:
        make_app(broker="redis://:se/cret@localhost:6379/0")
        with pytest.raises(ConfigurationError, match="it cannot be read") as caught:
            topic("alarm").send(1)
        assert "cret" not in str(caught.value)
        assert ways == []

    def test_a_server_that_goes_away_is_a_failed_send_until_it_is_back(
        self, make_app: MakeApp, lasting_valkey: RedisServer, ways: Ways
    ) -> None:
        app, alarm = make_app(broker=lasting_valkey.url), topic("alarm")
        connect(app)
        alarm.send("before")
        lasting_valkey.stop(signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(SendFailedError, match="refused"):
            alarm.send("meanwhile")
        assert time.monotonic() - began < 5
        lasting_valkey.start()
        alarm.send("after")
        alarm.send("and later")
        assert data(lasting_valkey) == ["before", "after", "and later"]
        assert (ways[0], ways[1], ways[-1]) == (True, False, True)

    def test_a_connection_that_was_closed_is_opened_anew(
        self, make_app: MakeApp, own_valkey: RedisServer, ways: Ways
    ) -> None:
        app, alarm = make_app(broker=own_valkey.url), topic("alarm")
        connect(app)
        alarm.send(1)
        with own_valkey.client() as client:
            client.client_kill_filter(_type="normal", skipme=True)
        alarm.send(2)
        assert data(own_valkey) == [1, 2]

    def test_a_server_that_hangs_makes_a_send_unknown_in_bounded_time(
        self, make_app: MakeApp, own_valkey: RedisServer, ways: Ways
    ) -> None:
        app, alarm, spoilt = make_app(broker=own_valkey.url), topic("alarm"), topic("spoilt", queue="spoilt")
        connect(app)
        with own_valkey.client() as client:
            client.set("spoilt", "no list")
        message = Message("lost?", "alarm")
        own_valkey.signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(SendUnknownError) as caught:
            alarm.send(message)
        seconds = time.monotonic() - began
        own_valkey.signal(signal.SIGCONT)

        assert caught.value.message is not None
        assert (caught.value.message.id, caught.value.message.data) == (message.id, "lost?")
        assert 4 < seconds < 8  # one wait for an answer, of 5 s
        # An answer that is still under way is nobody else's: this one has its own.
        with pytest.raises(SendFailedError, match="WRONGTYPE"):
            spoilt.send(1)
        sent: list[Any] = [["one", "x" * 5000], {"two": "y" * 5000}, "three"]
        for value in sent:
            alarm.send(value)
        assert [value for value in data(own_valkey) if value != "lost?"] == sent
        # After an error, Celery connects anew.
        assert ways == [False, False, False, True, True]

    def test_a_full_server_is_a_failed_send_until_there_is_room(
        self, make_app: MakeApp, own_valkey: RedisServer, ways: Ways
    ) -> None:
        app, alarm = make_app(broker=own_valkey.url), topic("alarm")
        connect(app)
        alarm.send("before")
        with own_valkey.client() as client:
            client.config_set("maxmemory", "1")
            with pytest.raises(SendFailedError, match="was not sent"):
                alarm.send("too much")
            client.config_set("maxmemory", "0")
        alarm.send("after")
        alarm.send("and later")
        assert ways == [True, False, False, True]
        assert data(own_valkey) == ["before", "after", "and later"]


class TestCompany:
    def test_threads_do_not_get_in_each_others_way(self, make_app: MakeApp, valkey: RedisServer, ways: Ways) -> None:
        app, alarm = make_app(), topic("alarm")
        connect(app)
        barrier = threading.Barrier(8)
        problems: list[BaseException] = []

        def send(thread: int) -> None:
            try:
                barrier.wait(10)
                for number in range(200):
                    alarm.send([thread, number, f"{thread}-{number} " * (number * 10)])
            except BaseException as exc:
                problems.append(exc)

        threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert not problems
        found = data(valkey)
        assert all(text == f"{thread}-{number} " * (number * 10) for thread, number, text in found)
        assert sorted((thread, number) for thread, number, _ in found) == [(t, n) for t in range(8) for n in range(200)]
        assert [number for thread, number, _ in found if thread == 3] == list(range(200))
        assert ways.count(True) > 1500

    def test_a_fork_shares_no_connection_with_its_parent(self, valkey: RedisServer) -> None:
        program = (
            "import os, sys\n"
            "from celery import Celery\n"
            "from watch_tasks import topic\n"
            "from watch_tasks.worker import install\n"
            "from watch_tasks.worker.shortcut import Shortcut\n"
            "send, ways = Shortcut.send, []\n"
            "def watched(*args):\n"
            "    ways.append(send(*args))\n"
            "    return ways[-1]\n"
            "Shortcut.send = watched\n"
            "app = install(Celery('forks', broker=sys.argv[1]))\n"
            "alarm = topic('alarm')\n"
            "alarm.send(['before', 0])\n"
            "alarm.send(['before', 1])\n"
            "child = os.fork()\n"
            "for number in range(100):\n"
            "    alarm.send(['parent' if child else 'child', number])\n"
            "assert ways == [False] + [True] * 101, ways\n"
            "if child:\n"
            "    assert os.waitpid(child, 0)[1] == 0\n"
        )
        ended = subprocess.run(
            [sys.executable, "-c", program, valkey.url], capture_output=True, text=True, timeout=60, check=False
        )
        assert ended.returncode == 0, ended.stderr
        expected = [("before", 0), ("before", 1), *((who, n) for who in ("child", "parent") for n in range(100))]
        assert sorted((who, number) for who, number in data(valkey)) == expected
