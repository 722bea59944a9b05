"""Celery with the Redis transport of this package, acks late, records nothing."""

from __future__ import annotations

from watch_tasks.transport import install

install()

from .stock import app, send, send_many  # noqa: E402 - after the transport is in place

__all__ = ["app", "send", "send_many"]
