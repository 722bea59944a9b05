from __future__ import annotations

import inspect
import pickle
import re
from typing import Any

import pytest

from watch_tasks import ConfigurationError, Message, SendUnknownError, TooLargeError, errors
from watch_tasks.errors import WatchTasksError, did_you_mean

KINDS = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, WatchTasksError)]


def drawn() -> dict[str, str | None]:
    """Return each class of the tree in the docstring, with the class it hangs under."""
    parents: dict[str, str | None] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^ {4}(?P<branch>[│├└─ ]*)(?P<name>\w+Error)\b", line)
        if match:
            depth = len(match["branch"])
            while path and path[-1][0] >= depth:
                path.pop()
            parents[match["name"]] = path[-1][1] if path else None
            path.append((depth, match["name"]))
    return parents


def make(kind: type[WatchTasksError]) -> WatchTasksError:
    """Return an error of the class, with a value in each of its fields."""
    arguments: dict[type, tuple[Any, ...]] = {
        ConfigurationError: ("first", "second"),
        TooLargeError: ("orders", 2_000_000, 1_048_576),
        SendUnknownError: ("the answer was lost", Message({"a": 1}, "orders")),
    }
    return kind(*arguments.get(kind, ("what happened",)))


def test_the_tree_that_is_drawn_is_the_real_one() -> None:
    real = {
        kind.__name__: next((base.__name__ for base in kind.__bases__ if issubclass(base, WatchTasksError)), None)
        for kind in KINDS
    }
    assert drawn() == real


def test_the_public_names_are_the_errors() -> None:
    assert sorted(errors.__all__) == sorted([*(kind.__name__ for kind in KINDS), "did_you_mean"])


@pytest.mark.parametrize("kind", KINDS)
class TestEach:
    def test_it_ends_in_error(self, kind: type[WatchTasksError]) -> None:
        assert kind.__name__.endswith("Error")

    def test_it_survives_pickling_with_its_fields(self, kind: type[WatchTasksError]) -> None:
        """Prefork children and result backends hand errors around in pickled form."""
        error = make(kind)
        copied = pickle.loads(pickle.dumps(error))
        assert type(copied) is kind
        assert (copied.args, vars(copied)) == (error.args, vars(error))

    def test_it_says_what_it_is_for(self, kind: type[WatchTasksError]) -> None:
        assert kind.__doc__


class TestTexts:
    def test_all_complaints_are_shown_a_line_each(self) -> None:
        assert str(make(ConfigurationError)) == "first\nsecond"

    def test_data_that_is_too_large_says_what_to_do(self) -> None:
        text = str(make(TooLargeError))
        assert "topic `orders`: data takes 2000000 bytes, at most 1048576 are allowed" in text
        assert "raise `watch_max_payload`" in text

    @pytest.mark.parametrize(
        ("name", "known", "expected"),
        [
            ("rediss3", ["redis", "rediss", "memory"], ", did you mean `rediss`?"),
            ("x", ["redis", "memory"], ""),
            ("x", [], ""),
        ],
    )
    def test_the_nearest_name_is_offered(self, name: str, known: list[str], expected: str) -> None:
        assert did_you_mean(name, known) == expected
