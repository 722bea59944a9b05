"""`watch-tasks scorecard`: a small real run, and that nothing of it is left, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

import psutil
import pytest
from click.testing import CliRunner

from tests.servers import RedisServer
from tests.workers import until
from watch_tasks.cli import group
from watch_tasks.errors import ConfigurationError
from watch_tasks.scorecard import contenders, stage, trial
from watch_tasks.scorecard.contenders import ALL
from watch_tasks.scorecard.figures import judge_kill
from watch_tasks.scorecard.ledger import Ledger
from watch_tasks.scorecard.trial import Score
from watch_tasks.worker import embedded

SMALL = ("--scale", "0.01", "--wait", "1")


class Run:
    """A scorecard in a folder of its own, as from a shell whose settings are somebody else's."""

    def __init__(self, folder: Path, temporary: Path, *options: str) -> None:
        self.temporary = temporary
        (folder / "celeryconfig.py").write_text("raise RuntimeError('not for a scorecard')")
        strange = {"CELERY_BROKER_URL": "redis://127.0.0.1:1/0", "WATCH_LEASE": "bad", "WATCH_DIR": str(folder / "w")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "watch_tasks", "scorecard", *options],
            cwd=folder,
            env={**os.environ, **strange, "TMPDIR": str(self.temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.said.extend(self.process.stderr)

    def until_it_says(self, text: str) -> None:
        until(lambda: any(text in line for line in self.said), text, 60, lambda: "".join(self.said))

    def end(self) -> tuple[int, str]:
        """Wait for its end, and return its code and what it printed."""
        assert self.process.stdout is not None
        output = self.process.stdout.read()
        code = self.process.wait(60)
        self._reader.join(60)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return code, output

    def leftovers(self) -> list[str]:
        """Return what is left of it: files, and processes."""
        mark = str(self.temporary)
        found = [path.name for path in self.temporary.glob("watch-scorecard-*")]
        for process in psutil.process_iter():
            try:
                if process.environ().get("TMPDIR") == mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder of a short name: pytest's own leave too little of the 107 bytes that the path of a socket may have."""
    with TemporaryDirectory(prefix="watch-test-") as folder:
        yield Path(folder)


@pytest.mark.worker
def test_a_small_run_prints_its_figures_draws_and_leaves_nothing(tmp_path: Path, temporary: Path) -> None:
    run = Run(tmp_path, temporary, *SMALL, "--only", "bulk", "--json", "--plot", "kill.svg")

    code, output = run.end()

    assert code == 0, run.said
    (line,) = map(json.loads, output.splitlines())
    assert (line["contender"], line["error"]) == ("bulk", None)
    assert line["sent_per_second"] > 0
    assert line["handled_per_second"] > 0
    assert 0 < line["latency_p50"] <= line["latency_p99"]
    assert line["sent"] >= line["in_hand"] >= 1
    assert line["duplicated"] <= line["begun_again"]
    assert len(line["timeline"]["handled"]) == len(line["timeline"]["late"])
    assert "Valkey" in line["machine"]
    assert ElementTree.parse(tmp_path / "kill.svg").getroot().tag.endswith("svg")
    assert run.leftovers() == []
    assert not (tmp_path / "w").exists()


@pytest.mark.worker
@pytest.mark.parametrize(
    ("number", "only", "code"), [(signal.SIGINT, "celery", 130), (signal.SIGKILL, "watch_tasks", -signal.SIGKILL)]
)
def test_nothing_outlives_it(number: int, only: str, code: int, tmp_path: Path, temporary: Path) -> None:
    run = Run(tmp_path, temporary, "--only", only)
    run.until_it_says("a heap of messages")
    until(lambda: any("sender" in line for line in logs(run.temporary)), "a sender runs")

    run.process.send_signal(number)

    assert run.end() == (code, "")
    until(lambda: not run.leftovers(), "nothing is left", 20, lambda: "\n".join(run.leftovers()))


def logs(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("watch-scorecard-*/*.log")]


class TestWhatIsTold:
    """Of ledgers that are written here, without a run."""

    @pytest.fixture(autouse=True)
    def _no_stage(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Stage:
            def server(self) -> str:
                return "Valkey 9"

        @contextmanager
        def open_stage(*_: Any) -> Iterator[Stage]:
            yield Stage()

        monkeypatch.setattr(stage, "open_stage", open_stage)

    @pytest.fixture
    def lossy(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each contender loses message 2, which its killed worker had in hand, and handles message 3 twice."""
        file = tmp_path / "ledger"
        file.write_text(
            "begun 1 99.0 5\nended 1 99.1 5\nbegun 2 99.9 5\nbegun 3 99.9 6\nended 3 100.1 6\nended 3 100.2 6\n"
        )
        sent = dict.fromkeys((1, 2, 3), (98.9, 99.0))
        effects = Ledger(file).read().effects

        def try_out(contender: Any, *_: Any) -> Score:
            kill = judge_kill(sent, effects, killed_at=100.0, group=5, waited=30.0, before=1.0, after=1.0)
            return Score(
                contender=contender,
                sent_per_second=2500.0,
                handled_per_second=None,
                latency_rate=100.0,
                latency_p50=0.0021,
                latency_p99=0.0099,
                kill=kill,
            )

        monkeypatch.setattr(trial, "try_out", try_out)

    def test_a_lost_message_stands_in_the_table(self, lossy: None) -> None:
        result = CliRunner().invoke(group, ["scorecard", "--only", "watch_tasks", "--only", "celery"])

        assert result.exit_code == 0, result.output
        rows = {line[:36].strip(): line[36:].split() for line in result.stdout.splitlines()}
        assert rows["not handled within 30 s of the kill"] == ["1", "1"]
        assert rows["handled more than once"] == ["1", "1"]
        assert rows["recovery from the kill"] == [">", "30", "s"] * 2
        assert rows["handled, messages a second"] == ["-", "-"]
        assert "by Celery when its visibility timeout is over, 1 h by default" in result.stdout
        assert "2 contenders in " in result.stdout

    def test_and_in_json(self, lossy: None) -> None:
        result = CliRunner().invoke(group, ["scorecard", "--only", "celery", "--json"])

        (line,) = map(json.loads, result.stdout.splitlines())
        assert (line["not_handled"], line["duplicated"], line["in_hand"], line["recovery"]) == (1, 1, 1, None)
        assert line["timeline"] == {"step": 0.5, "start": -1.0, "handled": [1, 0, 1, 0], "late": [0, 0, 1, 0]}
        assert f"{line['latency_p50']} {line['version']}" == f"0.0021 {ALL[2].version}"

    def test_one_that_cannot_be_measured_does_not_keep_the_others_from_it(
        self, lossy: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        good = trial.try_out

        def try_out(contender: Any, *rest: Any) -> Score:
            if contender.name == "celery":
                raise stage.ContenderError("the worker ended by itself. The end of its log:\n  no memory")
            return good(contender, *rest)

        monkeypatch.setattr(trial, "try_out", try_out)

        both = CliRunner().invoke(group, ["scorecard", "--only", "watch_tasks", "--only", "celery", "--json"])
        none = CliRunner().invoke(group, ["scorecard", "--only", "celery"])

        assert (both.exit_code, none.exit_code) == (5, 1)
        ours, stock = map(json.loads, both.stdout.splitlines())
        assert ours["error"] is None
        assert stock["error"].startswith("the worker ended by itself")
        assert ours.keys() == stock.keys()
        assert "Error: Celery: the worker ended by itself" in none.stderr
        assert "  no memory" in none.stderr


class TestABrokerOfTheUsers:
    """A server that no transport of another test looks after."""

    @pytest.mark.integration
    def test_is_refused_where_it_is_not_empty_and_left_as_it_is(self, own_valkey: RedisServer) -> None:
        with own_valkey.client() as client:
            client.set("theirs", 1)

        result = CliRunner().invoke(group, ["scorecard", "--broker", own_valkey.url])

        assert result.exit_code == 4
        assert "holds 1 key" in result.stderr
        with own_valkey.client() as client:
            assert client.keys() == [b"theirs"]

    @pytest.mark.integration
    def test_is_used_and_left_empty(self, own_valkey: RedisServer, tmp_path: Path) -> None:
        from watch_tasks.scorecard.signals import Signals

        with Signals() as signals, stage.open_stage(signals, own_valkey.url) as opened, own_valkey.client() as client:
            client.set("ours", 1)
            assert opened.url == own_valkey.url
            assert opened.server().startswith("Valkey ")

        with own_valkey.client() as client:
            assert client.keys() == []

    @pytest.mark.parametrize(
        ("url", "code", "said"),
        [
            ("amqp://me:secret@localhost", 2, "must be like redis://localhost:6379/9, got 'amqp://me:**@localhost'"),
            ("redis://me:secret@127.0.0.1:1/0", 69, "does not answer"),
            ("redis://localhost:port/0", 1, "must be like redis://localhost:6379/9"),
        ],
    )
    def test_that_cannot_be_used_is_told_without_its_password(self, url: str, code: int, said: str) -> None:
        result = CliRunner().invoke(group, ["scorecard", "--broker", url])

        assert result.exit_code == code, result.output
        assert said in result.stderr
        assert "secret" not in result.output


def test_a_platform_without_an_embedded_server_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def binary() -> str:
        raise ConfigurationError("there is no embedded server for this platform")

    monkeypatch.setattr(embedded, "_binary", binary)

    result = CliRunner().invoke(group, ["scorecard", "--only", "watch_tasks"])

    assert result.exit_code == 1
    assert "no embedded server for this platform" in result.stderr
    assert "--broker" in result.stderr


def test_a_drawing_that_cannot_be_written_is_told_before_anything_runs(tmp_path: Path) -> None:
    result = CliRunner().invoke(group, ["scorecard", "--plot", str(tmp_path / "nowhere" / "kill.svg")])

    assert result.exit_code == 2
    assert "cannot be written" in result.stderr


class TestDramatiq:
    def test_is_measured_where_it_is_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(contenders, "find_spec", lambda name: object())

        assert [one.name for one in ALL if one.is_installed] == ["watch_tasks", "bulk", "celery", "dramatiq"]

    def test_and_else_it_is_told_how_to_get_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(contenders, "find_spec", lambda name: None)

        result = CliRunner().invoke(group, ["scorecard", "--only", "dramatiq"])

        assert result.exit_code == 2
        assert "pip install 'dramatiq[redis]'" in result.stderr
