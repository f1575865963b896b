"""Properties of the losses and their options: closed-form gradients, equal policies, masked tokens, one graph."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

from memplan.errors import MemplanError
from memplan.grpo import (
    GRPOConfig,
    batch_loss,
    kl_estimate,
    kl_in_reward,
    off_policy_mask,
    policy_ratio,
    reduce_loss,
    sampler_ratio,
    selected_logprobs,
    sequence_ratio,
    token_entropies,
    top_entropy_mask,
)

KLS = ["k2", "k3", "k3_is", "fkl"]
CONFIGS = {
    "grpo": GRPOConfig(),
    "bnpo": GRPOConfig(loss_type="bnpo"),
    "dr_grpo": GRPOConfig(loss_type="dr_grpo", max_completion_length=9),
    "dapo": GRPOConfig(loss_type="dapo", clip_high=0.28, delta=1.5),
    "luspo": GRPOConfig(loss_type="luspo", importance_level="sequence"),
    "gspo": GRPOConfig(importance_level="sequence", clip_low=0.05, clip_high=0.04),
    "cispo": GRPOConfig(loss_type="cispo", clip_high=1.1),
    "cispo, sequence": GRPOConfig(loss_type="cispo", clip_high=1.1, importance_level="sequence"),
    "sapo": GRPOConfig(loss_type="sapo"),
    "sapo, sequence": GRPOConfig(loss_type="sapo", importance_level="sequence"),
    "vespo": GRPOConfig(loss_type="vespo"),
}
EVERYTHING = {
    "beta": 0.1,
    "kl": "k3_is",
    "entropy_bonus": 0.01,
    "top_entropy": 0.6,
    "sampler_correction": "token_truncate",
    "off_policy_threshold": 0.02,
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
each_kl = pytest.mark.parametrize("kind", KLS)


def for_seeds(test):
    """A property of every seed; without a deadline, as the first call of a torch op can take a second."""
    return settings(deadline=None, max_examples=25)(given(seed=st.integers(0, 2**31))(test))


def draw(seed=0, rows=4, tokens=7, spread=0.3, dtype=torch.float64):
    """New log-probs and entropies, and a batch of everything else; the last row has no completion."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    old = -3 * torch.rand(rows, tokens, generator=g).to(dtype) - 0.2
    mask = (torch.rand(rows, tokens, generator=g) < 0.7).to(dtype)
    mask[:, 0], mask[-1] = 1, 0
    batch = {
        "completion_mask": mask,
        "advantages": normal(rows),
        "old_logprobs": old,
        "ref_logprobs": old + spread * normal(rows, tokens),
        "sampler_logprobs": old + spread / 3 * normal(rows, tokens),
        "completion_tokens": torch.tensor(31, dtype=dtype),
    }
    new = old + spread * normal(rows, tokens)
    entropies = torch.rand(rows, tokens, generator=g).to(dtype)
    return new.requires_grad_(), entropies.requires_grad_(), batch


def gradient(config, new, entropies, batch):
    loss = batch_loss(new, batch, config, entropies)
    found = torch.autograd.grad(loss, (new, entropies), allow_unused=True)
    return loss.detach(), *(torch.zeros_like(new) if g is None else g for g in found)


def weights(config, batch):
    """What a unit of per-token loss adds to the loss, [B, N]."""
    mask = batch["completion_mask"]
    rows = len(mask)
    by_row = mask / mask.sum(-1, keepdim=True).clamp(min=1) / rows
    return {
        "grpo": by_row,
        "sapo": by_row,
        "bnpo": mask / mask.sum(),
        "dr_grpo": mask / (rows * 9),
        "luspo": mask / rows,
    }.get(config.loss_type, mask / 31)


# Per-token losses


