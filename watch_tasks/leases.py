"""Renews the leases of what a worker has in hand, and tends the storage, from a thread of its main process."""

from __future__ import annotations

import logging
import threading
from collections import Counter

from .errors import StorageError
from .storage.base import Storage

__all__ = ["LeaseKeeper"]

logger = logging.getLogger(__name__)


class LeaseKeeper:
    """Keeps the claims of one worker alive for as long as it knows their messages.

    Whatever a handler does in another process, its claim holds; in this process it holds while handlers let other
    threads run. A storage that is away is asked again: a lease that ran out counts until somebody takes over.

    Args:
        storage: where the claims are.
        worker: who holds them.
        lease: seconds that a claim holds.
        every: seconds between two renewals.
    """

    def __init__(self, storage: Storage, worker: str, *, lease: float, every: float) -> None:
        self._storage, self._worker, self._lease, self._every = storage, worker, lease, every
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start renewing. Twice is safe."""
        if self._thread is None or not self._thread.is_alive():
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="watch-leases", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop renewing; claims still held end with their leases. Twice is safe."""
        self._stop.set()
        if self._thread:
            self._thread.join(timeout=5.0)
            self._thread = None

    def hold(self, *ids: str) -> None:
        """Renew the claims on these ids from now on, whenever they are made. Counted: hold twice, drop twice."""
        with self._lock:
            self._held.update(ids)

    def drop(self, *ids: str) -> None:
        """Let the claims on these ids be."""
        with self._lock:
            for id in ids:
                self._held[id] -= 1
                if self._held[id] <= 0:
                    del self._held[id]

    def renew(self) -> set[str]:
        """Renew now; return the ids that are held."""
        with self._lock:
            ids = list(self._held)
        return self._storage.renew(self._worker, ids, self._lease)

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            try:
                self.renew()
                self._storage.tend()
            except StorageError as exc:
                logger.warning("could not renew leases, trying again in %.3g s: %s", self._every, exc)
            except Exception:
                # Without this thread everything in hand would be handled again by others.
                logger.exception("could not renew leases, trying again in %.3g s", self._every)
