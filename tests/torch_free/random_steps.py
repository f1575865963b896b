"""Small random Steps for hypothesis, with everything that ir.Step allows and real steps seldom have together."""

from hypothesis import strategies as st

from memplan.ir import Graph, Machine, Op, Step, Tensor

MACHINE = Machine("random", "cpu", 2**40, 1e9, (("float32", 1e10),), unified=True)
BYTES = st.sampled_from((0, 1, 4, 10, 64, 100, 1000))


@st.composite
def steps(draw: st.DrawFn, *, fused: bool = False, max_ops: int = 12) -> Step:
    """A forward DAG and a backward that reads tangents and whatever was made before, in program order.

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

    resident = tuple(storage(f"resident{k}") for k in range(draw(st.integers(1, 2))))
    readable = list(resident)
    forward = []
    for k in range(draw(st.integers(1, max_ops))):
        forward.append(op(f"f{k}", readable))
        readable += forward[-1].outputs
    made = readable[len(resident) :]
    tangents = tuple(storage(f"tangent{k}") for k in range(draw(st.integers(1, 2))))
    readable += tangents
    backward = []
    for k in range(draw(st.integers(1, max_ops))):
        backward.append(op(f"b{k}", readable))
        readable += backward[-1].outputs
    gradients = [t for b in backward for t in b.outputs]
    some = st.lists(st.sampled_from(made), max_size=2, unique=True) if made else st.just([])
    returned = st.lists(st.sampled_from(gradients), max_size=4, unique=True) if gradients else st.just([])
    return Step(
        "random",
        tuple(tensors),
        (
            Graph("forward", tuple(forward), resident, tuple(draw(some))),
            Graph("backward", tuple(backward), tangents, (*draw(returned), *draw(some)[:1])),
        ),
        resident,
        fused=fused,
    )


@st.composite
def steps_and_saved(draw: st.DrawFn, *, fused: bool = False) -> tuple[Step, frozenset[int]]:
    """A step, and any of the storages that can cross."""
    step = draw(steps(fused=fused))
    every = sorted(step.saveable)
    return step, frozenset(draw(st.lists(st.sampled_from(every), unique=True))) if every else frozenset()