@each_config
@for_seeds
def test_gradients_are_those_of_the_table(config, seed):
    """d loss / d l as a formula, each factor written out here; a sequence's ratio adds up its tokens' gradients."""
    new, entropies, batch = draw(seed)
    mask, a = batch["completion_mask"], batch["advantages"][:, None]
    difference = (new - batch["old_logprobs"]).detach()
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    by_sequence = config.importance_level == "sequence"
    w = ((difference * mask).sum(-1, keepdim=True) / count if by_sequence else difference).exp().expand_as(mask)
    if config.loss_type == "cispo":
        expected = -w.clamp(max=config.clip_high) * a
    elif config.loss_type == "sapo":
        s = torch.sigmoid(torch.where(a > 0, 1.0, 1.05) * (w - 1))
        expected = -4 * a * s * (1 - s) * w
    elif config.loss_type == "vespo":
        whole = (difference * mask).sum(-1, keepdim=True).exp()
        k, rate = torch.where(a >= 0, 2.0, 3.0), torch.where(a >= 0, 3.0, 2.0)
        expected = -a * whole**k * (rate * (1 - whole)).exp()
    else:
        still = (a > 0) & (w > 1 + config.clip_high) | (a < 0) & (w < 1 - config.clip_low)
        still |= (a < 0) & (w > (config.delta or math.inf))
        expected = torch.where(still, 0.0, -a * w)
    expected = expected * weights(config, batch)
    if by_sequence and config.loss_type != "cispo":  # cispo's ratio is a constant
        expected = expected.sum(-1, keepdim=True) * mask / count
    torch.testing.assert_close(gradient(config, new, entropies, batch)[1], expected.expand_as(mask))


DIFFERENTIABLE = [n for n, c in CONFIGS.items() if c.loss_type not in ("cispo", "vespo")]  # these hold a constant


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@each_kl
def test_gradients_are_finite_differences(name, kind):
    config = dataclasses.replace(CONFIGS[name], beta=0.3, kl=kind, entropy_bonus=0.1, sampler_correction="token_mask")
    new, entropies, batch = draw()
    assert torch.autograd.gradcheck(lambda new, h: batch_loss(new, batch, config, h), (new, entropies))


@each_config
@for_seeds
def test_equal_policies_descend_the_policy_gradient(config, seed):
    """At w = 1 all losses are one: d loss / d l = -A times the weight of the token, in every option that is off."""
    _, entropies, batch = draw(seed)
    new = batch["old_logprobs"].clone().requires_grad_()
    expected = -batch["advantages"][:, None] * weights(config, batch)
    if config.importance_level == "sequence" and config.loss_type == "grpo":
        assert torch.equal(
            sequence_ratio(new, batch["old_logprobs"], batch["completion_mask"]), torch.ones(4, 1).double()
        )
    torch.testing.assert_close(gradient(config, new, entropies, batch)[1], expected)


@for_seeds
def test_equal_policies_have_ratio_exactly_one(seed):
    new, _, batch = draw(seed, dtype=torch.float32)
    assert torch.equal(policy_ratio(new, new), torch.ones(4, 7))
    assert torch.equal(sequence_ratio(new, new, batch["completion_mask"]), torch.ones(4, 1))


@each_config
def test_a_ratio_out_of_range_has_a_finite_gradient(config):
    """exp of 200 is inf in float32, and the 0 that a clip multiplies it with would make nan."""
    new, entropies, batch = draw(dtype=torch.float32)
    batch["old_logprobs"] = batch["old_logprobs"] - torch.tensor([200.0, 0, 0, 0])[:, None]
    batch["advantages"] = batch["advantages"].abs()
    assert gradient(config, new, entropies, batch)[1].isfinite().all()


# What is masked


@each_config
@each_kl
@pytest.mark.parametrize("correction", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("absurd", [math.inf, -math.inf, math.nan, -1e30])
def test_what_is_masked_has_no_influence(config, kind, correction, absurd):
    if config.loss_type == "vespo" and correction.startswith("sequence"):
        correction = correction.replace("sequence", "token")
    config = dataclasses.replace(config, **EVERYTHING | {"kl": kind, "sampler_correction": correction})
    new, entropies, batch = draw()
    expected = gradient(config, new, entropies, batch)
    counts = batch["completion_mask"] > 0
    changed = dict(batch)
    for key in ("old_logprobs", "ref_logprobs", "sampler_logprobs"):
        changed[key] = torch.where(counts, batch[key], absurd)
    other, other_entropies = (torch.where(counts, x, absurd).detach().requires_grad_() for x in (new, entropies))
    with torch.autograd.set_detect_anomaly(True):  # nor is there nan on the way that a mask drops later
        found = gradient(config, other, other_entropies, changed)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not found[1][~counts].any() and not found[2][~counts].any() and found[1].any()


@each_config
def test_a_batch_without_completions_has_loss_zero(config):
    config = dataclasses.replace(config, **EVERYTHING)
    new, entropies, batch = draw()
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    batch["completion_tokens"] = torch.tensor(0)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in gradient(config, new, entropies, batch))


