"""Kills workers by a seeded plan while messages flow, and joins what went in with what came out, by id.

Nothing is shared with the system under test: the producer writes what it sent to a file of its own, handlers append to
a ledger before anything is committed, and the workers' exits are counted from outside.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from celery import Celery

from watch_tasks import points

from ..servers import RedisServer
from ..workers import Site, Worker

QUEUE = "celery"

TOPICS = """
import select

job = topic("job", retry=RetryPolicy(max_retries=None))

@job.handler
def work(message):
    note("begin", message)
    end = time.monotonic() + message.data
    while (left := end - time.monotonic()) > 0:
        select.select([], [], [], min(left, 0.1))  # `time.sleep` fails under libfaketime
    note("end", message)
"""

#: The same work without this package, with everything on that Celery offers against losses.
STOCK = """
import json, os, time
from celery import Celery

app = Celery("stock", broker=os.environ["CELERY_BROKER_URL"])
app.conf.update(
    task_acks_late=True, task_reject_on_worker_lost=True, task_ignore_result=True, worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    broker_transport_options={
        "visibility_timeout": 5, "unacked_restore_interval": 1, "unacked_restore_throttle_limit": 1
    },
)

def note(name, id):
    line = {"handler": name, "id": id, "pid": os.getpid(), "at": time.time()}
    handle = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, (json.dumps(line) + "\\n").encode())
    os.close(handle)

@app.task(name="watch.job", bind=True)
def job(self, data, **keywords):
    note("begin", self.request.id)
    time.sleep(data)
    note("end", self.request.id)
