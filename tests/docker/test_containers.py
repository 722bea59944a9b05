"""The promises of the nodes, in containers: our image over Redis and over RabbitMQ."""

from __future__ import annotations

from ..nodes.suite import NodeSuite


class TestContainers(NodeSuite):
    pass
