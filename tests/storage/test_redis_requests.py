"""Commits that are packed in columns are as they are one by one."""

from __future__ import annotations

from uuid import UUID

import pytest
from msgspec.structs import replace

from watch_tasks.storage.protocol import Commit, Step
from watch_tasks.storage.redis_requests import _alike, _chunk, pack_commits


def _commit(number: int) -> Commit:
    id = str(UUID(int=number << 64 | 0xABCDEF))
    return Commit(
        step=Step.HANDLED,
        topic="orders.created",
        index=f"order-{number}",
        id=id,
        copy=0,
        token=number + 1,
        blob=b"\x90" * number,
        digest=f"{number:031x}f",
        notes=tuple(
            (kind, f'{{"id":"{id}","copy":0,"seconds":{number / 7}}}'.encode()) for kind in ("handler", "handled")
        ),
    )


_COMMITS = [_commit(number) for number in range(1, 12)]
_ODD = _COMMITS[5]
_BARE = _ODD.id.replace("-", "")


def test_those_that_are_alike_are_packed_in_columns() -> None:
    assert _alike(_COMMITS) == [_chunk(commit) for commit in _COMMITS]


@pytest.mark.parametrize(
    "odd",
    [
        replace(_ODD, id=_ODD.id.upper()),
        replace(_ODD, id=_BARE + "----"),
        replace(_ODD, id=f" {_ODD.id[1:]}"),
        replace(_ODD, id="ä\n"),
        replace(_ODD, digest=_ODD.digest.upper()),
        replace(_ODD, digest="-" * 32),
        replace(_ODD, digest=""),
        replace(_ODD, copy=1),
        replace(_ODD, blob=b"\0" * 4096),
        replace(_ODD, notes=(*_ODD.notes, _ODD.notes[0])),
        replace(_ODD, notes=(_ODD.notes[0], ("late", b"{}"))),
        replace(_ODD, notes=(_ODD.notes[0], ("handled", b"{}"))),
        replace(_ODD, notes=(_ODD.notes[0], ("handled", b'{"seconds":"' + b"9" * 2000 + b'"}'))),
    ],
)
def test_one_that_is_not_alike_changes_nothing(odd: Commit) -> None:
    commits = [odd if commit is _ODD else commit for commit in _COMMITS]

    packed = _alike(commits)

    assert packed in (None, [_chunk(commit) for commit in commits])


@pytest.mark.parametrize(
    "odd",
    [
        replace(_ODD, step=Step.RETRY),
        replace(_ODD, token=None),
        replace(_ODD, index=None),
        replace(_ODD, notes=()),
        replace(_ODD, notes=(_ODD.notes[0], ("handled", b"no object"))),
        replace(_ODD, notes=(_ODD.notes[0], ("handled", b'{"seconds":"' + b"9" * 30_000 + b'"}'))),
        replace(_ODD, blob=b"\0" * 4097),
        replace(_ODD, copy=2**32),
        replace(_ODD, retention=60.0),
    ],
)
def test_one_that_does_not_fit_goes_by_itself(odd: Commit) -> None:
    commits = [odd if commit is _ODD else commit for commit in reversed(_COMMITS)]

    (runs, others, _), blobs, places = pack_commits(commits, "watch:s:")

    assert [commits[place].index for place in places[:-1]] == sorted(
        c.index for c in _COMMITS if c is not _ODD and c.index
    )
    assert commits[places[-1]] is odd
    assert (len(runs), len(others), len(blobs)) == (1, 1, 1 + len(odd.notes))
