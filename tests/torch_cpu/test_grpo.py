"""The GRPO room against float64 formulas and closed forms: losses, KL estimators, the step, tasks and rollouts."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.demo import CONFIG, small_llama
from memplan.errors import MemplanError
from memplan.grpo import (
    CharTokenizer,
    GRPOConfig,
    clipped_loss,
    group_advantages,
    grpo_loss,
    kl_estimate,
    make_step,
    make_tasks,
    policy_ratio,
    reduce_loss,
    rollout,
    score,
    selected_logprobs,
    token_logprobs,
)

LOSSES = [GRPOConfig(), GRPOConfig(loss_type="bnpo"), GRPOConfig(loss_type="dr_grpo", max_completion_length=7)]
ALL_LOSSES = [
    *LOSSES,
    GRPOConfig(loss_type="dapo"),
    GRPOConfig(loss_type="luspo", importance_level="sequence"),
    GRPOConfig(loss_type="cispo", clip_high=5.0),
    GRPOConfig(loss_type="sapo"),
    GRPOConfig(loss_type="vespo"),
]
ENTROPY = GRPOConfig(entropy_bonus=0.01, top_entropy=0.5, logit_scale=1.5, softcap=30.0)
KLS = ["k2", "k3", "k3_is"]


def for_seeds(test):
    """A property of every seed; without a deadline, as the first call of a torch op can take a second."""
    return settings(deadline=None, max_examples=50)(given(seed=st.integers(0, 2**31))(test))


def by_name(config):
    return config.loss_type


def draw(seed, rows=4, tokens=7):
    """Log-probs of new, old and reference policy, advantages and a mask, in float64."""
    g = torch.Generator().manual_seed(seed)
    old, ref, new = (-4 * torch.rand(rows, tokens, dtype=torch.float64, generator=g) for _ in range(3))
    new = old + 0.2 * (new - old)
    advantages = torch.randn(rows, dtype=torch.float64, generator=g)
    mask = (torch.rand(rows, tokens, generator=g) < 0.7).double()
    return new.requires_grad_(), old, ref, advantages, mask


@pytest.fixture(scope="module")
def tokenizer():
    return CharTokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return small_llama(tokenizer, hidden=32, layers=2)


@pytest.fixture(scope="module")
def sampled(model, tokenizer):
    return rollout(model, make_tasks(count=2), tokenizer, group_size=4, max_new_tokens=8)


# Losses


@for_seeds
def test_selected_logprobs_are_the_formula(seed):
    g = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(3, 5, 11, generator=g)
    tokens = torch.randint(11, (3, 5), generator=g)
    exact = logits.double() / 0.7
    exact = exact.gather(-1, tokens[..., None])[..., 0] - exact.exp().sum(-1).log()
    torch.testing.assert_close(selected_logprobs(logits, tokens, 0.7).double(), exact, rtol=0, atol=1e-5)


def test_selected_logprobs_are_float32_for_bfloat16_logits():
    logits = torch.randn(2, 3, 11, dtype=torch.bfloat16)
    tokens = torch.zeros(2, 3, dtype=torch.long)
    torch.testing.assert_close(selected_logprobs(logits, tokens), selected_logprobs(logits.float(), tokens))


@for_seeds
def test_gradient_is_minus_advantage_times_ratio_where_not_clipped(seed):
    new, old, _, advantages, _ = draw(seed)
    ratio = policy_ratio(new, old)
    (gradient,) = torch.autograd.grad(clipped_loss(ratio, advantages, 0.1, 0.2).sum(), new)
    a = advantages[:, None].expand_as(ratio)
    clipped = (ratio > 1.2) & (a > 0) | (ratio < 0.9) & (a < 0)
    torch.testing.assert_close(gradient, torch.where(clipped, 0.0, -a * ratio).detach())


@pytest.mark.parametrize("config", LOSSES, ids=by_name)
def test_loss_is_the_formula(config):
    new, old, _, advantages, mask = draw(0)
    per_token = clipped_loss(policy_ratio(new, old), advantages, 0.2, 0.3)
    total, rows = 0.0, len(mask)
    for i in range(rows):
        counted = [j for j in range(mask.shape[1]) if mask[i, j]]
        for j in counted:
            w, a = math.exp(new[i, j].item() - old[i, j].item()), float(advantages[i])
            scale = {"grpo": rows * len(counted), "bnpo": float(mask.sum()), "dr_grpo": rows * 7}[config.loss_type]
            total -= min(w * a, min(max(w, 0.8), 1.3) * a) / scale
    assert reduce_loss(per_token, mask, config).item() == pytest.approx(total, rel=1e-12)


@for_seeds
def test_equal_policies_give_minus_the_mean_advantage(seed):
    new, _, _, advantages, mask = draw(seed)
    mask[:, 0] = 1  # no empty completion
    per_token = clipped_loss(policy_ratio(new, new.detach()), advantages, 0.2, 0.2)
    torch.testing.assert_close(reduce_loss(per_token, mask, GRPOConfig()), -advantages.mean())


@pytest.mark.parametrize("config", LOSSES, ids=by_name)
def test_empty_completions_and_batches_give_zero(config):
    per_token = torch.randn(3, 5)
    assert reduce_loss(per_token, torch.zeros(3, 5), config) == 0


# KL estimators


@pytest.mark.parametrize("kind", KLS)
@for_seeds
def test_kl_is_zero_at_equality_and_never_negative(kind, seed):
    new, old, ref, _, _ = draw(seed)
    assert torch.equal(kl_estimate(ref, ref, old, kind), torch.zeros_like(ref))
    assert kl_estimate(new, ref, old, kind).min() >= -1e-14


@for_seeds
def test_kl_gradients_are_their_closed_forms(seed):
    new, old, ref, _, _ = draw(seed)
    closed = {"k2": new - ref, "k3": 1 - torch.exp(ref - new), "k3_is": torch.exp(new - old) * (new - ref)}
    for kind, expected in closed.items():
        (gradient,) = torch.autograd.grad(kl_estimate(new, ref, old, kind).sum(), new)
        torch.testing.assert_close(gradient, expected.detach())


@pytest.mark.parametrize("kind, direction", [("k2", "reverse"), ("k3", "forward"), ("k3_is", "reverse")])
def test_expected_kl_gradient_by_enumeration(kind, direction):
    """Over a whole vocabulary, on-policy: k2 and k3_is descend KL(policy || reference), k3 KL(reference || policy)."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(9, dtype=torch.float64, generator=g).requires_grad_()
    ref = torch.randn(9, dtype=torch.float64, generator=g).log_softmax(0)
    new = logits.log_softmax(0)
    expected = (new.detach().exp() * kl_estimate(new, ref, new.detach(), kind)).sum()
    exact = (new.exp() * (new - ref)).sum() if direction == "reverse" else (ref.exp() * (ref - new)).sum()
    (gradient,) = torch.autograd.grad(expected, logits, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(exact, logits)[0])


