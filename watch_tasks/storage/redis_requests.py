"""Many claims or commits as one request of a script: what they have in common is said once, the rest in columns.

Work on a whole column, in one call of what is written in C, is several times cheaper than the same for each item.
The scripts `claim_first.lua` and `commit_first.lua` read it. They take the short way for what is *plain*: what most
messages are, and what concerns no other of the same request.
"""

from __future__ import annotations

from binascii import unhexlify
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, groupby, repeat
from math import floor
from operator import attrgetter
from struct import Struct
from typing import Any, Final

import msgspec

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
#: Commits that are packed faster one by one.
_FEW: Final = 4
#: What copies of four bytes have room for.
_MOST_COPIES: Final = 2**31

#: Lengths as two bytes: most are short.
_short: Final = Struct(">H").pack
_shorts: Final = tuple(map(_short, range(1024)))
#: What the scripts read of MessagePack is of before it had a type for bytes: they are given as texts of it.
_TEXT, _LONG_TEXT, _LIST = b"\xda", b"\xdb", b"\xdc"
_long: Final = Struct(">I").pack
_kinds: Final[dict[str, bytes]] = {}

_common: Final[Callable[[Claim], Any]] = attrgetter("topic", "once", "worker", "lease", "retention", "started")


def pack_claims(claims: Sequence[Claim]) -> Any:
    """Return the request."""
    are_apart = _are_apart(claims)
    request = []
    for run in _runs(claims):
        first = run[0]
        ids = [claim.id for claim in run]
        copies = [claim.copy for claim in run]
        nonces = _column([claim.nonce for claim in run])
        notes = [claim.note for claim in run]
        short = _short_notes(first, ids, copies, nonces, notes) if are_apart else None
        request.append(
            (
                short is not None,
                first.topic,
                first.once,
                first.worker,
                micros(first.lease),
                None if first.retention is None else micros(first.retention),
                first.started,
                ids,
                [claim.index for claim in run],
                _column(copies),
                [floor(claim.sent_at * 1_000_000 + 0.5) for claim in run],
                nonces,
                _texts(short or notes),
                _column([claim.digest for claim in run]) if first.once == "index" else None,
            )
        )
    return request


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


def pack_commits(commits: Sequence[Commit], prefix: str) -> tuple[Any, list[bytes], Places]:
    """Return the request, its opaque bytes, and where each commit is in it; `prefix` is that of the keys of states."""
    plain = _plain(commits) if _are_apart(commits) else []
    chunks = dict(zip(plain, _chunks([commits[number] for number in plain]), strict=True))
    request: list[Any] = []
    places: Places = []
    for numbers in _commit_runs(commits, [number for number in plain if chunks[number] is not None]):
        indexes = [commits[number].index or "" for number in numbers]
        numbers = [numbers[place - 1] for place in in_order(indexes)]
        run = [commits[number] for number in numbers]
        retention = run[0].retention
        request.append(
            (
                run[0].topic,
                None if retention is None else micros(retention),
                [prefix + commit.id for commit in run],
                [commit.index for commit in run],
                [commit.token for commit in run],
                _column([commit.copy for commit in run]),
                _list([chunks[number] or b"" for number in numbers]),
            )
        )
        places += numbers
    rest = [] if len(places) == len(commits) else sorted(set(range(len(commits))).difference(places))
    blobs: list[bytes] = []
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
    if len({item.id for item in items}) < len(items):
        return False
    if _are_one([item.topic for item in items]):
        return len({item.index for item in items}) == len(items)
    return len({(item.topic, item.index) for item in items}) == len(items)


def _runs(claims: Sequence[Claim]) -> list[Sequence[Claim]]:
    """Cut into what has most in common, in the same order."""
    if _are_one(list(map(_common, claims))):
        return [claims]
    return [list(run) for _, run in groupby(claims, _common)]


def _are_one(values: list[Any]) -> bool:
    return values.count(values[0]) == len(values)


def _column(values: list[Any]) -> Any:
    """Return the values, or the one that they all are."""
    return values[0] if _are_one(values) else values


def _list(packed: Sequence[bytes]) -> msgspec.Raw:
    """Return a list of what is MessagePack already."""
    return msgspec.Raw(b"".join((_LIST, _short(len(packed)), *packed)))


def _texts(values: list[bytes]) -> msgspec.Raw:
    """Return the values, or the one that they all are, as MessagePack."""
    return msgspec.Raw(_text(values[0])) if _are_one(values) else _list(list(map(_text, values)))


def _text(value: bytes) -> bytes:
    size = len(value)
    return (_TEXT + _short(size) if size < 65536 else _LONG_TEXT + _long(size)) + value


def _short_notes(first: Claim, ids: list[str], copies: list[int], nonces: Any, notes: list[bytes]) -> Any:
    """Return the notes of one run without their beginnings; None: it does not fit into the short form of a state."""
    if (
        not _may_fold(first.retention)
        or len(first.worker) > _LONG_NAME
        or max(copies) > _MOST_COPIES
        or (len(nonces) > _LONG_NAME if isinstance(nonces, str) else max(map(len, nonces)) > _LONG_NAME)
    ):
        return None
    return _endings(notes, _beginnings(ids, copies))


