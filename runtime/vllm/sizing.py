"""How large a KV cache is: what a rollout can use, and no more than there is room for; the rest is the plan's.

In: a model's configuration, a batch of sequences, room in bytes. Out: whole blocks, as vLLM allocates them.
Bytes of a block: layers * 2 * key-value heads * head size * bytes of a number * tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memplan.errors import MemplanError
from memplan.units import human, parse_bytes

BLOCK = 128  # tokens of a block, vLLM's own choice on the CPU


@dataclass(frozen=True)
class CacheSize:
    """blocks: of `block_bytes` each, `bytes` together. spare: bytes of the room that a rollout cannot use."""

    blocks: int
    block_bytes: int
    spare: int

    @property
    def bytes(self) -> int:
        return self.blocks * self.block_bytes


def cache_size(
    config: Any, room: str | int, *, sequences: int, length: int, itemsize: int = 2, block: int = BLOCK
) -> CacheSize:
    """The cache for `sequences` of at most `length` tokens at a time, inside `room`.

    config: of transformers. itemsize: bytes of a number in the cache. With less room than all of them need, some wait
    for others. Raises MemplanError where one alone does not fit.
    """
    for name, value in (("sequences", sequences), ("length", length), ("itemsize", itemsize), ("block", block)):
        if value < 1:
            raise MemplanError(f"{name} is {value}: it must be at least 1")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = config.num_hidden_layers * 2 * heads * head * itemsize * block
    each, there = -(-length // block), parse_bytes(room)
    blocks = min(there // size, sequences * each + 1)  # one is vLLM's own, for what is written nowhere
    if blocks < each + 1:
        raise MemplanError(
            f"{human(there)} have no room for one sequence of {length} tokens, {human((each + 1) * size)}: make "
            "sequences shorter, or the budget larger"
        )
    return CacheSize(blocks, size, there - blocks * size)