def test_k3_is_gradient_does_not_overflow():
    new = torch.tensor([[-120.0]], requires_grad=True)  # exp(r - l) is inf in float32
    (gradient,) = torch.autograd.grad(
        kl_estimate(new, torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), "k3_is").sum(), new
    )
    assert torch.isfinite(gradient).all()


# Advantages


@pytest.mark.parametrize("scale", [True, False])
@for_seeds
def test_advantages_sum_to_zero_in_each_group(scale, seed):
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(seed))
    groups = group_advantages(rewards, 4, scale=scale).view(3, 4)
    torch.testing.assert_close(groups.sum(-1), torch.zeros(3), rtol=0, atol=1e-5)
    if scale:
        torch.testing.assert_close(groups.std(-1), torch.ones(3), rtol=0, atol=0.02)


def test_equal_rewards_have_no_advantage():
    for count, reward, dtype in itertools.product(
        (3, 7, 8), (0.1, 0.7, 100.1, 10000.1), (torch.float32, torch.float64)
    ):
        rewards = torch.full((count,), reward, dtype=dtype)
        assert torch.equal(group_advantages(rewards, count), torch.zeros(count))


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_named(reward):
    rewards = torch.rand(8)
    rewards[5] = reward
    with pytest.raises(MemplanError, match=f"reward 5 is {reward}, of completion 1 in group 1: rewards are finite"):
        group_advantages(rewards, 4)


