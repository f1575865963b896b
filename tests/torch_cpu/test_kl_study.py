"""The KL study: by hand is by autograd, what each KL term descends, no detach, and docs/kl-study.md is its figures."""

import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import kl_study as benchmark
from benchmarks.kl_study import HOLDS, HOW, NO_DETACH, WHO, compared, curves, ends, policies
from examples import kl_study as study
from memplan.grpo import GRPOConfig, batch_loss, policy_ratio

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "kl-study.md"
OFFERED = {"1 k3": "k3", "4 fkl": "fkl", "k2": "k2", "k3_is": "k3_is"}
UNCLIPPED = (1.0, torch.inf)
each_experiment = pytest.mark.parametrize("name", study.EXPERIMENTS)


def for_seeds(test):
    """A property of every seed; without a deadline, as the first call of a torch op can take a second."""
    return settings(deadline=None, max_examples=5)(given(seed=st.integers(0, 2**31))(test))


def close(found, exact, beside=0.0):
    """To 1e-12 of what `exact` or, where that may be nearly nothing, `beside` measures."""
    return (found - exact).abs().max().item() <= 1e-12 * max(exact.abs().max().item(), beside)


# Enumeration


@each_experiment
@pytest.mark.parametrize("who", WHO)
@for_seeds
def test_gradients_by_hand_are_autograds(name, who, seed):
    """Of every sequence alone, and of what is expected."""
    e = study.EXPERIMENTS[name]
    logits, new, ref_logits, old = policies(seed, 1.0, who)
    ref, weights = study.token_logprobs(ref_logits), study.chances(old)
    advantage = study.advantages(e, old, ref, study.REWARDS, weights, 0.3)
    losses = study.token_losses(e, new, ref, old, advantage, 0.3, UNCLIPPED).sum(1)
    found = study.enumerated_gradient(logits, study.slopes(e, new.detach(), ref, old, advantage, 0.3))
    for sequence in (0, seed % len(losses)):
        exact = torch.autograd.grad(losses[sequence], logits, retain_graph=True)[0]
        assert close(found[sequence], exact, beside=1.0)
    exact = torch.autograd.grad(weights @ losses, logits)[0]
    assert close((weights[:, None, None, None] * found).sum(0), exact)


@for_seeds
def test_every_policy_is_one(seed):
    _, new, ref_logits, old = policies(seed, 1.0, "off")
    for logprobs in (new, old, study.token_logprobs(ref_logits)):
        assert study.chances(logprobs).sum().item() == pytest.approx(1, rel=1e-12)


@for_seeds
def test_the_divergence_of_sequences_is_that_of_tokens(seed):
    """Its value, by the chain rule; not its gradient."""
    logits, new, ref_logits, _ = policies(seed, 1.0, "on")
    ref = study.token_logprobs(ref_logits)
    pairs = (
        (study.sequence_kl(new, ref), study.prefix_kl(logits, ref_logits, new.detach())),
        (study.sequence_kl(ref, new), study.prefix_kl(logits, ref_logits, ref, forward=True)),
    )
    for whole, tokens in pairs:
        assert close(tokens, whole) and whole > 0
        gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (whole, tokens)]
        assert close(*gradients) is (
            pairs.index((whole, tokens)) == 1
        )  # of the forward KL prefixes are the reference's


@pytest.mark.parametrize("who", WHO)
@for_seeds
def test_what_each_term_descends(who, seed):
    for name, figures in compared(seed, 1.0, who).items():
        for way, off in figures.items():
            if way not in ("noise", "value"):
                assert off < 1e-12 if (name, who, way) in HOLDS else off > 1e-3, (name, way)


@for_seeds
def test_k1_in_the_reward_ascends_the_reward_less_the_divergence(seed):
    e = study.EXPERIMENTS["k1 in reward"]
    logits, new, ref_logits, old = policies(seed, 1.0, "on")
    ref, weights = study.token_logprobs(ref_logits), study.chances(old)
    advantage = study.advantages(e, old, ref, study.REWARDS, weights, 0.3)
    loss = weights @ study.token_losses(e, new, ref, old, advantage, 0.3).sum(1)
    objective = new.sum(1).exp() @ study.REWARDS - 0.3 * study.sequence_kl(new, ref)
    found, exact = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (-loss, objective))
    assert close(found, exact)


# Losses


