"""How many schedules the model ran stands at the end of the run."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    for report in reports:
        histories = dict(report.user_properties).get("histories") if report.when == "call" else None
        if histories is not None:
            terminalreporter.write_line(f"{report.nodeid}: {histories} histories in {report.duration:.1f} s")
