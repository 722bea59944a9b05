"""Opens a backend by the scheme of its URL: from a table, imported at its use, or from an entry point."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .errors import ConfigurationError, did_you_mean

__all__ = ["open_by_scheme"]


def open_by_scheme(kind: str, url: str, table: dict[str, str], group: str) -> Any:
    """Open what a URL names.

    Args:
        kind: what it is, for the error: "storage", "queue".
        url: `scheme://…`.
        table: scheme → "module:function"; the function takes the URL.
        group: the entry-point group of those that others ship.

    Raises:
        ConfigurationError: nobody knows the scheme.
    """
    scheme, separator, _ = url.partition("://")
    target = table.get(scheme) if separator else None
    if target:
        module, _, name = target.partition(":")
        return getattr(import_module(module), name)(url)
    # Costs the reading of every installed package's metadata: only for a scheme that is not ours.
    from importlib.metadata import entry_points

    others = {entry.name: entry for entry in entry_points(group=group)}
    if scheme in others:
        return others[scheme].load()(url)
    known = [*table, *others]
    hint = did_you_mean(scheme, known) or "."
    raise ConfigurationError(f"unknown {kind} scheme `{scheme}`{hint} Known: {', '.join(known)}")
