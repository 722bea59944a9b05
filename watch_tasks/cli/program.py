"""What every command works with: the app, its settings, its storage and its topics, each opened at its first use.

Celery is imported here only inside functions: `celery` itself loads this package at every start.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import click

from ..errors import ConfigurationError, QueueUnavailableError, TopicError, WatchTasksError, did_you_mean
from ..registry import registry
from ..topics import Topic, check_topic
from .codes import REFUSED, USAGE, CommandError
from .output import listed, note

if TYPE_CHECKING:
    from celery import Celery

    from ..storage import Storage
    from ..worker import Settings
    from ..worker.outlet import CeleryOutlet

__all__ = ["SINCE", "TOPIC", "Program", "confirm", "examples", "with_program"]

#: The app that commands work on where nobody names one.
DEFAULT_APP: Final = "watch_tasks"

_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


class Program:
    """The program that a command looks into or sends through.

    Args:
        app: a Celery app, or where it is found, as for `celery -A`.
        include: modules of topics to load besides those that the app names.
        as_json: whether to print JSON lines.
    """

    def __init__(self, app: Celery | str = DEFAULT_APP, include: tuple[str, ...] = (), as_json: bool = False) -> None:
        self._app = app
        self.include = include
        self.as_json = as_json
        self._is_loaded = False
        #: Topics that no module defines, by name: each is warned of once.
        self._undefined: dict[str, Topic[Any]] = {}

    @cached_property
    def app(self) -> Celery:
        """The Celery app, with its configuration read."""
        from celery.app.utils import find_app

        _make_current_folder_importable()
        app = _imported(f"the app `{self._app}`", lambda: find_app(self._app))
        _imported(f"the configuration of `{self._app}`", lambda: app.conf.broker_url)
        return app

    @property
    def name(self) -> str:
        """Where the app is found, as for `celery -A`."""
        return self._app if isinstance(self._app, str) else f"{self._app.main}"

    @property
    def settings(self) -> Settings:
        """Our settings under the app."""
        from ..worker import settings_of

        return settings_of(self.app)

    @cached_property
    def storage(self) -> Storage:
        """The storage of the app."""
        from ..worker import storage_of

        self.require_server()
        return storage_of(self.app)

    def load_topics(self) -> list[Topic[Any]]:
        """Import the modules of topics and return all topics there are.

        They are those of `-I`, those that the configuration names, and those of the `watch-tasks up` that runs in
        `WATCH_DIR`, so that what it handles can be sent.
        """
        if not self._is_loaded:
            from ..worker.running import running_modules
            from ..worker.settings import watch_dir

            app = self.app
            for name in self.include:
                _imported(f"the module `{name}`", functools.partial(import_module, name))
            _imported("a module that the configuration names", app.loader.import_default_modules)
            for name in running_modules(watch_dir(app.conf)):
                try:
                    _imported(f"the module `{name}` of the running `up`", functools.partial(import_module, name))
                except CommandError as exc:  # it runs in another folder, perhaps: no reason to stop here
                    note(f"Warning: {exc.format_message()}")
            self._is_loaded = True
        return sorted(registry, key=lambda topic: topic.name)

    def topic(self, name: str) -> Topic[Any]:
        """Return a loaded topic, or one of plain JSON that sends through the app, and say so on stderr."""
        known = [topic.name for topic in self.load_topics()]
        topic = registry.get(name) or self._undefined.get(name)
        if topic is None:
            loaded = f"loaded: {listed(known)}" if known else "none is loaded, name a module with -I"
            near = did_you_mean(name, known)
            note(f"Warning: no loaded module defines topic `{name}`: its data is sent unchecked{near} ({loaded})")
            topic = self._undefined[name] = Topic(name)
        return topic

    def bind(self, topic: Topic[Any]) -> None:
        """Let a topic send through the app, where nobody bound it to anything yet.

        Raises:
            ConfigurationError: the broker's URL cannot be used, or not by two processes.
            QueueUnavailableError: no broker is configured, and no embedded server answers.
        """
        from ..worker import outlet_of

        self._require_broker()
        if not topic.is_bound:
            topic.bind(outlet_of(self.app))

    @cached_property
    def outlet(self) -> CeleryOutlet:
        """What sends through the app.

        Raises:
            ConfigurationError: the broker's URL cannot be used, or not by two processes.
            QueueUnavailableError: no broker is configured, and no embedded server answers.
        """
        from ..worker.runtime import runtime_of

        self._require_broker()
        return runtime_of(self.app).outlet

    def _require_broker(self) -> None:
        self.require_broker_url()
        if str(self.app.conf.broker_url).partition("://")[0] == "memory":
            raise ConfigurationError(
                "the broker memory:// lives in one process: what this command sends would be gone with it; "
                "name another in `broker_url`, such as redis://localhost:6379/0"
            )
        self.require_server()

    def require_server(self) -> None:
        """Make sure that, where no broker is configured, the embedded server answers.

        Raises:
            QueueUnavailableError: it does not.
        """
        folder = self.embedded_folder
        if folder is None:
            return
        from ..worker.embedded import url_of

        if url_of(folder) is None:
            raise QueueUnavailableError(
                f"no broker is configured, and no server answers in {folder}: start one with `watch-tasks up`, "
                "or name a broker in CELERY_BROKER_URL"
            )

    def require_broker_url(self) -> None:
        """Make sure that the broker's URL can be used. Nothing is connected to.

        Raises:
            ConfigurationError: it cannot.
        """
        from ..worker.settings import check_broker_url

        check_broker_url(self.app)

    @property
    def embedded_folder(self) -> str | None:
        """The folder of the embedded server, where that is the broker; else None."""
        from ..worker.embedded import expected_url
        from ..worker.settings import watch_dir

        folder = watch_dir(self.app.conf)
        return str(folder) if self.app.conf.broker_url == expected_url(folder) else None


def with_program(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of every command, and as its first argument the `Program` they name."""

    @click.option("-A", "--app", metavar="APP", help=f"The Celery app, as for `celery -A`. Default: {DEFAULT_APP}.")
    @click.option(
        "-I", "--include", multiple=True, metavar="MODULE", help="A module of topics to load. May be repeated."
    )
    @click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")
    @functools.wraps(function)
    def command(app: str | None, include: tuple[str, ...], as_json: bool, **values: Any) -> Any:
        # Under `celery -A app watch …` the root's object is Celery's own, and has the app.
        given = getattr(click.get_current_context().find_root().obj, "app", None)
        modules = tuple(name for names in include for name in names.split(",") if name)
        return function(Program(app or given or DEFAULT_APP, modules, as_json), **values)

    return command


