"""The statements of a SQL storage, built once: putting one together takes longer than running it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import BigInteger, Select, Table, and_, bindparam, delete, exists, func, or_, select, tuple_, update

from ..base import PAGE
from ..kept import Status
from ..protocol import STORY_LENGTH
from .tables import Tables

if TYPE_CHECKING:
    from .backend import Backend

__all__ = ["COUNTED", "COUNTERS", "FORGOTTEN", "Statements", "dropped"]

#: What is counted of a topic; `records` are the rows that there are, over or not.
COUNTERS: Final = ("handled", "duplicates", "retries", "records")

#: Rows that one step of `tend` forgets at most.
FORGOTTEN: Final = 250
#: Rows that are over, and not forgotten yet, of which `len` knows.
COUNTED: Final = 10_000


class Statements:
    """Those that a request is made of. Their parameters are named as columns are; `now` is a time in µs.

    Args:
        tables: the tables.
        backend: knows how lists are handed over, and how to insert or replace.
    """

    def __init__(self, tables: Tables, backend: Backend) -> None:
        self.tables = tables
        self._insert = backend.insert
        records, states, marks = tables.records, tables.states, tables.marks
        letters, indexes, events, counters = tables.letters, tables.indexes, tables.events, tables.counters

        ids = backend.listed("ids", 1)
        (id,) = ids.c
        self.load_ids = (
            select(
                id.label("asked"),
                states,
                marks.c.token.label("mark_token"),
                marks.c.expires.label("mark_expires"),
                marks.c.id.label("mark_id"),
                letters.c.at.label("letter_at"),
                letters.c.topic.label("letter_topic"),
                letters.c.blob.label("letter_blob"),
            )
            .select_from(ids)
            .outerjoin(states, states.c.id == id)
            .outerjoin(marks, marks.c.id == id)
            .outerjoin(letters, letters.c.id == id)
        )
        keys = backend.listed("keys", 2)
        topic, index = keys.c
        self.load_keys = (
            select(
                topic.label("asked_topic"),
                index.label("asked_index"),
                records,
                indexes.c.number,
                indexes.c.holder,
                indexes.c.events,
                indexes.c.expires.label("story_expires"),
            )
            .select_from(keys)
            .outerjoin(records, and_(records.c.topic == topic, records.c.index == index))
            .outerjoin(indexes, and_(indexes.c.topic == topic, indexes.c.index == index))
        )
        self.keys_of = select(states.c.topic, states.c.index).where(states.c.id == id, states.c.topic.is_not(None))

        #: Table → inserts rows, or replaces those of the same key.
        self.save = {table: self._replacing(table) for table in (records, states, marks, letters)}
        #: Table → deletes one row by its key.
        self.drop = {table: self._dropping(table) for table in (records, states, marks, letters)}
        self.add_index = indexes.insert().returning(indexes.c.number, indexes.c.topic, indexes.c.index)
        self.save_index = update(indexes).where(indexes.c.number == bindparam("of"))
        self.add_events = events.insert()
        self.trim_events = delete(events).where(events.c.number == bindparam("of"), events.c.place <= bindparam("upto"))
        adding = backend.insert(counters)
        self.count = adding.on_conflict_do_update(
            index_elements=["topic", "slot"],
            set_={name: counters.c[name] + adding.excluded[name] for name in COUNTERS},
        )

        is_owner = exists().where(
            indexes.c.topic == states.c.topic, indexes.c.index == states.c.index, indexes.c.holder == states.c.id
        )
        self.renew = (
            update(states)
            .where(
                states.c.id.in_(select(id)),
                states.c.worker == bindparam("of"),
                states.c.status == Status.RUNNING.value,
                or_(~states.c.exclusive, states.c.topic.is_(None), is_owner),
            )
            .values(until=backend.now() + bindparam("lease", type_=BigInteger()))
            .returning(states.c.id)
        )

        is_there = or_(records.c.expires.is_(None), records.c.expires > backend.now())
        self.get = select(records).where(
            records.c.topic == bindparam("of"), records.c.index == bindparam("named"), is_there
        )
        newest = select(records.c.at).where(records.c.topic == bindparam("of")).order_by(records.c.at.desc()).limit(1)
        self.newest = select(newest.scalar_subquery().label("at"), backend.last_token(tables).label("token"))
        self._page = (
            select(records)
            .where(
                records.c.topic == bindparam("of"),
                records.c.at.between(bindparam("since"), bindparam("until")),
                records.c.token <= bindparam("newest"),
                is_there,
            )
            .limit(PAGE)
        )
        self._place = tuple_(records.c.at, records.c.token)
        of_topic = counters.c.topic == bindparam("of")
        over = select(records.c.topic).where(records.c.expires <= backend.now()).limit(COUNTED).subquery()
        self.sizes = select(
            select(func.coalesce(func.sum(counters.c.records), 0)).where(of_topic).scalar_subquery().label("there"),
            select(func.count()).where(over.c.topic == bindparam("of")).scalar_subquery().label("over"),
        )

        self.letter = select(letters).where(letters.c.id == bindparam("of"))
        self._letters = (
            select(letters)
            .where(letters.c.at.between(bindparam("since"), bindparam("until")))
            .order_by(letters.c.at.desc(), letters.c.id.desc())
            .limit(PAGE)
        )
        self.story = (
            select(events.c.at, events.c.kind, events.c.note)
            .join(indexes, indexes.c.number == events.c.number)
            .where(
                indexes.c.topic == bindparam("of"),
                indexes.c.index == bindparam("named"),
                or_(indexes.c.expires.is_(None), indexes.c.expires > backend.now()),
            )
            .order_by(events.c.place.desc())
            .limit(STORY_LENGTH)
        )
        sums = (func.coalesce(func.sum(counters.c[name]), 0).label(name) for name in COUNTERS[:3])
        dead = select(func.count()).where(letters.c.topic == bindparam("of")).scalar_subquery()
        self.counts = select(*sums, dead.label("dead")).where(of_topic)
        self.now = select(backend.now())
        self.topics = select(counters.c.topic).distinct()

    def page(self, newest_first: bool, after: tuple[int, int] | None) -> Select[Any]:
        """Select a page of the records of a topic, from a time on, after the last place of the page before."""
        columns = self.tables.records.c
        order = [columns.at.desc(), columns.token.desc()] if newest_first else [columns.at, columns.token]
        page = self._page.order_by(*order)
        if after is None:
            return page
        return page.where(self._place < after if newest_first else self._place > after)

    def letters(self, topic: str | None, after: tuple[int, str] | None) -> Select[Any]:
        """Select a page of dead letters, newest first, of one topic or of all."""
        columns, page = self.tables.letters.c, self._letters
        if topic is not None:
            page = page.where(columns.topic == topic)
        return page if after is None else page.where(tuple_(columns.at, columns.id) < after)

    def _replacing(self, table: Table) -> Any:
        made = self._insert(table)
        key = [column.name for column in table.primary_key.columns]
        values = {column.name: made.excluded[column.name] for column in table.c if column.name not in key}
        return made.on_conflict_do_update(index_elements=key, set_=values)

    def _dropping(self, table: Table) -> Any:
        key = table.primary_key.columns
        return delete(table).where(*(column == bindparam(f"of_{column.name}") for column in key))


def dropped(table: Table, *key: str) -> dict[str, str]:
    """Return the parameters that name one row to a statement of `Statements.drop`."""
    return {f"of_{column.name}": value for column, value in zip(table.primary_key.columns, key, strict=True)}
