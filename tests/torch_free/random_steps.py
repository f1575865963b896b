"""Small random Steps for hypothesis, with everything that ir.Step allows and real steps seldom have together."""

from random import Random

from hypothesis import strategies as st

from memplan.ir import Graph, Machine, Op, Step, Tensor

MACHINE = Machine("random", "cpu", 2**40, 1e9, (("float32", 1e10),), unified=True)
BYTES = st.sampled_from((0, 1, 4, 10, 64, 100, 1000))


LAYOUTS = {  # (phase, unit) in order of execution
    "one pair": (("forward", 0), ("backward", 0)),
    "a graph break": (("forward", 0), ("forward", 1), ("backward", 1), ("backward", 0)),
    "two breaks, the middle without backward": (
        ("forward", 0), ("forward", 1), ("forward", 2), ("backward", 2), ("backward", 0)
    ),
    "micro-batches in one graph": (
        ("forward", 0), ("backward", 0), ("forward", 1), ("backward", 1), ("forward", 2)
    ),
}  # fmt: skip


@st.composite
def steps(draw: st.DrawFn, *, fused: bool = False, max_ops: int = 12, layout: str = "one pair") -> Step:
    """Graphs over a DAG, in program order: forward graphs read what forward graphs made before, backward graphs that
    too, their tangents, and what backward graphs made before.

    Some ops make two storages or none, must not run twice, are random or need a workspace; some backward ops
    depend on no tangent; some storages have no bytes; backward may return what forward made.
    """
    tensors: list[Tensor] = []

    def storage(name: str) -> int:
        tensors.append(Tensor(name, draw(BYTES), "activation", dtype="float32"))
        return len(tensors) - 1

    def op(name: str, readable: list[int]) -> Op:
        count = draw(st.sampled_from((1, 1, 1, 2, 0)))
        return Op(
            name,
            "random.op",
            tuple(draw(st.lists(st.sampled_from(readable), min_size=1, max_size=3, unique=True))),
            tuple(storage(f"{name}.{k}") for k in range(count)),
            flops=draw(st.integers(0, 1000)),
            traffic=draw(st.integers(1, 1000)),
            dtype="float32",
            fusion=draw(st.sampled_from(("pointwise", "reduction", "extern"))) if fused else "extern",
            workspace_bytes=draw(st.sampled_from((0, 0, 0, 50))),
            fixed=draw(st.sampled_from(("", "", "", "", "it writes to its inputs"))),
            rng_bytes=draw(st.sampled_from((0, 0, 0, 16))),
        )

    def some(of: list[int], most: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.sampled_from(of), max_size=most, unique=True))) if of else ()

    resident = tuple(storage(f"resident{k}") for k in range(draw(st.integers(1, 2))))
    inside = layout == "micro-batches in one graph"
    made: dict[int, int] = {}  # by forward graphs -> unit
    late: list[int] = []  # by backward graphs that others may read: tangents, gradients
    graphs = []
    for phase, unit in LAYOUTS[layout]:
        tangents: tuple[int, ...] = ()
        own = [t for t in made if made[t] == unit]
        if phase == "backward" and not inside:
            tangents = tuple(storage(f"tangent{unit}.{k}") for k in range(draw(st.integers(1, 2)))) + some(late, 1)
        readable = [*resident, *(t for t in made if made[t] <= unit), *tangents]
        if inside:
            readable += late
        ops = []
        for k in range(draw(st.integers(1, max_ops))):
            ops.append(op(f"{phase[0]}{unit}.{k}", readable))
            readable += ops[-1].outputs
        mine = [t for o in ops for t in o.outputs]
        read = {t for o in ops for t in o.inputs}
        if phase == "forward":
            inputs = (*resident, *(() if inside else sorted(t for t in read if made.get(t, unit) != unit)))
            made |= dict.fromkeys(mine, unit)
            graphs.append(Graph(f"forward {unit}", tuple(ops), inputs, some(mine, 2), "forward", unit))
        else:
            outputs = (*some(mine, 4), *some(own, 1))
            late += [t for t in mine if t in _tainted(ops, {*tangents, *late}, everything=inside)]
            name = f"backward {unit}"
            graphs.append(Graph(name, tuple(ops), tangents, outputs, "backward", unit))
    return Step("random", tuple(tensors), tuple(graphs), resident, fused=fused)


