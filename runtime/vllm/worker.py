"""A vLLM worker on the CPU whose KV cache leaves and comes back: it is in arenas, and its weights stay where they are.

In: vLLM's own calls; it makes this worker from its name, `worker_cls`. Out: sleeping and waking that are real, where
vLLM's worker for the CPU only warns. What is released is the KV cache, whatever the level: weights are the trainer's
too. vLLM sees to it that nothing reads the cache meanwhile, and that what was in it is computed again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from vllm.model_executor.layers import utils
from vllm.v1.worker.cpu_worker import CPUWorker

from memplan.runtime.arena import Arena


class ArenaWorker(CPUWorker):
    """`arenas`: where the KV cache is, all of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.arenas: list[Arena] = []

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        utils.dispatch_cpu_unquantized_gemm = _unpacked
        super().load_model(*args, **kwargs)

    def _maybe_get_memory_pool_context(self, tag: str) -> contextlib.AbstractContextManager[None]:
        if tag != "kv_cache":
            pool: contextlib.AbstractContextManager[None] = super()._maybe_get_memory_pool_context(tag)
            return pool
        return self._cache_in_arenas()

    @contextlib.contextmanager
    def _cache_in_arenas(self) -> Iterator[None]:
        with _Zeros(self.arenas):
            yield

    def discard(self, tags: tuple[str, ...]) -> None:
        if "kv_cache" in tags:
            for arena in self.arenas:
                arena.release()

    def sleep(self, level: int = 1) -> None:
        self.discard(("kv_cache",))

    def wake_up(self, tags: list[str] | None = None) -> None:
        if tags is None or "kv_cache" in tags:
            for arena in self.arenas:
                arena.map()


class _Zeros(TorchFunctionMode):
    """torch.zeros is an arena of its own: pages that were never written are zeros."""

    def __init__(self, arenas: list[Arena]) -> None:
        super().__init__()
        self.arenas = arenas

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.zeros:
            return func(*args, **kwargs)
        like = torch.empty(*args, **{**kwargs, "device": "meta"})
        arena = Arena.reserve(max(like.nbytes, 1))
        arena.map()
        self.arenas.append(arena)
        return arena.tensor(0, like.shape, like.dtype)


def _unpacked(layer: torch.nn.Module, remove_weight: bool) -> None:
    """For vLLM's own, which packs a weight for its kernels into a second copy and forgets the first."""
    layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]
