"""Opens a backend by the scheme of its URL: from a table, imported at its use, or from an entry point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Final

from .errors import ConfigurationError, did_you_mean

__all__ = ["open_by_scheme"]

_PACKAGE: Final = __name__.partition(".")[0]


def open_by_scheme(
    kind: str,
    url: str,
    table: Mapping[str, str],
    group: str,
    *,
    extras: Mapping[str, str] | None = None,
    refusal: Callable[[str], str | None] = lambda scheme: None,
) -> Any:
    """Open what a URL names.

    Args:
        kind: what it is, for the error: "storage", "queue".
        url: `scheme://…`.
        table: scheme → "module:function"; the function takes the URL.
        group: the entry-point group of those that others ship.
        extras: scheme → the extra of this package that brings its driver.
        refusal: says why a scheme that nobody ships is refused, or None.

    Raises:
        ConfigurationError: nobody knows the scheme, it is refused, or its driver is not installed.
    """
    scheme, separator, _ = url.partition("://")
    if not separator:
        scheme = scheme.partition(":")[0]  # the rest may be a password
    target = table.get(scheme) if separator else None
    if target:
        try:
            module, _, name = target.partition(":")
            return getattr(import_module(module), name)(url)
        except ImportError as exc:
            extra = (extras or {}).get(scheme)
            if extra is None or (exc.name or "").partition(".")[0] == _PACKAGE:
                raise
            raise ConfigurationError(f"{kind} `{scheme}` needs its driver: pip install 'watch-tasks[{extra}]'") from exc
    # Costs the reading of every installed package's metadata: only for a scheme that is not ours.
    from importlib.metadata import entry_points

    others = {entry.name: entry for entry in entry_points(group=group)}
    if separator and scheme in others:
        return others[scheme].load()(url)
    reason = refusal(scheme)
    if reason:
        raise ConfigurationError(reason)
    known = [*table, *others]
    if scheme in known:
        raise ConfigurationError(f"{kind} `{scheme}` must be named by a URL, such as {scheme}://…")
    hint = did_you_mean(scheme, known) or "."
    raise ConfigurationError(f"unknown {kind} scheme `{scheme}`{hint} Known: {', '.join(known)}")