# Reductions


@each_config
def test_reductions_skip_what_is_masked_even_inf(config):
    new, _, batch = draw()
    mask = batch["completion_mask"]
    absurd = torch.where(mask > 0, new, math.inf)
    expected = (new * weights(config, batch)).sum()
    torch.testing.assert_close(reduce_loss(absurd, mask, config, batch["completion_tokens"]), expected)


@pytest.mark.parametrize("name", ["dapo", "cispo", "vespo"])
@for_seeds
def test_parts_of_a_batch_add_up_with_the_count_of_the_whole(name, seed):
    new, entropies, batch = draw(seed)
    whole, *_ = gradient(CONFIGS[name], new, entropies, batch)
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = {key: value[rows] if value.dim() else value for key, value in batch.items()}
        parts.append(batch_loss(new[rows], part, CONFIGS[name]))
    torch.testing.assert_close(sum(parts).detach(), whole)


@pytest.mark.parametrize("name", ["dapo", "cispo", "vespo"])
def test_the_count_may_be_a_number_and_must_be_there(name):
    new, _, batch = draw()
    expected = batch_loss(new, batch, CONFIGS[name])
    assert torch.equal(batch_loss(new, batch | {"completion_tokens": 31}, CONFIGS[name]), expected)
    empty = batch | {"completion_mask": torch.zeros_like(new), "completion_tokens": 0}
    assert batch_loss(new, empty, CONFIGS[name]) == 0
    with pytest.raises(MemplanError, match=rf"'{name}' divides by batch\['completion_tokens'\]"):
        batch_loss(new, {k: v for k, v in batch.items() if k != "completion_tokens"}, CONFIGS[name])
    with pytest.raises(MemplanError, match="completion_tokens"):
        reduce_loss(new, batch["completion_mask"], CONFIGS[name])


# KL


@each_kl
@for_seeds
def test_kl_is_exactly_zero_between_equal_policies(kind, seed):
    new, _, batch = draw(seed, dtype=torch.float32)
    assert torch.equal(kl_estimate(new, new, batch["old_logprobs"], kind), torch.zeros(4, 7))


def enumerated(seed, size=11):
    """Logits of a policy over a whole vocabulary, and log-probs of a reference and of an older policy."""
    g = torch.Generator().manual_seed(seed)
    logits, ref, change = torch.randn(3, size, dtype=torch.float64, generator=g)
    return logits.requires_grad_(), ref.log_softmax(0), (logits.detach() + 0.5 * change).log_softmax(0)


EXACT = {
    ("k2", "on"): "reverse",
    ("k3", "on"): "forward",
    ("k3_is", "on"): "reverse",
    ("k3_is", "off"): "reverse",
    ("fkl", "on"): "forward",
    ("fkl", "off"): "forward",
}


@pytest.mark.parametrize("policy", ["on", "off"])
@each_kl
@for_seeds
def test_expected_gradients_by_enumeration(kind, policy, seed):
    """Which divergence an estimator descends, where tokens come from the policy itself or from an older one."""
    logits, ref, older = enumerated(seed)
    new = logits.log_softmax(0)
    old = new.detach() if policy == "on" else older
    found = torch.autograd.grad((old.exp() * kl_estimate(new, ref, old, kind)).sum(), logits, retain_graph=True)[0]
    divergences = {"reverse": (new.exp() * (new - ref)).sum(), "forward": (ref.exp() * (ref - new)).sum()}
    for direction, divergence in divergences.items():
        exact = torch.autograd.grad(divergence, logits, retain_graph=True)[0]
        off = ((found - exact).norm() / exact.norm()).item()
        assert off < 1e-12 if EXACT.get((kind, policy)) == direction else off > 1e-3


@pytest.mark.parametrize("kind, exact", [("k2", False), ("k3", True), ("k3_is", True), ("fkl", True)])
def test_which_values_are_unbiased(kind, exact):
    logits, ref, old = enumerated(0)
    new = logits.detach().log_softmax(0)
    sampled = new if kind in ("k2", "k3") else old
    value = (sampled.exp() * kl_estimate(new, ref, sampled, kind)).sum()
    forward, reverse = (ref.exp() * (ref - new)).sum(), (new.exp() * (new - ref)).sum()
    assert torch.allclose(value, forward if kind == "fkl" else reverse, rtol=1e-12) is exact


