"""A message that a topic would take, to show how one is sent."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from ..errors import MessageError
from ..topics import Topic

__all__ = ["send_command"]

_VALUES: Final[dict[str, Any]] = {
    "string": "text", "integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}, "null": None,
}  # fmt: skip


def send_command(topics: Sequence[Topic[Any]]) -> str:
    """Return a command line that can be pasted: for a topic whose schema says what its data is, if there is one."""
    told = [topic for topic in topics if _sample(topic)]
    return min(map(_command, told), key=len) if told else _command(topics[0])


def _command(topic: Topic[Any]) -> str:
    data = _sample(topic)
    try:
        topic.decode(data)
        text = shlex.quote(json.dumps(data))
    except MessageError:
        text = "'…'"
    return f"{_program()} send {topic.name} {text}"


def _program() -> str:
    """Return how this program is called from here: it may be in an environment that is not on the path."""
    called = Path(sys.argv[0])
    if called.name != "watch-tasks" or shutil.which("watch-tasks"):
        return "watch-tasks"
    return shlex.quote(os.path.relpath(called))


def _sample(topic: Topic[Any]) -> Any:
    shape, model = getattr(topic.schema, "type", None), getattr(topic.schema, "model", None)
    if shape is not None:
        schema = msgspec.json.schema(shape)
    elif model is not None:
        schema = model.model_json_schema()
    else:
        return {"text": "hello"}
    return _value(schema, schema.get("$defs", {}))


def _value(schema: dict[str, Any], definitions: dict[str, Any]) -> Any:
    """Return a value for a JSON schema: its default, its first choice, or the plainest of its type."""
    if "$ref" in schema:
        return _value(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    for name in ("default", "const"):
        if name in schema:
            return schema[name]
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return _value(schema["anyOf"][0], definitions)
    if "properties" in schema:
        required = schema.get("required", ())
        return {name: _value(schema["properties"][name], definitions) for name in required}
    return _VALUES.get(schema.get("type", "object"))
