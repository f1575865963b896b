"""Plan -> one FX graph that follows it, for a step with its backward inside. Decides nothing.

Before: a functional graph, and a Plan whose Runs name its nodes. After: the same graph with its ops in the plan's
order, and copies of those that run again. Each part of the plan starts from what is there by then: inputs, storages
that the plan keeps, storages that parts hand to each other; views are replayed where they are used, as in recompute.py.

    before    a b c d | d' c'          plan: keep b, recompute c
    after     a b c d   c again from b, d' c'

A storage that the plan offloads is copied off the device and back where the plan says, as in offload.py.
A random op that runs twice draws the same numbers: its generator state is saved when it first runs. Every node says
which part it is of, because an inner compiler that fuses must keep parts apart: else it would fuse micro-batches with
each other, and an op with its own second run, because they read the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import getitem

from torch import fx
from torch.fx.experimental.proxy_tensor import is_sym_node

from memplan.ir import Plan, Run
from memplan.passes import copies
from memplan.passes.compat import replay_random, save_random
from memplan.passes.kernel_order import PART
from memplan.passes.offload import arrive, release, reload, start
from memplan.passes.prefetch import spread
from memplan.passes.recompute import MOMENT

Made = dict[fx.Node, fx.Node]  # a node of the old graph -> what stands for it now in the new one


def rewrite(module: fx.GraphModule, plan: Plan) -> None:
    """Put the planned graph in the place of the module's own."""
    new = _Rewriter(module, plan)
    for k in range(len(plan.runs)):
        new.part(k)
    module.graph = new.finish()
    module.recompile()


class _Rewriter:
    def __init__(self, module: fx.GraphModule, plan: Plan) -> None:
        self.old, self.plan, self.graph = module.graph, plan, fx.Graph()
        self.by_name = {n.name: n for n in self.old.nodes}
        self.storages = {t.name: i for i, t in enumerate(plan.step.tensors)}
        self.there: Made = {}  # inputs, and ops and their results that every later part may read
        self.made: Made = {}  # what this part may read
        self.states: Made = {}  # random op that runs again -> its saved generator state
        self.again = {run.op for runs in plan.runs for run in runs if run.again}
        self.stays = plan.saved | plan.step.given | plan.step.late
        self.copies = [(c, self.by_name[plan.step.tensors[c.storage].name]) for c in self._moments()]
        self.tickets: Made = {}  # copies under way
        self.handles: Made = {}  # what is off the device
        self.moment = 0
        self.parts = list[list[fx.Node]]()
        for node in self.old.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.there[node] = self._copy(node, {})

    def part(self, k: int) -> None:
        """The runs of one graph of the plan."""
        self.made = dict(self.there)
        first = len(self.graph.nodes)
        for run in self.plan.runs[k]:
            self._before()
            self._run(self.by_name[self.plan.step.ops[run.op].name], run)
            self._after()
            self.moment += 1
        self.parts.append(list(self.graph.nodes)[first:])

    def finish(self) -> fx.Graph:
        """The new graph with its output."""
        self._emit(self.old.output_node())
        for k, nodes in enumerate(self.parts):
            for node in nodes:
                node.meta[PART] = k
            spread(self.graph, nodes)
        return self.graph

    def _moments(self) -> list[copies.Copy]:
        return copies.moments(self.plan.step, self.plan.runs, self.plan.offloads)

    def _before(self) -> None:
        """What comes back, and what has to be back."""
        for copy, x in self.copies:
            if copy.reload == self.moment:
                self.tickets[x] = reload(self.graph, self.handles[x], x.meta["val"])
        for copy, x in self.copies:
            if copy.first_use == self.moment:
                self.made[x] = self.there[x] = arrive(self.graph, self.tickets[x], self.handles[x])

    def _after(self) -> None:
        """What leaves, and what has to have left."""
        for copy, x in self.copies:
            if copy.start == self.moment:
                self.tickets[x] = start(self.graph, self.made[x], self.plan.offloads[copy.storage].tier)
        for copy, x in self.copies:
            if copy.release == self.moment:
                self.handles[x] = release(self.graph, self.made[x], self.tickets[x])

    def _run(self, node: fx.Node, run: Run) -> None:
        for needed in node.all_input_nodes:
            self._emit(needed)
        new = self._call(node, run)
        new.meta[MOMENT] = self.moment
        op = self.plan.step.ops[run.op]
        if not op.outputs or self.stays.issuperset(op.outputs):
            self.there.setdefault(node, new)
        self.made[node] = new
        for user in node.users:  # results of an op with several, and sizes that would else hold on to a tensor
            if user.target is getitem or (is_sym_node(user) and user.all_input_nodes == [node]):
                if run.again and user in self.there:
                    continue  # the saved one is read
                self.made[user] = self._copy(user, self.made)
                if (user.name in self.storages and self.storages[user.name] in self.stays) or is_sym_node(user):
                    self.there.setdefault(user, self.made[user])

    def _call(self, node: fx.Node, run: Run) -> fx.Node:
        op = self.plan.step.ops[run.op]
        if op.rng_bytes and run.op in self.again:
            if run.again:
                return replay_random(self.graph, node, self.states[node], self.made)
            new, self.states[node] = save_random(self.graph, node, self.made)
            return new
        return self._copy(node, self.made)

    def _emit(self, node: fx.Node) -> None:
        """A view, a size or the output, with what it needs."""
        stack = [node]
        while stack:
            n = stack[-1]
            missing = [i for i in n.all_input_nodes if i not in self.made]
            if n in self.made:
                stack.pop()
            elif missing:
                stack.extend(reversed(missing))
            else:
                self.made[stack.pop()] = self._copy(n, self.made)

    def _copy(self, node: fx.Node, made: Mapping[fx.Node, fx.Node]) -> fx.Node:
        return self.graph.node_copy(node, lambda n: made[n])
