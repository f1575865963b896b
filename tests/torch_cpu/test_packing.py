"""Packing and batches by tokens: the log-probs of the padded batch, in fewer tokens, inside one plan."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import memplan
from memplan.backend import memplan_backend
from memplan.errors import MemplanError
from memplan.grpo import Collate, GRPOConfig, TokenBatches, batch_logprobs, grpo_loss, make_step, pack
from memplan.grpo.packing import PACKABLE, check_packable
from memplan.ir import Plan

SMALL: dict[str, Any] = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=256,
)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),
    "neox": GPTNeoXConfig(**SMALL),
    "mixtral": MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2),
    "mistral": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=6),
    "gemma2": Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=6),
}
WINDOWS = ("mistral", "gemma2")
ATTENTION = [(name, kind) for name in CONFIGS for kind in ("eager", "sdpa") if (name, kind) != ("gemma2", "sdpa")]


def model_of(name: str, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention)


def samples_of(count: int, group: int = 1, seed: int = 0, longest: int = 30) -> list[dict[str, Any]]:
    """Groups of completions of one prompt, of all lengths."""
    draw = random.Random(seed)
    made = []
    for k in range(count):
        if k % group == 0:
            prompt = [draw.randrange(1, 61) for _ in range(draw.randint(1, longest // 2))]
        completion = [draw.randrange(1, 61) for _ in range(draw.randint(1, longest // 2))]
        made.append(
            {
                "prompt": prompt,
                "completion": completion,
                "advantage": draw.gauss(0, 1),
                "old_logprobs": [-4.1 + draw.random() for _ in completion],
            }
        )
    return made


def gradients(model: Any, batch: Any, config: GRPOConfig) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    loss = grpo_loss(model, batch, config)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("name", "attention"), ATTENTION)
def test_log_probs_and_gradients_are_those_of_the_padded_batch(name: str, attention: str) -> None:
    model, samples = model_of(name, attention), samples_of(6, group=3)
    padded = Collate(tokens=400, packed=False)(samples)
    config = GRPOConfig(entropy_bonus=0.01)
    expected, there = batch_logprobs(model, padded).detach(), padded["completion_mask"] > 0
    loss, grads = gradients(model, padded, config)
    for shared in (False, True):
        if shared and name in WINDOWS:
            with pytest.raises(MemplanError, match="has layers that look back a window"):
                batch_logprobs(model, pack(padded, 200, shared_prompts=True))
            continue
        batch = pack(padded, 200, shared_prompts=shared)
        assert batch["packed_ids"].shape == (1, 200)
        found = batch_logprobs(model, batch).detach()
        torch.testing.assert_close(found[there], expected[there], rtol=0, atol=1e-5)
        ours, theirs = gradients(model, batch, config)
        torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(theirs, grads, rtol=1e-4, atol=2e-6)


def test_what_is_packed_is_each_token_once_and_a_prompt_once_for_all() -> None:
    samples = samples_of(8, group=4)
    plain = Collate(tokens=1000, packed=False)(samples)
    tokens = sum(len(s["prompt"]) + len(s["completion"]) for s in samples)
    shared = sum(len(s["prompt"]) - 1 for s in samples[::4]) + sum(1 + len(s["completion"]) for s in samples)
    for size, how in ((tokens, False), (shared, True)):
        assert (
            int((pack(plain, size, shared_prompts=how)["packed_places"] < size).sum()) == plain["completion_mask"].sum()
        )
        with pytest.raises(MemplanError, match=f"the batch has {size} tokens, and {size - 1} have room"):
            pack(plain, size - 1, shared_prompts=how)


def test_rows_and_tokens_that_do_not_count_are_left_out() -> None:
    samples = samples_of(3)
    batch = Collate(tokens=200, packed=False)(samples)
    batch["completion_mask"][1] = 0
    size = sum(len(samples[k]["prompt"]) + len(samples[k]["completion"]) for k in (0, 2))
    made = pack(batch, size)
    assert (made["packed_places"][1] == size).all()
    model = model_of("llama")
    there = batch["completion_mask"] > 0
    found, expected = batch_logprobs(model, made), batch_logprobs(model, batch)
    torch.testing.assert_close(found[there], expected[there], rtol=0, atol=1e-5)
    assert (found[~there] == 0).all()


SIZES = dict(
    SMALL, num_key_value_heads=2, head_dim=8, n_embd=32, n_layer=2, n_head=4, n_inner=48, d_model=32, ffn_dim=48,
    n_positions=256, rotary_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_local_experts=4, num_experts=4,
    num_experts_per_tok=2,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(PACKABLE))
def test_every_type_of_model_that_is_said_to_be_packable(kind: str) -> None:
    if kind not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {kind}")
    known = AutoConfig.for_model(kind)
    config = AutoConfig.for_model(kind, **{k: v for k, v in SIZES.items() if hasattr(known, k)})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    padded = Collate(tokens=400, packed=False)(samples_of(6, group=3))
    expected, there = batch_logprobs(model, padded).detach(), padded["completion_mask"] > 0
    for shared in (False, True):
        try:
            check_packable(model, shared)
        except MemplanError as error:
            assert shared and "look back a window" in str(error)
            continue
        found = batch_logprobs(model, pack(padded, 200, shared_prompts=shared)).detach()
        torch.testing.assert_close(found[there], expected[there], rtol=0, atol=1e-5)


def test_a_model_whose_tokens_see_other_sequences_is_refused() -> None:
    """OPT finds positions out by itself."""
    model = AutoModelForCausalLM.from_config(
        OPTConfig(vocab_size=61, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(MemplanError, match="OPTForCausalLM is of type 'opt', of which it is not known that"):
        batch_logprobs(model, Collate(tokens=100)(samples_of(2)))


def test_positions_stay_inside_a_model_s_table() -> None:
    """Of 64, where a row has 256 tokens."""
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    padded = Collate(tokens=256, packed=False)(samples_of(4))
    model.eval()
    found, expected = batch_logprobs(model, pack(padded, 256)), batch_logprobs(model, padded)
    there = padded["completion_mask"] > 0
    torch.testing.assert_close(found[there], expected[there], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("attention", "rope", "says"),
    [
        ("flex_attention", "default", "has attention 'flex_attention', which does not read the mask of shared prompts"),
        ("sdpa", "dynamic", "turns all positions by the longest sequence"),
    ],
)
def test_what_is_packed_wrongly_is_refused(attention: str, rope: str, says: str) -> None:
    config = LlamaConfig(**SMALL, rope_parameters={"rope_type": rope, "factor": 4.0, "rope_theta": 1e4})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with pytest.raises(MemplanError, match=says):
        batch_logprobs(model, Collate(tokens=100, shared_prompts=True)(samples_of(2)))


def test_a_model_with_a_state_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(MemplanError, match="MambaForCausalLM carries a state from token to token"):
        batch_logprobs(model, Collate(tokens=100)(samples_of(2)))


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    group=st.integers(1, 4),
    packed=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_batches(lengths: list[int], group: int, packed: bool, epoch: int) -> None:
    lengths = lengths * group
    made = TokenBatches(lengths, 64, group=group, packed=packed, large_group="split")
    made.set_epoch(epoch)
    batches = list(made)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in b) if packed else max(lengths[i] for i in b) * len(b) for b in batches]
    assert max(sizes) <= 64
    assert packed or sizes[0] == max(sizes)
    assert max(map(len, batches)) <= made.limits["batch"] and made.limits["tokens"] == max(lengths)
    assert made.computed == (64 * len(batches) if packed else sum(sizes))
    again = TokenBatches(lengths, 64, group=group, packed=packed, large_group="split")
    again.set_epoch(epoch)
    assert list(again) == batches and len(again) == len(batches)
    for first in range(0, len(lengths), group):
        members = set(range(first, first + group))
        size = sum(lengths[i] for i in members) if packed else max(lengths[i] for i in members) * group
        if size <= 64:
            assert sum(bool(members & set(batch)) for batch in batches) == 1
    if packed:  # first fit: no two batches would go into one, but for one
        assert sum(size <= 32 for size in sizes) <= 1


@settings(deadline=None, max_examples=50)
@given(groups=st.integers(1, 8), group=st.integers(1, 4), seed=st.integers(0, 10**6), large=st.integers(0, 1))
def test_batches_of_shared_prompts(groups: int, group: int, seed: int, large: int) -> None:
    """What they take is what `pack` needs, and no row more would have fitted."""
    samples = samples_of(groups * group, group, seed)
    lengths = [len(s["prompt"]) + len(s["completion"]) for s in samples]
    tokens = max(lengths) if large else 200
    prompts = [len(s["prompt"]) for s in samples]
    made = TokenBatches(lengths, tokens, group=group, prompts=prompts, large_group="split")
    plain = TokenBatches(lengths, tokens, group=group, large_group="split")
    assert made.computed <= plain.computed
    for batch in made:
        assert len(batch) <= made.limits["batch"]
        rows = [samples[i] for i in batch]
        Collate(tokens, shared_prompts=True)(rows)
        size = made._size(batch)
        with pytest.raises(MemplanError, match=f"the batch has {size} tokens"):
            pack(Collate(10_000, packed=False)(rows), size - 1, shared_prompts=True)


def test_epochs_differ() -> None:
    made = TokenBatches([7, 9, 30, 4, 5, 6] * 4, 64)
    first = list(made)
    made.set_epoch(1)
    assert list(made) != first


def test_bad_input() -> None:
    for match, lengths, options in (
        ("there are no samples", [], {}),
        ("3 samples are no whole number of groups of 2", [1, 2, 3], {"group": 2}),
        (r"sample 1 has 65 tokens, and a batch 64: give more, .*too_long=\"truncate\"", [1, 65], {}),
        (r"the group of samples 2 to 3 has 80 tokens, and a batch 64", [1, 2, 40, 40], {"group": 2}),
        ("group=-2, tokens=64, and samples of 1: each is 1 at least", [1, 2], {"group": -2}),
        ("1 prompts for 2 samples, packed=True", [1, 2], {"prompts": [1]}),
        (
            "2 prompts for 2 samples, packed=False: .* only where batches are packed",
            [1, 2],
            {"prompts": [1, 1], "packed": False},
        ),
        ("too_long='split' is not offered: it is 'refuse' or 'truncate'", [1], {"too_long": "split"}),
        ("large_group='cut' is not offered: it is 'refuse' or 'split'", [1], {"large_group": "cut"}),
    ):
        with pytest.raises(MemplanError, match=match):
            TokenBatches(lengths, 64, **options)  # type: ignore[arg-type]
    sample, other = samples_of(2, longest=8)
    for match, samples in (
        ("a batch of no samples", []),
        (
            "sample 1 of a batch has no ref_logprobs, and others have",
            [sample | {"ref_logprobs": sample["old_logprobs"]}, other | {"ref_logprobs": None}],
        ),
    ):
        with pytest.raises(MemplanError, match=match):
            Collate(tokens=64)(samples)
    with pytest.raises(MemplanError, match=r"9 rows of .* tokens are more than the 64 of a batch"):
        Collate(tokens=64, packed=False)([samples_of(1, longest=40)[0]] * 9)
    with pytest.raises(MemplanError, match="has no prompt"):
        Collate(tokens=64)([sample | {"prompt": []}])
    with pytest.raises(MemplanError, match=r"sample 0 of a batch has 1 old_logprobs for 2 tokens"):
        Collate(tokens=64)([sample | {"completion": [1, 2], "old_logprobs": [0.0]}])


def test_what_is_too_long_is_cut_at_its_end() -> None:
    sample = {"prompt": [1, 2], "completion": [3, 4, 5, 6], "advantage": 1.0, "old_logprobs": [-1.0, -2, -3, -4]}
    assert list(TokenBatches([6], 4, too_long="truncate")) == [[0]]
    with pytest.raises(MemplanError, match="a sample has 6 tokens, and a batch 4: give more, as to TokenBatches, or"):
        Collate(tokens=4)([sample])
    batch = Collate(tokens=4, too_long="truncate")([sample])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4]] and batch["completion_mask"].tolist() == [[0, 1, 1]]
    assert batch["old_logprobs"].tolist() == [[0, -1, -2]]


@pytest.mark.usefixtures("fresh_dynamo", "one_thread")
@pytest.mark.parametrize("shared", [pytest.param(False, marks=pytest.mark.slow), True])
def test_epochs_stay_inside_a_budget_and_plan_no_more(shared: bool, made: list[Plan]) -> None:
    """Of a DataLoader over a dataset. What the model is given has one size, what the loss is given has several."""
    from datasets import Dataset

    samples = samples_of(24, group=4, longest=60)
    batches = TokenBatches([len(s["prompt"]) + len(s["completion"]) for s in samples], 256, group=4)
    collate = Collate(tokens=256, shared_prompts=shared)
    loader = DataLoader(Dataset.from_list(samples), batch_sampler=batches, collate_fn=collate)
    model = model_of("llama")

    def run(backend: Any, **how: Any) -> tuple[list[int], list[list[Any]]]:
        step, found, peaks = torch.compile(make_step(model), backend=backend, fullgraph=True, **how), [], []
        for epoch in range(2):
            batches.set_epoch(epoch)
            for batch in loader:
                model.zero_grad()
                if epoch:  # which would fail if a step were planned in it
                    with memplan.record("cpu") as seen:
                        step(batch).backward()
                    held = [*model.parameters(), *model.buffers(), *batch.values()]
                    peaks.append(seen.timeline.peak_above_base + sum(t.nbytes for t in held))
                else:
                    step(batch).backward()
                found.append([p.grad.numpy().copy() for p in model.parameters()])  # arrays are not recorded
        return peaks, found

    unplanned, expected = run("aot_eager")
    torch._dynamo.reset()
    budget = max(unplanned) * 3 // 4
    peaks, found = run(memplan_backend, options={"budget": budget, "inner": "eager", "limits": batches.limits})
    assert len(loader) > 2 and len(made) <= 2
    assert max(peaks) <= budget
    for ours, theirs in zip(found, expected, strict=True):
        assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))
