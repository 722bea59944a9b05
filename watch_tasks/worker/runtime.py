"""What one process needs to handle topics under one app: settings, storage, pipeline, outlet, leases.

Each process opens its own: connections must not cross a fork.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Final
from uuid import uuid4

from celery import Celery
from celery.worker import state

from ..errors import StorageError
from ..leases import LeaseKeeper
from ..pipeline import Pipeline
from ..registry import registry
from ..storage import Storage, open_storage
from .outlet import CeleryOutlet
from .settings import Settings, read_settings
from .shared import Shared

__all__ = ["Runtime", "runtime_of"]

logger = logging.getLogger(__name__)

_ATTRIBUTE: Final = "_watch_runtime"
#: Exit codes of a child that a signal ends: billiard makes them -(256 - signal).
_ENDINGS: Final = range(-255, -191)
_lock = threading.Lock()


class Runtime:
    """What a process shares between its messages. Get it by `runtime_of(app)`."""

    def __init__(self, app: Celery, shared: Shared) -> None:
        self.app = app
        self.pid = os.getpid()
        self.shared = shared
        self.outlet = CeleryOutlet(app, lambda: self.settings)
        #: Why nothing more is sent at a stop: the broker did not take the last copy, and each would wait anew.
        self.gave_up = ""
        self._pipelines: dict[str, Pipeline] = {}

    @cached_property
    def settings(self) -> Settings:
        """Our settings.

        Raises:
            ConfigurationError: they cannot work.
        """
        return read_settings(self.app.conf)

    @cached_property
    def storage(self) -> Storage:
        """The storage, opened at its first use in this process."""
        return open_storage(self.settings.storage_url)

    @cached_property
    def worker(self) -> str:
        """Name of this worker: unique to its process, also where containers share host names and process ids."""
        return f"{socket.gethostname()}/{self.pid}.{uuid4().hex[:4]}"

    def name_worker(self, hostname: str) -> None:
        """Take the name of the Celery worker into ours, before anything is claimed."""
        self.__dict__["worker"] = f"{hostname}.{uuid4().hex[:6]}"

    @cached_property
    def keeper(self) -> LeaseKeeper:
        """Renews what this worker has in hand."""
        settings = self.settings
        return LeaseKeeper(self.storage, self.worker, lease=settings.lease, every=settings.renew_every)

    def release(self, ids: Sequence[str], *, crashed: bool) -> list[int]:
        """End this worker's claims on these ids, where it has any.

        Args:
            ids: of messages.
            crashed: whether their handlers took a process down.

        Returns:
            How often the handler of each took a worker down; 0 where the storage is away.
        """
        try:
            return list(self.storage.release(self.worker, ids, crashed=crashed)) if ids else []
        except StorageError as exc:
            # The leases end by themselves, and whoever takes over counts the crash.
            logger.warning("could not release %d messages, such as %s: %s", len(ids), ids[0], exc)
            return [0] * len(ids)

    def is_stopping(self) -> bool:
        """Whether the worker was asked to stop."""
        # None and False mean no; a number, 0 too, is the exit code to stop with.
        asked, forced = state.should_stop, state.should_terminate
        if self.shared.is_stopping or (asked is not None and asked is not False):
            return True
        return forced is not None and forced is not False

    def pipeline(self, worker: str, can_die: bool) -> Pipeline:
        """Return the pipeline that handles messages for this worker.

        Args:
            worker: the worker's name, as its main process gave it.
            can_die: whether this process is replaced when it ends: a child of the prefork pool.
        """
        found = self._pipelines.get(worker)
        if found is None:
            settings = self.settings
            made = Pipeline(
                self.storage,
                registry.get,
                worker=worker,
                lease=settings.lease,
                max_crashes=settings.max_crashes,
                unknown_grace=settings.unknown_grace,
                stopping=self.is_stopping,
                interrupts=_ends_child if can_die else lambda error: False,
                kill_after=settings.kill_after if can_die else None,
            )
            # What is there now stays as long as the process: Python's collector need not go through it again and again.
            gc.freeze()
            # One for all threads: two would name their claims alike, and both be granted the same message.
            found = self._pipelines.setdefault(worker, made)
        return found

    @cached_property
    def clerk(self) -> Pipeline:
        """The pipeline of the main process, which handles nothing but buries; it never waits for a storage."""
        settings = self.settings
        return Pipeline(
            self.storage,
            registry.get,
            worker=self.worker,
            unknown_grace=settings.unknown_grace,
            stopping=lambda: True,
        )


def runtime_of(app: Celery) -> Runtime:
    """Return the runtime of an app in this process."""
    app = getattr(app, "_get_current_object", lambda: app)()  # a proxy, such as celery.current_app
    runtime: Runtime | None = app.__dict__.get(_ATTRIBUTE)
    if runtime is None or runtime.pid != os.getpid():
        with _lock:
            runtime = app.__dict__.get(_ATTRIBUTE)
            if runtime is None or runtime.pid != os.getpid():
                runtime = Runtime(app, runtime.shared if runtime else Shared())
                app.__dict__[_ATTRIBUTE] = runtime
    return runtime


def _ends_child(error: BaseException) -> bool:
    """Whether this is billiard ending a child of the prefork pool, and no `sys.exit(-1)` of a handler."""
    return isinstance(error, SystemExit) and error.code in _ENDINGS
