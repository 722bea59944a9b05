"""Random schedules against the storages: what is promised holds, whatever fails when."""

from __future__ import annotations

import os
from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from .machine import StorageMachine

#: Schedules that are run (a long run says more of them), and actions in each.
SHORT, STEPS = int(os.environ.get("MODEL_HISTORIES", "300")), 50


def explore(machine: type[StorageMachine], histories: int) -> int:
    """Run at least that many schedules; return how many were run."""
    machine.histories = 0
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=histories,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return machine.histories


def test_memory_storage_keeps_its_promises(record_property: Callable[[str, object], None]) -> None:
    ran = explore(StorageMachine, SHORT)

    record_property("histories", ran)
    assert ran >= SHORT
