"""A worker's heartbeat: a file that its main loop touches, and the health check that looks at the file's age.

A worker can be there and do nothing, with its loop blocked: only a file that goes stale shows that. The check runs
every few seconds in every container, so this module stands apart from `worker`, which loads Celery.

    python -m watch_tasks.heartbeat --max-age 30
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

__all__ = ["EVERY", "VARIABLE", "beat", "main"]

#: Environment variable that names the file. Unset: no heartbeat, since most workers have nobody who looks at it.
VARIABLE: Final = "WATCH_HEARTBEAT"

#: Seconds between two beats. Long handlers do not delay them in the pools prefork and threads.
EVERY: Final = 2.0


def beat() -> None:
    """Touch the file, where the environment names one.

    Raises:
        OSError: it cannot be written.
    """
    if name := os.environ.get(VARIABLE):
        Path(name).touch()


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if the last beat is recent enough, else say why not and return 1."""
    parser = argparse.ArgumentParser(
        prog="python -m watch_tasks.heartbeat", description="Tell whether the worker here makes progress."
    )
    parser.add_argument("--max-age", type=float, default=30.0, help="seconds since the last beat (default 30)")
    parser.add_argument("--file", default=os.environ.get(VARIABLE), help=f"the worker's file (default ${VARIABLE})")
    options = parser.parse_args(arguments)
    if not options.file:
        parser.error(f"no file: set {VARIABLE} for the worker and for this check, or give --file")
    complaint = _complaint(Path(options.file), options.max_age)
    if complaint:
        sys.stderr.write(f"{complaint}\n")
    return 1 if complaint else 0


def _complaint(file: Path, max_age: float) -> str | None:
    try:
        age = time.time() - file.stat().st_mtime
    except OSError as exc:
        return f"no heartbeat: {exc}"
    return f"the last heartbeat is {age:.0f} s old, more than {max_age:g} s" if age > max_age else None


if __name__ == "__main__":
    sys.exit(main())
