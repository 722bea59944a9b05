"""Commands are written at once, however long their arguments are."""

from __future__ import annotations

from collections.abc import Sequence

from watch_tasks.transport.one_write import in_one_write


class Wire:
    """A connection that notes what it writes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.written: list[tuple[str | Sequence[bytes], bool]] = []

    def send_packed_command(self, command: str | Sequence[bytes], check_health: bool = True) -> None:
        self.written.append((command, check_health))


class TestOneWrite:
    def test_parts_are_written_together(self) -> None:
        wire = in_one_write(Wire)("a")
        wire.send_packed_command([b"head", b"long", b"tail"])
        wire.send_packed_command((b"head", b"tail"), check_health=False)
        assert wire.written == [([b"headlongtail"], True), ([b"headtail"], False)]

    def test_what_is_one_already_stays_as_it_is(self) -> None:
        wire = in_one_write(Wire)("a")
        for command in (b"whole",), [], "text":
            wire.send_packed_command(command)
        assert [command for command, _ in wire.written] == [(b"whole",), [], "text"]

    def test_it_is_a_connection_of_its_kind(self) -> None:
        assert in_one_write(Wire) is in_one_write(Wire)
        wire = in_one_write(Wire)("a")
        assert isinstance(wire, Wire)
        assert wire.name == "a"
