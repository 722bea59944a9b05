"""Packets for real workers, sent as they are, and what they leave at the broker."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from watch_tasks import Message
from watch_tasks.packets import Member, Packet, member_of
from watch_tasks.queue import bulk
from watch_tasks.schema import dump
from watch_tasks.worker.outlet import CeleryOutlet
from watch_tasks.worker.settings import Settings

from ..servers import RedisServer
from ..workers import Site
from .test_garbage import envelope

__all__ = ["members", "push_body", "send_packet"]


def members(topic: str, data: Sequence[Any], **options: Any) -> list[Message[Any]]:
    """Return messages of a topic, the n-th under index `in` and id `mn`."""
    return [Message(one, topic, index=f"i{n}", id=f"m{n}", **options) for n, one in enumerate(data)]


def send_packet(site: Site, messages: Sequence[Message[Any]], id: str = "packet") -> None:
    """Send these as one packet."""
    made: list[Member] = [member_of(one, dump(one.data)) for one in messages]
    outlet = CeleryOutlet(site.bare, lambda: cast(Settings, None))
    outlet.push_packet(Packet(messages[0].topic, made, id))


def push_body(server: RedisServer, body: bytes, id: str, **headers: Any) -> None:
    """Put a packet with this body into the queue; keywords change its headers."""
    own = {"version": 1, "sent_at": "2026-01-02T03:04:05+00:00"}
    item = envelope(body, **{"task": bulk.TASK, "id": id, "root_id": id, "watch": own, **headers})
    with server.client() as client:
        client.lpush("celery", json.dumps(item))
