"""Many claims or commits as one request of a script: what they have in common is said once, the rest in columns.

The scripts `claim_first.lua` and `commit_first.lua` read it. They take the short way for what is *plain*: what most
messages are, and what concerns no other of the same request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
#: What lengths of two bytes have room for, with some to spare.
_LONG: Final = 30_000
#: What copies of four bytes have room for.
_MOST_COPIES: Final = 2**31

_short: Final = Struct(">H").pack
_kinds: Final[dict[str, bytes]] = {}

_common: Final[Callable[[Claim], Any]] = attrgetter("topic", "once", "worker", "lease", "retention", "started")
_topics: Final[Callable[[Any], str]] = attrgetter("topic")
_indexes: Final[Callable[[Any], str]] = attrgetter("index")
_ids: Final[Callable[[Any], str]] = attrgetter("id")


def pack_claims(claims: Sequence[Claim]) -> tuple[Any, list[bytes], Places]:
    """Return the request, its opaque bytes, and where each claim is in it."""
    are_apart = _are_apart(claims)
    request, blobs, places = [], [], []
    for numbers, run in _runs(claims, _common):
        first = run[0]
        notes = [claim.note for claim in run]
        is_plain = are_apart and _are_short(run)
        if is_plain:
            notes = [_shorten(claim.note, claim.id, claim.copy) for claim in run]
        if notes.count(notes[0]) == len(notes):
            sizes: Any = None
            blobs.append(notes[0])
        else:
            sizes = [len(note) for note in notes]
            blobs.append(b"".join(notes))
        request.append(
            (
                is_plain,
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
                sizes,
                None if is_plain else _column([claim.digest for claim in run]),
            )
        )
        places += numbers
    return request, blobs, places


def granted(claims: Sequence[Claim], places: Places, answer: list[Any]) -> list[Granted | Refused]:
    """Return what each claim is answered."""
    now, first, *each = answer
    now /= 1_000_000
    if first is not None:
        each = range(first, first + len(claims))  # type: ignore[assignment]
    answers: list[Any] = [None] * len(claims)
    for place, one in zip(places, each, strict=True):
        answers[place] = (
            Granted(one, claims[place].copy, None, 0, now) if isinstance(one, int) else read_answer(one)
        )
    return answers


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


def _runs(claims: Sequence[Claim], common: Callable[[Claim], Any]) -> list[tuple[Places, Sequence[Claim]]]:
    """Cut into what has these things in common, without changing the order."""
    if len(claims) == 1 or len(set(map(common, claims))) == 1:
        return [(list(range(len(claims))), claims)]
    runs: list[tuple[Places, list[Claim]]] = []
    last = None
    for number, claim in enumerate(claims):
        key = common(claim)
        if key != last:
            runs.append(([], []))
            last = key
        runs[-1][0].append(number)
        runs[-1][1].append(claim)
    return list(runs)


def _column(values: list[Any]) -> Any:
    """Return the values, or the one that they all are."""
    return values[0] if values.count(values[0]) == len(values) else values


def _shorten(note: bytes, id: str, copy: int) -> bytes:
    """Return an event's details without the id and the copy, where they begin with these; see `note_of` in Lua."""
    beginning = b'{"id":"%b","copy":%d,' % (id.encode(), copy)
    return note[len(beginning) :] if note.startswith(beginning) else note


def _are_short(claims: Sequence[Claim]) -> bool:
    """Whether these claims of one run fit into the short form of a state."""
    first = claims[0]
    return (
        first.once == "message"
        and _may_fold(first.retention)
        and len(first.worker) < _LONG
        and all(
            len(claim.nonce) < _LONG and claim.copy < _MOST_COPIES and claim.note.startswith(b"{") for claim in claims
        )
    )


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
        or commit.copy >= _MOST_COPIES
        or not _may_fold(commit.retention)
    ):
        return None
    id, events = commit.id, []
    beginning = b'{"id":"%b","copy":%d,' % (id.encode(), commit.copy)
    for kind, note in commit.notes:
        if note.startswith(beginning):
            note = note[len(beginning) :]
        elif not note.startswith(b"{"):
            return None
        if len(note) > _LONG:
            return None
        events += (_kind(kind), _short(len(note)), note)
    packed = b"".join(events)
    if len(packed) > _LONG:
        return None
    blob = commit.blob
    return b"".join((id_bytes(id), digest_bytes(commit.digest), _short(len(packed)), packed, _short(len(blob)), blob))


def _kind(kind: str) -> bytes:
    """Return the kind of an event as it stands in a folded one."""
    found = _kinds.get(kind)
    if found is None:
        name = kind.encode()
        found = _kinds[kind] = bytes((len(name),)) + name
    return found


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