@pytest.mark.parametrize("group_size", [0, 1, 3])
def test_advantages_need_whole_groups(group_size):
    with pytest.raises(MemplanError, match="do not split into groups"):
        group_advantages(torch.rand(8), group_size)


# Options


def test_a_loss_type_that_is_not_offered_is_refused_by_name():
    with pytest.raises(MemplanError, match=r"'dr-grpo' is not offered: .* did you mean 'dr_grpo'\?"):
        GRPOConfig(loss_type="dr-grpo")
    with pytest.raises(MemplanError, match="'rloo' is not offered: it is one of grpo, bnpo, dr_grpo, dapo, luspo, ci"):
        GRPOConfig(loss_type="rloo")


@pytest.mark.parametrize(
    "options",
    [
        {"kl": "k1"},
        {"clip_low": -0.1},
        {"clip_low": 1.5},
        {"clip_high": float("nan")},
        {"beta": -1.0},
        {"temperature": 0.0},
        {"loss_type": "dr_grpo"},
    ],
    ids=str,
)
def test_options_without_meaning_are_refused(options):
    with pytest.raises(MemplanError):
        GRPOConfig(**options)


# The step


@pytest.mark.parametrize("config", [*ALL_LOSSES, CONFIG, ENTROPY], ids=[*map(by_name, ALL_LOSSES), "demo", "entropy"])
def test_step_is_one_graph_with_the_same_gradients(model, sampled, config):
    batch = sampled.batch | {
        "ref_logprobs": sampled.batch["old_logprobs"] - 0.1,
        "completion_tokens": sampled.batch["completion_mask"].sum(),
    }
    step, found = make_step(model, config), []
    torch.compiler.reset()
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        run(batch).backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(found[0], found[1])
    assert any(g.abs().max() > 0 for g in found[0])


def test_first_ratio_is_exactly_one(model, sampled):
    batch = sampled.batch
    logprobs = token_logprobs(model, batch["input_ids"])
    assert torch.equal(policy_ratio(logprobs, batch["old_logprobs"]), torch.ones_like(logprobs))


@pytest.mark.parametrize("config", LOSSES, ids=by_name)
@pytest.mark.parametrize("kind", KLS)
def test_what_is_masked_never_matters(model, sampled, config, kind):
    """Neither padding tokens nor log-probs of masked positions, even absurd ones, reach the loss or its gradient."""
    config = dataclasses.replace(config, beta=0.1, kl=kind)
    mask = sampled.batch["completion_mask"].clone()
    mask[:, -3:] = 0
    batch = sampled.batch | {"completion_mask": mask, "ref_logprobs": sampled.batch["old_logprobs"] - 0.1}
    changed = dict(batch)
    changed["input_ids"] = batch["input_ids"].clone()
    changed["input_ids"][:, -3:] = 5
    changed["old_logprobs"] = torch.where(mask > 0, batch["old_logprobs"], -300.0)
    changed["ref_logprobs"] = torch.where(mask > 0, batch["ref_logprobs"], -1.0)
    found = []
    for each in (batch, changed):
        model.zero_grad()
        loss = grpo_loss(model, each, config)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[0], found[1])


def test_beta_without_reference_says_what_is_missing(model, sampled):
    with pytest.raises(MemplanError, match="ref_logprobs"):
        make_step(model, GRPOConfig(beta=0.1))(sampled.batch)


# Tasks and rollouts


@settings(deadline=None)
@given(st.text(alphabet=CharTokenizer().alphabet))
def test_tokenizer_round_trip(text):
    tokenizer = CharTokenizer()
    tokens = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.pad, *tokens, tokenizer.eos, 7, 8]) == text
    assert all(2 <= token < tokenizer.vocab_size for token in tokens)


def test_tokenizer_names_what_it_cannot_encode(tokenizer):
    with pytest.raises(MemplanError, match="é"):
        tokenizer.encode("é")


def test_tasks_are_deterministic_and_verifiable():
    tasks = make_tasks("spell_backward", 5, seed=3)
    assert tasks == make_tasks("spell_backward", 5, seed=3)
    assert tasks != make_tasks("spell_backward", 5, seed=4)
    for task in tasks:
        assert task.reward(task.answer) == task.score(task.answer) == 1
        assert task.reward("") == 0 <= task.reward(task.answer[:-1]) < 1


