"""A region that is an LM head with log-probs of given tokens -> what of it linear_logprob computes.

In: the loops of a region (loops.py). Out: a Selected: the product and its operands, how logits follow from it, which
nodes are log-probs, entropies and logsumexps of its rows; of backward the gradients of these, and which nodes are the
gradients of the operands. How people write it, or a compiler rewrites it, does not matter: what is computed is compared
with the formulas themselves (same_values.py).

    h W | log_softmax | gather           h W | logsumexp, gather | sub          h W | 30 tanh(/ 30) | cross entropy

What must hold: logits have no other reader. Raises NotFused otherwise, with what was seen.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from memplan.passes.absorb import Loop, elements
from memplan.passes.bodies import VIEWS, NotTiled
from memplan.passes.calls import descendants, name, tensors
from memplan.passes.capture import source_line
from memplan.passes.labels import Labels, value_of
from memplan.passes.layouts import has_rows, shape_of
from memplan.passes.row_locality import Region
from memplan.passes.same_values import ROWS, computed, constants, tame

TURNS = ("t", "permute", "transpose")
CASTS = ("_to_copy", "convert_element_type", "clone", "detach", "alias")
SAME = (*VIEWS, "expand", "unsqueeze", "squeeze")
CLOSE = 1e-9


class NotFused(Exception):
    """Why a region is not linear_logprob's. `head`: whether it looks like an LM head at all."""

    def __init__(self, reason: str, *, head: bool = True) -> None:
        super().__init__(reason)
        self.head = head


@dataclass(frozen=True)
class Form:
    """z = scale * raw, or with a cap: cap * tanh(scale * raw)."""

    scale: float = 1.0
    cap: float | None = None

    def logits(self, raw: Tensor) -> Tensor:
        return raw * self.scale if self.cap is None else (raw * self.scale).tanh() * self.cap

    def times(self, factor: float) -> Form:
        return Form(self.scale * factor) if self.cap is None else Form(self.scale, self.cap * factor)

    @property
    def logit_scale(self) -> float:
        """As linear_logprob takes it, beside the cap."""
        return self.scale * (self.cap or 1.0)


@dataclass(frozen=True)
class Grad:
    """What comes back, `sign` times, for log-probs or for entropies."""

    node: fx.Node
    of: str
    sign: int


@dataclass(frozen=True)
class Selected:
    """`found`: node -> ("logprob" | "entropy" | "total", 1 or -1). `grads` add up. `ends`: node -> what it is the
    gradient of: "hidden", "weight" as [V, D], "turned" as [D, V], or "bias".
    """

    product: fx.Node
    labels: Labels
    form: Form
    found: Mapping[fx.Node, tuple[str, int]]
    grads: tuple[Grad, ...]
    ends: Mapping[fx.Node, str]

    @property
    def frozen(self) -> bool:
        """Whether hidden states alone want a gradient."""
        return bool(self.ends) and set(self.ends.values()) == {"hidden"}


def selected(seed: fx.Node, region: Region, loops: Sequence[Loop], forward: Collection[fx.Node]) -> Selected:
    """What linear_logprob computes of the region of `seed`, [sequences, tokens, width]. Raises NotFused."""
    product = _product(seed, region, loops[0])
    try:
        with _disable_current_modes(), torch.enable_grad():  # on numbers, while fake ones are traced
            return _Matcher(product, region, forward).match()
    except NotTiled as e:
        raise NotFused(str(e)) from e


def _product(seed: fx.Node, region: Region, ahead: Loop) -> fx.Node:
    found = [n for n in ahead.nodes if name(n.target) in ("mm", "addmm", "bmm")]
    if len(found) != 1 or name(found[0].target) == "bmm":
        raise NotFused(f"it has {len(found)} products", head=False)
    (product,) = found
    sequences, tokens, _ = region.keeps[seed]
    if product.kwargs or region.keeps[product][0] != (*sequences, *tokens) or product.args[-1] in region.keeps:
        raise NotFused("its product is not of all rows with a weight")
    weight: Any = product.args[-1]
    width, vocabulary = shape_of(weight.meta["val"])
    if not (vocabulary.is_Integer and width.is_Integer) or vocabulary == width:
        raise NotFused("its weight is square, or of a size that varies")
    return product


