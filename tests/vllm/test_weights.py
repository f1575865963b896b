"""One copy of the weights: what the optimizer writes, the engine samples from, with nothing between them."""

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from memplan.errors import MemplanError
from memplan.grpo import token_logprobs
from memplan.runtime.vllm import Completion, InProcess

from .conftest import CONFIGS, Start, model_of

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


def test_what_was_computed_with_old_weights_is_forgotten(engine: InProcess) -> None:
    model = model_of(CONFIGS["llama"])
    engine.share(model)
    prompt = [[*range(3, 100)]]  # long enough to be remembered by its prefix
    first = engine.generate(prompt, max_tokens=4, temperature=0.0)
    assert engine.generate(prompt, max_tokens=4, temperature=0.0) == first
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    changed = engine.generate(prompt, max_tokens=4, temperature=0.0)
    ids = torch.tensor([[*prompt[0], *changed[0].tokens]])
    with torch.no_grad():
        ours = token_logprobs(model, ids)[0, len(prompt[0]) - 1 :]
    torch.testing.assert_close(ours, torch.tensor(changed[0].logprobs), atol=1e-5, rtol=0)


def test_a_change_that_autograd_does_not_see_is_said(engine: InProcess) -> None:
    model = model_of(CONFIGS["llama"])
    engine.share(model)
    prompt = [[*range(3, 100)]]
    engine.generate(prompt, max_tokens=1)
    for p in model.parameters():
        p.data.mul_(1.5)
    engine.invalidate()
    found = engine.generate(prompt, max_tokens=1, temperature=1.0)
    ids = torch.tensor([[*prompt[0], *found[0].tokens]])
    with torch.no_grad():
        assert abs(float(token_logprobs(model, ids)[0, -1]) - found[0].logprobs[0]) < 1e-5


def test_another_model_is_refused_and_nothing_is_moved(engine: InProcess, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in engine.params().items()}
    for name, why in (
        ("qwen3", "the engine is of another model, with model_type 'llama' and not 'qwen3'"),
        ("gpt2", "the engine is of another model, with model_type 'llama' and not 'gpt2'"),
    ):
        with pytest.raises(MemplanError, match=why):
            engine.share(model_of(CONFIGS[name]))
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
