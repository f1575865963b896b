"""What to save and what to offload by name, for people used to JAX's checkpoint policies.

    Lists(save=("aten.mm*",))                                jax.checkpoint_policies.dots_saveable
    Lists(save=("attn*",), offload=("model.layers.*.mlp*",)) save_and_offload_only_these_names

A pattern (fnmatch) is matched against a storage's name, the op that makes it and the module it is made in. What neither
list names runs again, as in JAX; what must not run twice is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from memplan.errors import MemplanError
from memplan.ir import Budget, Decision, Decisions, Machine, Step
from memplan.passes.policies.block_checkpoint import keep_only
from memplan.passes.policies.offload import away, oldest_first
from memplan.passes.schedule import saved_by


@dataclass(frozen=True)
class Lists:
    """`save` and `offload`: patterns; a storage that both name is offloaded. Raises MemplanError for a pattern that
    names nothing of the step.
    """

    save: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()
    name: str = "lists"

    def __post_init__(self) -> None:
        for patterns in (self.save, self.offload):
            if isinstance(patterns, str):
                raise MemplanError(f"Lists was given {patterns!r} for a tuple of patterns: write ({patterns!r},)")

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions:
        kept, moved = self._named(step, self.save), self._named(step, self.offload)
        decided = keep_only(step, kept | moved)
        saved = saved_by(step, decided)
        out: dict[int, Decision] = dict(decided)
        return out | away(step, saved, oldest_first(step, moved & saved), budget, machine, small=0)

    def _named(self, step: Step, patterns: Sequence[str]) -> frozenset[int]:
        found = frozenset[int]()
        for pattern in patterns:
            matched = frozenset(t for t in step.saveable if any(fnmatchcase(n, pattern) for n in _names(step, t)))
            if not matched:
                some = sorted({step.producer[t][1].target for t in step.saveable})[:8]
                raise MemplanError(
                    f"policy 'lists' names {pattern!r}, and no storage, op or module that can be saved matches it: "
                    f"ops are {', '.join(some)}, ..."
                )
            found |= matched
        return found


def _names(step: Step, storage: int) -> tuple[str, ...]:
    tensor = step.tensors[storage]
    return tensor.name, step.producer[storage][1].target, tensor.layer
