"""How much more memory this process can get, as far as the system says."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from memplan import memory


def free_bytes(device: torch.device) -> int:
    """Bytes that could still be allocated on a device.

    CUDA: what the driver has, and what the caching allocator holds unused, which may be in pieces. CPU: what the system
    calls available, and what the process's own limit leaves.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min(_limits())


def _limits() -> list[int]:
    found = [memory.available()]
    with contextlib.suppress(ImportError, OSError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            found.append(max(0, limit - pages * resource.getpagesize()))
    return found