def examples(*lines: str) -> str:
    """Return an epilogue for a command's help: lines that can be pasted."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def confirm(question: str, *, yes: bool, done: str = "removed") -> None:
    """Ask before something is thrown away, or done to many.

    Args:
        question: what.
        yes: whether it was answered beforehand.
        done: what happens to nothing where the answer is no.

    Raises:
        CommandError: the answer is no, or there is no terminal to ask at and `--yes` was not given.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise CommandError(f"{question} Add --yes: there is no terminal to ask at. Nothing was {done}.", REFUSED)
    if not click.confirm(question, err=True):
        raise CommandError(f"nothing was {done}", REFUSED)


class _TopicType(click.ParamType[str]):
    name = "topic"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return check_topic(value)
        except TopicError as exc:
            self.fail(str(exc), param, ctx)


class _SinceType(click.ParamType[datetime]):
    name = "since"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        try:
            duration = _DURATION.fullmatch(value)
            if duration:
                return datetime.now(UTC) - timedelta(seconds=float(duration[1]) * _SECONDS[duration[2]])
            time = datetime.fromisoformat(value)
        except (ValueError, OverflowError):
            self.fail(
                f"expected a time such as 2026-01-31T12:00:00Z or a duration such as 15m, 2h, 7d, got {value!r}",
                param,
                ctx,
            )
        return time if time.tzinfo else time.replace(tzinfo=UTC)


#: The name of a topic.
TOPIC: Final = _TopicType()
#: A moment: RFC 3339 (UTC where it names no zone), or how long ago.
SINCE: Final = _SinceType()


def _imported(what: str, load: Callable[[], Any]) -> Any:
    """Call what imports code of the user's, whose errors are shown without a traceback."""
    try:
        return load()
    except (WatchTasksError, click.ClickException):
        raise
    except Exception as exc:
        cause = exc.__cause__ if isinstance(exc.__cause__, ConfigurationError) else exc
        raise CommandError(f"{what} cannot be loaded: {type(cause).__name__}: {cause}", USAGE) from exc


def _make_current_folder_importable() -> None:
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
