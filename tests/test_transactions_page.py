"""The programs of docs/transactions.md run, on both databases, and print what it shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "transactions.md").read_text()
MODULE, PROGRAM = re.findall(r"```python\n(.*?)```\n", PAGE, re.DOTALL)[:2]
OUTPUT = re.findall(r"```text\n(.*?)```\n", PAGE, re.DOTALL)[0]


@pytest.mark.integration
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_its_program_runs_and_prints_what_is_shown(
    tmp_path: Path, database: str, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite:///{tmp_path}/shop.db" if database == "sqlite" else request.getfixturevalue("postgres")
    (tmp_path / "orders.py").write_text(MODULE)
    names = f"STORAGE = {url!r}\nDATABASE = {url.replace('postgresql://', 'postgresql+psycopg://')!r}\n"

    done = subprocess.run(
        [sys.executable, "-c", names + PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (done.returncode, done.stdout) == (0, OUTPUT), done.stderr
