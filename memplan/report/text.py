"""Plans and timelines as plain text, for terminals and logs: never a colour code, always 120 columns."""

from __future__ import annotations

import dataclasses
import io
from collections import defaultdict
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from memplan.groups import ROWS, any_layer, groups
from memplan.ir import KINDS, Block, Kind, Plan, Timeline
from memplan.units import human

WIDTH = 120
NAME, SOURCE = 14, 24  # characters of an op or a layer, and of a source, for which a table has room
REASON = 22  # and of a reason
LARGEST = 5  # blocks named at the peak
CLASS = "gap: to plans of the same order of ops, each run again once at most, storages kept, copied or recomputed whole"

_SHORT = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
    "int8": "i8",
    "uint8": "u8",
    "bool": "b8",
}


def table(plan: Plan) -> str:
    """The decisions, equal layers folded, then the peak, the budget, the notes, and whether it fits.

    Times are estimates, by the cost model that the last line names.
    """
    return "\n".join([_decisions(plan), *_peak(plan.timeline), _budget(plan), *_notes(plan), _verdict(plan)])


def summary(timeline: Timeline) -> str:
    """Where the bytes of a timeline are at its peak."""
    head = f"{timeline.title}: {timeline.origin}, {len(timeline.moments)} moments, {len(timeline.blocks)} blocks"
    return "\n".join([head, *_peak(timeline), *(f"note: {note}" for note in timeline.notes)])


def at_peak(timeline: Timeline) -> dict[Kind, int]:
    """Bytes by kind at the peak, base included; kinds without any are left out."""
    return at_moment(timeline, timeline.peak_moment)


def at_moment(timeline: Timeline, moment: int) -> dict[Kind, int]:
    """The same at another moment."""
    total = defaultdict(int, timeline.base)
    for block in timeline.alive(moment):
        total[block.kind] += block.bytes
    return {kind: total[kind] for kind in KINDS if total[kind]}


def beside(timeline: Timeline, moment: int) -> list[str]:
    """What others hold at a moment, in a line; none where they hold nothing."""
    there = [block for block in timeline.others if block.start <= moment < block.end]
    if not there:
        return []
    names = [block.name if len(there) == 1 else f"{block.name} {human(block.bytes)}" for block in there]
    return [f"beside it {human(timeline.beside[moment])} held by others: {', '.join(names)}"]


def block_line(block: Block) -> str:
    """A block in one line: its bytes, what it is, and the user's line."""
    what = [block.name, block.kind, shape_dtype(block.shape, block.dtype), block.decision, block.layer, block.source]
    return f"{human(block.bytes):>10}  " + "  ".join(part for part in what if part)


def folded(blocks: Iterable[Block]) -> list[Block]:
    """Equal blocks of equal layers as one, "4 x mm", with the bytes of all; largest first."""
    groups: dict[Block, list[Block]] = defaultdict(list)
    for block in blocks:
        groups[dataclasses.replace(block, layer=any_layer(block.layer), start=0, end=0)].append(block)
    out = [
        dataclasses.replace(same, name=f"{len(all_)} x {same.name}", bytes=len(all_) * same.bytes)
        if len(all_) > 1
        else all_[0]
        for same, all_ in groups.items()
    ]
    return sorted(out, key=lambda block: -block.bytes)


def shape_dtype(shape: tuple[int, ...], dtype: str) -> str:
    """bf16[2, 4096], as torch prints graphs."""
    return f"{_SHORT.get(dtype, dtype)}[{', '.join(map(str, shape))}]" if shape or dtype else ""


def _decisions(plan: Plan) -> str:
    step, rows, instead = plan.step, groups(plan), plan.instead
    decisions = dict(plan.decisions)

    def size(members: Iterable[int]) -> int:
        return sum(step.tensors[t].bytes for t in members)

    out = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("decision", "count", "bytes", "instead", "tensor", "op", "layer", "source"):
        if heading != "instead" or instead:
            number, folds = heading in ("count", "bytes"), heading in ("instead", "source")
            out.add_column(heading, justify="right" if number else "left", overflow="fold", no_wrap=not folds)
            out.columns[-1].max_width = REASON if heading == "instead" else None
    for members in rows[:ROWS]:
        tensor = step.tensors[members[0]]
        op = step.producer[members[0]][1].target if members[0] in step.producer else ""
        op, source = op.removeprefix("aten.").removesuffix(".default"), tensor.source
        # A layer's end says most, and of a long source the file and line.
        line = source if len(source) <= SOURCE else source.rpartition("/")[2].partition(" in ")[0]
        out.add_row(
            type(decisions[members[0]]).__name__.lower(),
            f"x{len(members)}",
            human(size(members)),
            *([instead.get(members[0], "")] if instead else []),
            shape_dtype(tensor.shape, tensor.dtype),
            _shorten(op),
            _shorten(any_layer(tensor.layer)[::-1])[::-1],
            line,
        )
    text = rendered(out)
    hidden = [t for members in rows[ROWS:] for t in members]
    return f"{text}\nand {len(hidden)} more ({human(size(hidden))})" if hidden else text