"""

#: In one step: looked at one after the other, a message that moves meanwhile would be seen nowhere.
_LEFT = """
local found = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  local kind, count = redis.call('TYPE', key).ok, 0
  if string.sub(key, 1, 6) == 'watch:' or string.find(key, 'pidbox', 1, true) then kind = '' end
  if string.sub(key, 1, 11) == 'watch.held:' or key == 'unacked' then count = redis.call('HLEN', key) end
  if kind == 'list' then count = redis.call('LLEN', key) end
  if kind == 'zset' and string.sub(key, -5) == 'later' then count = redis.call('ZCARD', key) end
  if count > 0 then found[#found + 1] = key; found[#found + 1] = count end
end
return found
"""

#: Ways to kill from outside, at a random moment.
WAYS = ("main", "child", "group")
#: Seconds after which a worker that did not come by its point is killed all the same.
PATIENCE = 5.0


def seed_of_run() -> int:
    """Return the seed of this run: `CHAOS_SEED`, else a new one; it is printed."""
    seed = int(os.environ.get("CHAOS_SEED") or random.randrange(10**6))
    print(f"seed={seed}")
    return seed


class Place(Site):
    """A site that can start many workers without waiting for them."""

    app = "watch_tasks"

    def __init__(self, folder: Path, url: str, topics: str = TOPICS, config: str = "", **environment: str) -> None:
        super().__init__(folder, url, topics, config, **{"WATCH_MAX_CRASHES": "1000", **environment})

    def spawn(self, *options: str, pool: str = "prefork", concurrency: int = 2, **environment: str) -> Worker:
        number = len(self._workers) + 1
        log = self.folder / f"worker{number}.log"
        command = [sys.executable, "-m", "celery", "-A", self.app, "worker", "-P", pool, "-l", "INFO"]
        command += ["-c", str(concurrency), "-n", f"w{number}@test", "--without-gossip", "--without-mingle", *options]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**self.environment, **environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        worker = Worker(process, log)
        self._workers.append(worker)
        return worker

    def handled_ids(self) -> Counter[str]:
        """Return the ids that are recorded, each as often as it is."""
        return Counter(record.id for record in self.storage.range("job"))

    def sweep_up(self) -> None:
        """End what is left of workers whose main process is gone."""
        mark = f"SITE={self.folder}".encode()
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:
                continue

    def end(self) -> None:
        """End all workers; what they left can still be read."""
        for worker in self._workers:
            if worker.is_running():
                worker.kill()
        self.sweep_up()

    def close(self) -> None:
        self.end()
        super().close()


class StockPlace(Place):
    """The same without this package."""

    app = "stock_app"

    #: What its module begins with.
    prelude = ""

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder, url)
        (folder / "stock_app.py").write_text(self.prelude + STOCK)

    def handled_ids(self) -> Counter[str]:
        return Counter(dict.fromkeys({line["id"] for line in self.lines()}, 1))


class TransportPlace(StockPlace):
    """The same with our transport, and nothing else of this package."""

    prelude = "from watch_tasks.transport import install\ninstall()\n"


class Producer:
    """Sends with ids of its own and writes to its own file what it meant to send, and what was confirmed."""

    def __init__(self, place: Place, file: Path) -> None:
        self._place, self._file = place, file.open("a", buffering=1)
        self.intents: dict[str, str] = {}
        self.sent: set[str] = set()
        self._bare = Celery("producer", broker=place.url, set_as_current=False)
        self._stop = threading.Event()

    def send(self, data: float, queue: str = QUEUE, **options: Any) -> str:
        """Send one; return its id."""
        id = str(uuid4())
        index = f"i{len(self.intents)}"
        self._file.write(json.dumps({"intent": id, "index": index}) + "\n")
        self.intents[id] = index
        try:
            self._bare.send_task("watch.job", [data], {"index": index}, task_id=id, queue=queue, **options)
        except Exception as exc:
            self._file.write(json.dumps({"unknown": id, "error": repr(exc)}) + "\n")
        else:
            self._file.write(json.dumps({"ok": id}) + "\n")
            self.sent.add(id)
        return id

    @contextmanager
    def flowing(
        self,
        server: RedisServer,
        every: float,
        data: Callable[[], float],
        most: int = 150,
        options: Callable[[], dict[str, Any]] = dict,
    ) -> Iterator[None]:
        """Send steadily meanwhile, each with its own options; not while more than `most` wait."""

        def run() -> None:
            with server.client() as client:
                while not self._stop.wait(every):
                    try:
                        if int(client.llen(QUEUE)) > most:  # type: ignore[arg-type]
                            continue
                    except Exception:
                        continue  # the server is being killed
                    self.send(data(), **options())

        self._stop.clear()
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join(60)

    def close(self) -> None:
        self._bare.close()
        self._file.close()


@dataclass
class Tally:
    """What one run came to."""

    kills: Counter[str] = field(default_factory=Counter)
    intents: int = 0
    sent_ok: int = 0
    sent_unknown: int = 0
    handled: int = 0
    dead: int = 0
    waiting: int = 0
    runs: int = 0
    extra_runs: int = 0
    duplicates_skipped: int = 0
    fenced: int = 0
    lost: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @property
    def killed(self) -> int:
        return sum(self.kills.values())

    def add(self, other: Tally) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @classmethod
    def load(cls, fields: dict[str, Any]) -> Tally:
        return cls(**{**fields, "kills": Counter(fields["kills"])})

    def dump(self) -> dict[str, Any]:
        return dict(vars(self))

    def __str__(self) -> str:
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        words = " ".join(f"{name}={value}" for name, value in numbers.items())
        kills = ", ".join(f"{name} {count}" for name, count in sorted(self.kills.items()))
        return f"kills={self.killed} ({kills}) {words} lost={len(self.lost)}"


class Slot:
    """One place of a worker that is killed and replaced, again and again."""

    def __init__(self, plan: Plan, place: Place, pool: str, concurrency: int) -> None:
        self._plan, self._place, self._pool, self._concurrency = plan, place, pool, concurrency
        self._worker: Worker | None = None
        self._fate = ""
        self._due = math.inf
        self._is_killed = False
        self._points = 0

    def turn(self, tally: Tally) -> None:
        """Do what is due."""
        if self._worker is None:
            self._start()
            return
        worker = self._worker
        is_running = worker.is_running()  # before its last words are read
        text = worker.text()
        reached = text.count("watch_tasks: crash point ")
        if reached > self._points:
            tally.kills[self._fate] += reached - self._points
            self._points = reached
            self._due = min(self._due, time.monotonic() + self._plan.chance.uniform(0.0, 0.5))
        if not is_running:
            if not self._is_killed and not reached:
                tally.complaints.append(
                    f"{worker.log.name} ended by itself ({worker.process.returncode}): {text[-2000:]}"
                )
            self._worker = None
            return
        if self._due == math.inf:
            if "ready." in text:
                wait = PATIENCE if self._fate not in WAYS else self._plan.chance.uniform(0.0, 1.0)
                self._due = time.monotonic() + wait
            return
        if time.monotonic() >= self._due and not self._is_killed:
            self._kill(worker, tally)

    def _start(self) -> None:
        self._fate = self._plan.next()
        self._due, self._is_killed, self._points = math.inf, False, 0
        environment = {}
        if self._fate not in WAYS:
            point, _, main = self._fate.partition(":")
            visit = self._plan.chance.randint(1, 20)
            environment[points.VARIABLE] = f"{point}:n={visit}" + (":main" if main else "")
        self._worker = self._place.spawn(pool=self._pool, concurrency=self._concurrency, **environment)

    def _kill(self, worker: Worker, tally: Tally) -> None:
        way = self._fate if self._fate in WAYS else "group"
        children = worker.children() if self._pool == "prefork" else []
        if way == "child" and children:
            os.kill(self._plan.chance.choice(children), signal.SIGKILL)
            self._due = time.monotonic() + self._plan.chance.uniform(0.0, 1.0)
            self._fate = self._plan.chance.choice(("main", "group"))
        elif way == "main" or self._pool != "prefork":
            way = "main"
            worker.process.kill()
            self._is_killed = True
        else:
            os.killpg(worker.pid, signal.SIGKILL)
            self._is_killed = True
        tally.kills[way] += 1


class Plan:
    """Which of one slot's workers dies how: every way and every point, over and over, in an order of the seed's.

    All slots of a run go through the same order, each from its own place on, so that together they come by everything.
    """

    def __init__(self, seed: float, ways: Iterable[str], place: int, slots: int) -> None:
        self.chance = random.Random(f"{seed}:{place}")
        self._order = random.Random(seed)
        self._ways = list(ways)
        self._left: list[str] = []
        self._skip, self._slots = place, slots

    def next(self) -> str:
        for _ in range(self._skip):
            self._draw()
        self._skip = self._slots - 1
        return self._draw()

    def _draw(self) -> str:
        if not self._left:
            self._left = self._order.sample(self._ways, len(self._ways))
        return self._left.pop()


def every_way(pool: str) -> list[str]:
    """Return all ways to kill a worker of ours."""
    if pool == "prefork":
        return [*WAYS, *WAYS, *points.POINTS, *(f"{point}:main" for point in points.POINTS)]
    return ["main", "main", *points.POINTS]


def torture(
    place: Place, server: RedisServer, producer: Producer, chance: random.Random, kills: int, pool: str, **options: Any
) -> Tally:
    """Kill workers while messages flow, then let everything drain and check it.

    Args:
        place: where the workers run.
        server: their broker.
        producer: sends meanwhile.
        chance: decides.
        kills: how many, at least.
        pool: the workers' pool.
        options: `slots`: workers at a time; `ways`: how they are killed.
    """
    tally = Tally()
    concurrency = 2 if pool == "prefork" else 4
    ways, width, seed = options.get("ways") or every_way(pool), options.get("slots", 3), chance.random()
    slots = [Slot(Plan(seed, ways, number, width), place, pool, concurrency) for number in range(width)]
    work = random.Random(chance.random())
    with producer.flowing(server, 0.01, lambda: work.choice((0.0, 0.005, 0.03))):
        while tally.killed < kills and not tally.complaints:
            for slot in slots:
                slot.turn(tally)
            time.sleep(0.02)
    last = place.spawn(pool=pool, concurrency=4)
    settle(place, server, producer, tally)
    if not last.is_running():
        tally.complaints.append(f"the last worker ended by itself: {last.text()[-2000:]}")
    place.end()
    check(place, producer, tally, in_flight=concurrency)
    return tally


def settle(place: Place, server: RedisServer, producer: Producer, tally: Tally, timeout: float = 60.0) -> None:
    """Wait until nothing waits and nothing is in hand; what is left over is counted, and a complaint."""
    deadline = time.monotonic() + timeout
    with server.client() as client:
        while left := leftovers(client):
            if time.monotonic() > deadline:
                tally.waiting = sum(left.values())
                tally.complaints.append(f"not drained after {timeout:g} s: {left}")
                return
            time.sleep(0.1)
    if isinstance(place, StockPlace):
        time.sleep(1)  # what was handed out last is still being handled


def leftovers(client: Any) -> dict[str, int]:
    """Return how much lies under each key of a broker that can hold messages, all at one moment."""
    answer = client.eval(_LEFT, 0)
    return {name.decode(errors="replace"): int(count) for name, count in zip(answer[::2], answer[1::2], strict=True)}


def check(place: Place, producer: Producer, tally: Tally, in_flight: int) -> None:
    """Join by id what was sent and what became of it; what does not hold is a complaint."""
    records = place.handled_ids()
    lines = place.lines()
    begun = Counter(line["id"] for line in lines if line["handler"] == "begin")
    is_ours = not isinstance(place, StockPlace)
    dead = {letter.id for letter in place.dead()} if is_ours else set()

    tally.intents, tally.sent_ok = len(producer.intents), len(producer.sent)
    tally.sent_unknown = tally.intents - tally.sent_ok
    tally.handled, tally.dead, tally.runs = len(records), len(dead), sum(begun.values())
    tally.extra_runs = sum(begun.values()) - len(begun)
    tally.lost = sorted(producer.sent - set(records) - dead)

    def expect(holds: bool, what: str) -> None:
        if not holds:
            tally.complaints.append(what)

    expect(not tally.lost, f"lost {tally.lost[:10]}")
    phantom = set(records) - set(producer.intents)
    expect(not phantom, f"handled and never sent: {sorted(phantom)[:10]}")
    if is_ours:
        expect(set(records.values()) <= {1}, "an id has two records")
        expect(set(records) <= set(begun), "a record without a run")
        counters = place.storage.counters("job")
        tally.duplicates_skipped = counters.duplicates
        expect(counters.handled == len(records), f"{counters.handled} commits accepted for {len(records)} ids")
        for id in records:
            told = Counter(event.event for event in place.storage.explain("job", producer.intents[id]))
            tally.fenced += told["fenced"]
            expect(told["handled"] == 1, f"{id} was handled {told['handled']} times")
        bound = tally.killed * in_flight
        expect(tally.extra_runs <= bound, f"{tally.extra_runs} extra runs for {tally.killed} kills")


def percentile(values: Iterable[float], share: float) -> float:
    """Return the value that this share of all is not above."""
    ordered = sorted(values)
    return ordered[min(math.ceil(share * len(ordered)), len(ordered)) - 1]


def pass_time(seconds: float) -> None:
    """Let real time go by where that is the fault itself."""
    signal.sigtimedwait([], seconds)
