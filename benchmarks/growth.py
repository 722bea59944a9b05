"""What a storage costs as it grows: time of a claim and a commit, bytes of a record, time of the questions about many.

    python -m benchmarks.growth --storage valkey --small 10000 --full 10000000 --rounds 10
    python -m benchmarks.growth --storage postgresql --copied 100000
    python -m benchmarks.growth --storage sqlite --full 1000000 --ending 0

`valkey`, `redis`, `postgresql` and `sqlite` are a server or a file of its own. A small and a full storage are filled by
`restore`; rounds of claims and commits alternate between the two, so that what else the machine does falls on both. At
the end a million records end at once while messages flow, and a worker's `LeaseKeeper` tends the storage as it always
does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice
from multiprocessing.synchronize import Event
from pathlib import Path
from uuid import UUID

from tests.servers import RedisServer, find_redis
from watch_tasks.leases import LeaseKeeper
from watch_tasks.record import Record
from watch_tasks.storage import open_storage
from watch_tasks.storage.base import Storage
from watch_tasks.storage.protocol import Claim, Commit, Granted, Step
from watch_tasks.storage.stored import encode_record
from watch_tasks.topics import WEEK

WORKER = "celery@web-1"
RETENTION = timedelta(seconds=WEEK)
#: Claims and commits of one round, one by one and in hundreds.
SINGLES, HUNDREDS = 200, 10
#: Messages a second while records end, and of these those whose claim is measured.
FLOW, PROBED = 1000, 100
#: Records with a story that are written in a second, at least, before they end.
FILLED = 3500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", default="valkey", help="valkey, redis, postgresql, sqlite, or a storage's URL")
    parser.add_argument("--small", type=int, default=10_000)
    parser.add_argument("--full", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--copied", type=int, default=0, help="PostgreSQL: restore so many, and have the server copy them to --full"
    )
    parser.add_argument("--walked", type=int, help="records that the walk by `range` reads; default: all")
    parser.add_argument("--ending", type=int, default=1_000_000, help="records that end while messages flow; 0: none")
    parser.add_argument("--window", type=float, default=60.0, help="seconds for which claims are measured meanwhile")
    chosen = parser.parse_args()
    with served(chosen.storage) as url:
        for name, figure in measure(url, chosen):
            print(f"| {name} | {figure} |", flush=True)


def measure(url: str, chosen: argparse.Namespace) -> Iterator[tuple[str, str]]:
    small, full = open_storage(part_of(url, "small")), open_storage(part_of(url, "full"))
    fill(small, "orders", chosen.small)
    rate, slope = fill_and_weigh(full, url, chosen.copied or chosen.full)
    if chosen.copied:
        slope = copy(part_of(url, "full"), chosen.copied, chosen.full)
    yield "records", f"{chosen.full:,}"
    yield "restored", f"{rate:,.0f}/s"
    yield "bytes a record", "unknown" if slope is None else f"{slope:.0f}"
    yield from compare(small, full, chosen.rounds)
    yield "`len`", f"{median_ms(lambda: full.len('orders')):.2f} ms"
    yield "first page of `range`", f"{median_ms(lambda: list(islice(full.range('orders'), 200))):.1f} ms"
    oldest = median_ms(lambda: list(islice(full.range("orders", newest_first=False), 200)))
    yield "the same, oldest first", f"{oldest:.1f} ms"
    yield from walk(full, chosen.walked)
    if chosen.ending:
        yield from end_many(part_of(url, "ending"), chosen.ending, chosen.window)


# -- the storage


@contextmanager
def served(storage: str) -> Iterator[str]:
    match storage:
        case "valkey" | "redis":
            # The file is not rewritten meanwhile: that is a fork, which costs the same with any storage.
            config = {"auto-aof-rewrite-percentage": "0"}
            binary = find_redis() if storage == "redis" else None
            server = RedisServer(Path(tempfile.mkdtemp()), binary, **config).start()
            try:
                yield server.url
            finally:
                server.stop()
        case "postgresql":
            from tests.postgres import PostgresHome, find_postgres

            home = PostgresHome(find_postgres())
            try:
                yield home.server(shared_buffers="1GB", max_wal_size="8GB").start().create_database("growth")
            finally:
                home.close()
        case "sqlite":
            with tempfile.TemporaryDirectory() as folder:
                yield f"sqlite:///{folder}/growth.db"
        case _:
            yield storage


def part_of(url: str, name: str) -> str:
    """Return the URL of one of several storages at the same place."""
    if url.startswith(("redis", "unix")):
        return f"{url}{'&' if '?' in url else '?'}prefix={name}:"
    if url.startswith("sqlite"):
        return f"{url}.{name}"
    return f"{url}{'&' if '?' in url else '?'}prefix={name}_"


def weigh(url: str) -> float | None:
    """Return the bytes that everything at this place takes, where there is a way to know."""
    if url.startswith(("redis", "unix")):
        import redis

        with redis.Redis.from_url(url.partition("?")[0]) as client:
            return float(client.info("memory")["used_memory"])
    if url.startswith("sqlite"):
        folder = Path(url.partition("://")[2]).parent
        return float(sum(path.stat().st_size for path in folder.iterdir()))
    if url.startswith("postgresql"):
        import psycopg

        with psycopg.connect(url.partition("?")[0]) as connection:
            row = connection.execute("SELECT pg_database_size(current_database())").fetchone()
            return float(row[0]) if row else None
    return None


def records(topic: str, count: int, first: float, step: float) -> Iterator[Record]:
    """Yield records as workers write them, without data; indexes have 24 characters."""
    chance = random.Random(1)
    for number in range(count):
        at = datetime.fromtimestamp(first + number * step, UTC)
        yield Record(
            topic=topic,
            index=f"order-{number:018d}",
            id=str(UUID(int=chance.getrandbits(128), version=4)),
            max_retries=3,
            sent_at=at - timedelta(milliseconds=40),
            handled_at=at,
            expires_at=at + RETENTION,
            seconds=0.0123,
            worker=WORKER,
            digest=f"{chance.getrandbits(128):032x}",
        )


def fill(storage: Storage, topic: str, count: int) -> None:
    """Keep records of the last five days, which last for two more."""
    days = 5 * 86400.0
    storage.restore(records(topic, count, time.time() - days, days / count))


def fill_and_weigh(storage: Storage, url: str, count: int) -> tuple[float, float | None]:
    """Return records a second, and bytes a record from the first million on (of fewer, from the first tenth)."""
    begun, days, weights = time.monotonic(), 5 * 86400.0, []
    start = min(1_000_000, count // 10)
    source = records("orders", count, time.time() - days, days / count)
    for number in (start, count - start):
        left = islice(source, number)
        while page := list(islice(left, 100_000)):
            storage.restore(page)
            print(f"{page[-1].index} after {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        weights.append(weigh(url))
    before, after = weights
    slope = None if before is None or after is None else (after - before) / (count - start)
    return count / (time.monotonic() - begun), slope


def copy(url: str, count: int, full: int) -> float:
    """Have PostgreSQL copy the records that there are until there are `full`; return the bytes a record it took."""
    import psycopg
    from psycopg import sql

    prefix = url.rpartition("prefix=")[2]
    names = {name: sql.Identifier(f"{prefix}{name}") for name in ("records", "counters")}
    more, before = full // count - 1, weigh(url)
    with psycopg.connect(url.partition("?")[0], autocommit=True) as connection:
        copied = sql.SQL(
            "INSERT INTO {records} SELECT topic, "
            "'order-' || lpad((substr(index, 7)::bigint + copy * {count})::text, 18, '0'), "
            "at + copy, expires + copy, first_token - copy * {count}, token - copy * {count}, "
            "gen_random_uuid()::text, digest, blob FROM {records}, generate_series(1, {more}) AS copy"
        )
        connection.execute(copied.format(count=sql.Literal(count), more=sql.Literal(more), **names))
        counted = sql.SQL(
            "UPDATE {counters} SET records = records + {extra} WHERE slot = (SELECT min(slot) FROM {counters})"
        )
        connection.execute(counted.format(extra=sql.Literal(count * more), **names))
        connection.execute("VACUUM ANALYZE")
    after = weigh(url)
    assert before is not None
    assert after is not None
    return (after - before) / (count * more)


# -- claims and commits


def messages(count: int) -> list[Claim]:
    made = []
    for _ in range(count):
        id = str(UUID(int=random.getrandbits(128), version=4))
        note = json.dumps({"id": id, "copy": 0, "worker": WORKER}).encode()
        made.append(
            Claim(
                topic="orders",
                index=f"order-{id[:18]}",
                id=id,
                copy=0,
                once="message",
                worker=WORKER,
                lease=6.0,
                digest=f"{random.getrandbits(128):032x}",
                retention=WEEK,
                sent_at=time.time(),
                nonce=id[:8],
                note=note,
            )
        )
    return made


def handled(claim: Claim, granted: object) -> Commit:
    assert isinstance(granted, Granted)
    blob = encode_record(Record(topic="", index="", id="", max_retries=3, seconds=0.0123, worker=WORKER))
    return Commit(
        step=Step.HANDLED,
        topic=claim.topic,
        index=claim.index,
        id=claim.id,
        copy=granted.copy,
        token=granted.token,
        blob=blob,
        digest=claim.digest,
        retention=WEEK,
        notes=(("handled", claim.note),),
    )


def singles(storage: Storage) -> float:
    """Return µs of a claim and a commit, one after the other."""
    claims = messages(SINGLES)
    start = time.perf_counter()
    for claim in claims:
        assert storage.commit(handled(claim, storage.claim(claim)))
    return (time.perf_counter() - start) / SINGLES * 1e6


def hundreds(storage: Storage) -> float:
    """Return µs of a message among a hundred that are claimed, and then committed, together."""
    batches = [messages(100) for _ in range(HUNDREDS)]
    start = time.perf_counter()
    for claims in batches:
        storage.commit_many([handled(*pair) for pair in zip(claims, storage.claim_many(claims), strict=True)])
    return (time.perf_counter() - start) / HUNDREDS / 100 * 1e6


def compare(small: Storage, full: Storage, rounds: int) -> Iterator[tuple[str, str]]:
    for name, work in (("claim + commit, one by one", singles), ("claim + commit, of 100", hundreds)):
        found: dict[int, list[float]] = {0: [], 1: []}
        work(small), work(full)
        for _ in range(rounds):
            for which, storage in enumerate((small, full)):
                found[which].append(work(storage))
        low, high = (statistics.median(times) for times in found.values())
        yield name, f"{low:.0f} µs small, {high:.0f} µs full: {high / low:.2f}"


# -- questions about many


def median_ms(ask: Callable[[], object]) -> float:
    times = []
    for _ in range(11):
        start = time.perf_counter()
        ask()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def resident() -> float:
    """Return MB of this process's memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def walk(storage: Storage, most_records: int | None) -> Iterator[tuple[str, str]]:
    start, count, least, most = time.monotonic(), 0, float("inf"), 0.0
    for count, _ in enumerate(islice(storage.range("orders"), most_records), 1):
        if count % 50_000 == 0:
            least, most = min(least, resident()), max(most, resident())
    yield "a walk by `range`", f"{count:,} records at {count / (time.monotonic() - start):,.0f}/s"
    yield "memory meanwhile", f"{least:.1f} to {most:.1f} MB" if most else "not measured: too few records"


