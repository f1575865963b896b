"""Boundaries are where the forward is narrow: between layers, not inside them."""

from memplan import steps
from memplan.ir import Graph, Op, Step, Tensor
from memplan.passes.blocks import frontiers


class Chain:
    """A forward graph written op by op."""

    def __init__(self) -> None:
        self.tensors, self.ops = [Tensor("x", 100, "input")], list[Op]()

    def op(self, name: str, size: int, *inputs: int) -> int:
        self.tensors.append(Tensor(name, size, "activation"))
        self.ops.append(Op(name, "op", inputs, (len(self.tensors) - 1,)))
        return len(self.tensors) - 1

    def layer(self, name: str, below: int) -> int:
        norm = self.op(f"{name}.norm", 100, below)
        up = self.op(f"{name}.up", 400, norm)
        gate = self.op(f"{name}.gate", 400, up)
        return self.op(f"{name}.residual", 100, below, self.op(f"{name}.down", 100, gate))

    def step(self, output: int) -> Step:
        graphs = (Graph("forward", tuple(self.ops), (0,), (output,)), Graph("backward", (), (), (), "backward"))
        return Step("chain", tuple(self.tensors), graphs, (0,))


def names(step: Step) -> list[set[str]]:
    return [{step.tensors[t].name for t in frontier} for frontier in frontiers(step)]


def test_a_chain_of_layers() -> None:
    for layers in (2, 5, 12):
        chain = Chain()
        below = chain.op("embedding", 100, 0)
        for k in range(layers):
            below = chain.layer(f"{k}", below)
        step = chain.step(chain.op("loss", 1, chain.op("logits", 2000, below)))
        found = names(step)
        assert found[-layers:] == [{f"{k}.residual"} for k in range(layers)]
        assert found[:-layers] in ([], [{"embedding"}])


def test_skips_cross_the_boundaries_of_a_unet() -> None:
    chain = Chain()
    below, skips = chain.op("embedding", 100, 0), list[int]()
    for k in range(2):
        below = chain.layer(f"down{k}", below)
        skips.append(chain.op(f"skip{k}", 10, below))
    below = chain.layer("bottom", below)
    for k in reversed(range(2)):
        below = chain.layer(f"up{k}", chain.op(f"join{k}", 100, below, skips[k]))
    step = chain.step(chain.op("loss", 1, chain.op("logits", 2000, below)))
    found = names(step)
    # The narrowest places around the bottom: before the second skip is made, and after it is read.
    assert {"down1.residual", "skip0"} in found
    assert {"join1", "skip0"} in found
    assert {"up0.residual"} in found


def test_boundaries_of_a_recorded_model_are_its_residual_stream() -> None:
    step = steps.load("llama8b_layers_4k_v32000")
    found = frontiers(step)
    assert {sum(step.tensors[t].bytes for t in f) for f in found} == {4096 * 4096 * 2}  # bfloat16 [4096, 4096]
    assert all(len(f) == 1 for f in found)
    assert len(found) == 2 * 32 + 2  # after attention and after the MLP of each layer, and both ends


def test_a_step_without_layers_has_no_boundary_inside() -> None:
    chain = Chain()
    step = chain.step(chain.op("loss", 1, 0))
    assert frontiers(step) == []