def _tainted(ops: list[Op], late: set[int], *, everything: bool) -> set[int]:
    """What of a backward graph's results depends on a tangent."""
    late = set(late)
    for op in ops:
        if everything or not late.isdisjoint(op.inputs):
            late.update(op.outputs)
    return late


@st.composite
def steps_and_saved(draw: st.DrawFn, *, fused: bool = False, layout: str = "one pair") -> tuple[Step, frozenset[int]]:
    """A step, and any of the storages that can cross."""
    step = draw(steps(fused=fused, layout=layout))
    every = sorted(step.saveable)
    return step, frozenset(draw(st.lists(st.sampled_from(every), unique=True))) if every else frozenset()


def any_steps() -> st.SearchStrategy[Step]:
    """Of every layout."""
    return st.sampled_from(sorted(LAYOUTS)).flatmap(lambda layout: steps(layout=layout, max_ops=8))


def backpropagated(random: Random, count: int) -> Step:
    """A step of about `count` ops as autograd makes them: each op of forward reads what is near, one of ten reads from
    far back, and backward runs through them in reverse, reading gradients, inputs, results, or none of these.
    """
    tensors = [Tensor("weights", 64, "parameter"), Tensor("batch", 16, "input"), Tensor("loss'", 1, "activation")]

    def storage(name: str) -> int:
        tensors.append(Tensor(name, random.choice((1, 4, 8, 16, 16, 32, 64)), "activation", dtype="float32"))
        return len(tensors) - 1

    def op(name: str, inputs: set[int], *outputs: int) -> Op:
        cost = round(10 ** random.uniform(1, 3))
        inside, fixed = random.choice((0, 0, 0, 16)), random.choice(("", "") * 8 + ("random",))
        return Op(
            name, "op", tuple(sorted(inputs)), outputs,
            traffic=cost, dtype="float32", workspace_bytes=inside, fixed=fixed,
        )  # fmt: skip

    forward, made = list[Op](), [1]
    for k in range(max(2, count // 2)):
        reads = {made[-1], random.choice(made[-4:])} | ({random.choice(made)} if random.random() < 0.1 else set())
        out = [storage(f"f{k}")] + ([storage(f"f{k}.stats")] if random.random() < 0.2 else [])
        forward.append(op(f"f{k}", reads, *out))
        made.append(out[0])
    backward, gradient = list[Op](), {made[-1]: 2}
    for own in reversed(forward):
        above = [gradient[t] for t in own.outputs if t in gradient]
        if not above:
            continue
        saved = set(own.outputs[1:]) | random.choice((set(own.inputs), set(own.inputs), {own.outputs[0]}, set()))
        new = [t for t in own.inputs if t in made[1:]]
        out = [storage(f"{own.name}' {t}") for t in new]
        backward.append(op(f"{own.name}'", {*above, *saved}, *out))
        for t, g in zip(new, out, strict=True):
            if t in gradient:  # two gradients are added up
                added = storage(f"sum {t}")
                backward.append(op(f"add {own.name}' {t}", {g, gradient[t]}, added))
                g = added
            gradient[t] = g
    first = [gradient[t] for t in forward[0].outputs if t in gradient]
    graphs = (
        Graph("forward", tuple(forward), (0, 1), (), "forward"),
        Graph("backward", tuple(backward), (2,), tuple(first), "backward"),
    )
    return Step("backpropagated", tuple(tensors), graphs, (0, 1))