# -- many that end at once


def flow(url: str, stop: Event) -> None:
    """Let messages flow from another process, twenty at a time, until stopped."""
    with open_storage(url) as storage:
        due = time.monotonic()
        while not stop.is_set():
            claims = messages(20)
            storage.commit_many([handled(*pair) for pair in zip(claims, storage.claim_many(claims), strict=True)])
            due += 20 / (FLOW - PROBED)
            time.sleep(max(0.0, due - time.monotonic()))


def probe(storage: Storage, seconds: float) -> list[float]:
    """Return the ms of each claim."""
    times, due = [], time.monotonic()
    end = due + seconds
    while due < end:
        claim = messages(1)[0]
        start = time.perf_counter()
        granted = storage.claim(claim)
        times.append((time.perf_counter() - start) * 1e3)
        storage.commit(handled(claim, granted))
        due += 1 / PROBED
        time.sleep(max(0.0, due - time.monotonic()))
    return times


def told(record: Record, end: float) -> Commit:
    """Return what adds a story of two events to a record."""
    note = json.dumps({"id": record.id, "copy": 0, "worker": WORKER}).encode()
    return Commit(
        step=Step.RETRY,
        topic=record.topic,
        index=record.index,
        id=record.id,
        copy=0,
        token=None,
        retention=end - time.time(),
        notes=(("attempt", note), ("handled", note)),
    )


