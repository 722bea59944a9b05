"""What the main process hands to a task that runs in this very process, so that nothing is found out twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from ..message import Message
from ..outcome import Outcome
from ..work import Settlement, Work

__all__ = ["HAND", "IDS", "Hand"]

#: The field of a task's request that holds it; never sent on.
HAND: Final = "watch_hand"
#: The attribute of a packet's delivery that holds the ids of its members.
IDS: Final = "watch_ids"


@dataclass(slots=True)
class Hand:
    """One delivery, as far as the main process has come with it."""

    message: Message[Any]
    #: What claiming ahead came to; None: the task claims.
    begun: Work | Outcome | None = None
    #: What the task leaves to be stored, where its message was claimed ahead and handled; nothing counts before.
    settlement: Settlement | None = None
