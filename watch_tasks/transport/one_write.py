"""Connections that send each command by one write.

Without hiredis, the client writes a long argument by itself: what stands before it, the argument, and what stands after
it are three system calls and as many packets on the way, for every message that is not small.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

__all__ = ["in_one_write"]


@cache
def in_one_write(connection_class: Any) -> Any:
    """Return a class of connections of the client, whose commands are each written at once."""

    class OneWrite(connection_class):
        def send_packed_command(self, command: str | Sequence[bytes], check_health: bool = True) -> None:
            parts = command if isinstance(command, str) or len(command) < 2 else [b"".join(command)]
            super().send_packed_command(parts, check_health=check_health)

    return OneWrite
