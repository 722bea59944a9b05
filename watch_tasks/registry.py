"""The topics of a process, and the apps that want to know of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from .errors import ConfigurationError, TopicError, did_you_mean

if TYPE_CHECKING:
    from .sending import Outlet
    from .topics import Topic

__all__ = ["Registry", "registry"]


class Registry:
    """The topics of a process. Apps subscribe, so that topics defined later reach them too."""

    def __init__(self) -> None:
        self._topics: dict[str, tuple[Topic[Any], str]] = {}
        self._subscribers: list[Callable[[Topic[Any]], None]] = []
        self._lock = threading.RLock()
        self._default: Callable[[], Outlet] | None = None
        self._default_urls: Callable[[], tuple[str, str]] | None = None

    def add(self, topic: Topic[Any], module: str) -> None:
        """Register a topic that `module` defines.

        Raises:
            TopicError: another module defined a topic of that name.
        """
        with self._lock:
            _, owner = self._topics.get(topic.name, (None, module))
            # A module that is loaded anew, as `importlib.reload` does, defines its topics anew.
            if owner != module:
                raise TopicError(f"topic `{topic.name}` is defined twice: in `{owner}` and in `{module}`")
            self._topics[topic.name] = topic, module
            for subscriber in self._subscribers:
                subscriber(topic)

    def subscribe(self, subscriber: Callable[[Topic[Any]], None]) -> None:
        """Call `subscriber` with every topic there is and will be."""
        with self._lock:
            self._subscribers.append(subscriber)
            for topic in self:
                subscriber(topic)

    def get(self, name: str) -> Topic[Any] | None:
        """Return the topic of that name, if there is one."""
        found = self._topics.get(name)
        return found[0] if found else None

    def __getitem__(self, name: str) -> Topic[Any]:
        """Return the topic of that name.

        Raises:
            TopicError: no loaded module defines it.
        """
        found = self.get(name)
        if found is None:
            raise TopicError(f"no loaded module defines topic `{name}`{did_you_mean(name, self._topics)}")
        return found

    def __iter__(self) -> Iterator[Topic[Any]]:
        return iter([topic for topic, _ in self._topics.values()])

    def __len__(self) -> int:
        return len(self._topics)

    def set_default(self, outlet: Callable[[], Outlet], urls: Callable[[], tuple[str, str]] | None = None) -> None:
        """Say where topics that nobody bound send, and the URLs of broker and storage: each called at its first use."""
        self._default, self._default_urls = outlet, urls

    def default_outlet(self) -> Outlet:
        """Return the outlet for topics that nobody bound."""
        if self._default is None:
            raise TopicError("the topic is not bound: call topic.bind(outlet), or import watch_tasks")
        return self._default()

    def default_urls(self) -> tuple[str, str]:
        """Return the URLs of the broker and of the storage, as the default app has them.

        Raises:
            ConfigurationError: its settings cannot work, or name no broker where none is embedded.
        """
        if self._default_urls is None:
            raise ConfigurationError("no app is known to have settings: import watch_tasks")
        return self._default_urls()


#: Every topic made with `topic()` in this process.
registry: Final = Registry()
