"""The KV cache is as large as was computed, block by block, and a rollout fits into it."""

import pytest

from memplan.errors import MemplanError
from memplan.runtime.host_pool import PAGE, rounded
from memplan.runtime.vllm.sizing import cache_size

from .conftest import CONFIGS, SIZES, Start


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_vllm_makes_as_many_blocks(start: Start, name: str) -> None:
    size = cache_size(CONFIGS[name], "1GB", sequences=16, length=128, itemsize=4)
    assert size.bytes + size.spare == 10**9
    engine = start(name, kv_cache=size.bytes)
    assert engine.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks == size.blocks == 17
    assert engine.kv_bytes == rounded(size.bytes, PAGE)
    found = engine.generate([[3, 4, 5]] * 16, max_tokens=125, ignore_eos=True)
    assert all(len(c.tokens) == 125 for c in found)
    assert engine.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.usage == 0


def test_less_room_makes_fewer_blocks_and_too_little_is_refused() -> None:
    config = CONFIGS["llama"]
    block = SIZES["num_hidden_layers"] * 2 * SIZES["num_key_value_heads"] * SIZES["head_dim"] * 2 * 128
    half = cache_size(config, 9 * block + 5, sequences=16, length=128)
    assert (half.blocks, half.block_bytes, half.spare) == (9, block, 5)
    assert cache_size(config, 2 * block, sequences=16, length=128).blocks == 2
    with pytest.raises(MemplanError, match=r"have no room for one sequence of 129 tokens, 196.6 KB: make sequences"):
        cache_size(config, 2 * block, sequences=16, length=129)
    with pytest.raises(MemplanError, match="sequences is 0: it must be at least 1"):
        cache_size(config, block, sequences=0, length=1)
