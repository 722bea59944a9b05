"""The ledger: lines of many processes in one file, and what a reader makes of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from watch_tasks.scorecard.ledger import BEGUN, ENDED, LEDGER, Ledger, note_sent, read_sent

PROGRAM = "from watch_tasks.scorecard.ledger import work; [work(number, {seconds}) for number in range({count})]"


def write(path: Path, count: int, seconds: float = 0.0) -> subprocess.Popen[bytes]:
    code = PROGRAM.format(count=count, seconds=seconds)
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, LEDGER: str(path)})


def test_lines_of_processes_that_write_at_once_stand_whole(tmp_path: Path) -> None:
    path = tmp_path / "ledger"

    writers = [write(path, 2000) for _ in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]

    ledger = Ledger(path).read()
    assert len(ledger.effects) == 4000
    assert ledger.handled == set(range(2000))


def test_work_that_takes_time_is_written_at_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "ledger"

    assert write(path, 1, 0.001).wait(60) == 0

    begun, ended = Ledger(path).read().effects
    assert (begun.kind, ended.kind) == (BEGUN, ENDED)
    assert ended.at - begun.at >= 0.001
    assert begun.group == ended.group == os.getpgrp()


def test_a_line_counts_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = Ledger(path)

    assert ledger.read().effects == []
    path.write_text("begun 1 10.0 5\nended 1 1")
    assert [effect.kind for effect in ledger.read().effects] == [BEGUN]
    path.write_text("begun 1 10.0 5\nended 1 10.5 5\n")
    assert [effect.at for effect in ledger.read().effects] == [10.0, 10.5]


def test_what_was_sent_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "sent"

    file.write_text(note_sent(range(7, 9), 1.5, 1.75) + note_sent(range(9, 10), 2.0, 2.25) + "10 3.0")

    assert read_sent(file) == {7: (1.5, 1.75), 8: (1.5, 1.75), 9: (2.0, 2.25)}
    assert read_sent(tmp_path / "none") == {}
