"""Many claims or commits as one request of a script: what they have in common is said once, the rest in columns.

The scripts `claim_first.lua` and `commit_first.lua` read it. They take the short way for what is *plain*: what most
messages are, and what concerns no other of the same request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from operator import attrgetter
from struct import Struct
from typing import Any, Final

from .protocol import Claim, Commit, Granted, Refused, Step
from .redis_records import digest_bytes, id_bytes, in_order, micros, read_answer

__all__ = ["accepted", "granted", "pack_claims", "pack_commits"]

#: The numbers of items, as they came, in the order in which they are in the request.
Places = list[int]

#: Seconds that a story is kept at least where it may be folded; the scripts fold what is handled in less than that.
_SHORTEST: Final = 86_400.0
#: Bytes of a blob that a record holds itself; see `records.lua`.
_LARGE: Final = 4096
#: Bytes of the events of a commit, and characters of what a state has before its events: lengths and places there have
#: two bytes.
_LONG: Final = 30_000
_LONG_NAME: Final = 4000
#: What copies of four bytes have room for.
_MOST_COPIES: Final = 2**31

_short: Final = Struct(">H").pack
_kinds: Final[dict[str, bytes]] = {}

_common: Final[Callable[[Claim], Any]] = attrgetter("topic", "once", "worker", "lease", "retention", "started")
_topics: Final[Callable[[Any], str]] = attrgetter("topic")
_indexes: Final[Callable[[Any], str]] = attrgetter("index")
_ids: Final[Callable[[Any], str]] = attrgetter("id")


def pack_claims(claims: Sequence[Claim]) -> tuple[Any, list[bytes]]:
    """Return the request and its opaque bytes."""
    are_apart = _are_apart(claims)
    request, blobs = [], []
    for run in _runs(claims):
        first = run[0]
        short = _short_notes(run) if are_apart else None
        notes = short or [claim.note for claim in run]
        is_one = notes.count(notes[0]) == len(notes)
        blobs.append(notes[0] if is_one else b"".join(notes))
        request.append(
            (
                short is not None,
                first.topic,
                first.once,
                first.worker,
                micros(first.lease),
                None if first.retention is None else micros(first.retention),
                first.started,
                [claim.id for claim in run],
                [claim.index for claim in run],
                _column([claim.copy for claim in run]),
                [micros(claim.sent_at) for claim in run],
                _column([claim.nonce for claim in run]),
                None if is_one else [len(note) for note in notes],
                _column([claim.digest for claim in run]) if first.once == "index" else None,
            )
        )
    return request, blobs


def granted(claims: Sequence[Claim], answer: list[Any]) -> list[Granted | Refused]:
    """Return what each claim is answered."""
    now, first, *each = answer
    now /= 1_000_000
    if first is not None:
        return [Granted(token, claim.copy, None, 0, now) for token, claim in enumerate(claims, first)]
    return [
        Granted(one, claim.copy, None, 0, now) if isinstance(one, int) else read_answer(one)
        for claim, one in zip(claims, each, strict=True)
    ]


def pack_commits(commits: Sequence[Commit]) -> tuple[Any, list[bytes], Places]:
    """Return the request, its opaque bytes, and where each commit is in it."""
    runs: dict[Any, tuple[Places, list[bytes]]] = {}
    rest: Places = []
    are_apart = _are_apart(commits)
    for number, commit in enumerate(commits):
        chunk = _chunk(commit) if are_apart else None
        if chunk is None:
            rest.append(number)
        else:
            numbers, chunks = runs.setdefault((commit.topic, commit.retention), ([], []))
            numbers.append(number)
            chunks.append(chunk)
    request, blobs, places = [], [], []
    for (topic, retention), (numbers, chunks) in runs.items():
        run = [commits[number] for number in numbers] if len(runs) > 1 or rest else commits
        indexes = [commit.index or "" for commit in run]
        request.append(
            (
                topic,
                None if retention is None else micros(retention),
                [commit.id for commit in run],
                indexes,
                [commit.token for commit in run],
                _column([commit.copy for commit in run]),
                None if sorted(indexes) == indexes else in_order(indexes),
                [len(chunk) for chunk in chunks],
            )
        )
        blobs.append(b"".join(chunks))
        places += numbers
    others = [_pack_other(commits[number], blobs) for number in rest]
    # Their records have one time: the index orders them.
    order = in_order([commits[number].index or "" for number in rest]) if rest else []
    return (request, others, order), blobs, places + rest


def accepted(count: int, places: Places, answer: Any) -> list[bool]:
    """Return whether each commit was accepted."""
    if isinstance(answer, int):
        return [True] * count
    answers = [False] * count
    for place, one in zip(places, answer, strict=True):
        answers[place] = bool(one)
    return answers


def _are_apart(items: Sequence[Any]) -> bool:
    """Whether each has an id and an index of its own."""
    if len(items) == 1:
        return True
    if len(set(map(_ids, items))) < len(items):
        return False
    return len(set(zip(map(_topics, items), map(_indexes, items), strict=True))) == len(items)


def _runs(claims: Sequence[Claim]) -> list[Sequence[Claim]]:
    """Cut into what has most in common, in the same order."""
    if len(claims) == 1 or len(set(map(_common, claims))) == 1:
        return [claims]
    return [list(run) for _, run in groupby(claims, _common)]


def _column(values: list[Any]) -> Any:
    """Return the values, or the one that they all are."""
    return values[0] if values.count(values[0]) == len(values) else values


def _short_notes(claims: Sequence[Claim]) -> list[bytes] | None:
    """Return the notes of one run without their beginnings; None: it does not fit into the short form of a state."""
    first, notes = claims[0], []
    if not _may_fold(first.retention) or len(first.worker) > _LONG_NAME:
        return None
    for claim in claims:
        note, copy = claim.note, claim.copy
        beginning = f'{{"id":"{claim.id}","copy":{copy},'.encode()
        if note.startswith(beginning):
            note = note[len(beginning) :]
        elif not note.startswith(b"{"):
            return None
        if copy > _MOST_COPIES or len(claim.nonce) > _LONG_NAME:
            return None
        notes.append(note)
    return notes


def _may_fold(retention: float | None) -> bool:
    return retention is None or retention >= _SHORTEST


def _chunk(commit: Commit) -> bytes | None:
    """Return what a record has from its id to its blob, its events folded; None: it needs more than that."""
    if (
        commit.step is not Step.HANDLED
        or commit.token is None
        or commit.index is None
        or not commit.notes
        or len(commit.blob) > _LARGE
        or commit.copy > _MOST_COPIES
        or not _may_fold(commit.retention)
    ):
        return None
    id, blob, size = commit.id, commit.blob, 0
    events: list[bytes] = []
    # Most notes begin so, and do without it; see `note_of` in `stories.lua`.
    beginning = f'{{"id":"{id}","copy":{commit.copy},'.encode()
    for name, note in commit.notes:
        if note.startswith(beginning):
            note = note[len(beginning) :]
        elif not note.startswith(b"{"):
            return None
        kind, length = _kinds.get(name) or _kind(name), len(note)
        size += len(kind) + 2 + length
        if size > _LONG:
            return None
        events += (kind, _short(length), note)
    return b"".join((id_bytes(id), digest_bytes(commit.digest), _short(size), *events, _short(len(blob)), blob))


def _kind(kind: str) -> bytes:
    """Return the kind of an event as it stands in a folded one."""
    name = kind.encode()
    _kinds[kind] = bytes((len(name),)) + name
    return _kinds[kind]


def _pack_other(commit: Commit, blobs: list[bytes]) -> Any:
    """Return one commit by itself; its opaque bytes are added to the others."""
    id, digest = id_bytes(commit.id), digest_bytes(commit.digest)
    blobs.append(id + digest + commit.blob)
    blobs += [note for _, note in commit.notes]
    return (
        commit.topic,
        commit.index,
        commit.step,
        commit.id,
        commit.copy,
        commit.token,
        None if commit.retention is None else micros(commit.retention),
        micros(commit.delay),
        [kind for kind, _ in commit.notes],
        len(id),
        len(digest),
    )
