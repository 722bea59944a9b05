from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

import watch_tasks
from watch_tasks import TopicError, topic
from watch_tasks.registry import Registry, registry
from watch_tasks.topics import Topic


@pytest.fixture
def topics() -> Registry:
    return Registry()


class TestNames:
    def test_a_topic_is_found_by_its_name(self, topics: Registry) -> None:
        made: Topic[Any] = Topic("orders")
        topics.add(made, "shop")
        assert topics["orders"] is topics.get("orders") is made
        assert ([*topics], len(topics)) == ([made], 1)

    def test_one_that_is_missing_is_named_with_the_nearest(self, topics: Registry) -> None:
        topics.add(Topic("orders.created"), "shop")
        assert topics.get("orders.craeted") is None
        with pytest.raises(
            TopicError, match=r"no loaded module defines topic `orders.craeted`, did you mean `orders.created`\?"
        ):
            topics["orders.craeted"]

    def test_where_nothing_is_near_nothing_is_guessed(self, topics: Registry) -> None:
        topics.add(Topic("orders"), "shop")
        with pytest.raises(TopicError, match=r"`xyz`$"):
            topics["xyz"]

    def test_two_modules_cannot_define_the_same(self, topics: Registry) -> None:
        first: Topic[Any] = Topic("orders")
        topics.add(first, "shop")
        with pytest.raises(TopicError, match="`orders` is defined twice: in `shop` and in `store`"):
            topics.add(Topic("orders"), "store")
        assert topics["orders"] is first

    def test_topic_names_the_module_that_called_it(self) -> None:
        registry.add(Topic("orders"), "elsewhere")
        with pytest.raises(TopicError, match=f"in `elsewhere` and in `{__name__}`"):
            topic("orders")


class TestReload:
    def test_a_module_that_is_loaded_anew_defines_its_topics_anew(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = "from watch_tasks import topic\nt = topic('reloaded')\n@t.handler\ndef handle(message): ...\n"
        (tmp_path / "reloaded_topics.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        module = importlib.import_module("reloaded_topics")
        monkeypatch.delitem(sys.modules, "reloaded_topics")
        monkeypatch.setitem(sys.modules, "reloaded_topics", module)
        before = module.t

        importlib.reload(module)

        assert registry["reloaded"] is module.t is not before
        assert [handler.name for handler in module.t.handlers] == ["handle"]


class TestSubscribers:
    def test_one_hears_of_topics_there_are_and_will_be(self, topics: Registry) -> None:
        early: Topic[Any] = Topic("early")
        late: Topic[Any] = Topic("late")
        heard: list[Topic[Any]] = []
        topics.add(early, "m")
        topics.subscribe(heard.append)
        topics.add(late, "m")
        assert heard == [early, late]

    def test_each_hears_of_each(self, topics: Registry) -> None:
        first: list[str] = []
        second: list[str] = []
        topics.subscribe(lambda topic: first.append(topic.name))
        topics.add(Topic("a"), "m")
        topics.subscribe(lambda topic: second.append(topic.name))
        topics.add(Topic("b"), "m")
        assert first == second == ["a", "b"]

    def test_one_may_define_topics_while_it_hears_of_one(self, topics: Registry) -> None:
        def follow(heard: Topic[Any]) -> None:
            if heard.name == "a":
                topics.add(Topic("b"), "m")

        topics.subscribe(follow)
        topics.add(Topic("a"), "m")
        assert {topic.name for topic in topics} == {"a", "b"}

    def test_a_refused_topic_is_not_told(self, topics: Registry) -> None:
        heard: list[str] = []
        topics.subscribe(lambda topic: heard.append(topic.name))
        topics.add(Topic("a"), "m")
        with pytest.raises(TopicError):
            topics.add(Topic("a"), "n")
        assert heard == ["a"]


class TestDefaultOutlet:
    def test_it_is_made_when_it_is_asked_for(self, topics: Registry) -> None:
        made: list[Any] = []

        class Desk:
            def __init__(self) -> None:
                made.append(self)

            def push(self, message: watch_tasks.Message[Any], *, delay: float = 0.0) -> None: ...

        topics.set_default(Desk)
        assert made == []
        assert topics.default_outlet() is made[0]

    def test_without_one_the_error_says_what_to_do(self, topics: Registry) -> None:
        with pytest.raises(TopicError, match=r"topic\.bind\(outlet\)"):
            topics.default_outlet()

    def test_the_package_brings_one(self) -> None:
        assert registry._default is watch_tasks._default_outlet