@pytest.mark.parametrize("name", OFFERED)
@pytest.mark.parametrize("who", WHO)
def test_the_losses_are_those_that_train(name, who):
    """Of all sequences alike, memplan's own loss of a batch."""
    _, new, ref_logits, old = policies(0, 1.0, who)
    ref, advantage = study.token_logprobs(ref_logits), study.REWARDS - 0.4
    batch = {
        "completion_mask": torch.ones_like(old),
        "advantages": advantage,
        "old_logprobs": old,
        "ref_logprobs": ref,
    }
    config = GRPOConfig(loss_type="dr_grpo", max_completion_length=study.LENGTH, beta=0.3, kl=OFFERED[name])
    found = study.token_losses(study.EXPERIMENTS[name], new, ref, old, advantage, 0.3).mean()
    torch.testing.assert_close(found, batch_loss(new, batch, config), rtol=1e-12, atol=0)


@for_seeds
def test_a_removed_detach_leaves_no_policy_gradient(seed):
    """Not nearly: d exp(l - l) / dl is 1 - 1."""
    logits, new, ref_logits, old = policies(seed, 1.0, "on")
    ref, weights = study.token_logprobs(ref_logits), study.chances(old)
    for name in (NO_DETACH, "1 k3"):
        e = study.EXPERIMENTS[name]
        advantage = study.advantages(e, old, ref, study.REWARDS, weights, 0.0)
        losses = study.token_losses(e, new, ref, old, advantage, beta=0.0).sum(1)
        found = torch.autograd.grad(weights @ losses, logits, retain_graph=True)[0]
        assert (found == 0).all() == (name == NO_DETACH)
    for second in (new, new.detach()):
        for ratio in (policy_ratio(new, second), torch.exp(new - second)):
            found = torch.autograd.grad(ratio.sum(), new, retain_graph=True)[0]
            assert (found == (0 if second is new else 1)).all()


def test_training_without_the_detach_changes_no_bit(monkeypatch):
    monkeypatch.setattr(study, "STEPS", 40)
    moved, curve = study.train(study.EXPERIMENTS[NO_DETACH], seed=0)
    assert (moved == 0).all() and len({at["reward"] for at in curve}) == 1 and {at["kl"] for at in curve} == {0.0}
    assert (study.train(study.EXPERIMENTS["1 k3"], seed=0)[0] != 0).any()


def test_samples_do_what_is_expected_of_them(monkeypatch):
    """A step on many samples is nearly that on all sequences, by probability."""
    monkeypatch.setattr(study, "STEPS", 1)
    for name in ("1 k3", "k1 in reward"):
        monkeypatch.setattr(study, "GROUP", 200_000)
        sampled, expected = (study.train(study.EXPERIMENTS[name], 3, expected=e)[0] for e in (False, True))
        assert 0 < (sampled - expected).norm() < 0.05 * expected.norm()


# The page


def results() -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / "kl_study.json").read_text())


def spread(values: list[float], digits: int, scale: float = 1) -> str:
    """Median (least to most), without a minus before a 0; 0 alone for what is 0 to rounding."""
    if max(map(abs, values)) < 1e-12:
        return "0"
    middle, least, most = (
        f"{round(scale * of(values), digits) + 0.0:.{digits}f}" for of in (statistics.median, min, max)
    )
    return f"{middle} ({least} to {most})"


def gradient_rows(figures: Any) -> Iterator[str]:
    at = figures["gradients"]["1.0"]
    for name, on in at["on"].items():
        off = at["off"][name]
        cells = [spread(row[way], 0, 100) for way in ("reverse, tokens", "forward, tokens") for row in (on, off)]
        cells += [spread(on["reverse, sequences"], 0, 100), spread(on["noise"], 1), spread(on["value"], 2)]
        yield f"| {name} | {' | '.join(cells)} |"


def distance_rows(figures: Any) -> Iterator[str]:
    for distance, at in figures["gradients"].items():
        on = at["on"]
        noise = [a / b for a, b in zip(on["4 fkl"]["noise"], on["1 k3"]["noise"], strict=True)]
        offs = (spread(on[name]["reverse, tokens"], 0, 100) for name in ("1 k3", "3 p (l - r)"))
        sequences = spread(on["k2"]["reverse, sequences"], 0, 100)
        yield f"| {distance} | {' | '.join(offs)} | {sequences} | {spread(noise, 1)} |"


def end_rows(figures: Any) -> Iterator[str]:
    for name in study.EXPERIMENTS:
        cells = [spread(ends(figures, 1, name, "sampled")[key], 3) for key in ("reward", "kl")]
        best = ends(figures, 1, "k1 in reward", "expected")["objective"]
        for updates, how in ((1, "expected"), (1, "sampled"), (10, "sampled")):
            ours = ends(figures, updates, name, how)["objective"]
            cells.append(spread([b - o for b, o in zip(best, ours, strict=True)], 4))
        yield f"| {name} | {' | '.join(cells)} |"


