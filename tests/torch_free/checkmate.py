"""The program of Jain et al. 2020 (Checkmate): the best plan of a chain when ops may run any number of times.

In: ops as what each reads, all of one unit of bytes and of time, and a budget in units. Out: the least number of runs.
Stage t ends with op t's first run; `kept[t, i]`: i is still there from the stage before; `runs[t, i]`: i runs in it.
Its class contains the planner's: it decides anew at each stage what is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from tests.torch_free.milp import Whole


def fewest_runs(reads: Sequence[Sequence[int]], budget: int) -> int | None:
    """None: nothing fits."""
    program, count = Whole(), len(reads)
    runs = {(t, i): program.variable(1, cost=1, whole=True) for t in range(count) for i in range(t + 1)}
    kept = {(t, i): program.variable(1, whole=True) for t in range(count) for i in range(t)}
    readers = [[k for k in range(count) if i in reads[k]] for i in range(count)]
    for (t, i), variable in runs.items():
        program.lower[variable] = float(i == t)
        for j in reads[i]:
            program.row([(runs[t, j], 1), (kept[t, j], 1), (variable, -1)], low=0)
    for (t, i), variable in kept.items():
        before = [(kept[t - 1, i], 1.0)] if (t - 1, i) in kept else []
        program.row([(runs[t - 1, i], 1), *before, (variable, -1)], low=0)
    for t in range(count):
        held = [(kept[t, i], 1.0) for i in range(t)]
        for k in range(t + 1):  # what is there when k runs, less what is freed after the op before it
            freed = list[tuple[int, float]]()
            for i in (*reads[k - 1], k - 1) if k else ():
                variable = program.variable(1, whole=True)
                program.row([(variable, 1), (runs[t, k - 1], -1)], high=0)
                later = [runs[t, j] for j in readers[i] if k <= j <= t]
                for still in [*later, *([kept[t + 1, i]] if (t + 1, i) in kept else [])]:
                    program.row([(variable, 1), (still, 1)], high=1)
                freed.append((variable, -1.0))
            now = program.variable(budget)
            program.row([*held, *freed, (runs[t, k], 1), (now, -1)], low=0, high=0)
            held = [(now, 1.0)]
    found = program.best()
    return None if found is None else round(found[1])


def chain(length: int) -> list[list[int]]:
    """A forward op after the other, and backward in reverse: it reads its gradient and its op's input and result."""
    forward = [[i - 1] if i else [] for i in range(length)]
    behind = reversed(range(length))
    return forward + [[length + k - 1, *({i, i - 1} - {-1, length + k - 1})] for k, i in enumerate(behind)]
