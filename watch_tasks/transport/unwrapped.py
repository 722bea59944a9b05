"""Whether somebody wrapped a function of a library, to see what goes through it: then it must not be passed by."""

from __future__ import annotations

from types import FunctionType, MethodType
from typing import Any

__all__ = ["is_unwrapped"]


def is_unwrapped(module: Any, function: Any) -> bool:
    """Return whether a function or a method is what its module made it, and nobody's wrapper.

    Asked for its class, a wrapper may name that of what it wraps; its type it cannot hide.
    """
    inner = function.__func__ if type(function) is MethodType else function
    return type(inner) is FunctionType and inner.__code__.co_filename == module.__file__
