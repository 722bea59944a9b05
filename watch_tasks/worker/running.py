"""What a running `watch-tasks up` leaves in its folder, so that other commands know its topic modules."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

__all__ = ["forget_running", "running_modules", "tell_running"]

_FILE: Final = "up.json"


def tell_running(folder: Path, modules: Sequence[str]) -> None:
    """Say that this process runs these topic modules."""
    (folder / _FILE).write_text(json.dumps({"pid": os.getpid(), "modules": list(modules)}))


def forget_running(folder: Path) -> None:
    """Take back what `tell_running` said. Twice is safe."""
    (folder / _FILE).unlink(missing_ok=True)


def running_modules(folder: Path) -> tuple[str, ...]:
    """Return the topic modules of the `watch-tasks up` that runs in this folder, or none."""
    try:
        told = json.loads((folder / _FILE).read_text())
        os.kill(told["pid"], 0)
        return tuple(map(str, told["modules"]))
    except (OSError, ValueError, KeyError, TypeError):
        return ()
