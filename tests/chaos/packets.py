"""Packets and singles under kills: of many messages some fail and a few kill their process, while workers are killed.

Two files outside the system tell what happened, each line one write at their end: every call of a handler, and every
commit, when the storage is asked and when it accepted. Everything is joined by index.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from watch_tasks import Reason

from ..servers import RedisServer
from ..workers import Worker, until
from .harness import Place, leftovers

#: Ids are given by the senders; what is sent of number n is in its index and its data.
TOPICS = """
import celery
from watch_tasks.storage.protocol import Step
from watch_tasks.storage.redis import RedisStorage

job = topic("job", retry=RetryPolicy(max_retries=1, backoff=0.05))

handles = {}

def append(file, line):
    # Opened once in each process: a hundred thousand are written.
    place = (os.getpid(), file)
    if place not in handles:
        handles[place] = os.open(os.environ[file], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handles[place], (json.dumps(line) + "\\n").encode())

@job.handler
def work(message):
    append("LEDGER", [message.index, time.time(), message.retries, celery.current_task.name])
    time.sleep(float(os.environ["WORK"]))
    if message.data == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if message.data == "fail":
        raise ValueError("never")

commit_many = RedisStorage._commit

def commit_and_write(self, commits):
    asked = [one.index for one in commits if one.step is Step.HANDLED]
    if asked:
        append("COMMITS", [time.time(), "asked", asked])
    answers = commit_many(self, commits)
    accepted = [one.index for one, is_accepted in zip(commits, answers) if is_accepted and one.step is Step.HANDLED]
    if accepted:
        append("COMMITS", [time.time(), "accepted", accepted])
    return answers

RedisStorage._commit = commit_and_write
"""

PRODUCER = """
import json, pathlib, sys
from topics_here import job
from watch_tasks import Message
from watch_tasks.celery import app

count, kinds = int(sys.argv[1]), json.loads(pathlib.Path("kinds.json").read_text())
messages = (Message(kinds.get(str(n), "ok"), index=str(n)) for n in range(count))
if sys.argv[2] == "packed":
    print(job.send_many(messages))
else:
    print(f"sent={sum(job.send(message) is not None for message in messages)},")
