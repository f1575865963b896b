"""The eager inner compiler: exact kernels, in the graph's order, each value dropped after its last use.

In: an FX graph. Out: a callable that takes its arguments in a list and empties it, so that nothing outside
holds a saved tensor once backward has used it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.graph import CodeGen


class _Boxed(CodeGen):
    """Generates `def forward(self, args)` that takes the list over; fx itself drops values after their last use."""

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **_: Any) -> str:
        names = [v.split(":")[0].split("=")[0].strip() for v in free_vars if v != "self"]
        lines = ["def forward(self, args):"]
        if names:
            lines += [f"{', '.join(names)}, = args", "args.clear()"]
        return "\n    ".join(lines)


def compile_eager(graph: fx.GraphModule, _example_inputs: Any) -> Callable[[list[Any]], Any]:
    """A boxed callable (AOTAutograd's word for the calling convention above) that runs the graph."""
    graph.graph.set_codegen(_Boxed())
    graph.recompile()
    forward = graph.forward

    def run(args: list[Any]) -> Any:
        return forward(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
