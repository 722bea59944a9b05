"""URLs that people have at hand: those that open a storage of ours, and why the others do not."""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pytest
from celery.app.backends import BACKEND_ALIASES

from watch_tasks import ConfigurationError, MemoryStorage, schemes
from watch_tasks.storage import _SCHEMES, open_storage
from watch_tasks.storage.urls import _REFUSED, INSTEAD, normalised, refusal

REST = "user:s3cret@db.example:5432/watch?sslmode=require"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs that the SQL storage was asked to open."""
    urls: list[str] = []
    _stand_in(monkeypatch, lambda url: (urls.append(url), MemoryStorage())[1])
    return urls


def _stand_in(monkeypatch: pytest.MonkeyPatch, open_url: Any) -> None:
    module = ModuleType("watch_tasks.storage.sql")
    module.open_url = open_url  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (f"{scheme}://{REST}", f"postgresql://{REST}")
        for scheme in (
            "postgresql",
            "postgres",
            "postgresql+psycopg",
            "postgresql+psycopg2",
            "db+postgresql",
            "db+postgres",
            "db+postgresql+psycopg2",
            "database+postgresql",
        )
    ]
    + [
        ("sqlite:///records.db", "sqlite:///records.db"),
        ("db+sqlite:///records.db", "sqlite:///records.db"),
        ("db+sqlite:////var/lib/watch/records.db", "sqlite:////var/lib/watch/records.db"),
        ("database+sqlite+pysqlite:///records.db", "sqlite:///records.db"),
    ],
)
def test_forms_of_a_sql_url_open_the_sql_storage(given: str, wanted: str, opened: list[str]) -> None:
    open_storage(given)

    assert opened == [wanted]


@pytest.mark.parametrize(
    "url",
    ["redis+socket:///run/redis.sock", "unix:///run/redis.sock", "sentinel://a;sentinel://b", "memory://", "postgres"],
)
def test_other_urls_stay_as_they_are(url: str) -> None:
    assert normalised(url) == url


@pytest.mark.parametrize("scheme", ["sqlite", "postgresql"])
@pytest.mark.parametrize("lacking", ["sqlalchemy", "psycopg", None])
def test_driver_that_is_not_installed_says_how_to_install_it(
    scheme: str, lacking: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_url(url: str) -> None:
        raise ImportError("it is not there", name=lacking)

    _stand_in(monkeypatch, open_url)

    with pytest.raises(
        ConfigurationError, match=rf"^storage `{scheme}` needs its driver: pip install 'watch-tasks\[sql\]'$"
    ):
        open_storage(f"db+{scheme}://{REST}")


def test_module_whose_import_lacks_a_driver_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(name: str) -> None:
        raise ModuleNotFoundError("No module named 'sqlalchemy'", name="sqlalchemy")

    monkeypatch.setattr(schemes, "import_module", lacking)

    with pytest.raises(ConfigurationError, match="needs its driver"):
        open_storage("sqlite:///records.db")


def test_mistake_in_our_own_imports_is_no_lacking_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_url(url: str) -> None:
        raise ImportError("cannot import name", name="watch_tasks.storage.base")

    _stand_in(monkeypatch, open_url)

    with pytest.raises(ImportError, match="cannot import name"):
        open_storage("sqlite:///records.db")


@pytest.mark.parametrize("scheme", sorted({*BACKEND_ALIASES, "amqp", "memcached", "filesystem", "django-db"}))
def test_every_result_backend_of_celery_opens_a_storage_or_is_refused(scheme: str) -> None:
    assert (scheme in _SCHEMES) != bool(refusal(scheme))


@pytest.mark.parametrize("scheme", _REFUSED)
@pytest.mark.parametrize("form", [f"{{}}://{REST}", "{}"], ids=["url", "name"])
def test_backend_that_cannot_keep_the_promises_is_refused_with_the_missing_one(scheme: str, form: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        open_storage(form.format(scheme))

    assert str(raised.value) == f"storage `{scheme}` cannot keep the promises: {_REFUSED[scheme]}; {INSTEAD}"


@pytest.mark.parametrize(
    ("scheme", "missing"),
    [
        ("cache+memcached", "forgets when its memory runs short"),
        ("cache+memory", "forgets when its memory runs short"),
        ("rpc", "read once, they are gone"),
        ("file", "no time order"),
        ("db+mysql", "two workers may handle the same message"),
        ("db+mysql+pymysql", "two workers may handle the same message"),
        ("mysql+pymysql", "two workers may handle the same message"),
        ("db+oracle", "two workers may handle the same message"),
        ("database+mssql+pyodbc", "two workers may handle the same message"),
        ("db+cockroachdb", "two workers may handle the same message"),
        ("mongodb+srv", "over one document"),
        ("redis+cluster", "keys of many slots"),
    ],
)
def test_forms_of_refused_urls_name_the_missing_promise(scheme: str, missing: str) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"^storage `{re.escape(scheme)}` cannot .*{missing}.*use redis://"
    ) as raised:
        open_storage(f"{scheme}://{REST}")

    assert "s3cret" not in str(raised.value)


def test_storage_that_somebody_ships_goes_before_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = EntryPoint("mongodb", "watch_tasks.storage.memory:open_url", "watch_tasks.storages")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [shipped])

    with open_storage(f"mongodb://{REST}") as storage:
        assert isinstance(storage, MemoryStorage)


@pytest.mark.parametrize("name", ["redis", "postgresql", "redis:s3cret@localhost"])
def test_name_without_a_url_is_told_so(name: str) -> None:
    scheme = name.partition(":")[0]

    with pytest.raises(ConfigurationError, match=rf"^storage `{scheme}` must be named by a URL, such as {scheme}://…$"):
        open_storage(name)
