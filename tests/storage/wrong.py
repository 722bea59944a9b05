"""Storages that are wrong on purpose: a test is worth something only if it fails them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from sqlalchemy import Connection, make_url

from watch_tasks.storage.kept import Key
from watch_tasks.storage.memory import MemoryStorage
from watch_tasks.storage.protocol import Claim, Granted, Refused
from watch_tasks.storage.sql import SqlStorage
from watch_tasks.storage.sql.postgres import Postgres


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


class Unlocked(Postgres):
    """Locks nothing: a transaction alone does not keep two from reading before either writes."""

    def lock(self, connection: Connection, ids: Iterable[str], keys: Iterable[Key]) -> int:
        return super().lock(connection, (), ())


class UnlockedStorage(SqlStorage):
    """On PostgreSQL, with its transactions and without its locks."""

    @classmethod
    def open(cls, url: str) -> UnlockedStorage:
        return cls(Unlocked(make_url(url).set(drivername="postgresql+psycopg"), None))