def _beginnings(ids: list[str], copies: list[int]) -> list[bytes]:
    if len(ids) > 1 and _are_one(copies):
        # Encoded all at once; an id that has the separator in it makes more of them.
        between = f'","copy":{copies[0]},'
        text = '{"id":"' + f'{between}\n{{"id":"'.join(ids) + between
        beginnings = text.encode().split(b"\n")
        if len(beginnings) == len(ids):
            return beginnings
    return list(map(_beginning, ids, copies))


def _beginning(id: str, copy: int) -> bytes:
    """Return what most notes begin with, and are kept without; see `note_of` in `stories.lua`."""
    return f'{{"id":"{id}","copy":{copy},'.encode()


def _endings(notes: list[bytes], beginnings: list[bytes]) -> list[bytes] | None:
    """Return notes without these beginnings; None: one is no object."""
    endings = list(map(bytes.removeprefix, notes, beginnings))
    if sum(map(len, endings)) + sum(map(len, beginnings)) > sum(map(len, notes)):
        for note, ending in zip(notes, endings, strict=True):
            if len(ending) == len(note) and not note.startswith(b"{"):
                return None
    return endings


def _may_fold(retention: float | None) -> bool:
    return retention is None or retention >= _SHORTEST


def _plain(commits: Sequence[Commit]) -> Places:
    """Return which of them may have a folded record, as far as can be seen at once."""
    return [
        number
        for number, commit in enumerate(commits)
        if commit.step is Step.HANDLED
        and commit.token is not None
        and commit.index is not None
        and commit.notes
        and len(commit.blob) <= _LARGE
        and commit.copy <= _MOST_COPIES
        and (commit.retention is None or commit.retention >= _SHORTEST)
    ]


def _commit_runs(commits: Sequence[Commit], numbers: Places) -> Iterable[Places]:
    """Cut into what has one topic and retention."""
    kinds = [(commits[number].topic, commits[number].retention) for number in numbers]
    if not kinds or _are_one(kinds):
        return [numbers] if kinds else []
    runs: dict[Any, Places] = {}
    for number, kind in zip(numbers, kinds, strict=True):
        runs.setdefault(kind, []).append(number)
    return runs.values()


def _chunks(commits: Sequence[Commit]) -> Sequence[bytes | None]:
    """Return what each record has from its id to its blob, events folded, as MessagePack; None: it needs more."""
    return (len(commits) > _FEW and _alike(commits)) or [_chunk(commit) for commit in commits]


def _alike(commits: Sequence[Commit]) -> list[bytes] | None:
    """Return the chunks of many by columns, which is much less than one by one; None: they are not alike."""
    notes, blobs = [commit.notes for commit in commits], [commit.blob for commit in commits]
    ids, copies = [commit.id for commit in commits], [commit.copy for commit in commits]
    if not _are_one([len(events) for events in notes]):
        return None
    heads = _heads(ids, [commit.digest for commit in commits])
    if heads is None:
        return None
    columns: list[Iterable[bytes]] = []
    lengths: list[list[int]] = []
    beginnings, fixed = _beginnings(ids, copies), 0
    for events in zip(*notes, strict=True):
        kind = events[0][0]
        endings = _endings([note for _, note in events], beginnings)
        if endings is None or not _are_one([kind for kind, _ in events]):
            return None
        lengths.append([len(note) for note in endings])
        columns += (repeat(_kinds.get(kind) or _kind(kind)), _lengths(lengths[-1]), endings)
        fixed += len(_kinds[kind]) + 2
    sizes = [len(blob) for blob in blobs]
    totals = [fixed + size for size in map(sum, zip(*lengths, strict=True))]
    if max(totals) > _LONG:
        return None
    texts = [len(heads[0]) + 4 + total + size for total, size in zip(totals, sizes, strict=True)]
    # Without `strict`: what all have is repeated for ever.
    parts = zip(repeat(_TEXT), _lengths(texts), heads, _lengths(totals), *columns, _lengths(sizes), blobs)
    return list(map(b"".join, parts))


def _heads(ids: list[str], digests: list[str]) -> list[bytes] | None:
    """Return `id_bytes` and `digest_bytes` of each, as one; None: some are not of the usual forms."""
    if {len(id) for id in ids} != {36} or {len(digest) for digest in digests} != {32}:
        return None
    text = "00" + "00".join(chain.from_iterable(zip(ids, digests, strict=True)))
    if not text[10::72] == text[15::72] == text[20::72] == text[25::72] == "-" * len(ids):
        return None
    try:
        digits = text.encode().translate(None, b"-")
        raw = unhexlify(digits)
    except ValueError:
        return None
    if len(raw) != 34 * len(ids) or not digits.islower():
        return None
    return [raw[place : place + 34] for place in range(0, len(raw), 34)]


def _lengths(sizes: list[int]) -> list[bytes]:
    """Return sizes as they stand in chunks."""
    return [_shorts[size] if size < 1024 else _short(size) for size in sizes]


def _chunk(commit: Commit) -> bytes | None:
    size = 0
    events: list[bytes] = []
    beginning = _beginning(commit.id, commit.copy)
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
    id, digest, blob = id_bytes(commit.id), digest_bytes(commit.digest), commit.blob
    return _text(b"".join((id, digest, _short(size), *events, _short(len(blob)), blob)))


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
