"""Packets under Celery: the internal task `watch._bulk`, and its request."""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial
from typing import Any

from celery import Celery
from celery.exceptions import Reject

from ..errors import MessageError, StorageError
from ..members import Members, Taken
from ..outcome import Busy, Dead, Duplicate, Fenced, Handled, Outcome, Reason
from ..packets import Packet
from ..queue import bulk, wire
from .hand import IDS
from .request import TopicRequest
from .runtime import runtime_of
from .task import TopicTask, Yielded, worker_of

__all__ = ["PacketRequest", "PacketTask", "register_packets"]

logger = logging.getLogger(__name__)


class PacketTask(TopicTask):
    """Handles the members of a packet; each keeps its own id, claim, record and dead letter.

    It is acked when each of them is recorded, dead, or has left as a message of its own.
    """

    name = bulk.TASK
    Request = f"{__name__}:PacketRequest"

    def run(self, raw: bytes) -> str:
        runtime = runtime_of(self.app)
        pipeline = runtime.pipeline(*worker_of(self.request, runtime))
        members = Members(pipeline, runtime.is_stopping)
        with self.settling():
            try:
                packet = bulk.read(raw, {"id": self.request.id, wire.HEADER: self.request.get(wire.HEADER)})
            except MessageError as exc:
                # The main process could read it, and had more room for what is nested deep: handed over again, it would
                # come without end.
                pipeline.bury(Reason.MALFORMED, exc, id=self.request.id, raw=raw, content_type="application/json")
                return "1 dead"
            if (self.request.delivery_info or {}).get("redelivered"):
                taken = members.take_apart(packet)
            else:
                taken = members.handle(packet)
            unsettled = [one for one in taken if not isinstance(one.outcome, (Handled, Duplicate, Dead))]
            self._publish_all(packet, unsettled)
        if any(one.message is None for one in unsettled):
            # No copy can carry what is no message: only the packet has it.
            raise Reject("a member could not be buried before the stop", requeue=True)
        if any(isinstance(one.outcome, Fenced) for one in unsettled):
            raise Yielded("a member was taken over by another worker")
        return _told(taken)

    def _publish_all(self, packet: Packet, unsettled: list[Taken]) -> None:
        """Publish what goes on; what was left untouched, as packets again."""
        runtime = runtime_of(self.app)
        for one in unsettled:
            if one.message is not None and not one.is_left:
                self.publish(runtime, one.message, one.outcome)
        left = [one.member for one in unsettled if one.is_left]
        middle = (len(left) + 1) // 2
        # In two, so that what is slow to handle is soon spread over all workers.
        for half in filter(None, (left[:middle], left[middle:])):
            rest = Packet(packet.topic, half, sent_at=packet.sent_at)
            self.patiently(runtime, partial(runtime.outlet.push_packet, rest, self.request))


class PacketRequest(TopicRequest):
    """One delivery of a packet: it holds the claims of all its members."""

    def __init__(self, message: Any, **options: Any) -> None:
        # The child decodes the members by itself: to Celery their JSON is one argument, as bytes.
        super().__init__(message, **{**options, "body": message.payload, "decoded": True})
        self._raw: bytes = message.payload[0][0]
        self._ids = getattr(message, IDS)

    def _count_crash(self) -> int:
        # Nobody knows whose handler it was. Counted against all, or those asked that left before and crashed alone,
        # the members would be buried together. Handed over again the packet is taken apart, and then each counts.
        self._release()
        return 0

    def bury(self, reason: Reason, error: BaseException | str, *, crashes: int = 0) -> Outcome:
        """Make a dead letter of each member, unless its id is settled; the Outcome is Dead where all are kept."""
        try:
            packet = bulk.read(self._raw, self.request_dict)
            clerk = self._runtime.clerk
            taken = Members(clerk, lambda: True).bury(packet, reason, error)
        except MessageError as exc:
            return self._runtime.clerk.bury(Reason.MALFORMED, exc, id=self.id, raw=self._raw)
        except StorageError as exc:
            logger.error("could not bury the members of packet %s: %s", self.id, exc)
            return Busy(0.0)
        return next((one.outcome for one in taken if not isinstance(one.outcome, Dead)), Dead(reason))


def register_packets(app: Celery) -> None:
    """Make the task of packets one of an app's. Twice is safe."""
    if bulk.TASK not in app.tasks:
        app.register_task(PacketTask())


def _told(taken: list[Taken]) -> str:
    counts = Counter([type(one.outcome) for one in taken])
    return ", ".join(f"{count} {kind.__name__.lower()}" for kind, count in counts.items())
