"""Sends invented events to the example topics, so that there is something to watch.

    python -m watch_tasks.examples.feed --count 60 --rate 5

The repositories and people are made up, the payloads have GitHub's shape. The same seed makes the same events with
the same indexes, so that feeding it again shows duplicates being recognised.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from watch_tasks import ConfigurationError, QueueUnavailableError, SendError, Topic

from .flaky import Job, flaky
from .github_events import TOPICS

__all__ = ["Event", "events", "main"]

#: Exit code where the settings cannot work.
USAGE: Final = 2
#: Exit code where the broker cannot be reached (`EX_UNAVAILABLE` of sysexits.h).
UNREACHABLE: Final = 69
#: Exit code after Ctrl-C, as a shell has it.
INTERRUPTED: Final = 130
#: Seconds between two tries to reach a broker that is still starting.
PAUSE: Final = 0.5

#: One event in so many is a flaky job, and so often these fail, in turn: the second one for good.
_FLAKY_EVERY: Final = 6
_FAILURES: Final = (1, 9, 2)

_PEOPLE = ("ada-kestrel", "bruno-tamarind", "chiyo-marsh", "dmitri-quill", "esi-larkspur")
_REPOSITORIES = ("lanternworks/beacon", "lanternworks/wick", "tidepool-labs/barnacle", "quietfield/almanac")
_TITLES = (
    "Beacon blinks twice at dawn",
    "Almanac skips leap seconds",
    "Document the tide tables",
    "Faster wick trimming",
)
_ZEN = ("Bright lights cast long logs.", "Count once, write once.", "A quiet queue is a happy queue.")


@dataclass(frozen=True)
class Event:
    """One thing to send, and where."""

    topic: Topic[Any]
    data: Any
    index: str


def events(count: int, seed: int) -> Iterator[Event]:
    """Yield invented events; the same for the same seed."""
    chance = random.Random(seed)
    for number in range(1, count + 1):
        if number % _FLAKY_EVERY == 0:
            name = f"job-{seed}-{number}"
            failures = _FAILURES[(number // _FLAKY_EVERY - 1) % len(_FAILURES)]
            yield Event(flaky, Job(name, failures), name)
        else:
            kind = chance.choice(("issues", "ping", "pull_request", "push", "push", "release", "star", "workflow_run"))
            delivery = str(uuid.UUID(int=chance.getrandbits(128), version=4))
            yield Event(TOPICS[kind], _payload(kind, chance), delivery)


def _payload(kind: str, chance: random.Random) -> dict[str, Any]:
    who, title, number = chance.choice(_PEOPLE), chance.choice(_TITLES), chance.randrange(1, 500)
    where = chance.choice(_REPOSITORIES)
    common: dict[str, Any] = {
        "repository": {"full_name": where, "name": where.partition("/")[2], "private": False},
        "sender": {"login": who, "type": "User"},
    }
    match kind:
        case "issues":
            action = chance.choice(("opened", "closed", "reopened"))
            return {"action": action, "issue": {"number": number, "title": title}, **common}
        case "ping":
            return {"zen": chance.choice(_ZEN), "hook_id": number, **common}
        case "pull_request":
            action = chance.choice(("opened", "synchronize", "closed"))
            pull = {"number": number, "title": title, "merged": action == "closed"}
            return {"action": action, "number": number, "pull_request": pull, **common}
        case "push":
            ids = [f"{chance.getrandbits(160):040x}" for _ in range(chance.randrange(1, 4))]
            commits = [{"id": id, "message": title, "author": {"name": who}} for id in ids]
            return {"ref": "refs/heads/main", "after": ids[-1], "commits": commits, **common}
        case "release":
            tag = f"v{number // 100}.{number % 100}"
            return {"action": "published", "release": {"tag_name": tag, "name": title}, **common}
        case "workflow_run":
            run = {"name": "tests", "run_number": number, "conclusion": chance.choice(("success", "failure"))}
            return {"action": "completed", "workflow_run": run, **common}
        case _:
            return {"action": "created", **common}


def main(arguments: Sequence[str] | None = None) -> int:
    """Send, and print one line of totals; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m watch_tasks.examples.feed", description="Send invented events.")
    parser.add_argument("--count", type=int, default=60, help="how many events (default 60)")
    parser.add_argument("--rate", type=float, default=5.0, help="events a second; 0: as fast as it goes (default 5)")
    parser.add_argument("--seed", type=int, help="makes the same events again (default: another one each time)")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for a broker that starts (default 0)")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(10_000) if options.seed is None else options.seed
    sent: Counter[str] = Counter()
    try:
        _send(events(options.count, seed), options.rate, time.monotonic() + options.wait, sent)
    except ConfigurationError as error:
        print(f"feed: {error}", file=sys.stderr)
        return USAGE
    except (QueueUnavailableError, SendError) as error:
        print(f"feed: {sent.total()} events sent, then the broker failed: {error}", file=sys.stderr)
        return UNREACHABLE
    except KeyboardInterrupt:
        return INTERRUPTED
    jobs = sent.pop(flaky.name, 0)
    print(f"fed {sent.total()} GitHub events of {len(sent)} kinds and {jobs} flaky jobs (--seed {seed} repeats them)")
    return 0


def _send(source: Iterator[Event], rate: float, patience: float, sent: Counter[str]) -> None:
    """Send at that rate; until `patience` is over, the first one waits for a broker that is not there yet."""
    began = time.monotonic()
    for event in source:
        while True:
            try:
                event.topic.send(event.data, index=event.index)
                break
            except (QueueUnavailableError, SendError):
                if sent or time.monotonic() > patience:
                    raise
                time.sleep(PAUSE)
                began = time.monotonic()
        sent[event.topic.name] += 1
        if rate > 0:
            time.sleep(max(0.0, began + sent.total() / rate - time.monotonic()))


if __name__ == "__main__":
    sys.exit(main())
