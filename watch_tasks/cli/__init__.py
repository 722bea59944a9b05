"""The command line: `watch-tasks`, `python -m watch_tasks`, and `celery -A app watch`.

Each command is a thin shell over one call of the library. Data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import click

from .check import check
from .codes import Group
from .dead import dead
from .explain import explain
from .handled import handled
from .program import examples
from .scorecard import scorecard
from .send import send
from .storage import storage
from .topics import topics
from .up import up

__all__ = ["group", "main"]


@click.group(
    cls=Group,
    name="watch",
    commands=[up, send, topics, handled, dead, explain, storage, check, scorecard],
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "watch-tasks up alerts",
        """watch-tasks send alarm '{"host": "web-1", "level": "critical"}'""",
        "watch-tasks topics",
        "watch-tasks explain alarm web-1:critical",
    ),
)
def group() -> None:
    """Watch topics: start them, send to them, and see what became of their messages."""


def main() -> None:
    """Run the command line of this process; does not return."""
    group(prog_name="watch-tasks")