@for_seeds
def test_k1_in_the_reward_is_the_reverse_kl(seed):
    """The score-function gradient of rewards less beta times k1 is that of E[R] - beta KL(policy || reference)."""
    logits, ref, _ = enumerated(seed)
    rewards = torch.arange(11.0, dtype=torch.float64)
    new = logits.log_softmax(0)
    shaped = kl_in_reward(rewards, new.detach()[:, None], ref[:, None], torch.ones(11, 1), beta=0.7)
    found = torch.autograd.grad((new.exp().detach() * shaped * new).sum(), logits, retain_graph=True)[0]
    objective = (new.exp() * rewards).sum() - 0.7 * (new.exp() * (new - ref)).sum()
    torch.testing.assert_close(found, torch.autograd.grad(objective, logits)[0])


def test_k1_counts_the_tokens_of_the_completion_alone():
    old, ref = torch.tensor([[-1.0, -2.0, math.inf]]), torch.tensor([[-1.5, -2.25, math.nan]])
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    torch.testing.assert_close(kl_in_reward(torch.ones(1), old, ref, mask, beta=0.1), torch.tensor([1 - 0.1 * 0.75]))


# Corrections


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@for_seeds
def test_a_sampler_that_agrees_is_not_corrected(mode, seed):
    new, _, batch = draw(seed)
    config = GRPOConfig(sampler_correction=mode)
    agreeing = batch | {"sampler_logprobs": batch["old_logprobs"].clone()}
    assert torch.equal(batch_loss(new, agreeing, config), batch_loss(new, batch, GRPOConfig()))
    unknown = batch | {"sampler_logprobs": torch.full_like(new, math.nan)}
    assert torch.equal(batch_loss(new, unknown, config), batch_loss(new, batch, GRPOConfig()))
    assert not torch.equal(batch_loss(new, batch, config), batch_loss(new, batch, GRPOConfig()))


@for_seeds
def test_truncated_and_masked_sampler_ratios_differ_only_out_of_bounds(seed):
    _, _, batch = draw(seed, spread=3)
    old, sampler, mask = batch["old_logprobs"], batch["sampler_logprobs"], batch["completion_mask"]
    for level in ("token", "sequence"):
        cut, none = (sampler_ratio(old, sampler, mask, f"{level}_{how}", 0.5, 2.0) for how in ("truncate", "mask"))
        exact = ((old - sampler) * mask if level == "token" else ((old - sampler) * mask).sum(-1, keepdim=True)).exp()
        within = (exact >= 0.5) & (exact <= 2)
        torch.testing.assert_close(cut[within], exact[within])
        torch.testing.assert_close(none, torch.where(within, cut, 0.0))
        assert set(cut[~within].tolist()) <= {0.5, 2.0}
        assert not sampler_ratio(old.requires_grad_(), sampler, mask, f"{level}_mask").requires_grad


@for_seeds
def test_off_policy_mask_drops_only_bad_completions_that_the_policy_left(seed):
    new, _, batch = draw(seed)
    mask, advantages, old = batch["completion_mask"], batch["advantages"], batch["old_logprobs"]
    kept = off_policy_mask(new, old, mask, advantages, threshold=0.05)[:, 0] > 0
    left = ((old - new) * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    assert torch.equal(~kept, (advantages < 0) & (left > 0.05))
    assert not off_policy_mask(new, old, mask, -advantages.abs(), threshold=0.05).requires_grad
    some = torch.rand_like(old) < 0.5
    unknown, equal = (torch.where(some, x, old) for x in (torch.tensor(math.nan).double(), new))
    found = [off_policy_mask(new, s, mask, advantages, threshold=0.01) for s in (unknown, equal)]
    assert torch.equal(*found)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), share=st.floats(0, 1))
def test_top_entropy_is_the_quantile_of_what_counts(seed, share):
    _, entropies, batch = draw(seed, rows=5, tokens=9, dtype=torch.float32)
    counts = batch["completion_mask"] > 0
    kept = top_entropy_mask(entropies.detach(), batch["completion_mask"], share)
    threshold = torch.quantile(entropies.detach()[counts], 1 - share)
    assert torch.equal(kept, counts & (entropies >= threshold))
    assert kept[counts].sum() >= max(1, math.floor(share * (counts.sum() - 1)))


