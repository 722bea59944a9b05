from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from watch_tasks.examples import countdown

EXPECTED = {"sent": 100, "handled": 67, "dead": 33, "calls": 199, "retries": 99}


def test_it_comes_out_as_it_must(capsys: pytest.CaptureFixture[str]) -> None:
    countdown.main([])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == EXPECTED


def test_it_runs_from_any_folder_with_nothing_configured(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "watch_tasks.examples.countdown"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith(("WATCH_", "CELERY_"))},
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == b'{"sent":100,"handled":67,"dead":33,"calls":199,"retries":99}'
