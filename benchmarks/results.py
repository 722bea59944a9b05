"""What was found, as a JSON file: every figure of every round, with the machine and the versions it was found on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import redis

#: Distributions whose versions the report tells.
LIBRARIES = ("celery", "kombu", "redis", "dramatiq", "taskiq", "taskiq-redis", "huey", "rq", "msgspec")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measurement: its figures, or why there are none."""

    scenario: str
    contender: str
    pool: str
    round: int
    count: int
    figures: dict[str, float] = field(default_factory=dict)
    error: str | None = None


@dataclass(kw_only=True)
class Results:
    """All measurements of a run."""

    machine: dict[str, Any]
    versions: dict[str, str]
    begun: str
    rounds: int
    seconds: float
    #: Messages a second at which latency was measured.
    latency_rate: float | None = None
    #: Minutes that it all took.
    minutes: float | None = None
    found: list[Result] = field(default_factory=list)

    def of(self, scenario: str) -> Iterator[Result]:
        return (one for one in self.found if one.scenario == scenario)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def read_results(path: Path) -> Results:
    told = json.loads(path.read_text())
    return Results(**{**told, "found": [Result(**one) for one in told["found"]]})


def begin(url: str, rounds: int, seconds: float) -> Results:
    """Return results without any, on this machine and this server."""
    with redis.Redis.from_url(url) as client:
        info = client.info("server")
    server = f"{info.get('server_name', 'redis')} {info.get('valkey_version') or info['redis_version']}"
    return Results(
        machine={
            "processor": _processor(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 2),
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            "server": server,
        },
        versions={name: version(name) for name in LIBRARIES},
        begun=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        rounds=rounds,
        seconds=seconds,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
