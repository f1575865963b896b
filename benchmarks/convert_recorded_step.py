"""A storage graph recorded for planners (nodes with op, bytes, time, flops, deps) -> a Step that memplan.steps loads.

    python benchmarks/convert_recorded_step.py GRAPH.json.gz TORCH_SAVED.json.gz memplan/steps/NAME.json.gz

Every node becomes an op that makes one storage. The recording has no tangents: the loss's gradient, 4 bytes, is
added as backward's input, and the op that starts backward reads it. Parameter gradients get no bytes: the figures
this step is compared with leave them out.
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

from memplan.ir import Fusion, Graph, Kind, Op, Step, Tensor
from memplan.serialize import to_json, write

BANDWIDTH = 2.6e12  # bytes/s: the recording's times are roofline estimates at this rate and 600 TFLOP/s
DTYPE = "bfloat16"
FIRST_OF_BACKWARD = "nll_loss_backward"

# How Inductor lowers them; what is not named is a kernel of its own.
_FUSION: dict[str, Fusion] = dict.fromkeys(
    (
        *("mul", "add", "sub", "div", "neg", "pow", "rsqrt", "silu", "sigmoid", "_to_copy", "cat", "clone", "fill"),
        *("empty_like", "_assert_tensor_metadata", "embedding", "nll_loss_backward"),
    ),
    "pointwise",
) | dict.fromkeys(
    ("sum", "mean", "_log_softmax", "_log_softmax_backward_data", "nll_loss_forward", "embedding_dense_backward"),
    "reduction",
)


def convert(name: str, nodes: list[dict[str, Any]], outs: list[int], saved: list[tuple[float, list[int]]]) -> Step:
    """The recorded nodes as a Step; storage i is what node i makes, and the last storage is the tangent."""
    first, tangent = sum(not node["bwd"] for node in nodes), len(nodes)
    gradients = {t for t in outs if t >= first}
    tensors, ops = [], []
    for i, node in enumerate(nodes):
        kind: Kind = "gradient" if i in gradients else "activation"
        tensors.append(Tensor(f"{node['op']}_{i}", 0 if i in gradients else node["bytes"], kind, dtype=DTYPE))
        inputs = (*node["deps"], tangent) if node["op"] == FIRST_OF_BACKWARD else tuple(node["deps"])
        traffic = round(node["time"] * BANDWIDTH)
        op, fusion = node["op"], _FUSION.get(node["op"], "extern")
        ops.append(Op(f"{op}_{i}", op, inputs, (i,), round(node["flops"]), traffic, DTYPE, fusion))
    tensors.append(Tensor("tangent", 4, "input", dtype="float32"))
    losses = tuple(t for t in outs if t < first)
    return Step(
        name,
        tuple(tensors),
        (
            Graph("forward", tuple(ops[:first]), (), losses),
            Graph("backward", tuple(ops[first:]), (tangent,), tuple(sorted(gradients)), "backward"),
        ),
        resident=(),
        saved_by=tuple(
            ("torch-min-cut" if ratio == 1.0 else f"torch-budget-{ratio:g}", tuple(kept)) for ratio, kept in saved
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path)
    parser.add_argument("torch_saved", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    recorded = json.loads(gzip.decompress(args.graph.read_bytes()))
    torch_saved = json.loads(gzip.decompress(args.torch_saved.read_bytes()))
    step = convert(args.output.name.removesuffix(".json.gz"), recorded["nodes"], recorded["outs"], torch_saved)
    write(args.output, gzip.compress(to_json(step).encode(), mtime=0))


if __name__ == "__main__":
    main()
