"""What linear_logprob computes of a region (selected.py) -> its ops in the place of the region's nodes.

    before    z = h W | log_softmax, gather -> l        |...| dz | dh = dz W', dW = dz' h
    after     l, entropy, total = linear_logprob(h, W, labels)  |...| dh, dW = linear_logprob_backward(dl, h, W, ...)

and with a frozen head, where forward makes dl/dh of each row:

    after     l, ..., u = linear_logprob(h, W, labels, "vectors")  |...| dh = u * dl

What must hold: log-probs are equal up to rounding, which is in float32 at least here, and so are gradients. A shift of
the tokens after the head becomes rows whose log-prob nobody reads, and to which nothing comes back. Of labels that are
no token, which only comparisons allow, the log-prob is another one than before, and as meaningless.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode

from memplan.passes.bodies import AXES
from memplan.passes.calls import name
from memplan.passes.layouts import Axis, Layout, has_rows
from memplan.passes.row_locality import Region
from memplan.passes.selected import NotFused, Selected
from memplan.runtime.kernels.linear_logprob import ops

aten = torch.ops.aten
FORWARD: Any = torch.ops.memplan.linear_logprob.default
BACKWARD: Any = torch.ops.memplan.linear_logprob_backward.default
WAYS = ("rows", "vocab", "vectors")
SAID = {
    "rows": "row tiles, logits computed again in backward",
    "vocab": "vocabulary tiles, logits computed again in backward",
    "vectors": "the gradient of each row in forward",
    "": "no gradient",
}


def fuse(graph: fx.Graph, seed: fx.Node, region: Region, found: Selected, way: str) -> str:
    """Put the ops in the graph's end, and their results in the place of what was found; nothing reads the logits then.
    `way`: one of WAYS, or "auto". Returns the way. Raises NotFused for a way that is not for such a head.
    """
    if way == "vectors" and not found.frozen:
        raise NotFused("way 'vectors' is for a frozen head, and this one is trained")
    mode = detect_fake_mode([found.product.meta["val"]])
    assert mode is not None
    with graph.inserting_before(graph.output_node()), mode:
        return _Writer(graph, seed, region, found, way).write()


class _Writer:
    def __init__(self, graph: fx.Graph, seed: fx.Node, region: Region, found: Selected, way: str) -> None:
        self.graph, self.region, self.found = graph, region, found
        self.like = found.product.meta  # of what forward is now; of backward it is that of the gradients' nodes
        operands: Any = found.product.args
        self.hidden: fx.Node = operands[-2]
        self.weight = self._weight(operands[-1])
        self.bias = found.product.args[0] if name(found.product.target) == "addmm" else None
        self.entropy = any(k == "entropy" for k, _ in found.found.values()) or any(
            g.of == "entropy" for g in found.grads
        )
        self.sizes = [self._size(seed, d) for d in (0, 1)]
        self.window, self.of_labels = self._window()
        self.form = (1.0, found.form.logit_scale, found.form.cap, self.hidden.meta["val"].dtype)
        self.way = self._chosen(way)

    def write(self) -> str:
        labels = self._whole(self._call(aten.view.default, self._labels(), [self.sizes[0], -1]))
        given = (self.hidden, self.weight, labels, self.bias, None, None)
        way = self.way or "auto"
        made = self._results(self._call(FORWARD, *given, *self.form, self.entropy, way))
        results = {"logprob": made[0], "entropy": made[1], "total": made[2]}
        for node, (what, sign) in self.found.found.items():
            self._replace(node, self._as(node, results[what], sign))
        if self.found.ends:
            self.like = next(iter(self.found.ends)).meta
            self._backward(given, made)
        return self.way

    def _chosen(self, way: str) -> str:
        if not self.found.ends:
            return ""
        if way == "auto" and self.found.frozen:
            return "vectors"
        if way == "auto":
            sums = torch.promote_types(self.form[3], torch.float32)
            return ops.smaller(self.hidden.meta["val"], self.weight.meta["val"], sums)
        return way

    def _backward(self, given: tuple[Any, ...], made: list[fx.Node]) -> None:
        grads = {of: self._sum(of) for of in ("logprob", "entropy")}
        if grads["logprob"] is None:
            grads["logprob"] = self._call(aten.full_like.default, made[0], 0.0)
        ends = {what: node for node, what in self.found.ends.items()}
        found: Mapping[str, fx.Node | None]
        if self.way == "vectors":
            found = {"hidden": self._scaled(grads["logprob"], grads["entropy"], made)}
        else:
            needs = [bool(ends.keys() & some) for some in ({"hidden"}, {"weight", "turned"}, {"bias"})]
            rows = (grads["logprob"], grads["entropy"], *given, *made[:2], made[2], *self.form, self.way, needs)
            of_hidden, of_weight, of_bias = self._results(self._call(BACKWARD, *rows))
            turned = self._call(aten.permute.default, of_weight, [1, 0]) if "turned" in ends else None
            found = {"hidden": of_hidden, "weight": of_weight, "turned": turned, "bias": of_bias}
        for node, what in self.found.ends.items():
            new = found[what]
            assert new is not None
            if what == "bias":
                new = self._call(aten.view.default, new, list(node.meta["val"].shape))
            self._replace(node, self._cast(new, node.meta["val"].dtype))

    def _scaled(self, of_logprob: Any, of_entropy: Any, made: list[fx.Node]) -> fx.Node:
        """Vectors times what comes back: the gradient of hidden states."""
        total = None
        for grad, vector in ((of_logprob, made[3]), (of_entropy, made[4])):
            if grad is not None:
                term = self._call(aten.mul.Tensor, vector, self._call(aten.unsqueeze.default, grad, 1))
                total = term if total is None else self._call(aten.add.Tensor, total, term)
        assert total is not None
        return total

    # ---- rows ----------------------------------------------------------------------------------------------------

    def _window(self) -> tuple[tuple[int, int] | None, Layout]:
        """How many tokens are before and after those that count; None: all count. And a layout of those that do."""
        layout = next(self.region.keeps[n] for n in self.found.found)
        tokens = [f for dim in layout for f in dim if isinstance(f, Axis) and f.name == AXES[1]]
        whole = [f for f in self.region.keeps[self.found.product][0] if f.name == AXES[1]]
        if not tokens or not whole:
            raise NotFused("its rows are not sequences of tokens")
        before = tokens[0].start - whole[0].start
        after = whole[0].size - tokens[0].size - before
        if not (before.is_Integer and after.is_Integer):
            raise NotFused("its rows begin at a token whose place varies")
        return ((int(before), int(after)) if before or after else None), layout

    def _whole(self, rows: fx.Node) -> fx.Node:
        """[sequences, tokens that count] -> [T], with zeros for the others."""
        if self.window is not None:
            rows = self._call(aten.constant_pad_nd.default, rows, list(self.window), 0)
        return self._call(aten.view.default, rows, [-1])

    def _labels(self) -> fx.Node:
        node = self.found.labels.node
        if self.found.labels.read_by(aten.gather.default):  # which refuses what is no token
            return node
        return self._call(aten.clamp.default, node, 0, int(self.found.product.meta["val"].shape[1]) - 1)

    def _as(self, node: fx.Node, rows: fx.Node, sign: int) -> fx.Node:
        """[T] as a node of the region has its rows."""
        layout = self.region.keeps[node]
        if self.window is not None:
            before, after = self.window
            rows = self._call(aten.view.default, rows, self.sizes)
            rows = self._call(aten.slice.Tensor, rows, 1, before, -after if after else 2**63 - 1)
            if any(len(dim) > 1 for dim in layout):
                rows = self._call(aten.clone.default, rows, memory_format=torch.contiguous_format)
        separate = sum(has_rows(dim) for dim in layout) > 1
        shape = [
            1 if not has_rows(dim) else self.sizes[0] if separate and dim[0].name == AXES[0] else -1 for dim in layout
        ]
        rows = self._call(aten.view.default, rows, shape)
        rows = self._call(aten.neg.default, rows) if sign < 0 else rows
        return self._cast(rows, node.meta["val"].dtype)

    def _sum(self, of: str) -> fx.Node | None:
        """[T]: all that comes back for log-probs, or for entropies."""
        total = None
        for grad in self.found.grads:
            if grad.of == of:
                rows = self._cast(grad.node, torch.promote_types(self.form[3], torch.float32))
                rows = self._call(aten.reshape.default, rows, [self.sizes[0], -1])
                rows = self._call(aten.neg.default, rows) if grad.sign < 0 else rows
                total = rows if total is None else self._call(aten.add.Tensor, total, rows)
        return None if total is None else self._whole(total)

    # ---- nodes ---------------------------------------------------------------------------------------------------

    def _weight(self, turned: fx.Node) -> fx.Node:
        """[V, D], as people hold it."""
        if name(turned.target) in ("t", "permute", "transpose") and isinstance(turned.args[0], fx.Node):
            return turned.args[0]
        return self._call(aten.permute.default, turned, [1, 0])

    def _size(self, node: fx.Node, dim: int) -> Any:
        size = node.meta["val"].shape[dim]
        return size if isinstance(size, int) else self._call(aten.sym_size.int, node, dim)

    def _cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        same = node.meta["val"].dtype == dtype
        return node if same else self._call(torch.ops.prims.convert_element_type.default, node, dtype)

    def _results(self, call: fx.Node) -> list[fx.Node]:
        return [self._call(getitem, call, k) for k in range(len(call.meta["val"]))]

    def _replace(self, node: fx.Node, new: fx.Node) -> None:
        new.meta = dict(node.meta) | {"val": new.meta["val"]}
        node.replace_all_uses_with(new)

    def _call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        new = self.graph.call_function(target, args, kwargs)
        new.meta = {k: self.like[k] for k in ("stack_trace", "nn_module_stack", "autograd_backward") if k in self.like}
        given, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        new.meta["val"] = target(*given, **named)
        return new
