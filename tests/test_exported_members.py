"""What `import watch_tasks` gives, and what it must not do."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from typing import Any

import pytest

import watch_tasks
import watch_tasks.testing

#: Seconds in which a program of one import is done.
PATIENCE = 60.0

#: Imports the package under the eyes of an audit hook, with an environment that must not be read, and prints what it
#: saw as JSON. What the standard library does when it is imported is not ours: it is imported before.
WATCHED = """
import importlib.resources, inspect, json, os, random, sys, uuid
import msgspec

before = set(sys.modules)
seen = []

class Unread(dict):
    def _note(self, *args, **kwargs):
        seen.append(f"environment {args}")
        raise KeyError(*args[:1])
    __getitem__ = get = __contains__ = __iter__ = keys = items = values = copy = setdefault = _note

def hook(event, args):
    if event == "open" and not str(args[0]).endswith((".py", ".pyc")):
        seen.append(f"open {args[0]}")
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.putenv", "signal.")):
        seen.append(event)
    if event == "import" and args[0].startswith("ctypes"):
        seen.append(event)

os.environ = Unread()
sys.addaudithook(hook)
import watch_tasks
print(json.dumps({"seen": seen, "loaded": sorted(set(sys.modules) - before)}))
"""


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-B", "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def told() -> Any:
    return json.loads(run(WATCHED))


def imported() -> dict[str, bool]:
    """Return what the top of the package takes from its modules, and whether it takes it for annotations only."""
    names: dict[str, bool] = {}
    for statement in ast.parse(inspect.getsource(watch_tasks)).body:
        late = isinstance(statement, ast.If)
        for node in statement.body if isinstance(statement, ast.If) else [statement]:
            if isinstance(node, ast.ImportFrom) and node.level:
                names |= {name.name: late for name in node.names}
    return names


class TestNames:
    def test_all_is_what_the_package_takes_from_its_modules(self) -> None:
        """But the registry, which is for apps. `app` is public too; a star import should not build it."""
        assert set(watch_tasks.__all__) == set(imported()) - {"registry"}

    def test_what_type_checkers_see_late_comes_late(self) -> None:
        assert set(watch_tasks._LATE) == {name for name, late in imported().items() if late} | {"app"}

    def test_no_name_stands_there_twice(self) -> None:
        assert len(watch_tasks.__all__) == len(set(watch_tasks.__all__))

    @pytest.mark.parametrize("name", watch_tasks.__all__)
    def test_every_name_can_be_imported(self, name: str) -> None:
        assert getattr(watch_tasks, name) is not None
        assert name in dir(watch_tasks)

    def test_a_late_name_is_what_its_module_says(self) -> None:
        from watch_tasks.watcher import Watcher

        assert watch_tasks.Watcher is Watcher

    def test_all_errors_are_public(self) -> None:
        assert {name for name in watch_tasks.errors.__all__ if name.endswith("Error")} <= set(watch_tasks.__all__)

    def test_a_name_that_does_not_exist_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="module 'watch_tasks' has no attribute 'Wacther'"):
            watch_tasks.Wacther  # noqa: B018
        with pytest.raises(AttributeError):
            watch_tasks.testing.Suite  # noqa: B018

    @pytest.mark.parametrize("name", ["topics", "storage", "queue", "errors"])
    def test_no_module_is_hidden_by_a_function_of_its_name(self, name: str) -> None:
        assert inspect.ismodule(getattr(watch_tasks, name))

    def test_the_test_kit_can_be_imported_whole(self) -> None:
        names = watch_tasks.testing.__all__
        assert names == sorted(set(names))
        assert all(inspect.isclass(getattr(watch_tasks.testing, name)) for name in names)


class TestImporting:
    def test_it_loads_nothing_that_costs(self, told: Any) -> None:
        heavy = ("celery", "kombu", "redis", "click", "rich", "asyncio", "flower", "billiard", "pydantic", "pytest")
        assert [name for name in told["loaded"] if name.split(".")[0] in heavy] == []

    def test_what_comes_late_is_not_loaded(self, told: Any) -> None:
        ours = {name for name in told["loaded"] if name.startswith("watch_tasks.")}
        assert ours == {
            f"watch_tasks.{name}"
            for name in (
                "errors",
                "message",
                "outcome",
                "packets",
                "record",
                "registry",
                "retry",
                "schema",
                "seconds",
                "sending",
                "topics",
            )
        }

    def test_it_reads_no_environment_and_opens_neither_file_nor_socket(self, told: Any) -> None:
        assert told["seen"] == []

    def test_the_watch_that_sees_nothing_would_have_seen_it(self) -> None:
        """The same program, its import replaced by what no import may do."""
        acts = "import socket; socket.socket(); open(os.devnull)\ntry: os.environ['HOME']\nexcept KeyError: pass"
        seen = json.loads(run(WATCHED.replace("import watch_tasks", acts)))["seen"]
        assert [entry.split()[0] for entry in seen] == ["socket.__new__", "open", "environment"]

    def test_a_star_import_builds_no_app(self) -> None:
        program = "from watch_tasks import *\nimport sys\nprint('celery' in sys.modules, 'app' in globals())"
        assert run(program) == "False False\n"

    def test_the_test_kit_costs_pytest_only_with_its_suites(self) -> None:
        program = "from watch_tasks.testing import ManualClock\nimport sys\nprint('pytest' in sys.modules)"
        assert run(program) == "False\n"
