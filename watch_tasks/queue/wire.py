"""A message in the wire form of Celery (its message protocol, version 2), and back.

Any Celery client can send one: task `watch.<topic>`, one argument with the data, and the optional keywords `index`,
`max_retries` and `once`. What we add travels in a header of our own, `watch`, which others may leave out.
Source of the protocol: Celery's documentation, "Message Protocol".
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any, Final, TypeGuard

import msgspec

from ..errors import MessageError, TopicError
from ..message import Message
from ..topics import check_topic

__all__ = [
    "HEADER",
    "PREFIX",
    "arguments",
    "aware",
    "bytes_id",
    "check_headers",
    "headers",
    "is_id",
    "read",
    "reprs",
    "task_name",
    "topic_of",
]

#: What the names of our tasks begin with.
PREFIX: Final = "watch."
#: The name of our own header.
HEADER: Final = "watch"

_VERSION: Final = 1
_KEYWORDS: Final = ("index", "max_retries", "once")
#: Characters an id may have: it names keys in storages and stands in logs.
_MAX_ID: Final = 255


class _Header(msgspec.Struct, frozen=True, omit_defaults=True):
    """Our own header. What Celery's own headers say of retries is shown to people, but not trusted."""

    version: int = _VERSION
    copy: int = 0
    index: str = ""
    #: RFC 3339.
    sent_at: datetime | None = None
    retries: int = 0
    handled: tuple[str, ...] = ()


_Text = str | None
_Plain = str | int | float | None


class _CeleryHeaders(msgspec.Struct):
    """The headers that Celery itself works with, in main processes, where most of its errors end the worker."""

    retries: int | None = None
    timelimit: tuple[float | None, float | None] | None = None
    eta: _Text = None
    expires: str | float | None = None
    stamped_headers: list[str] | None = None
    stamps: dict[str, _Plain | list[_Plain]] | None = None
    group: _Text = None
    group_index: int | None = None
    root_id: _Text = None
    parent_id: _Text = None
    shadow: _Text = None
    origin: _Text = None
    argsrepr: _Text = None
    kwargsrepr: _Text = None
    ignore_result: bool | None = None
    replaced_task_nesting: int | None = None
    lang: _Text = None


def check_headers(fields: dict[str, Any]) -> None:
    """Find out whether Celery can work with the headers of a task message.

    Raises:
        MessageError: one of them is of another kind than its protocol says.
    """
    try:
        msgspec.convert(fields, _CeleryHeaders)
    except msgspec.ValidationError as exc:
        raise MessageError(f"a header of Celery's does not fit: {exc}"[:500]) from exc


def task_name(topic: str) -> str:
    """Return the name of a topic's Celery task."""
    return PREFIX + topic


def topic_of(task: object) -> str | None:
    """Return the topic of a Celery task's name, or None where it is not one of ours."""
    return task[len(PREFIX) :] if isinstance(task, str) and task.startswith(PREFIX) else None


def arguments(message: Message[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return the positional and keyword arguments of the message's task."""
    keywords: dict[str, Any] = {"index": message.index}
    if message.max_retries is not None:
        keywords["max_retries"] = message.max_retries
    if message.once is not None:
        keywords["once"] = message.once
    return [message.data], keywords


def headers(message: Message[Any]) -> dict[str, Any]:
    """Return our own header, under its name."""
    header = _Header(
        copy=message.copy,
        index=message.index,
        sent_at=message.sent_at,
        retries=message.retries,
        handled=message.handled,
    )
    return {HEADER: {"version": _VERSION, **msgspec.to_builtins(header)}}


def reprs(message: Message[Any]) -> dict[str, str]:
    """Return what Flower and logs show of the arguments: the index, and nothing of the data.

    Flower parses `kwargsrepr` as a Python literal of at most 1,024 characters; `kwargs:index=…` finds it there.
    """
    return {"argsrepr": "()", "kwargsrepr": repr({"index": message.index})}


def read(fields: dict[str, Any], args: Any, keywords: Any) -> Message[Any]:
    """Return the message that a task's headers and arguments stand for, its data in plain form.

    An index that nobody named is the id.

    Raises:
        MessageError: they are no message; the text says what was expected and what came.
    """
    id = fields.get("id")
    if not is_id(id):
        raise MessageError(f"the header `id` must be 1 to {_MAX_ID} printable characters, got {id!r}"[:500])
    topic = topic_of(fields.get("task"))
    if topic is None:
        came = f"{fields.get('task')!r}"[:200]
        raise MessageError(f"the header `task` must be `{PREFIX}<topic>`, got {came}: another program's task")
    try:
        check_topic(topic)
    except TopicError as exc:
        raise MessageError(f"the header `task` must be `{PREFIX}<topic>`: {exc}"[:500]) from exc
    if not isinstance(args, (list, tuple)) or len(args) != 1:
        came = f"{len(args)}" if isinstance(args, (list, tuple)) else repr(type(args).__name__)
        raise MessageError(f"expected one positional argument, the data, got {came}")
    if not isinstance(keywords, dict) or not keywords.keys() <= set(_KEYWORDS):
        came = ", ".join(map(repr, keywords)) if isinstance(keywords, dict) else repr(type(keywords).__name__)
        raise MessageError(f"expected no keywords but {', '.join(_KEYWORDS)}, got {came}"[:500])
    try:
        header = msgspec.convert(fields.get(HEADER) or {}, _Header)
    except msgspec.ValidationError as exc:
        raise MessageError(f"the header `{HEADER}` does not fit: {exc}") from exc
    if header.version > _VERSION:
        raise MessageError(f"the header `{HEADER}` is of version {header.version}, this worker knows {_VERSION}")
    index = keywords.get("index")
    if index is None:
        index = header.index
    elif index == "":
        raise MessageError("an index must be 1 to 512 printable characters, got ''")
    return Message(
        args[0],
        topic,
        # The id stands for "nobody named it"; the pipeline asks the data and the topic then.
        index=index or id,
        id=id,
        retries=header.retries,
        max_retries=keywords.get("max_retries"),
        once=keywords.get("once"),
        handled=header.handled,
        sent_at=aware(header.sent_at) or datetime.now(UTC),
        copy=header.copy,
    )


def is_id(id: object) -> TypeGuard[str]:
    """Whether it can be the id of a message."""
    return isinstance(id, str) and 0 < len(id) <= _MAX_ID and id.isprintable()


def bytes_id(raw: bytes) -> str:
    """Return the id of something that brought none: a hash of its bytes, so that it is buried once."""
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def aware(time: datetime | None) -> datetime | None:
    """Return a time that names no zone as UTC, which is what Celery's own times mean."""
    return time.replace(tzinfo=UTC) if time and time.tzinfo is None else time
