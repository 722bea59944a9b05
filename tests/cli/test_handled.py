"""`watch-tasks handled`: the records, and what may be thrown away."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from watch_tasks import Record
from watch_tasks.storage import Storage

from .conftest import Run, lines

FIELDS = ["topic", "index", "id", "retries", "max_retries", "sent_at", "handled_at", "seconds", "worker", "data"]


@pytest.fixture(autouse=True)
def _records(storage: Storage) -> None:
    for number in range(3):
        at = datetime.now(UTC) - timedelta(hours=number)
        storage.put(Record(topic="orders", index=f"o-{number}", id=f"id-{number}", handled_at=at, data={"n": number}))
    storage.put(
        Record(topic="other", index="x", id="id-9", handled_at=datetime.now(UTC), data="\u202e\x9b", worker="\x1b[2J")
    )


def test_list_gives_every_field_of_each_record_newest_first(run: Run) -> None:
    found = lines(run("handled", "list", "orders", "--json"))

    assert [line["index"] for line in found] == ["o-0", "o-1", "o-2"]
    assert all(list(line) == FIELDS for line in found)
    assert found[1]["data"] == {"n": 1}
    assert found[1]["sent_at"] is None
    assert found[1]["handled_at"].endswith("Z")


def test_list_keeps_to_since_and_limit(run: Run) -> None:
    assert len(lines(run("handled", "list", "--json"))) == 4
    assert len(lines(run("handled", "list", "--json", "--limit", "2"))) == 2
    assert len(lines(run("handled", "list", "orders", "--json", "--since", "90m"))) == 2
    assert len(lines(run("handled", "list", "orders", "--json", "--since", "2000-01-01T00:00:00Z"))) == 3


def test_table_is_aligned_and_counted(run: Run) -> None:
    printed = run("handled", "list", "orders", "--limit", "2").stdout.splitlines()

    assert printed[0].split("  ")[0] == "TOPIC"
    assert printed[0].index("INDEX") == printed[1].index("o-0") == printed[2].index("o-1")
    assert printed[-1] == "2 records; there are more, see --limit"


def test_nothing_that_a_terminal_obeys_is_printed(run: Run) -> None:
    assert "\\x1b[2J" in run("handled", "list", "other").stdout
    assert '"data":"\\u202e\\u009b"' in run("handled", "list", "other", "--json").stdout
    assert not {"\u202e", "\x9b", "\x1b"} & set(run("handled", "get", "other", "x").stdout)


def test_get_shows_one_record(run: Run) -> None:
    (line,) = lines(run("handled", "get", "orders", "o-1", "--json"))

    assert line["id"] == "id-1"
    assert "id-1" in run("handled", "get", "orders", "o-1").stdout


def test_count_is_of_one_topic_or_of_all(run: Run) -> None:
    assert lines(run("handled", "count", "orders", "--json")) == [{"topic": "orders", "count": 3}]
    assert lines(run("handled", "count", "--json")) == [{"topic": None, "count": 4}]
    assert run("handled", "count", "nobody").stdout == "0 records\n"


@pytest.mark.parametrize("command", ["get", "remove"])
def test_index_that_is_not_there_has_its_code(run: Run, command: str) -> None:
    result = run("handled", command, "orders", "o-7")

    assert result.exit_code == 3
    assert "no record of `o-7`" in result.stderr


@pytest.mark.parametrize("args", [("remove", "orders", "o-1"), ("clear",), ("clear", "orders")])
def test_nothing_is_thrown_away_unasked(run: Run, storage: Storage, args: tuple[str, ...]) -> None:
    result = run("handled", *args)

    assert result.exit_code == 4
    assert "--yes" in result.stderr
    assert storage.len() == 4


def test_remove_forgets_one(run: Run, storage: Storage) -> None:
    assert run("handled", "remove", "orders", "o-1", "--yes").exit_code == 0

    assert storage.get("orders", "o-1") is None
    assert storage.len() == 3


def test_clear_forgets_a_topic(run: Run, storage: Storage) -> None:
    assert lines(run("handled", "clear", "orders", "--yes", "--json")) == [{"topic": "orders", "count": 3}]

    assert storage.len() == 1


@pytest.mark.parametrize("since", ["yesterday", "15", "7y", "2026-13-01"])
def test_since_that_is_no_time_is_refused(run: Run, since: str) -> None:
    result = run("handled", "list", "--since", since)

    assert result.exit_code == 2
    assert "such as 15m, 2h, 7d" in result.stderr
