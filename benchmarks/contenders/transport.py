"""Celery with the Redis transport of this package, acks late, records nothing."""

from __future__ import annotations

from watch_tasks.transport import install

install()

from .stock import app, noop, send  # noqa: E402 - after the transport is in place

__all__ = ["app", "noop", "send"]