def _shorten(name: str) -> str:
    return name if len(name) <= NAME else name[: NAME - 2] + ".."


def rendered(out: Table) -> str:
    """A table as lines of at most WIDTH columns; what is in its cells is taken literally."""
    buffer = io.StringIO()
    console = Console(
        file=buffer, width=WIDTH, color_system=None, force_terminal=False, markup=False, emoji=False, highlight=False
    )
    console.print(out)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def _peak(timeline: Timeline) -> list[str]:
    where = ""
    if timeline.moments:
        moment = timeline.moments[timeline.peak_moment]
        where = f" at {moment.name}" + (f" in {moment.phase}" if moment.phase else "")
    kinds = ", ".join(f"{kind} {human(size)}" for kind, size in at_peak(timeline).items())
    lines = [f"peak {human(timeline.peak)}{where}" + (f": {kinds}" if kinds else "")]
    alive = timeline.alive() if timeline.moments else []
    lines += [f"  {block_line(block)}" for block in alive[:LARGEST]]
    if rest := alive[LARGEST:]:
        lines.append(f"  {human(sum(b.bytes for b in rest)):>10}  in {len(rest)} smaller")
    return [*lines, *beside(timeline, timeline.peak_moment)]


def _budget(plan: Plan) -> str:
    budget = plan.budget
    beside = (*budget.beside, ("fragmentation reserve", budget.reserve_bytes))
    held = [f"{human(size)} {what}" for what, size in beside if size]
    left = f" less {' and '.join(held)}: {human(budget.available)} for the step" if held else ""
    lines = f"budget {human(budget.bytes)}{left}" + (f" ({budget.note})" if budget.note else "")
    if plan.offloads:
        tiers = [(tier, plan.timeline.away(tier)) for tier in ("host", "disk")]
        away = " and ".join(f"{human(size)} on the {tier}" for tier, size in tiers if size)
        waits = f"waits {1e3 * plan.timeline.stalled:.1f} ms for copies (estimate)"
        lines += f"\noff the device at most {away}; host budget {human(budget.host_bytes)}; {waits}"
    return lines + _advice(plan)


def _advice(plan: Plan) -> str:
    """What more memory and a faster bus could be worth, what is short, and among which plans the gap is meant."""
    bound = plan.bound
    if bound is None:
        return ""
    lines = [CLASS]
    if bound.at:
        unit = max(plan.budget.bytes // 10, 1)
        memory, bus = unit * bound.per_byte, bound.per_bus / 10
        op = next(op for op in plan.step.ops if op.name == bound.at)
        where = f"memory is shortest at {op.name}" + (f", {op.source}" if op.source else "")
        lines = [f"{human(unit)} more could save {1e3 * memory:.3g} ms (estimate); {where}", *lines]
        if bus > 0:
            binds = ": the bus binds" if bus > memory else ""
            lines.insert(1, f"a bus 10 % faster could save {1e3 * bus:.3g} ms (estimate){binds}")
        if bound.needs >= unit:
            less = f"slices (option tiles) could save up to {1e3 * bound.needs * bound.per_byte:.3g} ms (estimate)"
            lines.insert(1, f"what runs there takes {human(bound.needs)} in any plan: {less}")
    return "".join(f"\n{line}" for line in lines)


def _notes(plan: Plan) -> list[str]:
    notes = dict.fromkeys((*plan.step.notes, *plan.notes, *plan.timeline.notes))
    return [f"note: {note}" for note in notes]


def _verdict(plan: Plan) -> str:
    spare = plan.budget.available - plan.peak
    fits = f"fits: peak {human(plan.peak)} of {human(plan.budget.available)}, {human(spare)} to spare"
    short = f"does not fit: peak {human(plan.peak)} of {human(plan.budget.available)}, short by {human(-spare)}"
    time = f"{100 * plan.overhead:+.1f} % time".replace("-0.0", "+0.0")
    time += f", gap {100 * plan.gap:.1f}" if plan.gap is not None else ""
    by = f"policy {plan.policy} on {plan.machine.name}, inner {plan.inner}"
    return f"{fits if plan.fits else short}; {time} ({plan.step.cost}); {by}"
