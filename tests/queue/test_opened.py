"""A packet in hand: its members one by one, and when it is settled."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from watch_tasks import Message, QueueUnavailableError, SendFailedError
from watch_tasks.packets import Member, Packet
from watch_tasks.queue import Delivery, opened
from watch_tasks.queue.opened import OpenPacket


class Outer(Delivery):
    """By what the packet came."""

    def __init__(self) -> None:
        self.acks = 0
        self.error: Exception | None = None

    def ack(self) -> None:
        error, self.error = self.error, None
        if error:
            raise error
        self.acks += 1

    def back(self, delay: float = 0.0) -> None:
        raise NotImplementedError


class Shelf:
    """Where members go that leave."""

    def __init__(self) -> None:
        self.pushed: list[Any] = []
        self.is_down = False

    def push(self, message: Message[Any], *, delay: float = 0.0, bounded: bool = True) -> None:
        self._take((message.id, delay, bounded))

    def push_packet(self, packet: Packet, *, delay: float = 0.0) -> None:
        self._take([member.id for member in packet.members])

    def _take(self, what: Any) -> None:
        if self.is_down:
            raise SendFailedError("down")
        self.pushed.append(what)


@pytest.fixture
def outer() -> Outer:
    return Outer()


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def open_packet(outer: Outer, shelf: Shelf, count: int = 4) -> OpenPacket:
    members = [Member(f"m{number}", "", msgspec.Raw(b"1")) for number in range(count)]
    return OpenPacket(Packet("alarm", members), outer, shelf, 1000)


def take(packet: OpenPacket) -> Delivery:
    delivery = packet.next()
    assert delivery
    return delivery


def test_it_is_acked_with_its_last_member(outer: Outer, shelf: Shelf) -> None:
    packet = open_packet(outer, shelf)
    deliveries = [take(packet) for _ in range(4)]
    assert packet.next() is None
    for delivery in reversed(deliveries):
        assert outer.acks == 0
        delivery.ack()
    assert outer.acks == 1


def test_a_member_that_leaves_counts_as_settled(outer: Outer, shelf: Shelf) -> None:
    packet = open_packet(outer, shelf, 2)
    take(packet).back(2.5)
    take(packet).ack()
    assert shelf.pushed == [("m0", 2.5, False)]
    assert outer.acks == 1


def test_one_that_cannot_leave_stays_in_hand(outer: Outer, shelf: Shelf) -> None:
    packet = open_packet(outer, shelf, 1)
    delivery = take(packet)
    shelf.is_down = True
    with pytest.raises(QueueUnavailableError):
        delivery.back()
    assert outer.acks == 0
    shelf.is_down = False
    delivery.back()
    assert outer.acks == 1


def test_an_ack_that_failed_may_be_tried_again(outer: Outer, shelf: Shelf) -> None:
    packet = open_packet(outer, shelf, 1)
    delivery = take(packet)
    outer.error = QueueUnavailableError("away")
    with pytest.raises(QueueUnavailableError):
        delivery.ack()
    delivery.ack()
    assert outer.acks == 1


def test_what_takes_long_is_left_to_others_in_halves(
    outer: Outer, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    packet = open_packet(outer, shelf, 6)
    first = take(packet)
    monkeypatch.setattr(opened, "_ENOUGH", -1.0)

    assert packet.next() is None

    assert sorted(shelf.pushed) == [["m1", "m2", "m3"], ["m4", "m5"]]
    assert outer.acks == 0
    first.ack()
    assert outer.acks == 1


def test_what_cannot_be_left_is_handed_out_here(outer: Outer, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    packet = open_packet(outer, shelf, 3)
    monkeypatch.setattr(opened, "_ENOUGH", -1.0)
    shelf.is_down = True
    assert [take(packet).message.id for _ in range(3)] == ["m0", "m1", "m2"]


def test_what_is_forgotten_is_neither_handed_out_nor_acked(outer: Outer, shelf: Shelf) -> None:
    packet = open_packet(outer, shelf, 3)
    first = take(packet)
    packet.forget()
    first.ack()
    assert (packet.next(), len(packet), outer.acks, shelf.pushed) == (None, 0, 0, [])