def test_unknown_data_set_is_refused_by_name():
    with pytest.raises(MemplanError, match="did you mean 'chain_sum'"):
        make_tasks("chain_sums")


def test_rollout_is_deterministic_and_leaves_the_generator_alone(model, tokenizer, sampled):
    state = torch.get_rng_state()
    again = rollout(model, make_tasks(count=2), tokenizer, group_size=4, max_new_tokens=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.completions == sampled.completions
    for name, tensor in sampled.batch.items():
        assert torch.equal(again.batch[name], tensor), name


def test_rollout_packs_prompt_completion_and_padding(model, tokenizer):
    tasks = make_tasks(count=2)
    made = rollout(model, tasks, tokenizer, group_size=4, max_new_tokens=8, length=100)
    ids, mask = made.batch["input_ids"], made.batch["completion_mask"]
    assert ids.shape == (8, 100) and mask.shape == (8, 99)
    for row, completion in enumerate(made.completions):
        start = len(tokenizer.encode(tasks[row // 4].prompt))
        assert tokenizer.decode(ids[row].tolist()) == tasks[row // 4].prompt + completion
        assert tokenizer.decode(ids[row, 1:][mask[row] > 0].tolist()) == completion
        assert mask[row, : start - 1].sum() == 0 and mask[row, start - 1] == 1
        assert made.rewards[row].item() == pytest.approx(tasks[row // 4].reward(completion))


def test_padding_on_the_right_needs_no_attention_mask(model, tokenizer):
    """A prompt in a padded batch has the log-probs that it has alone."""
    tasks = make_tasks(count=4)
    ids = [tokenizer.encode(task.prompt) for task in tasks]
    longest = max(map(len, ids))
    assert min(map(len, ids)) < longest
    right = torch.tensor([p + [tokenizer.pad] * (longest - len(p)) for p in ids])
    alone = [token_logprobs(model, torch.tensor([p])).detach()[0] for p in ids]
    together = token_logprobs(model, right).detach()
    for one, row in zip(alone, together, strict=True):
        torch.testing.assert_close(row[: len(one)], one)


def test_rollout_refuses_a_length_that_does_not_hold_it(model, tokenizer):
    with pytest.raises(MemplanError, match="too short"):
        rollout(model, make_tasks(count=1), tokenizer, group_size=2, max_new_tokens=8, length=10)


def test_completions_from_elsewhere_are_packed_as_the_models_own() -> None:
    tokenizer, tasks = CharTokenizer(), make_tasks(count=2)
    prompts = [tokenizer.encode(task.prompt) for task in tasks]
    completions = [tokenizer.encode("ab"), [*tokenizer.encode("c"), tokenizer.eos], tokenizer.encode("abc"), [5]]
    logprobs = [[-0.5 * (k + 1)] * len(completion) for k, completion in enumerate(completions)]
    length = max(map(len, prompts)) + 4
    rolled = score(tasks, tokenizer, completions, logprobs, length=length)
    assert rolled.completions == ("ab", "c", "abc", tokenizer.decode([5]))
    ids, mask, old = (rolled.batch[name] for name in ("input_ids", "completion_mask", "old_logprobs"))
    assert ids.shape == (4, length) and mask.shape == old.shape == (4, length - 1)
    for row, completion in enumerate(completions):
        own = mask[row].bool()
        assert ids[row, 1:][own].tolist() == completion
        assert ids[row, : len(prompts[row // 2])].tolist() == prompts[row // 2]
        assert old[row][own].tolist() == logprobs[row]
        assert not old[row][~own].any()
    assert rolled.batch["advantages"].view(2, 2).sum(1).abs().max() < 1e-6
    assert "old_logprobs" not in score(tasks, tokenizer, completions, length=length).batch
    with pytest.raises(MemplanError, match="5 completions are not as many for each of 2 tasks"):
        score(tasks, tokenizer, [*completions, [5]], length=length)
    with pytest.raises(MemplanError, match=r"length=30 is too short for row 0: \d+ prompt tokens \+ 2 new ones"):
        score(tasks, tokenizer, completions, length=30)
