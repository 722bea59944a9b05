"""What the README says is so: its programs run and print what it shows, its commands and settings exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from .servers import RedisServer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()

#: Each Python program of the README, and the output shown right below it, if any.
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:```text\n(.*?)```\n)?", README, re.DOTALL)
#: Those that begin with the name of a file are that file; the others are programs.
FILES = {name[1]: code for code, _ in BLOCKS if (name := re.match(r"# (\w+\.py)\n", code))}
PROGRAMS = [(code, output) for code, output in BLOCKS if not re.match(r"# \w+\.py\n", code)]

#: Commands that have commands below them.
GROUPS = ("handled", "dead", "storage")


@pytest.fixture
def folder(tmp_path: Path, valkey: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the README's files, where the broker it names is a real one."""
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
    monkeypatch.setenv("CELERY_BROKER_URL", valkey.url)
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.integration
@pytest.mark.parametrize(("code", "output"), PROGRAMS)
def test_each_program_runs_and_prints_what_is_shown(code: str, output: str, folder: Path) -> None:
    done = run(folder, "-c", code.replace("redis://localhost:6379/0", os.environ["CELERY_BROKER_URL"]))

    assert (done.returncode, done.stdout) == (0, output), done.stderr


@pytest.mark.integration
def test_the_first_program_defines_a_topic_with_two_handlers(folder: Path) -> None:
    done = run(folder, "-c", "import alerts; print(alerts.alarm, alerts.alarm.retry.max_retries, alerts.alarm.timeout)")

    assert done.stdout == "<Topic alarm: notify, archive> 3 10\n", done.stderr


@pytest.mark.integration
def test_its_celeryconfig_is_enough_for_the_default_app(folder: Path) -> None:
    code = "from watch_tasks import app; app.loader.import_default_modules(); print('watch.alarm' in app.tasks)"

    done = run(folder, "-c", code)

    assert done.stdout == "True\n", done.stderr


@pytest.mark.integration
def test_its_conformance_test_passes(folder: Path) -> None:
    done = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shelf.py")

    assert done.returncode == 0, done.stdout


def test_every_command_it_names_exists(tmp_path: Path) -> None:
    named = set()
    for line in re.findall(r"(?:^|`)watch-tasks ([^`\n]+)", README, re.MULTILINE):
        command, *rest = line.replace("\\|", "|").split()
        actions = rest[0].split("|") if command in GROUPS else [""]
        named |= {f"{command} {action}".strip() for action in actions}

    known = commands(tmp_path)
    for group in GROUPS:
        known |= {f"{group} {action}" for action in commands(tmp_path, group)}

    assert named <= known


def commands(folder: Path, *group: str) -> set[str]:
    """Return the commands that `--help` lists."""
    done = run(folder, "-m", "watch_tasks", *group, "--help")
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"^  ([a-z]+) ", done.stdout.partition("Commands:")[2], re.MULTILINE))


def test_every_target_it_names_is_in_the_makefile_and_every_target_is_explained() -> None:
    named = set(re.findall(r"^make ([a-z]+)", README, re.MULTILINE))
    explained = set(re.findall(r"^([a-z]+):.*## ", MAKEFILE, re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)

    assert {"up", "test"} <= named <= explained
    assert phony
    assert set(phony[1].split()) == explained


def test_every_setting_of_ours_is_in_its_table_and_no_other() -> None:
    from watch_tasks.worker import Settings

    ours = {"watch_" + field.name.removeprefix("watch_") for field in fields(Settings)}

    assert set(re.findall(r"^\| `(watch_\w+)`", README, re.MULTILINE)) == (
        ours - {"watch_broker_url", "watch_storage_url"} | {"watch_storage_backend"}
    )


def test_every_reason_for_a_dead_letter_is_in_its_table() -> None:
    from watch_tasks import Reason

    assert [reason for reason in Reason if f"`{reason}`" not in README] == []


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
