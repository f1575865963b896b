"""Steps that are made, not recorded: linear chains whose best plans are known, and random layered graphs. Torch-free.

In: sizes, a seed. Out: a Step; the same arguments give the same one.
"""

from __future__ import annotations

from random import Random

from memplan.ir import Graph, Kind, Op, Step, Tensor

UNIT = 2**20  # bytes of each storage of a chain, and of its traffic


def linear_chain(length: int) -> Step:
    """`length` forward ops, each of the one before, and as many backward ops, each of the gradient before it and of
    what its forward op made. Every op takes the same time, every storage has UNIT bytes, and the loss's gradient, one
    more, is held throughout backward.

    Checkmate's chains (Jain et al. 2020): within 8, 10 and 14 units, lengths 8, 16 and 32 take 18, 40 and 84 ops.
    """
    tensors = [Tensor("input", 0, "input"), Tensor("tangent", UNIT, "input", dtype="float32")]

    def op(name: str, *inputs: int, kind: Kind = "activation") -> Op:
        tensors.append(Tensor(name, UNIT, kind, dtype="float32"))
        return Op(name, "unit", inputs, (len(tensors) - 1,), traffic=UNIT, dtype="float32")

    forward, backward, below, gradient = list[Op](), list[Op](), 0, 1
    for k in range(length):
        forward.append(op(f"v{k + 1}", below))
        below = forward[-1].outputs[0]
    tensors.append(Tensor("loss", 0, "activation", dtype="float32"))
    forward.append(Op("loss", "unit", (below,), (len(tensors) - 1,), dtype="float32"))  # which is free
    loss = len(tensors) - 1
    for k in reversed(range(length)):
        backward.append(op(f"g{k + 1}", gradient, forward[k].outputs[0], kind="gradient"))
        gradient = backward[-1].outputs[0]
    return _step(f"chain of {length}", tensors, forward, backward, (0,), (loss,), (gradient,))


def least_ops(length: int, units: int) -> int:
    """What a plan of a chain takes at least, in ops, inside so many units: when backward begins, all that is kept is
    there, the loss's gradient and the first one; the rest runs once more. Some plan takes no more, unless what is kept
    is so little that what lies between does not fit: from about the square root of twice the length on, some does.
    """
    return 2 * length + max(0, length - (units - 2))


def layered(seed: int, layers: int = 12, width: int = 4) -> Step:
    """A random graph of `layers` times `width` forward ops, of 1 to 64 MiB and up to 10 GFLOP each. An op reads one or
    two results of the layer before, and one in four a result of any earlier layer; each has a backward op, which reads
    the gradients of what it made and what it read.
    """
    random, tensors = Random(seed), [Tensor("input", UNIT, "input", dtype="bfloat16")]
    forward, rows = list[Op](), [[0]]
    for k in range(layers):
        row = list[int]()
        for j in range(width if k < layers - 1 else 1):
            read = set(random.sample(rows[-1], min(len(rows[-1]), random.choice((1, 2)))))
            if random.random() < 0.25:
                read.add(random.choice(random.choice(rows)))
            tensors.append(Tensor(f"v{k}.{j}", random.randint(1, 64) * UNIT, "activation", dtype="bfloat16"))
            row.append(len(tensors) - 1)
            forward.append(_op(tensors, f"v{k}.{j}", sorted(read), row[-1], random.randint(0, 10**10)))
        rows.append(row)
    tensors.append(Tensor("tangent", tensors[-1].bytes, "input", dtype="bfloat16"))
    tangent = len(tensors) - 1
    backward, gradients = list[Op](), {rows[-1][0]: [tangent]}
    for forward_op in reversed(forward):
        made = forward_op.outputs[0]
        if made not in gradients:  # nothing of the last layer depends on it
            continue
        for t in forward_op.inputs:
            tensors.append(Tensor(f"{forward_op.name}'{t}", tensors[t].bytes, "activation", dtype="bfloat16"))
            inputs = [*gradients[made], *forward_op.inputs]
            backward.append(_op(tensors, tensors[-1].name, inputs, len(tensors) - 1, forward_op.flops))
            gradients.setdefault(t, []).append(len(tensors) - 1)
    return _step(
        f"layered {seed}", tensors, forward, backward, (0,), (rows[-1][0],), tuple(gradients[0]), (tangent,)
    )  # fmt: skip


def _op(tensors: list[Tensor], name: str, inputs: list[int], output: int, flops: int) -> Op:
    traffic = sum(tensors[t].bytes for t in (*inputs, output))
    return Op(name, "random", tuple(inputs), (output,), flops, traffic, "bfloat16")


def _step(
    name: str,
    tensors: list[Tensor],
    forward: list[Op],
    backward: list[Op],
    resident: tuple[int, ...],
    losses: tuple[int, ...],
    gradients: tuple[int, ...],
    tangents: tuple[int, ...] = (1,),
) -> Step:
    graphs = (
        Graph("forward", tuple(forward), resident, losses),
        Graph("backward", tuple(backward), tangents, gradients, "backward"),
    )
    return Step(name, tuple(tensors), graphs, resident)
