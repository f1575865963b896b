"""One trainer for each device: a lock file that says who has it.

In: a device's name. Out: a lock that this process holds until it is closed, or the process has ended, however that
came about: the system's own lock on the file counts, and what is written in it is for people.
"""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
import weakref
from pathlib import Path

from memplan.errors import MemplanError


class DeviceLock:
    """Held from the start. Raises MemplanError, which names the process that has the device.

    folder: where lock files are; None: the folder for temporary files, which trainers that are to see each other share.
    """

    def __init__(self, device: str, folder: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(folder or tempfile.gettempdir(), f"memplan-{device.replace(':', '-')}.lock")
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as e:
            raise MemplanError(f"cannot open the lock file {str(self.path)!r} of {device!r}: {e.strerror}") from None
        self.close = weakref.finalize(self, os.close, self._file)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = (
                os.pread(self._file, 1000, 0).decode(errors="replace") or "a process that has not said its name yet"
            )
            self.close()
            raise MemplanError(
                f"{device!r} has a ledger already, of {holder}: one trainer has a device; end that one, or close its "
                f"ledger ({str(self.path)!r} is its lock)"
            ) from None
        # Not renamed into place: the lock is on this very file.
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} ({' '.join(sys.orig_argv)[:200]})".encode(), 0)
        forked(self)


def forked(lock: DeviceLock) -> None:
    """A forked process, as a worker that loads data, does not keep the lock of its parent when that has ended."""
    ref = weakref.ref(lock)

    def close() -> None:
        if (there := ref()) is not None:
            there.close()

    os.register_at_fork(after_in_child=close)