"""


@dataclass
class Joined:
    """What came of all messages."""

    messages: int
    seconds: float = 0.0
    kills: int = 0
    handled: int = 0
    failed_dead: int = 0
    killers_dead: int = 0
    neighbours_dead: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    #: Commits of which it is written that they were accepted; those that were asked for, and their process was killed
    #: before it could write that.
    commits_accepted: int = 0
    commits_cut_off: int = 0
    #: What the storage counted as accepted, beyond one for each message.
    extra_commits: int = 0
    #: Calls of handlers of messages that were handled, beyond one for each.
    repeats: int = 0
    #: Those of which a call began after the commit was written.
    repeats_of_recorded: list[str] = field(default_factory=list)
    #: Retries that travelled in a packet.
    retries_in_company: int = 0
    complaints: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        told = {name: len(value) if isinstance(value, list) else value for name, value in vars(self).items()}
        return " ".join(f"{name}={value:.0f}" for name, value in told.items())


def torture_packets(
    place: Place,
    server: RedisServer,
    seed: int,
    messages: int,
    killers: int,
    *,
    work: float,
    every: tuple[float, float],
    most: int | None = None,
    timeout: float,
    packed: bool = True,
) -> Joined:
    """Send so many, in packets or one by one, while two workers handle them, of which one is killed every few seconds.

    Args:
        place: where the workers run; its topics are `TOPICS`.
        server: where its storage is, and its broker unless that is another one.
        seed: decides who fails, who kills, and when workers are killed.
        messages: how many; one in a hundred fails.
        killers: how many of them kill their process.
        work: seconds that a handler takes.
        every: seconds between two kills: from, to.
        most: kills at most; None: until nine tenths have ended.
        timeout: seconds until all must have ended.
        packed: whether they travel in packets.
    """
    chance, joined = random.Random(seed), Joined(messages)
    odd = chance.sample(range(messages), killers + messages // 100)
    kinds = {str(number): "kill" if place < killers else "fail" for place, number in enumerate(odd)}
    place.environment |= {"COMMITS": str(place.folder / "commits.jsonl"), "WORK": str(work)}
    (place.folder / "produce.py").write_text(PRODUCER)
    (place.folder / "kinds.json").write_text(json.dumps(kinds))
    began = time.monotonic()
    workers = [place.spawn() for _ in range(2)]
    command = [sys.executable, "produce.py", str(messages), "packed" if packed else "singly"]
    producer = subprocess.Popen(command, cwd=place.folder, env=place.environment, stdout=subprocess.PIPE)
    try:
        _kill_until_all_ended(place, server, workers, chance, joined, every, most, timeout)
    finally:
        told, _ = producer.communicate(timeout=60)
    if f"sent={messages}," not in told.decode():
        joined.complaints.append(f"sent: {told.decode()}")
    joined.seconds = time.monotonic() - began
    place.end()
    _join(place, kinds, joined)
    return joined


def _kill_until_all_ended(
    place: Place,
    server: RedisServer,
    workers: list[Worker],
    chance: random.Random,
    joined: Joined,
    every: tuple[float, float],
    most: int | None,
    timeout: float,
) -> None:
    deadline = time.monotonic() + timeout

    def ended() -> int:
        return place.storage.len("job") + place.storage.counters("job").dead

    with server.client() as client:
        while ended() < joined.messages or leftovers(client):
            pause = time.monotonic() + chance.uniform(*every)
            while time.monotonic() < pause and (ended() < joined.messages or leftovers(client)):
                time.sleep(0.1)
            if time.monotonic() > deadline:
                joined.complaints.append(f"{ended()} ended in time, left over: {leftovers(client)}")
                return
            if joined.kills == most or ended() > joined.messages * 0.9:
                continue  # the last ones may end in peace
            number = chance.randrange(len(workers))
            until(lambda number=number: "ready." in workers[number].text(), "it is ready", 60, workers[number].text)
            if not workers[number].is_running():
                joined.complaints.append(f"ended by itself: {workers[number].text()[-2000:]}")
                return
            os.killpg(workers[number].pid, signal.SIGKILL)
            joined.kills += 1
            workers[number] = place.spawn()
        joined.complaints += [
            f"ended by itself: {worker.text()[-2000:]}" for worker in workers if not worker.is_running()
        ]


def _join(place: Place, kinds: dict[str, str], joined: Joined) -> None:
    expect = {kind: {index for index, found in kinds.items() if found == kind} for kind in ("kill", "fail")}
    fine = {str(number) for number in range(joined.messages)} - kinds.keys()
    records = {record.index for record in place.storage.range("job")}
    letters = {letter.index: letter for letter in place.dead()}
    runs = _lines(place.ledger)
    lines = [(index, at, step) for at, step, indexes in _lines(place.folder / "commits.jsonl") for index in indexes]
    recorded_at = {index: at for index, at, step in lines if step == "accepted"}
    written = Counter(index for index, _, step in lines if step == "accepted")
    asked = {index for index, _, step in lines if step == "asked"}
    calls = Counter(line[0] for line in runs)

    joined.handled, joined.commits_accepted = len(records), written.total()
    joined.commits_cut_off = len((records & asked) - written.keys())
    joined.lost = sorted(map(str, (fine | kinds.keys()) - records - letters.keys()))
    joined.neighbours_dead = [
        f"{index}: {letter.reason} {letter.error}" for index, letter in letters.items() if index in fine
    ]
    joined.killers_dead = sum(
        index in expect["kill"] and letter.reason is Reason.KILLED_WORKER for index, letter in letters.items()
    )
    joined.failed_dead = sum(
        index in expect["fail"] and letter.reason is Reason.EXHAUSTED and letter.retries == 1
        for index, letter in letters.items()
    )
    joined.extra_commits = place.storage.counters("job").handled - len(records)
    joined.repeats = sum(calls[index] - 1 for index in records)
    joined.repeats_of_recorded = [index for index, at, *_ in runs if at > recorded_at.get(index, float("inf"))]
    joined.retries_in_company = sum(retries > 0 and task != "watch.job" for _, _, retries, task in runs)

    twice = {index for index, count in written.items() if count > 1}
    again = [index for index in records if calls[index] > 1]
    for index in again:
        told = Counter(event.event for event in place.storage.explain("job", index))
        if told["handled"] != 1:
            twice.add(index)
    checks = {
        f"lost {joined.lost[:10]}": not joined.lost,
        f"neighbours are dead {joined.neighbours_dead[:10]}": not joined.neighbours_dead,
        f"handled though they fail or kill {sorted(records & kinds.keys())[:10]}": records <= fine,
        f"recorded twice {sorted(twice)[:10]}": not twice and not joined.extra_commits,
        f"recorded and never run {sorted(records - calls.keys())[:10]}": records <= calls.keys(),
        f"committed and not recorded {sorted(written.keys() - records)[:10]}": written.keys() <= records,
        "accepted commits are one for each": joined.commits_accepted + joined.commits_cut_off == joined.handled,
        f"run after they were recorded {joined.repeats_of_recorded[:10]}": not joined.repeats_of_recorded,
        "retries in packets": not joined.retries_in_company,
        "killers are dead, and only by that": joined.killers_dead == len(expect["kill"]),
        "failed ones are dead after their retry": joined.failed_dead == len(expect["fail"]),
        "each killer was run three times, or once more": all(calls[index] >= 3 for index in expect["kill"]),
    }
    joined.complaints += [what for what, holds in checks.items() if not holds]


def _lines(file: Path) -> list[list]:  # type: ignore[type-arg]
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
