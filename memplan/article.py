"""The article's account of what GRPO takes, line by line, and what a plan makes of the same job on a card.

In: machines, and what may be in the host's memory. Out: an Account, printed as two tables.
The job: Llama-3.1-8B in bfloat16, LoRA of rank 16 on all projections, a group of 8 completions of 20,480 tokens, and
the reference's log-probs. The article is unsloth.ai/blog/grpo, "Long-context GRPO", 20 February 2025: its figures are
arithmetic, and so are the lines here, by its own formulas where it gives one. Its GB are 2**30 bytes but for weights.
The plans are of recorded steps (memplan/steps) of one completion, eight of which with their gradients added up are the
job; AdamW's states are bfloat16, as adapters are. They are predictions: times by data sheets, nothing is run.
Where the frozen weights do not fit beside the rest they are streamed (memplan.stream): fetched for each layer.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

from rich.table import Table

from memplan import steps
from memplan.ir import Budget, Held, Machine, Plan, Step
from memplan.machines import machine
from memplan.options import read_budget
from memplan.passes.pipeline import make_plan, smallest_plan
from memplan.passes.policies.optimal import Optimal
from memplan.report.text import at_peak, rendered
from memplan.units import human

COMPLETIONS, TOKENS, LAYERS, HEADS, WIDTH, VOCABULARY = 8, 20480, 32, 8, 128, 128256
LOGITS = 2 * 2 * COMPLETIONS * TOKENS * VOCABULARY  # the policy's and the reference's, two bytes each
CACHE = 2 * 2 * TOKENS * LAYERS * HEADS * WIDTH  # keys and values of one sequence, two bytes each
STATES = 2  # that AdamW has for each parameter
COLUMNS = 5  # cards in one table, which has 120 columns of text
RESIDENT, STREAMED = "llama8b_lora_grpo_1x20k", "llama8b_lora_grpo_1x20k_streamed"

NOTES = (
    "*: streamed, fetched for each layer. Slices are of 1,024 rows of the head and its loss, whose logits never exist",
    "whole, and of 4,096 of an MLP. The KV cache leaves in training; in a rollout it has what weights, adapters and",
    "states leave, less what the engine takes for itself, which is not counted.",
)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the article's, in its GB: with usual code, with the article's, and how it comes to be so."""

    name: str
    usual: float
    theirs: float
    how: str


LINES = (
    Line("training memory", 414, 42, "given without a formula; 372 less, as activations leave the device"),
    Line(
        "logits of the loss",
        LOGITS / 2**30,
        LOGITS / COMPLETIONS / 2**30,
        f"2 x 2 x {COMPLETIONS} x {TOKENS} x {VOCABULARY} bytes; of one completion at a time",
    ),
    Line("weights for inference", 16, 0, "8e9 x 2 bytes; shared with the trainer"),
    Line("KV cache", CACHE / 2**30, CACHE / 2**30, f"2 x 2 x {TOKENS} x {LAYERS} x {HEADS} x {WIDTH} bytes"),
)


@dataclasses.dataclass(frozen=True)
class Card:
    """What is planned for one machine. Bytes are at the peak of training; `plain_seconds`: of a step that keeps all."""

    machine: str
    memory: int
    room: int  # for what is off the device
    streamed: bool  # the frozen weights, off the device
    weights: int  # frozen ones that are on the device
    trained: int  # adapters, their gradients and AdamW's states
    activations: int
    temporary: int  # slices, among them of logits, workspaces, and what an op makes and drops
    beside: int  # context, and what is held back against fragmentation
    host: int  # the most that is off the device, streamed weights and all
    seconds: float
    plain_seconds: float
    cache: int  # room of a rollout's KV cache beside all weights and states; negative: the weights do not fit

    @property
    def needed(self) -> int:
        """Bytes of the device."""
        return self.weights + self.trained + self.activations + self.temporary + self.beside

    @property
    def fits(self) -> bool:
        return self.needed <= self.memory and self.host <= self.room


@dataclasses.dataclass(frozen=True)
class Account:
    """The article's lines, cards, and the least budgets of the job: with its weights on the device, and streamed."""

    lines: tuple[Line, ...]
    cards: tuple[Card, ...]
    least: tuple[int, int | None]  # None: the host has no room for them

    def __str__(self) -> str:
        job = f"GRPO on Llama-3.1-8B, LoRA, {COMPLETIONS} completions of {TOKENS:,} tokens"
        return "\n".join(
            (
                f"{job}. The article's account, in its GB (arithmetic):",
                "",
                rendered(_theirs(self.lines)),
                "",
                "What memplan plans for the same job, one completion at a time (predicted, not run), in training:",
                "",
                *(f"{rendered(_ours(self.cards[k : k + COLUMNS]))}\n" for k in range(0, len(self.cards), COLUMNS)),
                *NOTES,
                f"At least it takes {human(self.least[0])} on an H100" + self._streamed(),
            )
        )

    def _streamed(self) -> str:
        least = self.least[1]
        return "." if least is None else f", and {human(least)} with the weights streamed."