class _Matcher:
    def __init__(self, product: fx.Node, region: Region, forward: Collection[fx.Node]) -> None:
        self.product, self.region, self.forward = product, region, forward
        self.order = list(product.graph.nodes)
        self.constants = constants(product.graph)
        self.wide = {n for n in region.keeps if elements(n) >= elements(product) / 2}
        self.labels: list[Labels] = []
        self.made: dict[fx.Node, bool] = {product: True}  # whether it follows from logits and labels alone
        generator = torch.Generator().manual_seed(0)
        vocabulary = int(product.meta["val"].shape[1])
        self.tokens = torch.randint(vocabulary, (ROWS,), generator=generator)
        self.raw = 2 * torch.randn(ROWS, vocabulary, dtype=torch.float64, generator=generator)
        self.raw[::2].scatter_(1, self.tokens[::2, None], 9.0)  # some are likely, and some are not
        self.grad = torch.randn(ROWS, dtype=torch.float64, generator=generator)

    def match(self) -> Selected:
        within = [n for n in self.order if n in self.forward and n in self.region.keeps and n is not self.product]
        part = [n for n in within if self._follows(n)]
        after = descendants([self.product])
        rows = [n for n in part if self._one_per_row(n) and n in after]
        reason = NotFused(self._no_logprob(within, part), head=False)
        if not rows or not self.labels:
            raise reason
        values = dict(zip(rows, computed(part, rows, self.region, self._given()), strict=True))
        for form in reversed(self._forms(part)):
            found = {n: kind for n in rows if (kind := self._kind(values[n], form)) is not None}
            if not any(kind == "logprob" for kind, _ in found.values()):
                continue
            try:
                return self._with_backward(set(part), found, form)
            except NotFused as e:
                reason = e
        raise reason

    def _no_logprob(self, within: Sequence[fx.Node], part: Sequence[fx.Node]) -> str:
        """Why there may be none."""
        known, others = {self.product, *part}, set(within) - set(part)
        stops = (n for n in within if n in others & self.wide and not known.isdisjoint(n.all_input_nodes))
        first = next((f", {name(n.target)} at {source_line(n)} comes before" for n in stops), "")
        return f"no log-prob of a given token is computed from it{first}"

    # ---- forward -------------------------------------------------------------------------------------------------

    def _follows(self, node: fx.Node) -> bool:
        """Whether it follows from logits and labels alone, by ops that random numbers show."""
        if node not in self.made:
            self.made[node] = False
            self.made[node] = (
                node.op == "call_function"
                and node in self.region.keeps
                and tame(node, self.wide, self.constants)
                and all(n in self.constants or self._follows(n) or self._label(n) for n in _given(node))
            )
        return self.made[node]

    def _label(self, node: fx.Node) -> bool:
        """Whether it is the labels, which are those of any other part."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype not in (torch.int64, torch.int32):
            return False
        if elements(node) >= elements(self.product) / 2:
            return False
        mine = Labels.of(node, self.constants)
        if self.labels and not self.labels[0].same(mine, self.constants):
            return False
        if all(mine.node is not other.node for other in self.labels):
            self.labels.append(mine)
        return True

    def _one_per_row(self, node: fx.Node) -> bool:
        value = node.meta["val"]
        return value.dtype.is_floating_point and all(has_rows(dim) or not dim for dim in self.region.keeps[node])

    def _given(self) -> dict[fx.Node, Tensor]:
        return self.constants | {self.product: self.raw} | {labels.node: self.tokens[:, None] for labels in self.labels}

    def _forms(self, part: Sequence[fx.Node]) -> list[Form]:
        """How logits may follow from the product; the farthest comes last."""
        forms = {self.product: Form()}
        for node in part:
            of, *more = node.args or (None,)
            if not isinstance(of, fx.Node) or of not in forms:
                continue
            op, number = name(node.target), more[0] if more else None
            if op in (*VIEWS, *CASTS, "slice"):
                forms[node] = forms[of]
            elif op in ("mul", "div") and isinstance(number, (int, float)) and number:
                forms[node] = forms[of].times(number if op == "mul" else 1 / number)
            elif op == "tanh" and forms[of].cap is None:
                forms[node] = Form(forms[of].scale, 1.0)
        return list(dict.fromkeys(f for f in forms.values() if f.scale and (f.cap is None or f.cap > 0)))

    def _kind(self, value: Tensor, form: Form) -> tuple[str, int] | None:
        for what, right in _formulas(form.logits(self.raw), self.tokens).items():
            for sign in (1, -1):
                if _close(value.squeeze(1), sign * right):
                    return what, sign
        return None

    # ---- backward ------------------------------------------------------------------------------------------------

    def _with_backward(self, part: set[fx.Node], found: Mapping[fx.Node, tuple[str, int]], form: Form) -> Selected:
        reached, ends = self._reached(part, found)
        if not ends:
            return Selected(self.product, self.labels[0], form, found, (), {})
        kinds = {end: self._end(end) for end in ends}
        sources = {_stripped(self._operand(end), (*VIEWS, *TURNS)) for end in ends}
        if len(sources) != 1:
            raise NotFused("its products in backward do not read the same gradient of logits")
        grads = self._grads(sources.pop(), reached, form)
        return Selected(self.product, self.labels[0], form, found, grads, kinds)

    def _reached(self, part: Collection[fx.Node], found: Collection[fx.Node]) -> tuple[set[fx.Node], list[fx.Node]]:
        """What reads logits without asking for what was found, and the products and sums where that ends."""
        reached, ends = {self.product}, list[fx.Node]()
        for node in self.order:
            if node in found or reached.isdisjoint(node.all_input_nodes):
                continue
            sums = node in self.region.ends or name(node.target) in ("mm", "addmm")
            if node not in self.forward and node.op != "output" and sums:
                ends.append(node)
            elif node.op == "output" or (node in self.forward and node not in part):
                raise NotFused(
                    f"its logits are also read by {name(node.target)} at {source_line(node) or 'the output'}"
                )
            else:
                reached.add(node)
        return reached, ends

    def _operand(self, end: fx.Node) -> fx.Node:
        """The gradient of logits that a product or a sum reads."""
        for n in end.all_input_nodes:
            if elements(n) >= elements(self.product) / 2:
                return n
        raise NotFused(f"{end.name} at {source_line(end)} reads part of what leads to the gradient of logits")

    def _end(self, end: fx.Node) -> str:
        """What it is the gradient of."""
        operands: Any = self.product.args
        hidden, weight = (_stripped(n, (*VIEWS, *TURNS)) for n in operands[-2:])
        vocabulary, width = self.product.meta["val"].shape[1], operands[-1].meta["val"].shape[0]
        shape = list(end.meta["val"].shape)
        if name(end.target) == "mm":
            others = [_stripped(n, (*VIEWS, *TURNS)) for n in end.args if n is not self._operand(end)]  # type: ignore[arg-type]
            if others == [weight] and end.args[0] is self._operand(end):
                return "hidden"
            if others == [hidden] and shape in ([vocabulary, width], [width, vocabulary]):
                return "weight" if shape[0] == vocabulary else "turned"
        if name(end.target) == "sum" and end.meta["val"].numel() == vocabulary:
            return "bias"
        raise NotFused(f"{name(end.target)} at {source_line(end) or end.name} reads the gradient of logits too")

    def _grads(self, source: fx.Node, reached: Collection[fx.Node], form: Form) -> tuple[Grad, ...]:
        """What comes back for log-probs and for entropies, so that with it the gradient of logits is as it should."""
        raw = self.raw.clone().requires_grad_()
        formulas = _formulas(form.logits(raw), self.tokens)
        right = {
            what: torch.autograd.grad((formulas[what] * self.grad).sum(), raw, retain_graph=True)[0]
            for what in ("logprob", "entropy")
        }
        passed = set[fx.Node]()  # what is one number per row, and not yet the gradient of a log-prob or an entropy
        while True:
            cut, needed = dict[fx.Node, set[fx.Node]](), set[fx.Node]()
            if not self._leads(source, reached, passed, cut, needed):
                raise NotFused("its gradient does not follow from that of log-probs")
            grads = {n: self._grad(n, cut, source, sorted(needed), right) for n in cut}
            wrong = [n for n, grad in grads.items() if grad is None]
            if not wrong:
                return tuple(grad for grad in grads.values() if grad is not None)
            passed.add(max(wrong))  # what comes before it may be right once it is no longer cut there

    def _grad(
        self,
        node: fx.Node,
        cut: Mapping[fx.Node, Collection[fx.Node]],
        source: fx.Node,
        needed: Sequence[fx.Node],
        right: Mapping[str, Tensor],
    ) -> Grad | None:
        """What it is the gradient of, if it is so alone, with zeros for all else that comes back."""
        given = self._given()
        for n, seen_as in cut.items():
            rows = (self.grad if n is node else torch.zeros_like(self.grad))[:, None]
            given |= {view: value_of(view, {**self.constants, n: rows}) for view in seen_as}
        (value,) = computed(needed, [source], self.region, given)
        signed = ((what, sign) for what in right for sign in (1, -1))
        return next((Grad(node, *kind) for kind in signed if _close(value, kind[1] * right[kind[0]])), None)

    def _leads(
        self,
        node: fx.Node,
        reached: Collection[fx.Node],
        passed: Collection[fx.Node],
        cut: dict[fx.Node, set[fx.Node]],
        needed: set[fx.Node],
    ) -> bool:
        """Whether it follows from labels, logits, and numbers of rows, which become the cut, with what is read of them;
        `needed`: what lies in between.
        """
        if node in needed or node is self.product or node in self.constants or self._label(node):
            return True
        row: fx.Node | None = _stripped(node, SAME)
        while row is not None and row in passed and row not in self.region.keeps:
            row = self._made_of_one(row)
        if row is not None and row not in passed and row not in reached and self._number_of_row(row):
            cut.setdefault(row, set()).add(node)
            return True
        if node.op != "call_function" or node not in self.region.keeps or not tame(node, self.wide, self.constants):
            return False
        needed.add(node)
        return all(self._leads(n, reached, passed, cut, needed) for n in _given(node))

    def _made_of_one(self, node: fx.Node) -> fx.Node | None:
        """What a pointwise node follows from, besides constants."""
        others = [n for n in _given(node) if n not in self.constants]
        alone = len(others) == 1 and torch.Tag.pointwise in getattr(node.target, "tags", ())
        return _stripped(others[0], SAME) if alone and tame(node, self.wide, self.constants) else None

    def _number_of_row(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            return False
        return elements(node) == elements(self.labels[0].node) and not self._follows(node)


def _formulas(z: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    log_p = z.log_softmax(-1)
    return {
        "logprob": log_p.gather(1, tokens[:, None]).squeeze(1),
        "entropy": -(log_p.exp() * log_p).sum(1),
        "total": z.logsumexp(1),
    }


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= CLOSE * (1 + b.abs().max()))


def _given(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node reads; sizes are known from where rows are."""
    return [n for n in node.all_input_nodes if tensors(n.meta.get("val"))]


def _stripped(node: fx.Node, ops: Collection[str]) -> fx.Node:
    while name(node.target) in ops and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
