"""Look before running: would the step fit, what would be recomputed, and where do the bytes go?

    pip install -e . && python examples/02_look_first.py

memplan.plan runs nothing and leaves no trace on the model. A budget that is too small is refused with the smallest
one that fits; at that budget this prints the plan and writes its timeline to timeline.json and timeline.png.
"""

import memplan
from memplan.demo import problem
from memplan.grpo import make_step


def main() -> None:
    model, sampled = problem(group_size=4, max_new_tokens=8, hidden=64, layers=2)
    step = make_step(model)
    try:
        plan = memplan.plan(step, sampled.batch, budget="1MB")
    except memplan.DoesNotFit as error:
        print(error)
        plan = memplan.plan(step, sampled.batch, budget=error.smallest)
    print(plan)
    plan.timeline.save("timeline.json")
    plan.timeline.save("timeline.png")


if __name__ == "__main__":
    main()
