"""Schemas: the shape of a topic's data, and its plain form on the wire.

msgspec does the work for dataclasses, TypedDict, attrs classes and its own Struct; pydantic models bring their own
(extra `pydantic`). Whatever has `encode` and `decode` is a schema as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final, Generic, Protocol, TypeVar, cast, runtime_checkable

import msgspec

from .errors import SchemaError

__all__ = ["PlainSchema", "Schema", "dump", "dump_directly", "load", "schema_of"]

T = TypeVar("T")


def _plain_model(data: Any) -> Any:
    """Return the plain form of what msgspec does not know: a pydantic model."""
    if hasattr(data, "model_dump"):
        return data.model_dump(mode="json")
    raise TypeError(f"{data!r} ({type(data).__name__}) has none")


def _builtins(data: Any, hook: Callable[[Any], Any] | None = None) -> Any:
    """Return plain values, and those of a set in one order wherever it is: else equal data had another digest."""
    try:
        return msgspec.to_builtins(data, str_keys=True, enc_hook=hook, order="deterministic")
    except TypeError:  # a set of what has no order, or what has no plain form
        return msgspec.to_builtins(data, str_keys=True, enc_hook=hook)


_encoder = msgspec.json.Encoder(order="deterministic", enc_hook=_plain_model)
#: Writes the fields of objects in the order in which the other writes the keys of their plain form.
_sorting = msgspec.json.Encoder(order="sorted")

#: The types whose values JSON has a form for as they are; what derives from them may be anything.
_FLAT: Final = frozenset({str, int, float, bool, type(None)})


@runtime_checkable
class Schema(Protocol[T]):
    """Turns data into plain JSON values and back.

    Both raise whatever they like where a shape does not fit: it is reported with the topic's name, and the
    message is refused at `send` and becomes a dead letter at a worker.
    """

    def encode(self, data: T) -> Any:
        """Return plain JSON values: dict, list, str, int, float, bool, None."""

    def decode(self, plain: Any) -> T:
        """Return the data again, checked."""


class PlainSchema:
    """No schema: any JSON values, as they are. Dataclasses and the like are sent as JSON objects."""

    def encode(self, data: Any) -> Any:
        return _builtins(data, _plain_model)

    def decode(self, plain: Any) -> Any:
        return plain


class _TypeSchema(Generic[T]):
    def __init__(self, type_: type[T]) -> None:
        self.type = type_
        # A TypedDict cannot be asked about, and a generic alias neither; a builtin says yes too soon: `True` is an
        # int. Convert checks those.
        own = isinstance(type_, type) and type_.__module__ != "builtins"
        self._instances = own and not issubclass(type_, dict)
        self._read = msgspec.json.Decoder(type_).decode

    def encode(self, data: T) -> Any:
        plain = _builtins(data)
        # A dataclass checks nothing when it is made: whoever sends should learn what every worker would refuse.
        self._convert(plain)
        return plain

    def decode(self, plain: Any) -> T:
        if self._instances and isinstance(plain, self.type):
            return plain
        return self._convert(plain)

    def dump(self, data: T) -> bytes | None:
        """Return what `dump` makes of what `encode` returns, or None where only those two can tell."""
        try:
            raw = _sorting.encode(data)
            # Checked as `encode` checks: what was written is read.
            self._read(raw)
        except Exception:  # noqa: BLE001 - whatever is wrong, `encode` tells
            return None
        return raw

    def _convert(self, plain: Any) -> T:
        # JSON has strings as keys only: those of a `dict[int, …]` come back as numbers.
        return msgspec.convert(plain, self.type, str_keys=True)


class _ModelSchema(Generic[T]):
    def __init__(self, model: Any) -> None:
        self.model = model

    def encode(self, data: T) -> Any:
        return self.model.model_validate(data).model_dump(mode="json")

    def decode(self, plain: Any) -> T:
        return cast(T, self.model.model_validate(plain))


def schema_of(schema: type[T] | Schema[T] | None) -> Schema[T]:
    """Return the schema for a type, a schema object as it is, or plain JSON values for None.

    Raises:
        TypeError: msgspec cannot describe the type; the text says which part.
    """
    if schema is None:
        return cast("Schema[T]", PlainSchema())
    if hasattr(schema, "model_validate"):
        return _ModelSchema(schema)
    if not isinstance(schema, type) and isinstance(schema, Schema):
        return schema
    try:
        msgspec.json.schema(schema)
        if _holds_raw(msgspec.inspect.type_info(schema)):
            raise TypeError("`msgspec.Raw` has no plain form; `Any` has")
    except TypeError as exc:
        raise TypeError(
            f"`schema` must be a dataclass, TypedDict, attrs class, msgspec Struct, pydantic model, "
            f"or an object with `encode` and `decode`, got {schema!r}: {exc}"
        ) from exc
    return _TypeSchema(schema)


def _holds_raw(info: msgspec.inspect.Type) -> bool:
    """Whether JSON as it is may stand somewhere in a type: it would be written unseen, and no worker could read it."""
    seen: set[int] = set()
    left: list[Any] = [info]
    while left:
        one = left.pop()
        if isinstance(one, msgspec.inspect.RawType):
            return True
        if isinstance(one, (list, tuple)):
            left += one
        elif isinstance(one, (msgspec.inspect.Type, msgspec.inspect.Field)) and id(one) not in seen:
            seen.add(id(one))
            left += [getattr(one, name) for name in one.__struct_fields__]
    return False


def dump_directly(schema: Schema[T], data: T) -> bytes | None:
    """Return what `dump` makes of what a schema encodes, without the plain values in between.

    To make those takes longer than to write them. None: that is not known without them.
    """
    if isinstance(schema, _TypeSchema):
        return schema.dump(data)
    return _dump_flat(data) if type(schema) is PlainSchema else None


def _dump_flat(data: Any) -> bytes | None:
    """Return JSON of an object or a list of text and numbers, as most data is; None: it is something else."""
    kind = type(data)
    values = data.values() if kind is dict else data if kind is list else (data,)
    if not _FLAT.issuperset(map(type, values)):
        return None
    try:
        return _encoder.encode(data)
    except (TypeError, ValueError):  # a key that is no text, or half a surrogate pair
        return None


def dump(data: Any) -> bytes:
    """Return data as canonical JSON (sorted keys), for the storage and for digests.

    Raises:
        SchemaError: it holds something that JSON has no form for.
    """
    try:
        return _encoder.encode(data)
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        # What JSON parsers let pass and msgspec refuses to write: half a surrogate pair, for one.
        try:
            return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
        except (TypeError, ValueError, RecursionError):
            raise SchemaError(f"data must have a JSON form: {exc}") from exc


def load(raw: bytes) -> Any:
    """Return what `dump` was given, as plain JSON values."""
    try:
        return msgspec.json.decode(raw)
    except msgspec.DecodeError:
        return json.loads(raw)