def account(machines: Sequence[Machine], host: str | int, progress: Callable[[str], None] = lambda _: None) -> Account:
    """Plan the job for every machine; `host`: what may be off the device, as option host_budget is written.

    Raises MemplanError for a host budget that cannot be read.
    """
    jobs = [(target, read_budget(None, target, host=host)) for target in machines]
    cards = []
    for target, budget in jobs:
        progress(f"planning for {target.name}")
        kept = None if _parameters(_job(RESIDENT)) > budget.available else _card(target, budget, RESIDENT)
        cards.append(kept if kept and kept.fits else _card(target, budget, STREAMED))
    progress("looking for the least budgets")
    return Account(LINES, tuple(cards), _least(host))


def _job(name: str) -> Step:
    """A micro-batch with the gradients of those before, and AdamW's states."""
    step = steps.load(name)
    gradients = _adapters(step)
    return dataclasses.replace(step, held=Held((("gradient", gradients), ("optimizer_state", STATES * gradients))))


def _card(target: Machine, budget: Budget, name: str) -> Card:
    step = _job(name)
    adapters, off = _adapters(step), _off(step)
    left = dataclasses.replace(budget, host_bytes=max(0, budget.host_bytes - off))
    plan = make_plan(step, Optimal(), left, target, inner="eager", fit=False)
    kinds, fetched = Counter(at_peak(plan.timeline)), _fetched(plan)
    card = Card(
        target.name,
        target.memory_bytes,
        budget.host_bytes,
        name == STREAMED,
        weights=kinds["parameter"] - adapters + fetched,
        trained=adapters + kinds["gradient"] + kinds["optimizer_state"],
        activations=kinds["activation"] - fetched + kinds["input"],
        temporary=kinds["temporary"],
        beside=budget.needed_for(plan.peak) - plan.peak,
        host=plan.timeline.host_peak + off,
        seconds=COMPLETIONS * plan.timeline.seconds,
        plain_seconds=COMPLETIONS * sum(_job(RESIDENT).seconds(target)),
        cache=budget.available - _parameters(step) - (1 + STATES) * adapters,
    )
    assert card.needed == budget.needed_for(plan.peak)  # its lines are all that there is
    return card


def _least(host: str | int) -> tuple[int, int | None]:
    """The least budgets that the job can be done in, on an H100: with its weights on the device, and streamed."""
    target, found = machine("h100"), list[int | None]()
    budget = read_budget(None, target, host=host)
    for step in map(_job, (RESIDENT, STREAMED)):
        room = budget.host_bytes - _off(step)
        left = dataclasses.replace(budget, host_bytes=max(0, room))
        found.append(budget.needed_for(smallest_plan(step, target, "eager", left).peak) if room >= 0 else None)
    resident, streamed = found
    assert resident is not None
    return resident, streamed


def _adapters(step: Step) -> int:
    """Their bytes, which are their gradients' too."""
    return sum(step.tensors[t].bytes for t in step.backward.outputs)


def _off(step: Step) -> int:
    """Bytes of the streamed weights."""
    return sum(step.tensors[t].bytes for t in step.below)


def _parameters(step: Step) -> int:
    """Their bytes, streamed ones and all."""
    return sum(step.tensors[t].bytes for t in step.resident if step.tensors[t].kind == "parameter")


def _fetched(plan: Plan) -> int:
    """Bytes of streamed weights that are on the device at the peak."""
    names = {plan.step.tensors[t].name for op in plan.step.ops if op.fetches for t in op.outputs}
    return sum(block.bytes for block in plan.timeline.alive() if block.name in names)


def _theirs(lines: Sequence[Line]) -> Table:
    table = _table("", "usual", "the article's", "how")
    for line in lines:
        table.add_row(line.name, f"{line.usual:.1f}", f"{line.theirs:.1f}", line.how)
    table.add_row("total", f"{sum(x.usual for x in lines):.1f}", f"{sum(x.theirs for x in lines):.1f}", "")
    return table


def _ours(cards: Sequence[Card]) -> Table:
    table = _table("", *(card.machine for card in cards))
    rows: dict[str, Callable[[Card], str]] = {
        "frozen weights": lambda c: human(c.weights) + " *" * c.streamed,
        "adapters, gradients, states": lambda c: human(c.trained),
        "activations": lambda c: human(c.activations),
        "slices, workspaces": lambda c: human(c.temporary),
        "context, reserve": lambda c: human(c.beside),
        "needed": lambda c: human(c.needed),
        "of": lambda c: human(c.memory) + ": too much" * (c.needed > c.memory),
        "off the device": lambda c: human(c.host) + ": too much" * (c.host > c.room),
        "seconds of a step": lambda c: f"{c.seconds:.0f}",
        "longer than if all were kept": lambda c: f"{100 * (c.seconds / c.plain_seconds - 1):.1f} %",
        "a second copy of the weights": lambda _: "0",
        "KV cache in training": lambda _: "0",
        "room for one in a rollout": lambda c: human(c.cache) if c.cache > 0 else "none",
        "completions in it": lambda c: str(max(0, c.cache // CACHE)),
    }
    for name, of in rows.items():
        table.add_row(name, *map(of, cards))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for k, column in enumerate(columns):
        table.add_column(column, justify="right" if k and column != "how" else "left")
    return table
