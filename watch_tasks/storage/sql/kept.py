"""What one transaction has loaded of a SQL storage, and what it writes back."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

from sqlalchemy import Connection, Executable, RowMapping, Table

from ..kept import NEVER, Entry, Events, Kept, Key, Letter, Mark, State, Status
from ..protocol import STORY_LENGTH
from .backend import Backend
from .statements import COUNTERS, Statements, dropped
from .tables import SLOTS, Tables

__all__ = ["SqlKept", "micros", "seconds"]

#: The end of a story is written anew only when it moves by this share of the retention: it is in an index.
_COARSE: Final = 0.01
#: Seconds whose µs fit into 64 bits.
_MOST_SECONDS: Final = 9e12
#: A story is cut to its length once in so many events.
_TRIM_EVERY: Final = 50


def micros(seconds: float) -> int:
    """Return seconds as whole µs; at most what a column holds, some 292,000 years."""
    return round(min(seconds, _MOST_SECONDS) * 1_000_000)


def seconds(micros: int) -> float:
    """Return µs as seconds."""
    return micros / 1_000_000


def _ends(expires: float) -> int | None:
    return None if expires == NEVER else micros(expires)


def _end(expires: int | None) -> float:
    return NEVER if expires is None else seconds(expires)


class _Index:
    """What is known of an index beside its record."""

    def __init__(self, row: RowMapping, now: float) -> None:
        self.number: int | None = row["number"]
        self.holder: str | None = row["holder"]
        is_there = self.number is not None
        self.is_new = not is_there
        self.events: int = row["events"] if is_there else 0
        # Without events it has no story: the row is there because somebody holds the index.
        self.expires = _end(row["story_expires"]) if self.events else 0.0
        #: Whether its story is over: what lies there of it is to go.
        self.is_over = is_there and self.expires <= now
        self.is_changed = False
        self.told: list[tuple[float, str, bytes]] = []


class SqlKept(Kept):
    """Loads what a request concerns; `flush` writes what the rules changed.

    The caller has locked the ids and the keys in this transaction, and keeps them locked until it ends.

    Args:
        connection: in a transaction.
        tables: the tables.
        statements: those of the tables.
        backend: gives lists and tokens.
        now: the storage's clock, read under the locks.
        ids: the messages.
        keys: the topics and indexes; those of states are added.
    """

    def __init__(
        self,
        connection: Connection,
        tables: Tables,
        statements: Statements,
        backend: Backend,
        *,
        now: float,
        ids: Sequence[str],
        keys: Sequence[Key],
    ) -> None:
        self.now = now
        self._connection, self._tables, self._statements, self._backend = connection, tables, statements, backend
        self._next, self._last, self._most_tokens = 0, -1, max(len(ids), len(keys))
        self._states: dict[str, State | None] = {}
        self._marks: dict[str, Mark | None] = {}
        self._letters: dict[str, Letter | None] = {}
        self._records: dict[Key, Entry | None] = {}
        self._indexes: dict[Key, _Index] = {}
        #: Keys whose record has a row, over or not.
        self._rows: set[Key] = set()
        self._changed: dict[str, set[Any]] = defaultdict(set)
        self._counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(COUNTERS, 0))
        self._load_ids(set(ids))
        others = {state.key for state in self._states.values() if state and state.key} - set(keys)
        if others:  # an id that was sent under two indexes, or has just been
            backend.lock(connection, (), others)
        self._load_keys({*keys, *others})
        self._load_ids({index.holder for index in self._indexes.values() if index.holder} - self._states.keys())

    # -- loading

    def _load_ids(self, ids: Collection[str]) -> None:
        if not ids:
            return
        asked = self._backend.listing("ids", [(id,) for id in ids])
        for row in self._connection.execute(self._statements.load_ids, asked).mappings():
            id = row["asked"]
            self._states[id] = _state(row) if row["id"] is not None and _end(row["expires"]) > self.now else None
            self._marks[id], self._letters[id] = None, None
            if row["mark_id"] is not None and _end(row["mark_expires"]) > self.now:
                self._marks[id] = Mark(row["mark_token"], _end(row["mark_expires"]))
            if row["letter_at"] is not None:
                self._letters[id] = Letter(seconds(row["letter_at"]), row["letter_topic"], row["letter_blob"])

    def _load_keys(self, keys: Collection[Key]) -> None:
        if not keys:
            return
        asked = self._backend.listing("keys", list(keys))
        for row in self._connection.execute(self._statements.load_keys, asked).mappings():
            key = row["asked_topic"], row["asked_index"]
            self._indexes[key] = _Index(row, self.now)
            self._records[key] = None
            if row["id"] is not None:
                self._rows.add(key)
                if _end(row["expires"]) > self.now:
                    self._records[key] = _entry(row)

    # -- what the rules see

    def state(self, id: str) -> State | None:
        return self._states[id]

    def save(self, state: State) -> None:
        self._states[state.id] = state
        self._changed["states"].add(state.id)

    def drop_state(self, id: str) -> None:
        self._states[id] = None
        self._changed["states"].add(id)

    def mark(self, id: str) -> Mark | None:
        return self._marks[id]

    def save_mark(self, id: str, mark: Mark) -> None:
        self._marks[id] = mark
        self._changed["marks"].add(id)

    def record(self, key: Key) -> Entry | None:
        return self._records[key]

    def save_record(self, key: Key, entry: Entry) -> None:
        self._records[key] = entry
        self._changed["records"].add(key)

    def drop_record(self, key: Key) -> None:
        self._records[key] = None
        self._changed["records"].add(key)

    def holder(self, key: Key) -> str | None:
        return self._indexes[key].holder

    def hold(self, key: Key, id: str) -> None:
        index = self._indexes[key]
        index.is_changed = index.is_changed or index.holder != id
        index.holder = id

    def let_go(self, key: Key, id: str) -> None:
        index = self._indexes[key]
        if index.holder == id:
            index.holder, index.is_changed = None, True

    def letter(self, id: str) -> Letter | None:
        return self._letters[id]

    def save_letter(self, id: str, letter: Letter) -> None:
        self._letters[id] = letter
        self._changed["letters"].add(id)

    def drop_letter(self, id: str) -> None:
        if self._letters[id]:
            self._letters[id] = None
            self._changed["letters"].add(id)

    def count(self, topic: str, name: str | None = None) -> None:
        counts = self._counts[topic]
        if name:
            counts[name] += 1

    def tell(self, key: Key, events: Events, retention: float | None) -> None:
        index = self._indexes[key]
        index.told += events
        expires = NEVER if retention is None else self.now + retention
        least = index.expires if retention is None else index.expires + retention * _COARSE
        if index.is_over or index.number is None or expires > least:
            index.expires = max(expires, index.expires)
            index.is_changed = True

    def next_token(self) -> int:
        if self._next > self._last:
            known = [state.token for state in self._states.values() if state]
            known += [record.token for record in self._records.values() if record]
            least = max([micros(self.now), *(token + 1 for token in known)])
            self._next = self._backend.tokens(self._connection, self._tables, self._most_tokens, least)
            self._last = self._next + self._most_tokens - 1
        self._next += 1
        return self._next - 1

    # -- writing back

    def flush(self) -> None:
        """Write what the rules changed."""
        # In one order everywhere, so that nobody waits in a circle: marks of other ids, and counters, are not locked.
        tables, changed = self._tables, {what: sorted(which) for what, which in self._changed.items()}
        self._write(tables.states, {(id,): self._states[id] for id in changed.get("states", ())}, _state_row)
        self._write(tables.marks, {(id,): self._marks[id] for id in changed.get("marks", ())}, _mark_row)
        self._write(tables.letters, {(id,): self._letters[id] for id in changed.get("letters", ())}, _letter_row)
        records = {key: self._records[key] for key in changed.get("records", ())}
        for key, entry in records.items():
            self._counts[key[0]]["records"] += (entry is not None) - (key in self._rows)
        self._write(tables.records, records, _record_row)
        self._write_indexes()
        slot = random.randrange(SLOTS)  # noqa: S311 - no secret
        counts = [{"topic": topic, "slot": slot, **self._counts[topic]} for topic in sorted(self._counts)]
        self._run(self._statements.count, counts)

    def _write(self, table: Table, things: dict[tuple[str, ...], Any], row: Callable[..., dict[str, Any]]) -> None:
        self._run(
            self._statements.save[table], [row(*key, thing) for key, thing in things.items() if thing is not None]
        )
        self._run(
            self._statements.drop[table], [dropped(table, *key) for key, thing in things.items() if thing is None]
        )

    def _write_indexes(self) -> None:
        self._add_indexes()
        events, trims, updates = [], [], []
        for index in self._indexes.values():
            if not index.told and not index.is_changed:
                continue
            before = 0 if index.is_over else index.events
            if index.is_over:
                trims.append({"of": index.number, "upto": index.events})
            after = index.events + len(index.told)
            if not index.is_new:
                row = {"holder": index.holder, "events": after, "expires": _ends(index.expires)}
                updates.append({"of": index.number, **row})
            for place, (at, kind, note) in enumerate(index.told, index.events + 1):
                events.append({"number": index.number, "place": place, "at": micros(at), "kind": kind, "note": note})
            # A hot index is trimmed now and then, not with each event.
            if after > STORY_LENGTH and after // _TRIM_EVERY > before // _TRIM_EVERY:
                trims.append({"of": index.number, "upto": after - STORY_LENGTH})
        self._run(self._statements.trim_events, trims)
        self._run(self._statements.add_events, events)
        self._run(self._statements.save_index, updates)

    def _add_indexes(self) -> None:
        """Give each index a number that is told of for the first time."""
        added: list[dict[str, Any]] = []
        for (topic, name), index in self._indexes.items():
            if index.is_new and (index.told or index.is_changed):
                row = {"holder": index.holder, "events": len(index.told), "expires": _ends(index.expires)}
                added.append({"topic": topic, "index": name, **row})
        if added:
            for number, topic, name in self._connection.execute(self._statements.add_index, added):
                self._indexes[topic, name].number = number

    def _run(self, statement: Executable, rows: list[dict[str, Any]]) -> None:
        if rows:
            self._connection.execute(statement, rows if len(rows) > 1 else rows[0])


def _state(row: RowMapping) -> State:
    return State(
        row["id"],
        (row["topic"], row["index"]) if row["topic"] is not None else None,
        row["copy"],
        Status(row["status"]),
        row["carried"],
        row["token"],
        row["first_token"],
        row["worker"],
        row["nonce"],
        seconds(row["until"]),
        row["started"],
        row["exclusive"],
        row["crashes"],
        row["progress"],
        _end(row["expires"]),
    )


def _entry(row: RowMapping) -> Entry:
    return Entry(
        seconds(row["at"]),
        _end(row["expires"]),
        row["id"],
        row["first_token"],
        row["token"],
        row["digest"],
        row["blob"],
    )


def _state_row(id: str, state: State) -> dict[str, Any]:
    topic, index = state.key or (None, None)
    return {
        "id": id,
        "topic": topic,
        "index": index,
        "copy": state.copy,
        "status": state.status.value,
        "carried": state.carried,
        "token": state.token,
        "first_token": state.first_token,
        "worker": state.worker,
        "nonce": state.nonce,
        "until": micros(state.until),
        "started": bool(state.started),
        "exclusive": state.exclusive,
        "crashes": state.crashes,
        "progress": state.progress,
        "expires": _ends(state.expires),
    }


def _mark_row(id: str, mark: Mark) -> dict[str, Any]:
    return {"id": id, "token": mark.token, "expires": _ends(mark.expires)}


def _letter_row(id: str, letter: Letter) -> dict[str, Any]:
    return {"id": id, "at": micros(letter.at), "topic": letter.topic, "blob": letter.blob}


def _record_row(topic: str, index: str, entry: Entry) -> dict[str, Any]:
    return {
        "topic": topic,
        "index": index,
        "at": micros(entry.at),
        "expires": _ends(entry.expires),
        "first_token": entry.first_token,
        "token": entry.token,
        "id": entry.id,
        "digest": entry.digest,
        "blob": entry.blob,
    }
