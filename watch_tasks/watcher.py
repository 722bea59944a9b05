"""The Watcher: a loop over a queue, in one process. What becomes of a message is the pipeline's to decide."""

from __future__ import annotations

import copy
import logging
import os
import socket
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, Protocol, Self

from .collection import Collection
from .errors import ConfigurationError, QueueClosedError, TopicError
from .handlers import close_loop
from .leases import LeaseKeeper
from .message import Message
from .outcome import Busy, Fenced, Outcome, Retry, Snoozed
from .pipeline import Pipeline
from .queue import Delivery, Queue, Unreadable, open_queue
from .queue.memory import MemoryQueue
from .registry import Registry, registry
from .retry import RetryPolicy
from .storage import Storage, open_storage
from .storage.memory import MemoryStorage
from .topics import Topic, check_topic

__all__ = ["TopicHandler", "Topics", "Watcher"]

logger = logging.getLogger(__name__)

#: Seconds that a claim holds, and between two renewals.
_LEASE: Final = 6.0
_RENEWAL: Final = 2.0
#: Seconds that one look into the queue waits at most: how soon `stop` and `wait` are noticed. After a message the next
#: look does not wait, so that the end of the queue is seen at once.
_LOOK: Final = 0.1
#: Seconds between two tries of what failed: the first, doubled up to the last.
_PAUSES: Final = (0.1, 5.0)
#: Schemes of a broker that is a storage too.
_BOTH: Final = ("memory", "redis", "rediss", "redis+socket", "unix", "sentinel")


class Topics(Protocol):
    """What a Watcher handles: a TopicHandler, or anything that finds topics by name."""

    def find(self, name: str) -> Topic[Any] | None:
        """Return the topic of that name, or None."""

    def __iter__(self) -> Iterator[Topic[Any]]: ...


class TopicHandler:
    """Topics by name, for one Watcher: given as such, or made of handlers. They are not registered for Celery.

    Args:
        topics: name → a Topic, or the handlers of one, in order.
        retry: the policy of the topics made here.
        timeout: seconds that one delivery of theirs may take; None: the Watcher's.

    Raises:
        TopicError: a name is no name of a topic, two handlers of one have the same name, or a Topic stands under
            another's name.
        TypeError: a handler cannot be called.
    """

    def __init__(
        self,
        topics: Mapping[str, Topic[Any] | Sequence[Callable[[Message[Any]], Any]]],
        *,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - a frozen value
        timeout: float | None = None,
    ) -> None:
        self._topics: dict[str, Topic[Any]] = {}
        for name, given in topics.items():
            if not isinstance(given, Topic):
                made: Topic[Any] = Topic(name, retry=retry, timeout=timeout)
                for function in given:
                    made.handler(function)
                given = made
            elif given.name != check_topic(name):
                raise TopicError(f"topic `{given.name}` cannot stand under the name `{name}`")
            self._topics[name] = given

    def find(self, name: str) -> Topic[Any] | None:
        """Return the topic of that name, or None."""
        return self._topics.get(name)

    def __iter__(self) -> Iterator[Topic[Any]]:
        return iter(self._topics.values())


class _Registered:
    """Every topic that is registered, those of later too."""

    def __init__(self, topics: Registry) -> None:
        self._registry = topics

    def find(self, name: str) -> Topic[Any] | None:
        return self._registry.get(name)

    def __iter__(self) -> Iterator[Topic[Any]]:
        return iter(self._registry)


