"""`watch-tasks handled export` and `import`: records move to another storage, each as it was."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from watch_tasks import MemoryStorage, Message, Record, topic
from watch_tasks.cli.moving import export_lines, import_lines
from watch_tasks.cli.program import Program
from watch_tasks.errors import StorageUnavailableError
from watch_tasks.storage import Storage
from watch_tasks.storage.base import PAGE
from watch_tasks.work import Work
from watch_tasks.worker import install
from watch_tasks.worker.runtime import runtime_of

from .conftest import Run, lines, runner

NOW = datetime.now(UTC)
FIELDS = {
    *("topic", "index", "id", "retries", "max_retries", "sent_at", "handled_at", "seconds", "worker", "data"),
    *("digest", "expires_at"),
}


def record(number: int, **fields: Any) -> Record:
    """Return a record that was handled so many seconds ago, and is kept for another day."""
    given = {
        "topic": "orders",
        "index": f"o-{number}",
        "id": f"id-{number}",
        "handled_at": NOW - timedelta(seconds=number),
        "expires_at": NOW + timedelta(days=1, microseconds=number),
        "digest": "ab" * 16,
        "data": {"n": number},
        **fields,
    }
    return Record(**given)


#: One for each thing that a line might lose.
ODD = [
    record(1, index="ä:/日本 -x", id="x" * 300, worker="w@\x1b[2J", seconds=0.1 + 0.2),
    record(2, expires_at=None, digest="", data=None),
    record(3, topic="other.topic", retries=7, max_retries=0, sent_at=NOW - timedelta(days=400, microseconds=1)),
    record(4, max_retries=2**63 - 1, data=["\u202e\x9b\n", 2**63, -0.0, 1e-320, None, True, {"": [[]]}]),
    record(5, data="half a pair: \ud800", handled_at=NOW - timedelta(seconds=5, microseconds=7)),
    record(6, data="x" * 1_000_000),
    record(7, data=""),
]


def line(**fields: Any) -> str:
    """Return a line with the fewest fields that make a record, and these."""
    given = {"topic": "orders", "index": "o-1", "id": "id-1", "handled_at": NOW.isoformat(), **fields}
    return json.dumps({name: value for name, value in given.items() if value is not ...})


@pytest.fixture
def source() -> Iterator[Storage]:
    with MemoryStorage() as storage:
        yield storage


@pytest.fixture
def run_source(source: Storage) -> Iterator[Run]:
    """Run a command on the storage that records come from."""
    app = install(Celery("source", broker="memory://", set_as_current=False))
    runtime_of(app).__dict__["storage"] = source
    yield runner(app)
    app.close()


def test_every_record_is_equal_after_its_way_through_a_file_into_another_storage(
    run_source: Run, run: Run, source: Storage, storage: Storage, tmp_path: Path
) -> None:
    given = [*ODD, *(record(number) for number in range(10, 10 + 2 * PAGE))]
    assert source.restore(given) == len(given)

    exported = run_source("handled", "export")
    (tmp_path / "records.jsonl").write_bytes(exported.stdout_bytes)
    imported = run("handled", "import", "records.jsonl", "--json")

    assert (exported.exit_code, exported.stderr) == (0, f"{len(given)} records exported\n")
    assert imported.exit_code == 0, imported.stderr
    assert list(storage.range(newest_first=False)) == list(source.range(newest_first=False))
    counted = lines(imported)[-1]
    assert counted.pop("seconds") >= 0
    assert counted == {"imported": len(given), "skipped": 0, "refused": 0}


def test_export_gives_every_field_oldest_first(run_source: Run, source: Storage) -> None:
    source.restore(ODD)

    result = run_source("handled", "export", "--json")

    found = lines(result)
    assert [one["id"] for one in found] == [one.id for one in reversed(ODD)]
    assert all(set(one) == FIELDS for one in found)
    assert found[-2]["expires_at"] is None
    assert result.stderr == '{"exported":7}\n'
    assert not {"\u202e", "\x9b", "\x1b"} & set(result.stdout)


def test_export_keeps_to_topic_and_since(run_source: Run, source: Storage) -> None:
    source.restore([record(10), record(7200), record(20, topic="other")])

    assert len(lines(run_source("handled", "export", "orders"))) == 2
    assert [one["index"] for one in lines(run_source("handled", "export", "orders", "--since", "1h"))] == ["o-10"]
    assert run_source("handled", "export", "nobody").stderr == "0 records exported\n"


def test_twice_is_safe(run: Run, storage: Storage, run_source: Run, source: Storage) -> None:
    source.restore(ODD)
    exported = run_source("handled", "export").stdout_bytes

    first = run("handled", "import", input=exported)
    second = run("handled", "import", "-", input=exported)

    assert first.stdout == "7 records imported, 0 skipped, 0 refused\n"
    assert (second.exit_code, second.stdout) == (0, "0 records imported, 7 skipped, 0 refused\n")
    assert storage.len() == len(ODD)


def test_what_is_over_or_overtaken_is_skipped(run: Run, storage: Storage) -> None:
    storage.put(record(0, index="o-1", id="newer"))
    over = (NOW - timedelta(seconds=1)).isoformat()
    older = (NOW - timedelta(seconds=9)).isoformat()
    given = [line(handled_at=older), line(index="o-2", expires_at=over), line(index="o-3")]

    result = run("handled", "import", "--json", input="\n\n".join(given))

    assert result.exit_code == 0
    assert (lines(result)[-1]["imported"], lines(result)[-1]["skipped"]) == (1, 2)
    assert {found.id for found in storage.range()} == {"newer", "id-1"}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "expected JSON, got"),
        ("\udcff", "expected JSON, got bytes that are not UTF-8, at 0"),
        ('"text"', "expected a record, Expected `object`, got `str`"),
        ("[" * 100_000, "expected"),
        (line(data=...).replace("}", ', "data": NaN}'), "expected JSON, got NaN, which JSON has not"),
        (line(data=...).replace("}", ', "data": ' + "[" * 9999 + "]" * 9999 + "}"), "expected JSON, got values nested"),
        (line(topic=...), "missing required field `topic`"),
        (line(index=...), "missing required field `index`"),
        (line(id=...), "missing required field `id`"),
        (line(handled_at=...), "missing required field `handled_at`"),
        (line(topic="Orders"), "the name of a topic must be"),
        (line(index=""), "an index must be"),
        (line(index="a\nb"), "an index must be"),
        (line(id=""), "at `$.id`"),
        (line(id="\ud800"), "`id` must be a text that UTF-8 can write"),
        (line(worker=1), "Expected `str`, got `int` - at `$.worker`"),
        (line(retries=-1), "Expected `int` >= 0 - at `$.retries`"),
        (line(retries=1.5), "at `$.retries`"),
        (line(max_retries=2**64), "at `$.max_retries`"),
        (line(seconds="1"), "at `$.seconds`"),
        (line(digest="AB"), "at `$.digest`"),
        (line(handled_at="2026-01-31T12:00:00"), "with a timezone component - at `$.handled_at`"),
        (line(handled_at="yesterday"), "Invalid RFC3339 encoded datetime - at `$.handled_at`"),
        (line(handled_at="0001-01-01T00:00:00+14:00"), "`handled_at` must be between 1970 and 9998"),
        (line(expires_at="9999-12-31T23:59:59.999999Z"), "`expires_at` must be between 1970 and 9998"),
        (line(sent_at="9999-12-31T23:59:59-14:00"), "`sent_at` must be between 1970 and 9998"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_a_bad_line_is_told_by_its_number_and_keeps_no_other_from_being_imported(
    run: Run, storage: Storage, bad: str, said: str
) -> None:
    given = "\n".join([line(index="first"), "", bad, line(index="last")])

    result = run("handled", "import", "--json", input=given.encode(errors="surrogateescape"))

    assert result.exit_code == 5, result.exception
    (told,) = map(json.loads, result.stderr.splitlines())
    assert told["line"] == 3
    assert said in told["error"]
    assert lines(result)[-1]["imported"] == 2
    assert lines(result)[-1]["refused"] == 1
    assert {found.index for found in storage.range()} == {"first", "last"}


def test_exit_code_tells_all_bad_from_some(run: Run) -> None:
    assert run("handled", "import", input="{\n[]\n").exit_code == 1
    assert run("handled", "import", input="{\n" + line()).exit_code == 5
    assert run("handled", "import", input="{\n" + line()).exit_code == 5  # it is there already, which is no fault
    assert run("handled", "import", input=line()).exit_code == 0
    assert run("handled", "import", input="").exit_code == 0
    assert run("handled", "import", "nowhere.jsonl").exit_code == 2


def test_lines_of_other_programs_get_the_digest_that_the_worker_would_find(run: Run, storage: Storage) -> None:
    data = {"b": [1.0, "ü", None], "a": "\x9b"}
    message = Message(data, "orders", index="o-1")
    wanted = Work.read(topic("orders"), message, "w").digest

    run("handled", "import", input="\n".join([line(data=data), line(index="o-2"), line(index="o-3", data=None)]))

    digests = {found.index: found.digest for found in storage.range()}
    assert digests == {"o-1": wanted, "o-2": "", "o-3": ""}


def test_lines_of_other_programs_end_as_their_topic_says(run: Run, storage: Storage) -> None:
    topic("orders", retention=86400.0 * 30)
    topic("eternal", retention=None)
    given = [line(), line(topic="eternal"), line(topic="unknown"), line(index="o-2", expires_at=None)]

    assert run("handled", "import", input="\n".join(given)).exit_code == 0

    left = {(one.topic, one.index): one.expires_at and one.expires_at - one.handled_at for one in storage.range()}
    assert left == {
        ("orders", "o-1"): timedelta(days=30),
        ("orders", "o-2"): None,
        ("eternal", "o-1"): None,
        ("unknown", "o-1"): timedelta(days=7),
    }


def test_an_imported_record_makes_its_message_a_duplicate(run: Run, storage: Storage) -> None:
    handled_elsewhere = Message({"n": 1}, "orders", index="o-1", id="id-1")
    run("handled", "import", input=line(data={"n": 1}))

    work = Work.read(topic("orders", once="index"), handled_elsewhere, "w")
    answer = storage.claim(work.claim(6.0, "nonce"))

    assert getattr(answer, "why", None) == "duplicate"


class FillingStorage(MemoryStorage):
    """Counts what is restored, and keeps nothing; it goes away after so many pages."""

    def __init__(self, pages: int) -> None:
        super().__init__()
        self.pages = pages
        self.largest = 0

    def restore(self, records: Iterable[Record]) -> int:
        page = list(records)
        self.largest = max(self.largest, len(page))
        if self.pages == 0:
            raise StorageUnavailableError("it went away")
        self.pages -= 1
        return len(page)


def test_storage_that_goes_away_in_the_middle_leaves_true_counts(app: Celery) -> None:
    runtime_of(app).__dict__["storage"] = FillingStorage(2)

    given = "\n".join(line(index=f"o-{number}") for number in range(3 * PAGE))
    result = runner(app)("handled", "import", "--json", input=given)

    assert result.exit_code == 69
    assert lines(result)[-1]["imported"] == 2 * PAGE


@pytest.mark.parametrize("way", ["export", "import"])
def test_memory_stays_the_same_however_many_there_are(
    way: str, app: Celery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = FillingStorage(1_000_000)
    runtime_of(app).__dict__["storage"] = storage
    many = (record(0, index=f"o-{number}", data="x" * 1000) for number in range(20_000))  # 25 MB as lines
    path = tmp_path / "records.jsonl"

    with path.open("w") as file:
        monkeypatch.setattr("sys.stdout", file)
        tracemalloc.start()
        assert export_lines(many) == 20_000
        if way == "import":
            tracemalloc.reset_peak()
            with path.open("rb") as source:
                assert import_lines(Program(app), source).refused == 0
            assert storage.largest == PAGE
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

    assert peak < 4_000_000