def sentences(figures: Any) -> Iterator[str]:
    left, detach = figures["left"], figures["no_detach"]
    wide = json.loads((ROOT / "benchmarks" / "results" / "kl_estimators.json").read_text())["rows"]["on"]
    yield f"over 32 tokens, a single one long, {100 * wide['p (l - r), as written']['reverse']:.0f} %"
    yield f"agree to {figures['agreement']:.1e} of the largest entry"
    yield f"leaves the reference by {spread(left['3 p (l - r)'], 2)} nats"
    yield f"largest derivative in a log-prob is {detach['with']:.2f} with the detach, and {detach['without']:g} without"
    yield f"Training moves a logit by {detach['moved']:g}"
    yield (
        f"{figures['steps']} steps, groups of {figures['group']}, rate {figures['rate']:g}, beta {figures['beta']:g}, "
        f"{figures['seeds']} seeds"
    )


def test_the_figures_of_the_page_are_those_of_the_benchmark():
    figures, text = results(), " ".join(DOC.read_text().split())
    rows = [*gradient_rows(figures), *distance_rows(figures), *end_rows(figures)]
    for line in (*rows, *sentences(figures)):
        assert " ".join(line.split()) in text, line
    assert figures["broken"] == []
    found = re.findall(r"^\| .*\d \(-?\d.* to .*$", DOC.read_text(), re.MULTILINE)
    assert all(line in rows for line in found) and len(found) == len(rows)


def test_the_benchmark_is_of_this_code():
    """Figures without samples, of one seed: what is committed is what comes out."""
    figures = results()
    for who in WHO:
        for name, row in compared(0, 1.0, who).items():
            for key, value in row.items():
                assert figures["gradients"]["1.0"][who][name][key][0] == pytest.approx(value, rel=1e-6, abs=1e-12)
    end = study.train(study.EXPERIMENTS["1 k3"], 0, expected=True)[1][-1]
    found = ends(figures, 1, "1 k3", "expected")
    assert [found[key][0] for key in ("kl", "reward")] == pytest.approx([end["kl"], end["reward"]], abs=2e-5)


def test_what_the_page_says_in_words():
    """The statements that have no figure of their own."""
    figures = results()
    expected = {name: curves(figures, 1, name, "expected") for name in study.EXPERIMENTS}
    assert expected["1 k3"] == expected["4 fkl"] and expected["k2"] == expected["k3_is"]
    for how in HOW:
        assert curves(figures, 1, "k2", how) == curves(figures, 1, "k3_is", how)
    behind = {
        (name, updates, how): [b - o for b, o in zip(best, ends(figures, updates, name, how)["objective"], strict=True)]
        for best in [ends(figures, 1, "k1 in reward", "expected")["objective"]]
        for name in study.EXPERIMENTS
        for updates in (1, 10)
        for how in HOW
    }
    for (name, updates, how), of in behind.items():
        seeds = range(len(of))
        if name in ("k2", "k3_is"):
            assert all(of[i] < behind["1 k3", updates, how][i] for i in seeds)
        if name == "3 p (l - r)":
            assert all(of[i] > behind[NO_DETACH, updates, how][i] for i in seeds)
        if name == "4 fkl" and how == "sampled":
            assert statistics.median(of) > statistics.median(behind["1 k3", updates, how])
        if how == "expected" and name != "3 p (l - r)":
            assert all(abs(of[i] - behind[name, 1, how][i]) < 0.003 for i in seeds)
    grown = {
        name: statistics.median(behind[name, 10, "sampled"]) - statistics.median(behind[name, 1, "sampled"])
        for name in ("1 k3", "4 fkl", "k2", "k3_is")
    }
    assert min(grown.values()) > 0 and grown["4 fkl"] > grown["1 k3"]
    for path in re.findall(r"`((?:memplan|tests|examples|benchmarks)/[\w/]+\.py)`?", DOC.read_text()):
        assert (ROOT / path).is_file(), path
    assert (DOC.parent / "kl-study.png").is_file()


@pytest.mark.parametrize(
    ("main", "arguments", "says"),
    [
        (study.main, ["--help"], "What must hold"),
        (study.main, ["--seed", "1"], "unrecognized arguments: --seed"),
        (
            benchmark.main,
            ["-o", "nowhere/figures.json"],
            "cannot write 'nowhere/figures.json': name a file in a folder",
        ),
        (benchmark.main, ["--plot", "."], "cannot write '.'"),
    ],
)
def test_arguments_are_read_first(main, arguments, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kl_study.py", *arguments])
    monkeypatch.setattr(study, "train", None)
    with pytest.raises(SystemExit):
        main()
    assert says in "".join(capsys.readouterr())