def end_many(url: str, count: int, window: float) -> Iterator[tuple[str, str]]:
    with open_storage(url) as storage:
        # Filled, then measured in quiet, then they end within a second, and so do their stories.
        end = time.time() + count / FILLED + window + 10
        source = records("orders", count, end - WEEK, 1 / count)
        for page in iter(lambda: list(islice(source, 200)), []):
            storage.restore(page)
            storage.commit_many([told(record, end) for record in page])
        stop = multiprocessing.Event()
        sender = multiprocessing.Process(target=flow, args=(url, stop), daemon=True)
        keeper = LeaseKeeper(storage, WORKER, lease=6.0, every=2.0)
        sender.start()
        keeper.start()
        try:
            probe(storage, 3.0)
            if time.time() + window > end:
                print("filling took too long: some end while it is quiet", file=sys.stderr)
            quiet = probe(storage, window)
            time.sleep(max(0.0, end - time.time()))
            before = weigh(url)
            ending = probe(storage, window)
            after = weigh(url)
        finally:
            stop.set()
            sender.join()
            keeper.stop()
        for name, times in (("quiet", quiet), (f"while {count:,} end", ending)):
            parts = statistics.quantiles(times, n=100)
            yield f"claims of {FLOW:,} messages/s, {name}", f"p50 {parts[49]:.2f} ms, p99 {parts[98]:.2f} ms"
        ratio = statistics.quantiles(ending, n=100)[98] / statistics.quantiles(quiet, n=100)[98]
        yield "p99 ÷ p99", f"{ratio:.2f}"
        if before is not None and after is not None:
            yield "memory freed meanwhile", f"{(before - after) / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