@for_seeds
def test_the_entropy_bonus_is_a_mean_over_the_tokens_of_high_entropy(seed):
    new, entropies, batch = draw(seed)
    batch["advantages"] = torch.zeros(4).double()
    kept = top_entropy_mask(entropies, batch["completion_mask"], 0.5)
    for config in (GRPOConfig(top_entropy=0.5, entropy_bonus=0.2), GRPOConfig(entropy_bonus=0.2)):
        acting = kept if config.top_entropy < 1 else batch["completion_mask"] > 0
        loss, _, found = gradient(config, new, entropies, batch)
        torch.testing.assert_close(loss, -0.2 * entropies.detach()[acting].mean())
        torch.testing.assert_close(found, -0.2 * acting.double() / acting.sum())


# Log-probs and entropies


@pytest.mark.parametrize("margin", [0.0, 5.0, 17.0, 30.0, 60.0])
def test_log_probs_of_certain_tokens_keep_value_and_gradient(margin):
    """z_t - logsumexp z would be 0 from 17 nats on, with no gradient."""
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    logits[:, 2] = logits.max() + margin
    tokens = torch.full((3,), 2)
    found, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    value = selected_logprobs(found, tokens)
    others = exact[:, [0, 1, 3, 4, 5, 6, 7]].logsumexp(-1)
    true = -torch.log1p((others - exact[:, 2]).exp())
    torch.testing.assert_close(value.double(), true, rtol=1e-5, atol=0)
    value.sum().backward()
    true.sum().backward()
    torch.testing.assert_close(found.grad.double(), exact.grad, rtol=1e-5, atol=0)
    assert (found.grad != 0).all()


@for_seeds
def test_log_prob_gradients_are_finite_differences(seed):
    g = torch.Generator().manual_seed(seed)
    logits = (6 * torch.randn(2, 3, 5, dtype=torch.float64, generator=g)).requires_grad_()
    tokens = torch.randint(5, (2, 3), generator=g)
    assert torch.autograd.gradcheck(lambda z: selected_logprobs(z, tokens, 0.7, 1.3, 20.0), logits)
    assert torch.autograd.gradcheck(lambda z: token_entropies(z, 0.7, 1.3, 20.0), logits)


@pytest.mark.parametrize("equal", [2, 5])
def test_equal_logits_have_the_gradient_of_softmax(equal):
    """Where both branches of the formula meet."""
    logits = torch.zeros(1, equal, requires_grad=True)
    selected_logprobs(logits, torch.zeros(1, dtype=torch.long)).sum().backward()
    torch.testing.assert_close(logits.grad, F.one_hot(torch.zeros(1).long(), equal) - 1 / equal)


@pytest.mark.parametrize("vocabulary", [1, 4])
def test_tokens_that_are_never_sampled_do_no_harm(vocabulary):
    """Logits of -inf, up to all but the token's own."""
    logits = torch.full((2, vocabulary), -math.inf)
    logits[:, 0] = 3.0
    if vocabulary > 1:
        logits[1, 1] = 2.0
    logits.requires_grad_()
    tokens = torch.zeros(2, dtype=torch.long)
    values = selected_logprobs(logits, tokens), token_entropies(logits)
    exact = torch.log_softmax(logits.detach(), -1)
    torch.testing.assert_close(values[0], exact[:, 0])
    torch.testing.assert_close(values[1], -(exact.exp() * exact).nan_to_num(nan=0).sum(-1))
    sum(v.sum() for v in values).backward()
    assert logits.grad.isfinite().all()


@for_seeds
def test_scale_then_softcap_then_temperature(seed):
    g = torch.Generator().manual_seed(seed)
    logits = 20 * torch.randn(3, 5, 11, dtype=torch.float64, generator=g)
    tokens = torch.randint(11, (3, 5), generator=g)
    exact = (30 * torch.tanh(logits * 0.5 / 30) / 0.7).log_softmax(-1)
    found = selected_logprobs(logits, tokens, 0.7, 0.5, 30.0)
    torch.testing.assert_close(found, exact.gather(-1, tokens[..., None])[..., 0])
    torch.testing.assert_close(token_entropies(logits, 0.7, 0.5, 30.0), -(exact.exp() * exact).sum(-1))


def test_entropies_are_float32_and_log_v_for_equal_logits():
    found = token_entropies(torch.zeros(2, 3, 64, dtype=torch.bfloat16))
    torch.testing.assert_close(found, torch.full((2, 3), math.log(64)))


