"""AdamW whose moments are held in bfloat16 where gradients are small, and in float32 elsewhere.

In: parameters in float32, with gradients. Out: parameters updated as torch.optim.AdamW does, and states of fewer bytes.
A moment is cut into blocks of 256 values. The blocks in bfloat16 ("low") lie one after the other in one tensor, the
others and what is left of less than a block in another, so what a block does not need is free. Which are low is chosen
at a parameter's first step and again every `every` steps, from the root mean square of each block's gradients, over the
time that the second moment looks back on (at the first step: of that gradient). Values are rounded to bfloat16 up or
down by chance (rounding.py), or a second moment would stand still: a step changes it by 1/1000, bfloat16 by 1/256.
Must hold: with no block low, the bits are those of torch's fused AdamW. The random numbers of a step follow from the
seed and the number of the step, so that a run that was saved and loaded goes on bit for bit.
What a step takes beside the states is bounded by `at_once`, and by one moment of one parameter while blocks are chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memplan.errors import MemplanError
from memplan.runtime.optim.asked import check, check_all, check_parameter
from memplan.runtime.optim.blocks import fits, layout, new_state, repack, restored
from memplan.runtime.optim.choice import lowest, squares_of
from memplan.runtime.optim.rounding import generator_of
from memplan.runtime.optim.update import update


class HybridAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW with moments in bfloat16 or float32, block by block.

    `threshold`: blocks whose gradients are below it on average (root mean square) are in bfloat16; 1e-3 unless `share`
    is given. `share`, 0 to 1: that part of a group's blocks is, those of the smallest gradients; then the bytes are
    known ahead, 8 - 4 * share for each value. `every`: steps from one choice to the next. `seed`: of the rounding.
    `at_once`: how many values are updated at a time; a step takes up to 17 bytes for each of them.
    Raises MemplanError for what it cannot do, with what can be done.
    """

    # What a step without data may be run as, to know the most that one can take (runtime/optimizers.py).
    extremes = ({"every": 1}, {"every": 1, "without_data": "none"}, {"every": 1, "without_data": "most"})

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        threshold: float | None = None,
        share: float | None = None,
        every: int = 100,
        seed: int = 0,
        at_once: int = 2**18,
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            threshold=threshold, share=share, every=every, seed=seed, at_once=at_once, calls=0,
        )  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; raises MemplanError."""
        super().add_param_group(param_group)
        try:
            check(self.param_groups[-1])
            check_all(self.param_groups[-1]["params"])
        except MemplanError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @torch.compiler.disable(reason="views of states are updated")  # type: ignore[no-untyped-call, untyped-decorator]
    def _update(self) -> None:
        """Of every group; never a part of a graph, which has no views that are changed."""
        for number, group in enumerate(self.param_groups):
            given = [p for p in group["params"] if p.grad is not None]
            self._check(group, given)
            if given:
                generator = generator_of(given[0].device, group["seed"], number, group["calls"])
                self._choose(group, given, generator)
                group["calls"] += 1
                held = [self.state[p] for p in given]
                torch._foreach_add_([state["step"] for state in held], 1.0)
                update(given, held, group, generator)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the states are the same bits again. Raises MemplanError for another optimizer's. Hooks that run
        before find the states by their parameters.
        """
        groups = state_dict.get("param_groups", []) if isinstance(state_dict, dict) else []
        sizes = [[len(group["params"]) for group in of] for of in (groups, self.param_groups)]
        if sizes[0] != sizes[1] or not all("at_once" in group for group in groups):
            raise MemplanError(
                f"the state to load is of groups of {sizes[0]} parameters, and of no HybridAdamW over these, of "
                f"{sizes[1]}: give what state_dict() of one over the same parameters returned"
            )
        mine, theirs = ([p for group in of for p in group["params"]] for of in (self.param_groups, groups))
        saved = state_dict["state"]
        states = {p: restored(saved[key], p) for key, p in zip(theirs, mine, strict=True) if key in saved}
        # By parameters, which are no names that were saved, torch takes them as they are, and makes none float32.
        super().load_state_dict({**state_dict, "state": states})

    def _check(self, group: dict[str, Any], given: list[torch.Tensor]) -> None:
        """Raises MemplanError for what was changed since it was given, before anything is updated."""
        check(group)
        for p in given:
            if p.grad is not None and p.grad.is_sparse:
                raise MemplanError("a gradient is sparse, and HybridAdamW takes none: use torch.optim.SparseAdam")
            check_parameter(p)
        for p in group["params"]:
            if p in self.state:
                fits(self.state[p], p)

    def _choose(self, group: dict[str, Any], given: list[torch.Tensor], generator: torch.Generator | None) -> None:
        """Make the states of parameters that have none; when it is time, choose anew for all."""
        due = group["calls"] % group["every"] == 0
        chosen = [p for p in group["params"] if p in self.state] if due else []
        chosen += [p for p in given if p not in self.state]
        squares = [squares_of(p, self.state.get(p), group) for p in chosen]
        lows = lowest(squares, group)
        # Those that shrink come first, so that the sum is never above what it was and what it will be.
        order = sorted(range(len(chosen)), key=lambda i: self._grows(chosen[i], lows[i]))
        for i in order:
            p, (low, count) = chosen[i], lows[i]
            if p not in self.state:
                self.state[p] = new_state(p, low, count)
            else:
                repack(self.state[p], low, count, group["at_once"], generator)

    def _grows(self, p: torch.Tensor, low: tuple[torch.Tensor, int]) -> int:
        """By how many blocks the part of a parameter's that is in float32 grows."""
        blocks = low[0].numel()
        return layout(self.state[p])[0] - low[1] if p in self.state else blocks - low[1]
