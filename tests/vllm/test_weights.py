"""One copy of the weights: what the optimizer writes, the engine samples from, with nothing between them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from memplan.errors import MemplanError
from memplan.grpo import token_logprobs
from memplan.runtime.vllm import Completion, InProcess

from .conftest import CONFIGS, REFUSED, Start, model_of

init_empty_weights = pytest.importorskip("accelerate").init_empty_weights
PROMPTS = [[3, 4, 5, 6 + k] for k in range(4)]
SHARED = [name for name in CONFIGS if name != "gpt2"]


@pytest.fixture
def engine(start: Start) -> InProcess:
    return start()


def off_by(model: PreTrainedModel, completions: list[Completion], temperature: float = 1.0) -> float:
    """How far the trainer's log-probs are from those the tokens were sampled with, in nats."""
    worst = 0.0
    for c in completions:
        ids = torch.tensor([[*PROMPTS[c.prompt], *c.tokens]])
        with torch.no_grad():
            ours = token_logprobs(model, ids, temperature)[0, len(PROMPTS[c.prompt]) - 1 :]
        worst = max(worst, float((ours - torch.tensor(c.logprobs)).abs().max()))
    return worst


def trained(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    model(input_ids=torch.tensor(PROMPTS), labels=torch.tensor(PROMPTS)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", CONFIGS)
def test_engine_and_trainer_agree_before_and_after_steps(start: Start, name: str) -> None:
    engine = start(name)
    model = model_of(CONFIGS[name], seed=1)  # other values than the checkpoint's
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    shared = engine.share(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    tokens = set()
    for temperature in (1.0, 0.7, 1.3):
        found = engine.generate(PROMPTS, max_tokens=16, ignore_eos=True, seed=3, temperature=temperature)
        assert off_by(model, found, temperature) < 1e-5
        tokens.add(tuple(c.tokens for c in found))
        trained(model, optimizer)
    assert len(tokens) == 3
    engine.close()
    if name in SHARED:
        assert not shared.copied
        theirs = [p.untyped_storage() for p in engine.params().values()]
        for p in model.parameters():
            assert any(s.data_ptr() <= p.data_ptr() < s.data_ptr() + s.nbytes() for s in theirs)
    else:
        assert "c_attn.weight is copied before each rollout: vLLM keeps it in 3 pieces" in shared.report()
        assert "c_fc.weight is copied before each rollout: vLLM keeps it in another order" in shared.report()


def test_a_model_without_memory_takes_the_engines(start: Start) -> None:
    for name in ("llama", "qwen2-tied"):
        engine = start(name)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
        assert engine.share(model).copied == {}
        assert not any(p.is_meta for p in model.parameters())
        assert off_by(model, engine.generate(PROMPTS, max_tokens=16, ignore_eos=True)) < 1e-5
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "qwen2-tied")
        there = model_of(CONFIGS[name]).state_dict()  # the checkpoint's
        assert all(torch.equal(value, there[key]) for key, value in model.state_dict().items())
        engine.close()


LONG = [3 + k % 100 for k in range(300)]  # two blocks and more: what is remembered is whole blocks


def changed_by_hand(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)


def changed_by_a_fused_step(model: PreTrainedModel) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)  # which autograd does not see
    trained(model, optimizer)


def changed_behind_autograd(model: PreTrainedModel) -> None:
    for p in model.parameters():
        p.data.mul_(1.5)


@pytest.mark.parametrize("change", [changed_by_hand, changed_by_a_fused_step, changed_behind_autograd])
@pytest.mark.parametrize("name", ["llama", "gpt2"])  # shared, and copied
def test_what_was_computed_with_old_weights_is_forgotten(start: Start, name: str, change: Any) -> None:
    engine = start(name, max_model_len=400)
    model = model_of(CONFIGS[name])
    engine.share(model)
    for _ in range(2):
        found = engine.generate([LONG], max_tokens=4, temperature=1.0)
        ids = torch.tensor([[*LONG, *found[0].tokens]])
        with torch.no_grad():
            ours = token_logprobs(model, ids)[0, len(LONG) - 1 :]
        torch.testing.assert_close(ours, torch.tensor(found[0].logprobs), atol=2e-5, rtol=0)
        change(model)
        if change is changed_behind_autograd:
            engine.invalidate()


def test_autocast_of_the_trainer_does_not_reach_the_engine(engine: InProcess) -> None:
    model = model_of(CONFIGS["llama"])
    engine.share(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = engine.generate(PROMPTS, max_tokens=16, ignore_eos=True)
    assert off_by(model, found) < 1e-5


def test_another_model_is_refused_and_nothing_is_moved(engine: InProcess, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in engine.params().items()}
    for name, why in (
        ("qwen3", "the engine is of another model, with model_type 'llama' and not 'qwen3'"),
        ("gpt2", "the engine is of another model, with model_type 'llama' and not 'gpt2'"),
    ):
        with pytest.raises(MemplanError, match=why):
            engine.share(model_of(CONFIGS[name]))
    for key, value in (("rms_norm_eps", 0.1), ("tie_word_embeddings", True), ("hidden_act", "gelu")):
        with pytest.raises(MemplanError, match=f"the engine is of another model, with {key} "):
            engine.share(model_of(type(CONFIGS["llama"])(**{**CONFIGS["llama"].to_dict(), key: value})))
    config = type(CONFIGS["llama"])(**{**CONFIGS["llama"].to_dict(), "intermediate_size": 160})
    model = model_of(config)
    at = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(
        MemplanError, match=r"another model: of parameter '.*gate_proj.weight' .* 12288 numbers of 20480"
    ):
        engine.share(model)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == at
    assert all(torch.equal(value, before[name]) for name, value in engine.params().items())


def test_weights_that_have_moved_away_are_found(engine: InProcess) -> None:
    model = model_of(CONFIGS["llama"])
    engine.share(model)
    model.load_state_dict(model_of(CONFIGS["llama"], seed=2).state_dict(), assign=True)
    with pytest.raises(MemplanError, match=r"parameter '.*' is not in the engine's memory any more, as after model.to"):
        engine.generate(PROMPTS)
    engine.share(model)
    assert off_by(model, engine.generate(PROMPTS, max_tokens=16, ignore_eos=True)) < 1e-5


def test_another_dtype_is_copied_and_said(engine: InProcess) -> None:
    model = model_of(CONFIGS["llama"]).bfloat16()
    shared = engine.share(model)
    assert set(shared.copied.values()) == {"vLLM keeps it as torch.float32, and the trainer as torch.bfloat16"}
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    engine.generate(PROMPTS, max_tokens=1)
    assert torch.equal(engine.params()["model.norm.weight"], model.model.norm.weight.float())


def test_what_vllm_packs_or_has_no_model_for_is_refused(start: Start) -> None:
    model = model_of(REFUSED["qwen3-moe"])
    with pytest.raises(MemplanError, match=r"vLLM packs it|is not taken by vLLM's|vLLM's .* has no place for"):
        start("qwen3-moe").share(model)


def test_an_architecture_that_vllm_takes_from_transformers_is_refused(start: Start) -> None:
    with pytest.raises(MemplanError, match="vLLM has no model of its own for it, and would change transformers' for"):
        start("olmo2")
    ids = torch.tensor(PROMPTS)
    model_of(REFUSED["olmo2"])(input_ids=ids)  # transformers' own still works


def test_a_second_model_is_refused(engine: InProcess) -> None:
    engine.share(model_of(CONFIGS["llama"]))
    with pytest.raises(MemplanError, match="the engine shares another model's weights already"):
        engine.share(model_of(CONFIGS["llama"]))
