"""The same work under each library: a handler that does nothing. Each module sends and, in a worker, counts.

`BROKER` is the server, `COUNT` how many messages there are, `RESULT` the file that gets the seconds from the first to
the last.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

BROKER = os.environ.get("BROKER", "redis://127.0.0.1:6379/0")
COUNT = int(os.environ.get("COUNT", "0"))

_seen = 0
_first = 0.0


def seen() -> None:
    """Count one message; at the last, write down how long they took."""
    global _seen, _first
    _seen += 1
    if _seen == 1:
        _first = time.perf_counter()
    elif _seen == COUNT:
        Path(os.environ["RESULT"]).write_text(str(time.perf_counter() - _first))
