"""What claiming ahead rests on: with one of its protections taken away, a test of `tests/worker` goes red."""

from __future__ import annotations

from collections.abc import Callable
from subprocess import TimeoutExpired

import pytest

from ..servers import RedisServer
from ..worker import test_gathering as tests
from ..worker.conftest import make_site
from ..worker.test_gathering import pool
from ..workers import Site

__all__ = ["make_site", "pool"]

pytestmark = [pytest.mark.chaos, pytest.mark.worker, pytest.mark.timeout(600)]

MakeSite = Callable[..., Site]

#: A protection → how the module that a worker loads takes it away.
SPOILT = {
    "not started": """
from watch_tasks.work import Work
claim = Work.claim
Work.claim = lambda self, lease, nonce, *, started=True: claim(self, lease, nonce)
""",
    "only new ones": """
from watch_tasks.worker.request import TopicRequest
TopicRequest.is_new = True
""",
    "ack after the commit": """
from watch_tasks.worker.gathering import Gathering
ended = Gathering._ended
def early(self, request, hand, answer):
    request.acknowledge()
    ended(self, request, hand, answer)
Gathering._ended = early
""",
    "release at a stop": """
from watch_tasks.storage.redis import RedisStorage
RedisStorage.release = lambda self, worker, ids, *, crashed=False: [0 for _ in ids]
""",
    "renewal": """
from watch_tasks.leases import LeaseKeeper
LeaseKeeper.hold = lambda self, id: None
LeaseKeeper.drop = lambda self, id: None
""",
}

#: What a test that goes red raises.
RED = (AssertionError, ValueError, TimeoutExpired)


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda protection: monkeypatch.setattr(tests, "JOB", SPOILT[protection] + tests.JOB)


@pytest.mark.parametrize("protection", ["not started", "only new ones"])
def test_a_killer_takes_its_neighbours_along_or_is_never_found_out(
    make_site: MakeSite, spoil: Callable[[str], None], pool: str, protection: str
) -> None:
    spoil(protection)
    with pytest.raises(RED) as red:
        tests.test_a_killer_is_found_out_and_no_crash_counts_against_its_neighbours(make_site, pool)
    print(f"without {protection}: {str(red.value)[:500]}")


def test_what_the_storage_never_recorded_is_acked(
    make_site: MakeSite, own_valkey: RedisServer, valkey: RedisServer, spoil: Callable[[str], None], pool: str
) -> None:
    spoil("ack after the commit")
    with pytest.raises(RED) as red:
        tests.test_nothing_is_acked_while_the_storage_is_away(make_site, own_valkey, valkey, pool)
    print(f"without the ack after the commit: {str(red.value)[:500]}")


def test_what_was_given_back_waits_for_a_lease(
    make_site: MakeSite, valkey: RedisServer, spoil: Callable[[str], None], pool: str
) -> None:
    spoil("release at a stop")
    with pytest.raises(RED) as red:
        tests.test_a_stop_records_what_is_handled_and_gives_back_the_rest(make_site, valkey, pool)
    print(f"without release at a stop: {str(red.value)[:500]}")


def test_what_waits_is_run_by_others(make_site: MakeSite, spoil: Callable[[str], None], pool: str) -> None:
    spoil("renewal")
    with pytest.raises(RED) as red:
        tests.test_leases_of_those_that_wait_are_renewed(make_site, pool)
    print(f"without renewal: {str(red.value)[:500]}")
