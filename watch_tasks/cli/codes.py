"""Exit codes, and the errors of the library as those codes. The one place where either is decided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import click

from ..errors import (
    ConfigurationError,
    MessageError,
    NotFoundError,
    QueueFullError,
    QueueUnavailableError,
    SendError,
    StorageUnavailableError,
    WatchTasksError,
)
from .output import clean

__all__ = [
    "DONE",
    "FAILED",
    "INTERRUPTED",
    "NOT_FOUND",
    "PARTLY",
    "REFUSED",
    "UNREACHABLE",
    "USAGE",
    "Command",
    "CommandError",
    "Group",
]

DONE: Final = 0
FAILED: Final = 1
#: Wrong arguments; click's own number.
USAGE: Final = 2
#: No such index or id.
NOT_FOUND: Final = 3
#: The shape does not fit, the queue is full, or nobody could be asked.
REFUSED: Final = 4
#: Some of many were done.
PARTLY: Final = 5
#: The broker or the storage does not answer. Source: EX_UNAVAILABLE of BSD's sysexits.h.
UNREACHABLE: Final = 69
#: By Ctrl-C. Source: 128 + SIGINT, as shells count.
INTERRUPTED: Final = 130

#: The first class that fits decides. A lost answer and an unreachable broker are one case to a caller.
_CODES: Final[tuple[tuple[type[WatchTasksError], int], ...]] = (
    (StorageUnavailableError, UNREACHABLE),
    (QueueUnavailableError, UNREACHABLE),
    (QueueFullError, REFUSED),
    (SendError, UNREACHABLE),
    (MessageError, REFUSED),
    (NotFoundError, NOT_FOUND),
    (ConfigurationError, FAILED),
)


class CommandError(click.ClickException):
    """A command that ends with a sentence on stderr and a code of its own."""

    def __init__(self, text: str, code: int = FAILED) -> None:
        super().__init__(text)
        self.exit_code = code  # type: ignore[misc]  # click reads it from the instance

    def show(self, file: Any = None) -> None:
        lines = "\n".join(clean(line) for line in self.format_message().splitlines())
        click.echo(f"Error: {lines}", file=file, err=True)


class Command(click.Command):
    """A command whose library errors end in their codes, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        return _translate(lambda: super(Command, self).invoke(ctx))


class Group(click.Group):
    """A group of such commands."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as exc:
            if exc.option_name not in ("-A", "--app", "-I", "--include", "--json"):
                raise
            # `celery` takes them before the command, so people try it here as well.
            raise click.UsageError(f"{exc.option_name} belongs behind the command", ctx) from exc


def _translate(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except KeyboardInterrupt:
        raise CommandError("interrupted", INTERRUPTED) from None
    except WatchTasksError as exc:
        code = next((code for kind, code in _CODES if isinstance(exc, kind)), FAILED)
        raise CommandError(str(exc), code) from exc
