"""How much of this host's memory can still be had, and how much of it this process has."""

import ctypes
import functools
import os
from pathlib import Path


def available() -> int:
    """Bytes that can be taken without swapping, as far as the system says."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass  # not Linux: what is free at least
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def resident() -> int:
    """Bytes of this process's own pages, heap and anonymous mappings; not those of files, as libraries are.

    What malloc keeps unused is given back first. Linux alone; the kernel's count may lag by some pages for each core.
    """
    _libc().malloc_trim(0)
    _, pages, of_files, *_ = Path("/proc/self/statm").read_text().split()
    return os.sysconf("SC_PAGE_SIZE") * (int(pages) - int(of_files))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