class Watcher:
    """Takes messages from a queue, has them handled, and remembers what became of them; one at a time, in a thread.

    Several Watchers, in any number of processes, may share a queue and a storage. While it runs, its topics that
    nobody bound send through its queue, also from within their handlers; they stay bound to it.

    Args:
        queue: a queue or its URL; None: a MemoryQueue of its own.
        storage: a storage or its URL; None: a MemoryStorage of its own.
        handler: what handles which topic; None: every registered topic, those of later too.
        timeout: seconds that one delivery may take where its topic says nothing. A sync handler cannot be cut off
            here: it is reported at its deadline, and counts as timed out when it returns.

    Raises:
        ConfigurationError: a URL that opens nothing.
        ValueError: the timeout is not above 0.
    """

    def __init__(
        self,
        queue: Queue | str | None = None,
        storage: Storage | str | None = None,
        handler: Topics | None = None,
        timeout: float | None = None,
    ) -> None:
        if timeout is not None and not 0 < timeout < float("inf"):
            raise ValueError(f"`timeout` must be seconds above 0, or None, got {timeout!r}")
        self._opened: list[Queue | Storage] = []
        #: What it reads; messages may be pushed at any time, before `start` too.
        self.queue: Queue = self._open(queue, open_queue, MemoryQueue)
        #: What it remembers by.
        self.storage: Storage = self._open(storage, open_storage, MemoryStorage)
        self.handler: Topics = _Registered(registry) if handler is None else handler
        self.timeout = timeout
        #: Its name as a worker, in records and leases.
        self.name = f"watcher-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._stopping = threading.Event()
        self._leases = LeaseKeeper(self.storage, self.name, lease=_LEASE, every=_RENEWAL)
        self._pipeline = Pipeline(
            self.storage,
            self._find,
            worker=self.name,
            lease=_LEASE,
            stopping=self._stopping.is_set,
            pause=self._stopping.wait,
        )
        #: What waits for others to be handled with.
        self._collected: Collection[Delivery] = Collection()
        self._thread: threading.Thread | None = None
        self._idle = threading.Condition()
        #: Numbers of the newest `wait` that began, and of the newest that has seen the queue empty since.
        self._asked = 0
        self._answered = 0

    def _open(self, given: Any, by_url: Callable[[str], Any], make: Callable[[], Any]) -> Any:
        if given is not None and not isinstance(given, str):
            return given
        opened = make() if given is None else by_url(given)
        self._opened.append(opened)
        return opened

    @classmethod
    def from_settings(cls, settings: Mapping[str, str] | None = None) -> Self:
        """Return a Watcher of every registered topic, on the broker and storage that Celery workers use.

        Args:
            settings: `CELERY_BROKER_URL` and `WATCH_STORAGE_BACKEND` (unset: the broker); None: the environment,
                `celeryconfig.py`, and where both are silent the embedded server, as for workers.

        Raises:
            ConfigurationError: no broker is named, or the broker cannot be the storage and none is named.
        """
        if settings is None:
            return cls(*registry.default_urls())
        broker, storage = settings.get("CELERY_BROKER_URL"), settings.get("WATCH_STORAGE_BACKEND")
        if not broker:
            raise ConfigurationError("no broker is named: set CELERY_BROKER_URL, to `redis://localhost:6379/0` say")
        if not storage and broker.partition("://")[0] not in _BOTH:
            scheme = broker.partition("://")[0]
            raise ConfigurationError(
                f"broker `{scheme}` cannot be the storage too: set WATCH_STORAGE_BACKEND, "
                "to `redis://localhost:6379/0` say"
            )
        return cls(broker, storage or broker)

    # -- life

    def start(self) -> None:
        """Begin to handle messages. Twice is safe; after `stop` it is over: make a new one.

        Raises:
            RuntimeError: it was stopped.
            ConfigurationError: a topic needs what the storage cannot do.
        """
        if self._stopping.is_set():
            raise RuntimeError("a Watcher that was stopped cannot start again: make a new one")
        complaints = self.storage.misfits(self.handler)
        if complaints:
            raise ConfigurationError(*complaints)
        if self._thread is None:
            self._bind()
            self._leases.start()
            self._thread = threading.Thread(target=self._run, name=f"watch-{self.name}", daemon=True)
            self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Finish what is in hand, take nothing more, and close what this Watcher opened. Twice is safe.

        Args:
            timeout: seconds to wait for what is in hand; None: until it is done.

        Returns:
            False if it was not done in time, or the caller is a handler: the thread ends and closes when it is done.
        """
        self._stopping.set()
        with self._idle:
            self._idle.notify_all()
        if self._thread is None:
            self._close()
        elif self._thread is threading.current_thread():
            return False
        else:
            self._thread.join(timeout)
            if self._thread.is_alive():
                logger.warning("watcher %s still has a message in hand after %.3g s", self.name, timeout)
                return False
        return True

    def _release(self) -> None:
        if self.queue not in self._opened:
            try:
                self.queue.release()
            except QueueClosedError:
                pass
            except Exception as exc:  # noqa: BLE001 - whatever a queue raises; closing it gives back the same
                logger.warning("watcher %s keeps what its queue fetched, until that is closed: %s", self.name, exc)

    def _close(self) -> None:
        self._leases.stop()
        for thing in self._opened:
            thing.close()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to do: the queue is empty, with what is delayed, and nothing is in hand here.

        Only what was pushed before the call counts, with all that comes of it; what another Watcher has in hand
        does not.

        Args:
            timeout: seconds to wait at most; None: any time.

        Returns:
            Whether nothing is left; False too if the Watcher is stopped, or not started.
        """
        with self._idle:
            self._asked += 1
            mine = self._asked
            self._idle.wait_for(lambda: self._answered >= mine or not self._is_running, timeout)
            return self._answered >= mine

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def _is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._stopping.is_set()

    # -- the loop

    def _run(self) -> None:
        try:
            timeout = _LOOK
            while not self._stopping.is_set():
                delivery = self._look(timeout)
                if delivery is not None:
                    self._take(delivery)
                elif not self._collected:
                    self._answer()
                for batch in self._collected.take_due():
                    self._handle(batch)
                timeout = self._collected.seconds(_LOOK) if delivery is None else 0.0
        except QueueClosedError:
            logger.error("watcher %s ends: its queue was closed", self.name)
        finally:
            self._stopping.set()
            self._give_back()
            close_loop()
            self._release()
            self._close()
            with self._idle:
                self._idle.notify_all()

    def _look(self, timeout: float) -> Delivery | None:
        delivery: Delivery | None = self._patiently(lambda: self.queue.next(timeout))
        return delivery

    def _answer(self) -> None:
        """Tell those who wait, if the queue is empty now. Only this thread knows that it has nothing in hand."""
        asked = self._asked
        if self._answered < asked and self._patiently(self.queue.len) == 0:
            with self._idle:
                self._answered = asked
                self._idle.notify_all()

    def _take(self, delivery: Delivery) -> None:
        message = delivery.message
        topic = None if isinstance(message, Unreadable) else self._find(message.topic)
        if topic is not None and topic.batch is not None:
            self._collected.add(topic.name, topic.batch, delivery)
        else:
            self._handle([delivery])

    def _handle(self, deliveries: Sequence[Delivery]) -> None:
        ids = [delivery.message.id for delivery in deliveries]
        self._leases.hold(*ids)
        settled = 0
        try:
            for delivery, outcome in zip(deliveries, self._outcomes(deliveries), strict=True):
                self._act(delivery, outcome)
                settled += 1
        except QueueClosedError:
            raise
        except Exception:
            # A fault of the storage's or of ours, not of the message: it must neither end the loop nor be lost.
            left = deliveries[settled:]
            text = "%d messages, the first is %s, could not be handled, they come again in %.3g s"
            logger.exception(text, len(left), left[0].message.id, _PAUSES[1])
            self._put_back(left, _PAUSES[1])
            self._stopping.wait(_PAUSES[0])
        finally:
            self._leases.drop(*ids)

    def _put_back(self, deliveries: Sequence[Delivery], delay: float) -> None:
        for delivery in deliveries:
            self._patiently(partial(delivery.back, delay))

    def _give_back(self) -> None:
        """Let go of what was collected and not begun."""
        try:
            self._put_back(self._collected.take_all(), 0.0)
        except QueueClosedError:
            logger.info("what watcher %s had collected comes again: its queue was closed", self.name)

    def _outcomes(self, deliveries: Sequence[Delivery]) -> list[Outcome]:
        messages = [delivery.message for delivery in deliveries]
        unreadable = [message for message in messages if isinstance(message, Unreadable)]
        if unreadable:  # alone, see `_take`
            return [self._bury(message) for message in unreadable]
        return self._pipeline.handle_many([message for message in messages if isinstance(message, Message)])

    def _bury(self, message: Unreadable) -> Outcome:
        return self._pipeline.bury(
            message.reason,
            message.error,
            id=message.id,
            topic=message.topic,
            index=message.index,
            raw=message.raw,
            content_type=message.content_type,
        )

    def _act(self, delivery: Delivery, outcome: Outcome) -> None:
        match outcome:
            case Retry(delay, message) | Snoozed(delay, message):
                # First published, then acked: in between there are two copies, and the claim tells them apart.
                if self._push(message, delay):
                    self._patiently(delivery.ack)
            case Busy(until):
                self._patiently(lambda: delivery.back(until))
            case Fenced():
                pass
            case _:
                self._patiently(delivery.ack)

    def _push(self, message: Message[Any], delay: float) -> bool:
        pushed = False

        def push() -> None:
            nonlocal pushed
            self.queue.push(message, delay=delay, bounded=False)
            pushed = True

        self._patiently(push)
        return pushed

    def _patiently(self, call: Callable[[], Any]) -> Any:
        """Call until it works, with longer and longer pauses; asked to stop, once more, and return None if it fails.

        Raises:
            QueueClosedError: there is nothing to wait for.
        """
        pause, longest = _PAUSES
        while True:
            try:
                return call()
            except QueueClosedError:
                raise
            except Exception as exc:  # noqa: BLE001 - whatever a queue raises, the next try may find it back
                if self._stopping.is_set():
                    logger.error("watcher %s stops while its queue fails: %s", self.name, exc)
                    return None
                logger.warning("the queue fails, trying again in %.2g s: %s: %s", pause, type(exc).__name__, exc)
            self._stopping.wait(pause)
            pause = min(pause * 2, longest)

    # -- topics

    def _find(self, name: str) -> Topic[Any] | None:
        topic = self.handler.find(name)
        if topic is None or topic.timeout is not None or self.timeout is None:
            return topic
        limited = copy.copy(topic)
        limited.timeout = self.timeout
        return limited

    def _bind(self) -> None:
        bind = weakref.WeakMethod(self._bind_one)
        if isinstance(self.handler, _Registered):
            # The registry outlives this Watcher and must not keep it.
            registry.subscribe(lambda topic: (bound := bind()) and bound(topic))
        else:
            for topic in self.handler:
                self._bind_one(topic)

    def _bind_one(self, topic: Topic[Any]) -> None:
        if not topic.is_bound and not self._stopping.is_set():
            topic.bind(self.queue)
