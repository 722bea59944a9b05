"""The same index sent again and again, by several at once, under `once="index"` (F9).

CHAOS_F9 says how many indexes; CHAOS_SEED repeats a run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from uuid import uuid4

import pytest
from celery import Celery

from watch_tasks import Reason

from ..servers import RedisServer
from ..workers import until
from .harness import Place, leftovers, seed_of_run

pytestmark = [pytest.mark.chaos, pytest.mark.worker, pytest.mark.timeout(3600)]

PRODUCERS = 8

TOPICS = """
job = topic("job", once="index")

@job.handler
def work(message):
    note("begin", message, data=message.data)
    time.sleep(message.data["seconds"])
    note("end", message, data=message.data)
"""


def test_the_same_index_is_handled_once(tmp_path: Path, own_valkey: RedisServer) -> None:
    seed = seed_of_run()
    chance = random.Random(seed)
    count = int(os.environ.get("CHAOS_F9", "1000"))
    place = Place(tmp_path / "site", own_valkey.url, TOPICS)
    #: Index → the data that is sent under it; more than one kind where somebody numbers orders wrongly.
    variants = {f"i{n}": [0] if n % 10 else [0, 1] for n in range(count)}
    plan = [(index, kind) for index, kinds in variants.items() for kind in kinds for _ in range(chance.randint(2, 6))]
    plan += [("i1", 0)] * 1000
    chance.shuffle(plan)
    sent: dict[str, tuple[str, int]] = {}
    lock = threading.Lock()

    def produce(share: list[tuple[str, int]], pace: random.Random) -> None:
        with (
            Celery("producer", broker=place.url, set_as_current=False) as app,
            (tmp_path / "sent.jsonl").open("a", buffering=1) as file,
        ):
            for index, kind in share:
                id = str(uuid4())
                data = {"kind": kind, "seconds": 0.002}
                app.send_task("watch.job", [data], {"index": index}, task_id=id, ignore_result=True)
                file.write(json.dumps({"ok": id, "index": index, "kind": kind}) + "\n")
                with lock:
                    sent[id] = index, kind
                if pace.random() < 0.02:
                    time.sleep(0.05)

    shares = [plan[start::PRODUCERS] for start in range(PRODUCERS)]
    threads = [
        threading.Thread(target=produce, args=(share, random.Random(f"{seed}:{number}")))
        for number, share in enumerate(shares)
    ]
    kills = 0
    try:
        workers = [place.spawn(concurrency=2), place.spawn(pool="threads", concurrency=4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(chance.uniform(2, 4))
            worker = chance.choice(workers)
            if "ready." in worker.text():
                os.killpg(worker.pid, signal.SIGKILL)
                worker.process.wait(20)
                workers.remove(worker)
                workers.append(place.spawn(pool=chance.choice(("prefork", "threads"))))
                kills += 1
        # Once more, when all has been handled.
        with own_valkey.client() as client:
            until(lambda: not leftovers(client), "all has ended", 300, place.report)
            produce(chance.sample(plan, min(len(plan), 500)), chance)
            until(lambda: not leftovers(client), "all has ended again", 60, place.report)
        exits = [worker.process.returncode for worker in workers if not worker.is_running()]
        records = {record.index: record.id for record in place.storage.range("job")}
        dead = {letter.id: letter for letter in place.dead()}
        lines = place.lines()
        twice = [
            index
            for index in records
            if sum(event.event == "handled" for event in place.storage.explain("job", index)) > 1
        ]
    finally:
        place.close()

    ended = Counter(line["index"] for line in lines if line["handler"] == "end")
    extra = sum(ended.values()) - len(ended)
    by_index: dict[str, Counter[int]] = defaultdict(Counter)
    for index, kind in sent.values():
        by_index[index][kind] += 1
    kept = {index: sent[id][1] for index, id in records.items()}
    wrong = {id for id, (index, kind) in sent.items() if kept.get(index) != kind}
    print(
        f"F9 seed={seed} indexes={count} sent={len(sent)} producers={PRODUCERS} kills={kills} handled={len(records)} "
        f"effects twice={extra} conflicts sent={len(wrong)} flagged={len(dead)}"
    )
    assert exits == []
    assert set(records) == set(variants)
    assert twice == []
    assert extra <= kills * 4
    assert set(dead) == wrong
    assert {letter.reason for letter in dead.values()} <= {Reason.INDEX_CONFLICT}
