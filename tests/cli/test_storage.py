"""`watch-tasks storage`: its form is brought up to date, once, and only by this."""

from __future__ import annotations

import pytest
from celery import Celery

from watch_tasks import MemoryStorage
from watch_tasks.errors import StorageUnavailableError
from watch_tasks.worker.runtime import runtime_of

from .conftest import Run, lines, runner

STATEMENTS = ["CREATE TABLE watch_records (\n  topic TEXT\n)", "note the \x1b[2Jversion"]


class OutdatedStorage(MemoryStorage):
    """One whose form has to be brought up to date."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = list(STATEMENTS)
        self.is_away = False

    def migrations(self) -> list[str]:
        if self.is_away:
            raise StorageUnavailableError("storage `outdated`: it does not answer")
        return list(self.waiting)

    def migrate(self) -> list[str]:
        done, self.waiting = self.migrations(), []
        return done


@pytest.fixture
def outdated(app: Celery, monkeypatch: pytest.MonkeyPatch) -> OutdatedStorage:
    storage = OutdatedStorage()
    monkeypatch.setitem(runtime_of(app).__dict__, "storage", storage)
    return storage


@pytest.fixture
def migrate(app: Celery, outdated: OutdatedStorage) -> Run:
    run = runner(app)
    return lambda *options: run("storage", "migrate", *options)


def test_dry_run_shows_each_statement_and_changes_nothing(migrate: Run, outdated: OutdatedStorage) -> None:
    result = migrate("--dry-run")

    assert result.exit_code == 0
    assert result.stdout == "CREATE TABLE watch_records (\n  topic TEXT\n)\nnote the \\x1b[2Jversion\n"
    assert result.stderr == "dry run: nothing was changed\n"
    assert outdated.waiting == STATEMENTS


def test_it_is_run_once_and_says_what_was_done(migrate: Run, outdated: OutdatedStorage) -> None:
    first, second = migrate(), migrate()

    assert first.stdout.startswith("CREATE TABLE watch_records (\n")
    assert (first.exit_code, first.stderr) == (0, "")
    assert (second.exit_code, second.stdout) == (0, "nothing to do: the storage is up to date\n")
    assert outdated.waiting == []


@pytest.mark.parametrize("options", [["--json"], ["--json", "--dry-run"]])
def test_json_is_one_object_for_each_statement_and_nothing_else(migrate: Run, options: list[str]) -> None:
    result = migrate(*options)

    assert lines(result) == [{"statement": statement} for statement in STATEMENTS]
    assert result.stderr == ""


def test_json_of_nothing_to_do_is_nothing(migrate: Run) -> None:
    migrate()

    assert migrate("--json").output == migrate("--json", "--dry-run").output == ""


def test_storage_without_a_form_has_nothing_to_do(run: Run) -> None:
    for options in ([], ["--dry-run"]):
        assert run("storage", "migrate", *options).stdout == "nothing to do: the storage is up to date\n"


def test_storage_that_does_not_answer_has_its_code(migrate: Run, outdated: OutdatedStorage) -> None:
    outdated.is_away = True

    for options in ([], ["--dry-run"]):
        result = migrate(*options)

        assert (result.exit_code, result.stdout) == (69, "")
        assert "it does not answer" in result.stderr


def test_storage_without_a_form_is_asked_whether_it_is_there(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCH_STORAGE_BACKEND", "redis://127.0.0.1:1/0")

    result = runner(app)("storage", "migrate")

    assert (result.exit_code, result.stdout) == (69, "")
