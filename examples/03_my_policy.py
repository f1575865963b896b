"""A checkpointing policy of your own: what to keep and what to compute again, in a few lines.

    pip install -e . && python examples/03_my_policy.py

This one recomputes every storage of 100 kB or more that is cheap to make: less than one operation per byte moved,
so matrix products and attention are kept.
A policy decides; whether the outcome is valid and fits is checked by memplan, whatever the policy says.
"""

from collections.abc import Mapping

import memplan
from memplan.demo import problem
from memplan.grpo import make_step


@memplan.policy("cheap")
def cheap(step: memplan.Step, budget: object, machine: object) -> Mapping[int, memplan.Recompute]:
    return {
        storage: memplan.Recompute()  # a storage left out is kept if backward reads it
        for op in step.forward.ops
        if op.flops <= op.traffic and not op.fixed  # fixed: why an op must not run twice
        for storage in op.outputs
        if step.tensors[storage].bytes >= 100_000
    }


def main() -> None:
    model, sampled = problem(group_size=4, max_new_tokens=8, hidden=64, layers=2)
    step = make_step(model)
    for policy in ("greedy", cheap):
        plan = memplan.plan(step, sampled.batch, budget="1GB", policy=policy)
        print(f"{plan.policy:>8}: peak {plan.peak / 1e6:.2f} MB, estimated extra time {plan.overhead:.1%}")


if __name__ == "__main__":
    main()
