"""A small step, written by hand: `layers` times a product and a tanh, then a loss, over a batch of 64 rows."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from memplan.ir import (
    Block,
    Budget,
    Decision,
    Graph,
    Keep,
    Machine,
    Moment,
    Op,
    Plan,
    Recompute,
    Run,
    Step,
    Tensor,
    Timeline,
)

ROWS, WIDTH = 64, 256
SIZE = 4 * ROWS * WIDTH  # one activation, float32
MACHINE = Machine("toy", "cpu", 2**30, 1e10, (("float32", 5e10),), unified=True)


def make_step(layers: int = 4) -> Step:
    """Storages: the input, a weight per layer, per layer a product and its tanh, the loss, a gradient per layer."""
    shape, wide = (ROWS, WIDTH), (WIDTH, WIDTH)
    tensors = [Tensor("x", SIZE, "input", shape, "float32")]
    tensors += [Tensor(f"w{i}", 4 * WIDTH**2, "parameter", wide, "float32") for i in range(layers)]
    forward, backward, below = [], [], 0
    for i in range(layers):
        layer, product, tanh = f"model.layers.{i}", len(tensors), len(tensors) + 1
        tensors.append(Tensor(f"mm_{i}", SIZE, "activation", shape, "float32", source="toy.py:7 in f", layer=layer))
        tensors.append(Tensor(f"tanh_{i}", SIZE, "activation", shape, "float32", source="toy.py:8 in f", layer=layer))
        flops = 2 * ROWS * WIDTH**2
        forward.append(Op(f"mm_{i}", "aten.mm.default", (below, 1 + i), (product,), flops, 3 * SIZE, "float32"))
        forward.append(Op(f"tanh_{i}", "aten.tanh.default", (product,), (tanh,), 0, 2 * SIZE, "float32", "pointwise"))
        below = tanh
    loss = len(tensors)
    tensors.append(Tensor("loss", 4, "activation", (), "float32", source="toy.py:12 in [loss]"))
    forward.append(Op("loss", "aten.sum.default", (below,), (loss,), 0, SIZE, "float32", "reduction"))
    for i in reversed(range(layers)):
        gradient, tanh = len(tensors), 2 + layers + 2 * i
        tensors.append(Tensor(f"grad_{i}", 4 * WIDTH**2, "gradient", wide, "float32"))
        backward.append(Op(f"grad_{i}", "aten.mm.default", (tanh,), (gradient,), 0, 3 * SIZE, "float32"))
    gradients = tuple(op.outputs[0] for op in backward)
    resident = tuple(range(1 + layers))
    return Step(
        "toy",
        tuple(tensors),
        (
            Graph("forward", tuple(forward), resident, (loss,)),
            Graph("backward", tuple(backward), (), gradients, "backward"),
        ),
        resident,
        notes=("toy.py:12: nothing was found here",),
    )


def make_plan(layers: int = 4, budget: int = 2**24) -> Plan:
    """Products are recomputed, every tanh but the last layer's is kept; the timeline follows op by op."""
    step = make_step(layers)
    ops = step.forward.ops + step.backward.ops
    moments, blocks, seconds = [], [], 0.0
    decisions: dict[int, Decision] = {}
    for i, op in enumerate(ops):
        seconds += MACHINE.seconds(op)
        phase = "forward" if i < len(step.forward.ops) else "backward"
        moments.append(Moment(op.name, seconds, phase))
        for t in op.outputs:
            tensor = step.tensors[t]
            recompute = tensor.name.startswith("mm_")
            if tensor.kind == "activation" and tensor.shape:
                decisions[t] = Recompute() if recompute else Keep()
            readers = [j for j, reader in enumerate(ops) if t in reader.inputs]
            end = len(ops) if tensor.kind == "gradient" else 1 + max(readers, default=i)
            decision = type(decisions[t]).__name__.lower() if t in decisions else ""
            what = (tensor.shape, tensor.dtype, tensor.source, tensor.layer)
            blocks.append(Block(tensor.name, tensor.bytes, tensor.kind, i, end, decision, *what))
    base = (("parameter", 4 * layers * WIDTH**2), ("input", SIZE))
    timeline = Timeline("toy, planned", "predicted", tuple(moments), tuple(blocks), base)
    forward = tuple(Run(i) for i in range(len(step.forward.ops)))
    backward = tuple(Run(len(forward) + i) for i in range(len(step.backward.ops)))
    return Plan(
        step,
        tuple(decisions.items()),
        (forward, backward),
        timeline,
        Budget(budget),
        MACHINE,
        policy="by_hand",
        base_seconds=seconds / 1.05,
        notes=("written by hand",),
    )


@pytest.fixture
def step() -> Step:
    return make_step()


@pytest.fixture
def plan() -> Plan:
    return make_plan()


@pytest.fixture
def timeline(plan: Plan) -> Timeline:
    return plan.timeline


@pytest.fixture
def plan_of() -> Callable[..., Plan]:
    """make_plan(layers, budget), for tests that need another plan than the usual one."""
    return make_plan


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[browser]'")
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    chromium = next((path for path in map(shutil.which, names) if path), None)
    if chromium is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on the path, so what needs one was not run")
    with playwright.sync_playwright() as run:
        started = run.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()
