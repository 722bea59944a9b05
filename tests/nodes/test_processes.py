"""The promises of the nodes, with processes in the place of containers."""

from __future__ import annotations

import pytest

from .suite import NodeSuite


@pytest.mark.worker
class TestProcesses(NodeSuite):
    pass
