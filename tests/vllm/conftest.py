"""What tests that run a real vLLM engine share. They are skipped where vLLM is not installed."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from memplan.runtime.vllm import InProcess

HERE = Path(__file__).parent
SIZES: dict[str, Any] = dict(
    vocab_size=131,  # vLLM pads it
    hidden_size=128,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,  # what vLLM's attention takes at least
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=0,
)
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**SIZES),
    "gemma": GemmaConfig(**SIZES),
    "gpt2": GPT2Config(vocab_size=131, n_embd=128, n_head=4, n_layer=2, bos_token_id=None, eos_token_id=2),
}
REFUSED: dict[str, PretrainedConfig] = {
    "qwen3-moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
    "olmo2": Olmo2Config(**{name: value for name, value in SIZES.items() if name != "head_dim"}),
}
KV = 4 * 2**20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.filterwarnings("default"))  # vLLM's own, at import and when it starts
            if importlib.util.find_spec("vllm") is None:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


@pytest.fixture(autouse=True, scope="session")
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
        patch.setitem(os.environ, "VLLM_LOGGING_LEVEL", "ERROR")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # small products: threads would wait for each other, and for other processes
        yield
        torch.set_num_threads(threads)


def model_of(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Random weights, without dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


Start = Callable[..., InProcess]


def started(folder: Path, name: str = "llama", kv_cache: int = KV, **options: Any) -> InProcess:
    """An engine of random weights."""
    model_of((CONFIGS | REFUSED)[name]).save_pretrained(folder)
    usual = {"skip_tokenizer_init": True, "max_model_len": 128, "dtype": "float32", "max_num_seqs": 16}
    return InProcess.start(folder, kv_cache, **{**usual, **options})


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts engines that end with the test at the latest."""
    engines = list[InProcess]()

    def start(name: str = "llama", **options: Any) -> InProcess:
        engines.append(started(tmp_path / str(len(engines)), name, **options))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()
