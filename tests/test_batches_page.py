"""The program of docs/batches.md runs, and prints what it shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "docs" / "batches.md").read_text()
MODULE, PROGRAM = re.findall(r"```python\n(.*?)```\n", PAGE, re.DOTALL)
(OUTPUT,) = re.findall(r"```text\n(.*?)```\n", PAGE, re.DOTALL)


def test_its_program_runs_and_prints_what_is_shown(tmp_path: Path) -> None:
    (tmp_path / "readings.py").write_text(MODULE)

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (done.returncode, done.stdout) == (0, OUTPUT), done.stderr
