"""A storage that is wrong on purpose: the suite is worth something only if it fails this one."""

from __future__ import annotations

import time
from collections.abc import Sequence

from watch_tasks.storage.memory import MemoryStorage
from watch_tasks.storage.protocol import Claim, Granted, Refused


class CheckThenWriteStorage(MemoryStorage):
    """Looks whether a message is free, and takes it in a second step: two may look before either takes."""

    def _claim(self, claims: Sequence[Claim]) -> list[Granted | Refused]:
        kept = self._kept
        taken = {claim.id for claim in claims if kept.state(claim.id)}
        holders = {(claim.topic, claim.index): kept.holder((claim.topic, claim.index)) for claim in claims}
        time.sleep(0.001)  # a round trip
        for claim in claims:
            key = claim.topic, claim.index
            if claim.id not in taken:
                kept.states.pop(claim.id, None)
            if holders[key] is None and (holder := kept.holder(key)):
                kept.let_go(key, holder)
        return super()._claim(claims)
