"""The example's loop, 50 steps: one copy of the weights, one budget, the same log-probs, and nothing that grows."""

from benchmarks.engine import SLACK, loop, promised


def test_fifty_steps() -> None:
    figures, _ = loop(50)
    print(figures)
    assert promised(figures) == []
    over = figures | {"peaks": {"rollout": 0, "train": figures["budget"] + 2 * SLACK}}
    assert promised(over) == ["a phase is over the budget"]
