"""What a worker's main process shares with the children it forked: that it stops, and where each of them is."""

from __future__ import annotations

import mmap
import struct
from collections import deque
from typing import Final

__all__ = ["Shared"]

#: Groups that can be told of at a time; there are about as many as children.
_PLACES: Final = 1024
_place: Final = struct.Struct("=i")


class Shared:
    """A piece of memory. Made before the children are."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, (_PLACES + 1) * _place.size)
        # The one given back last is taken last: a child whose pool forgot what it runs tells of it for a while.
        self._free = deque(range(1, _PLACES + 1))

    def stop(self) -> None:
        """Ask all to stop."""
        self._memory[0] = 1

    def go_on(self) -> None:
        """Take that back."""
        self._memory[0] = 0

    @property
    def is_stopping(self) -> bool:
        return self._memory[0] == 1

    def take_place(self) -> int | None:
        """Return a place that nobody else has; None: there is none. For the main process."""
        if not self._free:
            return None
        place = self._free.popleft()
        self.tell(place, -1)
        return place

    def give_back(self, place: int) -> None:
        """Let others have a place."""
        self._free.append(place)

    def tell(self, place: int, number: int) -> None:
        """Say at which number of its work a child is; -1: at none."""
        _place.pack_into(self._memory, place * _place.size, number)

    def told(self, place: int) -> int:
        """Return the number that a child told last."""
        number: int = _place.unpack_from(self._memory, place * _place.size)[0]
        return number
