"""The command line as a whole: its entries, its help, and how little it loads."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import click
import pytest
from celery import Celery
from click.testing import CliRunner

from tests.servers import RedisServer
from watch_tasks.cli import group
from watch_tasks.cli.output import age, clean, count, listed, to_json
from watch_tasks.cli.sample import send_command
from watch_tasks.storage import open_storage
from watch_tasks.topics import Topic
from watch_tasks.worker import install

from .conftest import Order, runner


def commands(of: click.Group) -> list[click.Command]:
    found = [command for command in of.commands.values() if not isinstance(command, click.Group)]
    return found + [
        command for one in of.commands.values() if isinstance(one, click.Group) for command in commands(one)
    ]


@pytest.mark.parametrize("command", commands(group), ids=lambda command: str(command.name))
def test_every_command_has_the_common_options_and_examples(command: click.Command) -> None:
    shown = CliRunner().invoke(command, ["--help"]).output if command.name else ""

    for text in ("-A, --app", "-I, --include", "--json", "Examples:\n    watch-tasks "):
        assert text in shown.replace("echo '{\"total\": 3}' | ", "")


def test_loading_it_loads_neither_celery_nor_redis_nor_rich() -> None:
    script = "import sys, watch_tasks.cli; print({'celery', 'kombu', 'redis', 'rich'} & set(sys.modules))"

    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    "entry", [["-m", "watch_tasks"], ["-m", "celery", "-A", "watch_tasks", "watch"]], ids=["module", "celery"]
)
def test_without_a_broker_it_says_how_to_get_one(entry: list[str], tmp_path: Path) -> None:
    (tmp_path / "celeryconfig.py").touch()

    result = subprocess.run([sys.executable, *entry, "handled", "count"], cwd=tmp_path, capture_output=True, text=True)

    assert result.returncode == 69
    assert "start one with `watch-tasks up`, or name a broker in CELERY_BROKER_URL" in result.stderr
    assert "Traceback" not in result.stderr


def test_app_and_modules_of_the_current_folder_are_found(tmp_path: Path, valkey: RedisServer) -> None:
    (tmp_path / "shop.py").write_text(
        "from celery import Celery\nfrom watch_tasks.worker import install\n"
        f"app = install(Celery('shop', broker={valkey.url!r}))\n"
    )
    (tmp_path / "bills.py").write_text("from watch_tasks import topic\nbill = topic('bill')\n")

    command = [sys.executable, "-m", "watch_tasks", "topics", "-A", "shop", "-I", "bills"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[1].startswith("bill ")


@pytest.mark.parametrize("option", ["-A", "--app", "-I", "--include", "--json"])
@pytest.mark.parametrize("before", [[], ["dead"]], ids=["root", "group"])
def test_common_option_before_its_command_is_told_its_place(before: list[str], option: str) -> None:
    result = CliRunner().invoke(group, [*before, option, "list"])

    assert result.exit_code == 2
    assert f"{option} belongs behind the command" in result.stderr


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense://:secret@host", "there is no transport `nonsense`"),
        ("redis://:secret@host:99999/0", "it cannot be read"),
        ("redis://:se/cret@host:6379/0", "it cannot be read"),
    ],
)
@pytest.mark.parametrize("command", [["check"], ["topics"], ["send", "orders", "1"], ["up"]], ids=lambda args: args[0])
def test_broker_url_that_cannot_be_used_is_a_sentence(
    command: list[str], url: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "celeryconfig.py").touch()
    monkeypatch.setenv("CELERY_BROKER_URL", url)
    monkeypatch.setenv("WATCH_STORAGE_BACKEND", "memory://")

    result = subprocess.run(
        [sys.executable, "-m", "watch_tasks", *command], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )

    assert result.returncode == 1
    assert said in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert "cret" not in result.stdout + result.stderr


def test_nothing_is_sent_to_a_broker_that_ends_with_the_command() -> None:
    result = runner(install(Celery("here", broker="memory://", set_as_current=False)))("send", "orders", "1")

    assert result.exit_code == 1
    assert "would be gone with it" in result.stderr


@pytest.mark.parametrize("command", [["check"], ["handled", "count"], ["storage", "migrate"]], ids=lambda args: args[0])
def test_storage_that_cannot_keep_the_promises_is_a_sentence(
    command: list[str], app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCH_STORAGE_BACKEND", "cache+memcached://user:s3cret@localhost")

    result = runner(app)(*command)

    assert result.exit_code == 1
    assert "storage `cache+memcached` cannot keep the promises: a cache forgets" in result.output
    assert "s3cret" not in result.output


@pytest.mark.parametrize("option", [("-A", "nowhere"), ("-I", "nowhere")])
def test_module_that_is_not_there_is_a_wrong_argument(option: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "celeryconfig.py").touch()

    command = [sys.executable, "-m", "watch_tasks", "topics", *option]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert result.returncode == 2
    assert "`nowhere` cannot be loaded" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("answer", "code", "left"), [("y\n", 0, 0), ("n\n", 4, 1)])
def test_at_a_terminal_it_asks(answer: str, code: int, left: int, tmp_path: Path, valkey: RedisServer) -> None:
    from watch_tasks import Record

    (tmp_path / "celeryconfig.py").write_text(f"broker_url = {valkey.url!r}\n")
    with open_storage(valkey.url) as storage:
        storage.put(Record(topic="a", index="x", id="1"), retention=None)
        keyboard, terminal = pty.openpty()
        os.write(keyboard, answer.encode())

        command = [sys.executable, "-m", "watch_tasks", "handled", "remove", "a", "x"]
        result = subprocess.run(command, cwd=tmp_path, stdin=terminal, capture_output=True, text=True)

        assert result.returncode == code
        assert "Forget that `x` of topic `a` was handled? [y/N]" in result.stderr
        assert storage.len("a") == left
    os.close(terminal)
    os.close(keyboard)


def test_json_keeps_half_a_surrogate_pair_and_escapes_what_terminals_obey() -> None:
    assert to_json({"data": {"a": "\ud800"}}) == '{"data":{"a":"\\ud800"}}'
    assert to_json({"a": "\x1b\x9b\u202e é", "b": b"\xff"}) == '{"a":"\\u001b\\u009b\\u202e é","b":"/w=="}'


def test_texts_for_people() -> None:
    assert clean("a\x1b[1m\nb\u202e é") == "a\\x1b[1m\\nb\\u202e é"
    assert (count(1, "record"), count(0, "record")) == ("1 record", "0 records")
    assert listed([str(n) for n in range(12)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
    assert age(None) is None


def test_shown_send_command_has_the_shape_of_the_schema() -> None:
    assert send_command([Topic("orders", schema=Order)]) == "watch-tasks send orders '{\"number\": 1}'"
    assert send_command([Topic("free")]) == 'watch-tasks send free \'{"text": "hello"}\''
