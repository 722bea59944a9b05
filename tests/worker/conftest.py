"""Sites for real workers; each is closed, with all it started, when its test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..servers import RedisServer
from ..workers import Site


@pytest.fixture
def make_site(tmp_path: Path, valkey: RedisServer) -> Iterator[Callable[..., Site]]:
    made: list[Site] = []

    def make(topics: str, config: str = "", url: str = valkey.url, **environment: str) -> Site:
        made.append(Site(tmp_path / f"site{len(made)}", url, topics, config, **environment))
        return made[-1]

    yield make
    for site in made:
        site.close()
