"""The folder of an embedded server, `WATCH_DIR`: private to one user, and locked by whoever runs in it."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import IO

from ..errors import ConfigurationError

if sys.platform != "win32":
    import fcntl

__all__ = ["FolderLock", "private_folder"]


class FolderLock:
    """A lock on a file, held until the last process that has it open ends or releases it, in whatever way.

    A child that is given `fileno()` holds it as well, and goes on holding it when its parent is killed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def acquire(self) -> bool:
        """Take it, without waiting; return whether it is held by this object now."""
        if sys.platform == "win32":
            raise ConfigurationError("`watch-tasks up` and the embedded server need Linux or macOS")
        if self._file is None:
            # Opened to append: whoever fails to take it must not touch it.
            file = self.path.open("a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                return False
            self._file = file
        return True

    def release(self) -> None:
        """Let go of it here; a child that was given it still holds it. Twice is safe."""
        if self._file:
            self._file.close()
            self._file = None

    def is_held(self) -> bool:
        """Return whether anybody holds it, this object included."""
        if self._file or not self.path.exists():
            return self._file is not None
        taken = self.acquire()
        self.release()
        return not taken

    def fileno(self) -> int:
        """Return the descriptor to pass on. Only while it is held."""
        if self._file is None:
            raise ValueError(f"the lock {self.path} is not held")
        return self._file.fileno()


def private_folder(folder: Path) -> None:
    """Make a folder that only its owner can enter, with all above it; an empty one that is there is made so.

    Raises:
        ConfigurationError: it belongs to somebody else, or others can enter it and it holds things already.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise ConfigurationError(f"{folder} must be a folder of yours, and is not; name another in WATCH_DIR")
        if found.st_mode & 0o077:
            if any(folder.iterdir()):
                raise ConfigurationError(
                    f"{folder} holds messages, so that only you may enter it: chmod 700 {folder}, "
                    "or name another folder in WATCH_DIR"
                )
            folder.chmod(0o700)
    except OSError as exc:
        raise ConfigurationError(f"{folder} cannot be used: {exc.strerror}; name another folder in WATCH_DIR") from exc
