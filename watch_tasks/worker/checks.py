"""What a worker must find as it starts: else it ends with every complaint there is."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from celery.concurrency.prefork import TaskPool as PreforkPool

from .. import heartbeat, points
from ..errors import ConfigurationError
from ..registry import registry
from .settings import check_broker_url

__all__ = ["check_broker", "check_start"]


def check_broker(app: Any) -> None:
    """See that the broker's URL can be used, before Celery reads it: its traceback has a part of the password in it."""
    try:
        check_broker_url(app)
    except ConfigurationError as exc:
        _end(exc)


def check_start(app: Any, pool: Any, runtime: Any) -> None:
    """See that there is all that the handlers need."""
    try:
        settings = runtime.settings
        complaints = [
            f"topic `{topic.name}` has no handlers: add one with @{topic.name.replace('.', '_')}.handler"
            for topic in registry
            if not topic.handlers
        ]
        try:
            is_shared = runtime.storage.is_shared
            complaints += runtime.storage.misfits(registry)
        except ConfigurationError as exc:
            complaints += [f"setting `watch_storage_backend`: {complaint}" for complaint in exc.complaints]
            is_shared = True
        if not is_shared and isinstance(pool, PreforkPool):
            complaints.append(
                f"storage {settings.storage_url} lives in one process, and this pool has several: use -P threads or "
                "-P solo, or a storage such as redis://…"
            )
        missing = settings.missing_server()
        if missing:
            complaints.append(missing)
        try:
            points.arm()
        except ConfigurationError as exc:
            complaints += exc.complaints
        try:
            heartbeat.beat()
        except OSError as exc:
            complaints.append(f"`{heartbeat.VARIABLE}` must name a file that can be written: {exc}")
        if complaints:
            raise ConfigurationError(*complaints)
    except ConfigurationError as exc:
        _end(exc)


def _end(error: ConfigurationError) -> NoReturn:
    sys.exit("watch_tasks cannot start:\n" + "\n".join(f"  - {complaint}" for complaint in error.complaints))
