"""A storage that is wrong on purpose: the suite is worth something only if it fails this one."""

from __future__ import annotations

import time
from collections.abc import Sequence

from watch_tasks.storage.memory import MemoryStorage
from watch_tasks.storage.protocol import Claim, Granted, Refused


class CheckThenWriteStorage(MemoryStorage):
    """Looks whether a message is free, and takes it in a second step: two may look before either takes."""

    def _claim(self, claims: Sequence[Claim]) -> list[Granted | Refused]:
        taken = {claim.id for claim in claims if claim.id in self._states}
        holders = {claim.id for claim in claims if (claim.topic, claim.index) in self._holders}
        time.sleep(0.001)  # a round trip
        for claim in claims:
            if claim.id not in taken:
                self._states.pop(claim.id, None)
            if claim.id not in holders:
                self._holders.pop((claim.topic, claim.index), None)
        return super()._claim(claims)
