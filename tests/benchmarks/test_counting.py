"""What is handled is counted exactly, whatever processes and threads it is handled in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.counting import Handled, Tally, rate

ROOT = Path(__file__).parents[2]

#: Counts 0 to 2999 in four threads of a process, and 3000 to 3999 in its child.
PROGRAM = """
import os, threading
from benchmarks.counting import seen

threads = [threading.Thread(target=lambda n=n: [seen(n * 750 + m) for m in range(750)]) for n in range(4)]
[one.start() for one in threads]
[one.join() for one in threads]
if not os.fork():
    [seen(n) for n in range(3000, 4000)]
    os._exit(0)
os.wait()
"""


def test_every_message_of_all_threads_and_processes_is_counted_once(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env={**os.environ, "RESULT": str(tmp_path)}, check=True, timeout=60
    )

    tally = Tally(tmp_path)

    assert tally.update() == tally.update() == 4000
    assert tally.distinct() == 4000
    assert len({one.process for one in tally.handled}) == 2


def test_a_rate_is_of_the_time_in_which_every_process_was_at_work() -> None:
    alone = [Handled(1, n, n / 10) for n in range(100)]  # 10/s from 0 to 9.9
    joined = [Handled(2, 100 + n, 5.05 + n / 10) for n in range(49)]  # and 10/s from 5.05 to 9.85

    found, part = rate([*alone, *joined])

    assert found == pytest.approx(20, rel=0.01)
    assert part == pytest.approx(98 / 149, rel=0.02)


def test_a_rate_of_one_process_is_of_all_but_its_first_message() -> None:
    assert rate([Handled(1, n, 3 + n / 4) for n in range(9)]) == (pytest.approx(4), 8 / 9)


def test_too_few_messages_have_no_rate() -> None:
    with pytest.raises(ValueError, match="too few"):
        rate([Handled(1, 0, 1.0)])
