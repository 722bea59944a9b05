"""Single messages for children of the prefork pool, several in one job: claimed together, run one by one, recorded
together.

What a message costs there is mostly its way: to a child and back, to the storage and back, twice. So what waits while
all children are busy goes to the next that is free as a group, provided that its handlers have been quick of late. Each
message keeps its own task, with all that Celery and others hang on to it, its own claim, record and dead letter.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any, Final

from celery.concurrency.base import BasePool

from ..outcome import Handled
from ..topics import Topic
from ..transport.waker import Waker
from ..work import Work
from .appetite import FADE, SPAN, Appetite
from .batches import Batch, told
from .grouped import ALONE, Answer, run_group
from .request import TopicRequest
from .runtime import Runtime

__all__ = ["Groups"]

logger = logging.getLogger(__name__)

#: Messages of a group at most, and bytes of their bodies.
_MOST: Final = 100
_MOST_BYTES: Final = 1024 * 1024
#: Seconds after which a child that is at a group still has met a slow message.
_STUCK: Final = 1.0


class Groups:
    """Hands single messages to the children of a pool.

    Args:
        runtime: of the worker's main process.
        pool: has children.
        appetite: how many it has in hand.
    """

    def __init__(self, runtime: Runtime, pool: BasePool, appetite: Appetite) -> None:
        self._runtime, self._pool, self._appetite = runtime, pool, appetite
        self._waker = Waker(self._turn)
        self._waiting: deque[TopicRequest] = deque()
        #: Those that are not over.
        self._groups: set[Group] = set()
        #: Task → seconds that its next message may take: the most of late.
        self._slowest: dict[str, float] = {}

    def takes(self, request: Any) -> bool:
        """Whether this is a message that may be claimed before its handler starts, and be in company then.

        See docs/protocol.md §5.
        """
        topic: Topic[Any] | None = getattr(request.task, "topic", None) if isinstance(request, TopicRequest) else None
        if topic is None:  # somebody else's task, a batch, or a packet
            return False
        return request.is_new and topic.batch is None and not topic.transactional and topic.once != "none"

    def add(self, request: TopicRequest) -> None:
        """Take a delivery that is due."""
        self._waiting.append(request)
        busy = len(self._groups)
        if busy < self._children:
            self._turn()
        elif busy == self._children:
            self._waker.wake()  # until then more may come

    def register_with_event_loop(self, loop: Any) -> None:
        """Have this loop give turns. Again after the loop was reset."""
        self._waker.register(loop)

    def make_way(self) -> None:
        """Let something else have the pool: it waits for a child beside our groups."""

    def close(self) -> None:
        """Finish what the pool has handled since it was let go of: that is told by the pool itself, before it ends."""

    def look_again(self) -> None:
        """See whether there are more children by now, and who is stuck."""
        for group in self._groups:
            if group.age() > _STUCK:
                self._appetite.told(group.age())
        self._fit()
        self._waker.wake()

    def let_go(self) -> None:
        """Forget what no child was given: it goes back with its connection."""
        self._appetite.let_go()
        self._waiting.clear()
        # The pool forgets what no child has taken as well.
        for group in [group for group in self._groups if not group.is_accepted]:
            group.forget()
            self._groups.discard(group)

    @property
    def _children(self) -> int:
        """How many the pool has: none once a cold stop has ended it, and the loop runs on for a moment."""
        is_ended = getattr(self._pool, "_pool", self) is None  # then Celery's pool cannot say a number any more
        return 0 if is_ended else int(self._pool.num_processes)

    def _turn(self) -> None:
        while self._waiting and self._has_room():
            requests = [request for request in self._take() if self._is_wanted(request)]
            if requests:
                self._start(requests)

    def _is_wanted(self, request: TopicRequest) -> bool:
        try:
            return not request.revoked()
        except Exception:  # such as of a result backend that is away; the others must not stay behind for it
            logger.exception("message %s is revoked, which could not be told", request.id)
            request.put_back()
            return False

    def _has_room(self) -> bool:
        """Whether a child is free; or will be in a moment, and shall not wait then."""
        missing = self._children - len(self._groups)
        # Somebody may have taken all children away.
        is_soon = bool(self._groups) and all(group.is_quick for group in self._groups)
        return missing > 0 or (missing == 0 and is_soon)

    def _start(self, requests: list[TopicRequest]) -> None:
        group = Group(requests, self._runtime, self._over, self._run_alone)
        group.is_quick = sum(map(self._expected, requests)) <= SPAN
        self._groups.add(group)
        group.execute_using_pool(self._pool)

    def _expected(self, request: TopicRequest) -> float:
        """Return the seconds that a message may take, as far as can be told."""
        return self._slowest.get(request.type, math.inf)

    def _run_alone(self, request: TopicRequest) -> None:
        """Run by itself what the child that had it did not touch."""
        request.given_back()
        if not self._runtime.is_stopping():  # else it goes back with the connection
            self._start([request])

    def _take(self) -> list[TopicRequest]:
        """Return what goes to one child: no more than its share, and than it can be done with soon."""
        share = min(-(-len(self._waiting) // self._children), _MOST)
        taken: list[TopicRequest] = []
        seconds, size = 0.0, 0
        for request in islice(self._waiting, share):
            seconds += self._expected(request)
            size += len(request.body)
            if taken and (seconds > SPAN or size > _MOST_BYTES):
                break
            taken.append(request)
        for _ in taken:
            self._waiting.popleft()
        return taken

    def _over(self, group: Group) -> None:
        self._groups.discard(group)
        for name, seconds, size in group.ran:
            self._slowest[name] = max(seconds, self._slowest.get(name, 0.0) * FADE)
            self._appetite.told(seconds, size)
        self._fit()
        self._turn()

    def _fit(self) -> None:
        """Have so many in hand as suits the pace; what must not wait here any longer goes back to the broker."""
        at_once = self._children
        if not at_once:
            return
        self._appetite.fit(at_once)
        while len(self._waiting) > self._appetite.most_waiting(at_once):
            self._waiting.pop().hand_over_again()


class Group(Batch):
    """Requests that one child runs one after the other.

    Args:
        requests: in the order in which they run.
        runtime: of this process.
        ended: called with it once it is over.
        run_alone: called with each that the child did not touch.
    """

    def __init__(
        self,
        requests: list[TopicRequest],
        runtime: Runtime,
        ended: Callable[[Group], object],
        run_alone: Callable[[TopicRequest], object],
    ) -> None:
        super().__init__("", runtime, self._ended)
        self._tell = ended
        self.requests = requests
        self._run_alone = run_alone
        #: Whether it will soon be over, as far as can be told.
        self.is_quick = False
        #: The task of each that ran, how long that took, and bytes of its body.
        self.ran: list[tuple[str, float, int]] = []
        self._began = math.inf
        self._place = runtime.shared.take_place() if len(requests) > 1 else None

    def execute_using_pool(self, pool: Any, **_: Any) -> None:
        self._hand_over(pool, run_group, [(request.type, told(request)) for request in self.requests], self._place)

    def age(self) -> float:
        """Return the seconds for which a child has had it."""
        return max(time.monotonic() - self._began, 0.0)

    def _on_accepted(self, pid: int, time_accepted: float) -> None:
        self._began = time.monotonic()
        super()._on_accepted(pid, time_accepted)

    def _settle(self, request: TopicRequest, answer: Answer | None) -> None:
        if answer is ALONE:
            self._run_alone(request)
            return
        told, outcome = answer
        if told is not None and told[2] is not None:  # of a retry no time is told
            self.ran.append((request.type, told[2], len(request.body)))
        request.settled(Handled(0.0) if outcome is None else outcome, told)

    def _release(self, *, is_crash: bool) -> list[int]:
        if len(self.requests) == 1:
            return super()._release(is_crash=is_crash)
        counts = super()._release(is_crash=False)
        number = self._runtime.shared.told(self._place) if is_crash and self._place else -1
        if number >= 0:
            counts[number] = self._count_crash(self.requests[number])
        return counts

    def _count_crash(self, request: TopicRequest) -> int:
        """Count the crash of a handler whose message was claimed ahead; return how often it took its worker down."""
        message = request.read()
        try:
            begun = self._runtime.clerk.begin((message,)) if message else []
        except Exception:  # its neighbours are to be settled all the same
            logger.exception("could not count that message %s took its process down", request.id)
            return 0
        return max(self._runtime.release([request.id], crashed=True)) if begun and isinstance(begun[0], Work) else 0

    def forget(self) -> None:
        super().forget()
        if self._place:
            self._runtime.shared.give_back(self._place)
            self._place = None

    def _ended(self, _: Batch) -> None:
        self._tell(self)