# One graph


@each_config
def test_every_option_is_one_graph(config):
    config = dataclasses.replace(config, **EVERYTHING)
    new, entropies, batch = draw(dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(lambda new, h: batch_loss(new, batch, config, h), backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(new, entropies), (new, entropies))
    torch.testing.assert_close(found, gradient(config, new, entropies, batch)[1:])


@each_config
@pytest.mark.parametrize("correction", ["token_mask", "sequence_truncate"])
def test_nothing_waits_for_the_device(config, correction):
    """Fake tensors have no values: whatever reads one on the host raises."""
    if config.loss_type == "vespo":
        correction = "token_truncate"
    config = dataclasses.replace(config, **EVERYTHING | {"sampler_correction": correction})
    with FakeTensorMode():
        new, entropies, batch = draw(dtype=torch.float32)
        loss = gradient(config, new, entropies, batch)[0]
        with pytest.raises(DataDependentOutputException):
            loss.item()


# Options


REFUSED = {
    "'gspo' is not offered": {"loss_type": "gspo"},
    "'k1' is not offered.*kl_in_reward": {"kl": "k1"},
    "importance_level 'row' is not offered": {"importance_level": "row"},
    "sampler_correction 'token' is not offered": {"sampler_correction": "token"},
    "'luspo'.*importance_level='sequence'": {"loss_type": "luspo"},
    "'vespo'.*importance_level='token'": {"loss_type": "vespo", "importance_level": "sequence"},
    "'vespo'.*'token_mask'": {"loss_type": "vespo", "sampler_correction": "sequence_mask"},
    "delta=4.*'cispo'": {"loss_type": "cispo", "clip_high": 5.0, "delta": 4.0},
    "delta=4.*'sapo'": {"loss_type": "sapo", "delta": 4.0},
    "delta=4.*'vespo'": {"loss_type": "vespo", "delta": 4.0},
    "delta=1.1.*1 \\+ clip_high": {"delta": 1.1},
    "'cispo'.*clip_high=0.2": {"loss_type": "cispo"},
    "'dr_grpo'.*max_completion_length": {"loss_type": "dr_grpo"},
    "top_entropy=1.2": {"top_entropy": 1.2},
    "entropy_bonus=nan": {"entropy_bonus": math.nan},
    "softcap=0": {"softcap": 0.0},
    "logit_scale=-1": {"logit_scale": -1.0},
    "off_policy_threshold=-0.1": {"off_policy_threshold": -0.1},
    "sampler_clip_min=4.*sampler_clip_max=3": {"sampler_correction": "token_mask", "sampler_clip_min": 4.0},
    "'token_truncate'.*sampler_clip_max": {"sampler_correction": "token_truncate", "sampler_clip_max": None},
    "sampler_clip_min=0.5.*sampler_correction": {"sampler_clip_min": 0.5},
    "sapo_tau": {"loss_type": "sapo", "sapo_tau": (1.0, 0.0)},
    "vespo_k": {"loss_type": "vespo", "vespo_k": (-1.0, 2.0)},
    "vespo_lambda": {"loss_type": "vespo", "vespo_lambda": (0.0, 2.0)},
    "beta='1'": {"beta": "1"},
}


@pytest.mark.parametrize("message, options", REFUSED.items(), ids=map(str, REFUSED.values()))
def test_what_cannot_be_is_refused_in_one_line(message, options):
    with pytest.raises(MemplanError, match=message) as caught:
        GRPOConfig(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, missing",
    [
        ({"beta": 0.1}, "ref_logprobs"),
        ({"sampler_correction": "token_mask"}, "sampler_logprobs"),
        ({}, "old_logprobs"),
        ({}, "advantages"),
    ],
    ids=str,
)
def test_what_a_batch_lacks_is_named(options, missing):
    new, entropies, batch = draw()
    del batch[missing]
    with pytest.raises(MemplanError, match=rf"batch\['{missing}'\]"):
        batch_loss(new, batch, GRPOConfig(**options), entropies)


@pytest.mark.parametrize("options", [{"entropy_bonus": 0.1}, {"top_entropy": 0.5}], ids=str)
def test_options_of_entropy_ask_for_entropies(options):
    new, _, batch = draw()
    with pytest.raises(MemplanError, match="entropies"):
        batch_loss(new, batch, GRPOConfig(**options))
