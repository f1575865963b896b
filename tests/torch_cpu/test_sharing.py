"""Sharing: Q is orthogonal whatever its parameters are, errors are what they are said to be, bytes are really saved."""

import copy
import itertools
import math
import random

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import memplan
from memplan.backend import memplan_backend
from memplan.errors import MemplanError
from memplan.passes.check import check
from memplan.sharing import Blocks, Householder, Pair, Report, share_as, share_lossy, survey, unshare
from memplan.sharing.fit import image, least_error
from memplan.sharing.forms import Image, fold, reflected, unfold
from memplan.sharing.pairs import best_pairs
from memplan.sharing.share import held

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "one_thread")

TOKENS = torch.arange(48).remainder(31)[None]
Q_AND_K = [("q_proj", "k_proj")]


def random_q(form, d: int, dtype=torch.float64) -> nn.Module:
    """Some Q of the form, with random parameters."""
    q = form.blank(d, dtype, torch.device("cpu"))
    for p in q.parameters():
        p.data.normal_()
    for signs in q.buffers():
        signs.copy_(torch.randint(2, signs.shape) * 2 - 1)
    return q


def dense(q: nn.Module, d: int, dtype=torch.float64) -> torch.Tensor:
    return q(torch.eye(d, dtype=dtype)).detach()


def llama(layers: int = 4, kv: int = 4, **options) -> LlamaForCausalLM:
    sizes = options | dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=kv, use_cache=False, **sizes))


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS, labels=TOKENS).loss


def plant(model: nn.Module, source: str, target: str, form, right: bool = False) -> None:
    """The target becomes 0.7 times an image of the source's first rows and columns."""
    to = model.get_parameter(target)
    w1 = model.get_parameter(source).detach()[: to.shape[0], : to.shape[1]].double()
    q = dense(random_q(form, w1.shape[right]), w1.shape[right])
    to.data.copy_(0.7 * (w1 @ q if right else q @ w1))


def layer(number: int, kind: str) -> str:
    return f"model.layers.{number}.{kind}.weight"


FORMS = [Householder(1), Householder(5), Blocks(2), Blocks(3), Blocks(4), Blocks(), Householder(12)]


# Forms


def test_reflections_one_by_one():
    """H(v1) ... H(vk) x is what a loop over 1 - 2 v v' / v'v gives."""
    v, x = torch.randn(3, 7, 4, dtype=torch.float64), torch.randn(3, 7, 5, dtype=torch.float64)
    expected = x
    for j in reversed(range(4)):
        one = v[..., j : j + 1]
        expected = expected - 2 * one @ (one.mT @ expected) / one.square().sum(-2, keepdim=True)
    torch.testing.assert_close(reflected(v, x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("b", [2, 3, 4, 7, 8])
def test_a_folded_triangle_is_the_triangle(b):
    lower = torch.randn(2, b, b).tril(-1)
    assert fold(lower)[0].numel() == b * (b - 1) // 2
    assert torch.equal(unfold(fold(lower)), lower)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_q_is_orthogonal_of_its_form_and_of_its_bytes(form):
    q = random_q(form, 12)
    one = dense(q, 12)
    torch.testing.assert_close(one @ one.t(), torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-12)
    if isinstance(form, Blocks):
        outside = torch.block_diag(*[torch.ones(form.of(12), form.of(12))] * (12 // form.of(12))) == 0
        assert not one[outside].any()
    else:
        changed = torch.linalg.matrix_rank(one - torch.eye(12, dtype=torch.float64)).item()
        assert changed == form.reflectors
    for dtype in (torch.float64, torch.bfloat16):
        made = form.blank(12, dtype, torch.device("cpu"))
        assert form.nbytes(12, dtype) == sum(t.nbytes for t in made.state_dict().values())


@pytest.mark.parametrize("d", [4, 5])
def test_one_block_is_any_orthogonal_matrix(d):
    """Of either determinant, and where reflections degenerate."""
    eye = torch.eye(d, dtype=torch.float64)
    random = torch.linalg.qr(torch.randn(2, d, d, dtype=torch.float64))[0]
    for q in (eye, -eye, eye.flip(0), eye.roll(1, 0), *random, random[0] * (eye[0] * 2 - 1)):
        w1 = torch.randn(d, 7, dtype=torch.float64)
        made, error = image(w1, q @ w1, Blocks(), False, torch.float64)
        assert error < 1e-7  # the square root of what rounding leaves
        torch.testing.assert_close(dense(made.q, d), q, rtol=0, atol=1e-7)


@pytest.mark.parametrize("form", [Householder(3), Blocks(3), Blocks()], ids=str)
@pytest.mark.parametrize("right", [False, True])
def test_gradients_flow_to_all_parts(form, right):
    shape = (6, 9)
    made = Image(random_q(form, shape[right]), torch.tensor(0.8, dtype=torch.float64), shape, right)
    source = torch.randn(8, 9, dtype=torch.float64, requires_grad=True)
    names, parts = zip(*made.named_parameters(), strict=True)

    def compute(source, *parts):
        return torch.func.functional_call(made, dict(zip(names, parts, strict=True)), (source,))

    assert torch.autograd.gradcheck(compute, (source, *(p.detach().requires_grad_() for p in parts)))


def test_eager_keeps_the_image_alone():
    """And none of what is on the way to it."""
    made = Image(random_q(Blocks(), 128, torch.float32), torch.tensor(1.0), (128, 128), False)
    source = torch.randn(128, 128, requires_grad=True)
    with memplan.record("cpu") as seen:
        weight = made(source)
    left = seen.timeline.totals[-1] - seen.timeline.base_bytes
    assert weight.requires_grad and weight.nbytes <= left < 1.5 * weight.nbytes


# Fits


@pytest.mark.parametrize("c", [1.7, -1.7])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_an_image_is_found(form, c):
    w1 = torch.randn(12, 20, dtype=torch.float64)
    w2 = c * random_q(form, 12)(w1).detach()
    made, error = image(w1, w2, form, False, torch.float64)
    assert error < 1e-6 and least_error(w1, w2) < 1e-6
    assert abs(made.scale.item()) == pytest.approx(1.7)  # where -Q is of the form, of either sign
    made, error = image(w1, w2, form, False, torch.bfloat16)
    stored = (made(w1.bfloat16()).double() - w2).norm() / w2.norm()
    assert error == pytest.approx(stored.item(), rel=1e-9) and 1e-4 < error < 2e-2


def angles(count: int = 4000) -> torch.Tensor:
    t = torch.linspace(0, 2 * math.pi, count, dtype=torch.float64)
    turns = torch.stack([t.cos(), -t.sin(), t.sin(), t.cos()], -1).view(-1, 2, 2)
    return torch.cat([turns, turns @ torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))])


def best_by_trial(w1: torch.Tensor, w2: torch.Tensor, qs: torch.Tensor) -> float:
    """The smallest relative error of c Q w1 over the given Qs, each with its best c."""
    turned = qs @ w1
    scale = (turned * w2).sum((-1, -2), keepdim=True) / w1.square().sum()
    return ((scale * turned - w2).flatten(1).norm(dim=1).min() / w2.norm()).item()


@pytest.mark.parametrize("seed", range(5))
def test_two_rows_against_all_angles(seed):
    """The least error, one block, and one reflection are the best there are."""
    g = torch.Generator().manual_seed(seed)
    w1, w2 = torch.randn(2, 2, 3, dtype=torch.float64, generator=g)
    every = best_by_trial(w1, w2, angles())
    assert least_error(w1, w2) == pytest.approx(every, abs=1e-5)
    assert image(w1, w2, Blocks(), False, torch.float64)[1] == pytest.approx(every, abs=1e-5)
    reflections = best_by_trial(w1, w2, angles()[4000:])
    assert image(w1, w2, Householder(1), False, torch.float64)[1] == pytest.approx(reflections, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_no_form_is_below_the_least_error_and_more_is_never_worse(seed):
    torch.manual_seed(seed)
    w1, w2 = torch.randn(2, 24, 24, dtype=torch.float64)
    least = least_error(w1, w2)

    def errors(forms):
        return [image(w1, w2, form, False, torch.float64)[1] for form in forms]

    for found in (errors(map(Householder, (2, 4, 8, 16))), errors(map(Blocks, (2, 6, 12, 24)))):
        assert found == sorted(found, reverse=True)
        assert all(least - 1e-9 < e < 1 for e in found)
    assert errors([Blocks()])[0] == pytest.approx(least, abs=1e-9)


def test_independent_square_weights_leave_two_thirds():
    """The singular values of a product of two independent Gaussian matrices have a mean of 3/4 (Fuss-Catalan)."""
    w1, w2 = torch.randn(2, 256, 256, dtype=torch.float64)
    assert least_error(w1, w2) == pytest.approx(math.sqrt(1 - 0.75**2), abs=0.01)


# Sharing


@pytest.mark.parametrize("form", [Householder(4), Blocks(8), Blocks()], ids=str)
def test_bytes_are_saved_and_errors_are_as_reported(form):
    model = llama()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = held(model)
    assert before == sum(w.nbytes for w in weights.values()) + sum(b.nbytes for b in model.buffers())
    found = survey(model, form=form)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters()) and not found.merged
    tolerance = sorted(p.error for p in found.pairs)[len(found.pairs) // 2]
    report = share_lossy(model, form=form, tolerance=tolerance)
    assert report.merged and len(report.pairs) == len(found.pairs)
    in_pairs = [name for pair in report.merged for name in (pair.source, pair.target)]
    assert len(set(in_pairs)) == len(in_pairs)
    assert report.before == before and report.after == held(model)
    assert before - held(model) == sum(pair.saved for pair in report.merged) > 0
    for pair in report.merged:
        path, _, name = pair.target.rpartition(".")
        owner = model.get_submodule(path)
        assert owner.parametrizations[name].original is model.get_parameter(pair.source)
        error = (getattr(owner, name) - weights[pair.target]).norm() / weights[pair.target].norm()
        assert error.item() == pytest.approx(pair.error, rel=1e-4) and pair.error <= tolerance
        assert pair.least <= pair.error + 1e-6
    assert all(pair.why for pair in report.pairs if not pair.merged)
    lines = str(report).splitlines()
    assert lines[0].startswith(f"lossy sharing: {len(report.merged)} of {len(report.pairs)} pairs")
    assert all(any(pair.target in line for line in lines) for pair in report.merged)


def test_bytes_are_those_of_storages():
    net, both = nn.Module(), torch.randn(4, 4)
    net.one, net.other = nn.Parameter(both[:1]), nn.Parameter(both[2:])
    assert held(net) == both.nbytes


@pytest.mark.parametrize("form", [Blocks(), Blocks(8)], ids=str)
def test_what_a_survey_says_is_what_a_tolerance_gives(form):
    """At each of its errors, to the last bit."""
    model = llama(2)
    found = survey(model, form=form)
    for tolerance in sorted(pair.error for pair in found.pairs)[::4]:
        expected = best_pairs(pair for pair in found.pairs if pair.error <= tolerance)
        report = share_lossy(copy.deepcopy(model), form=form, tolerance=tolerance)
        assert sum(p.saved for p in report.merged) == sum(p.saved for p in expected) > 0


def test_nothing_is_merged_over_the_tolerance():
    model = llama()
    loss = loss_of(model)
    report = share_lossy(model, form=Blocks(8), tolerance=0.3)
    assert not report.merged and report.before == report.after
    assert all(pair.error is None and pair.least > 0.3 for pair in report.pairs)
    assert torch.equal(loss_of(model), loss)


@pytest.mark.parametrize("right", [False, True])
def test_query_with_the_next_layers_key(right):
    """With grouped queries the key has fewer rows: Q acts on as many of the query's."""
    model = llama(2, kv=2)
    plant(model, layer(0, "self_attn.q_proj"), layer(1, "self_attn.k_proj"), Householder(3), right)
    key = model.model.layers[1].self_attn.k_proj
    expected = key.weight.detach().clone()
    report = share_lossy(model, form=Householder(3), tolerance=1e-3, kinds=Q_AND_K)
    (pair,) = report.merged
    assert (pair.source, pair.target) == (layer(0, "self_attn.q_proj"), layer(1, "self_attn.k_proj"))
    assert pair.shape == (16, 32) and pair.side == ("right" if right else "left") and pair.error < 1e-5
    assert report.before - report.after == 4 * (16 * 32 - 3 * (32 if right else 16) - 1)
    torch.testing.assert_close(key.weight, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_the_larger_one_is_the_source():
    """A key before a query."""
    report = survey(llama(2, kv=2), form=Householder(3), kinds=[("k_proj", "q_proj")])
    pair, _ = report.pairs
    assert (pair.source, pair.target) == (layer(1, "self_attn.q_proj"), layer(0, "self_attn.k_proj"))


@pytest.mark.parametrize("seed", range(8))
def test_most_bytes_of_all_choices(seed):
    """Against every set of pairs in which no weight is twice; of equal sets, the one of the smaller errors."""
    rng = random.Random(seed)
    links = list(itertools.combinations("abcdef", 2)) * 2  # both sides
    pairs = [
        Pair(one, other, (2, 2), 1000, side=side, stored=rng.randrange(100, 1000, 300), error=rng.random())
        for (one, other), side in zip(rng.sample(links, 11), itertools.cycle(("left", "right")), strict=False)
    ]

    def apart(some) -> bool:
        names = [name for p in some for name in (p.source, p.target)]
        return len(names) == len(set(names))

    def worth(some) -> tuple[int, float]:
        return sum(p.saved for p in some), -sum(p.error for p in some)

    best = max((s for n in range(4) for s in itertools.combinations(pairs, n) if apart(s)), key=worth)
    chosen = best_pairs(pairs)
    assert apart(chosen) and set(chosen) == set(best)


def test_training_goes_on_in_one_storage():
    """W1, Q and c train, Q stays orthogonal, and both weights read one W1."""
    model = llama(2)
    report = share_lossy(model, form=Blocks(8), tolerance=0.999, kinds=[("q_proj", "q_proj")])
    (pair,) = report.merged
    owner = model.get_submodule(pair.target.removesuffix(".weight"))
    made = owner.parametrizations["weight"][0]
    source = model.get_parameter(pair.source)
    before = [p.detach().clone() for p in (source, *made.parameters())]
    assert sum(p is source for p in model.parameters()) == 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(loss_of(model))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
    assert not any(torch.equal(a, b) for a, b in zip(before, (source, *made.parameters()), strict=True))
    one = dense(made.q, 32, torch.float32)
    torch.testing.assert_close(one @ one.t(), torch.eye(32), rtol=0, atol=1e-5)
    image_of = source @ one.t() if pair.side == "right" else one @ source
    torch.testing.assert_close(owner.weight, made.scale * image_of)


def test_what_does_not_train_stays_so():
    model, other = (llama(2).requires_grad_(False) for _ in range(2))
    share_as(other, share_lossy(model, form=Blocks(), tolerance=0.99))
    for one in (model, other):
        assert not any(p.requires_grad for p in one.parameters())
        unshare(one)
        assert not any(p.requires_grad for p in one.parameters())


@pytest.mark.parametrize("form", [Householder(4), Blocks(16)], ids=str)
def test_saved_and_loaded(form, tmp_path):
    """The same bits in a model of other weights, by files alone; W1 is in the file once."""
    model = llama()
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    report = share_lossy(model, form=form, tolerance=0.99)
    torch.save(model.state_dict(), tmp_path / "shared.pt")
    report.save(tmp_path / "report.json")
    saved = (tmp_path / "whole.pt").stat().st_size - (tmp_path / "shared.pt").stat().st_size
    assert saved > 0.7 * (report.before - report.after)  # names take some bytes too
    other = LlamaForCausalLM(model.config)
    again = Report.load(tmp_path / "report.json")
    assert again == report and share_as(other, again) is other
    other.load_state_dict(torch.load(tmp_path / "shared.pt"))
    assert held(other) == held(model)
    assert torch.equal(loss_of(other), loss_of(model))
    one, two = model.state_dict(), other.state_dict()
    assert list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)


def test_unshared_and_copied():
    """Each weight has its own storage again, and the same bits; copies of the model are left alone."""
    model = llama()
    size, keys = held(model), list(model.state_dict())
    report = share_lossy(model, form=Blocks(), tolerance=0.99)
    copied, loss = copy.deepcopy(model), loss_of(model)
    assert held(copied) == report.after
    assert unshare(model) is model
    assert held(model) == size and list(model.state_dict()) == keys
    assert torch.equal(loss_of(model), loss) and torch.equal(loss_of(copied), loss)
    assert held(copied) == report.after
    owner = model.get_submodule(report.merged[0].target.removesuffix(".weight"))
    assert type(owner) is nn.Linear
    assert share_lossy(model, form=Blocks(), tolerance=0.99).merged


def test_bfloat16_and_autocast():
    model = llama(2).bfloat16()
    report = share_lossy(model, form=Householder(4), tolerance=0.99)
    assert report.merged and all(p.dtype == torch.bfloat16 for p in model.parameters())
    loss_of(model).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model = llama(2)
    report = share_lossy(model, form=Blocks(), tolerance=0.99)
    path = report.merged[0].target.removesuffix(".weight")
    weight = model.get_submodule(path).weight
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model).backward()
        assert torch.equal(model.get_submodule(path).weight, weight)


# Plans


def test_a_plan_sees_the_smaller_parameters():
    """Parameters and what comes with them (gradients, states) are smaller by what is saved, and so is the peak."""

    def planned(model):
        def step(tokens):
            return model(input_ids=tokens, labels=tokens).loss

        return memplan.plan(step, TOKENS, inner="eager", optimizer="adamw", policy="block-checkpoint")

    def parameters(plan):
        return sum(t.bytes for t in plan.step.tensors if t.kind == "parameter")

    model = llama(2)
    whole = planned(model)
    report = share_lossy(model, form=Blocks(8), tolerance=0.99)
    shared = planned(model)
    saved = report.before - report.after
    assert parameters(whole) - parameters(shared) == saved > 0.2 * report.before
    assert whole.step.base_bytes - shared.step.base_bytes > 2.9 * saved
    assert shared.peak < whole.peak


def test_a_planned_step_trains_as_an_eager_one(made):
    model = llama(2)
    share_lossy(model, form=Householder(4), tolerance=0.99)
    loss_of(model).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    options = {"inner": "eager", "policy": "block-checkpoint"}
    step = torch.compile(
        lambda tokens: model(input_ids=tokens, labels=tokens).loss, backend=memplan_backend, options=options
    )
    step(TOKENS).backward()
    assert check(made[-1]) == [] and made[-1].backward
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


# Bad input


def wrong(match: str, model=None, call=share_lossy, **options) -> None:
    """Refused with that first line, and the model is as it was."""
    model = model if model is not None else llama(2)
    before = {name: (p, p._version) for name, p in getattr(model, "named_parameters", dict)() or ()}
    with pytest.raises(MemplanError) as e:
        call(model, **({"form": Householder(4), "tolerance": 0.5} | options))
    first = str(e.value).splitlines()[0]
    assert match in first, first
    for name, (p, version) in before.items():
        assert model.get_parameter(name) is p and p._version == version


def test_no_layers():
    wrong("has no layers: no torch.nn.ModuleList of two or more", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    wrong("has no layers", llama(1))
    report = Report((), 0.5, 1, 1)
    for call in (share_lossy, lambda model, **_: share_as(model, report), lambda model, **_: unshare(model)):
        wrong("of a list: give a torch.nn.Module", [nn.Linear(4, 4)], call)
    wrong("no module 'model.layer'; did you mean 'model.layers'?", layers="model.layer")
    for layers in (5, ["model.layers"]):
        wrong("is no name: give that of the module whose children are the layers", layers=layers)
    wrong("no layer has a matrix", nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)]))


def test_layers_may_be_named():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert len(survey(net, form=Blocks(), layers="", kinds=[("*", "*")]).pairs) == 2  # sides


def test_names_that_match_nothing():
    wrong("no matrix of a layer is called 'q_prj'", kinds=[("q_prj", "k_proj")])
    wrong("did you mean 'mlp.up_proj'", kinds=[("mlp.up_prj", "k_proj")])
    wrong("give pairs of names", kinds=("q_proj", "k_proj"))
    wrong("kinds=5: give pairs of names", kinds=5)
    wrong("kinds is empty", kinds=[])


def test_shapes_that_do_not_fit():
    wrong("no two fit, as model.layers.0.mlp.up_proj.weight, [48, 32] float32 cpu", kinds=[("up_proj", "down_proj")])
    mixed = llama(2)
    mixed.model.layers[1].bfloat16()
    wrong("[48, 32] bfloat16 cpu: one has to have", mixed, kinds=[("up_proj", "up_proj")])
    report = survey(llama(2), form=Householder(4), kinds=[("up_proj", "*")])
    unfit = [pair for pair in report.pairs if "do not fit" in pair.why]
    assert [pair.target for pair in unfit] == [layer(1, "mlp.down_proj")] and unfit[0].error is None


@pytest.mark.parametrize("tolerance", [0, 1, -0.1, 1.5, math.nan, "0.1", True, None])
def test_tolerance_out_of_range(tolerance):
    wrong("is not a relative error between 0 and 1", tolerance=tolerance)


def test_forms_that_cannot_be():
    wrong("is no form of Q: give Householder(reflectors) or Blocks(size)", form="householder")
    for make in (lambda: Householder(0), lambda: Householder(2.5), lambda: Blocks(1), lambda: Blocks(True)):
        with pytest.raises(MemplanError, match="give a whole number"):
            make()
    wrong("blocks of 7 rows do not divide 32: give 4 or 8", form=Blocks(7), kinds=[("q_proj", "q_proj")])
    wrong("any Q of 32 rows is at most 32 reflections", form=Householder(33), kinds=[("q_proj", "q_proj")])
    wrong("a Q of 1 row has no blocks", nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)]), form=Blocks(2))


def test_a_dense_q_saves_nothing():
    """The arithmetic is in the message; one reflection less than all saves."""
    asked = {"kinds": [("q_proj", "q_proj")]}
    text = (
        "Q of 32 rows and c take 32 vectors of 32 values and one, 4,100 bytes, and the weight has 32 x 32 values, "
        "4,096 bytes (a dense Q would have 32 x 32)"
    )
    wrong(text, form=Householder(32), **asked)
    report = survey(llama(2), form=Householder(31), **asked)
    assert report.pairs[0].saved == 4 * (32 * 32 - 31 * 32 - 1)


def test_tied_and_shared_weights():
    model = llama(3)
    model.model.layers[2].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    wrong("q_proj.weight is tied", model, kinds=[("q_proj", "q_proj")])
    survey(model, form=Householder(4), kinds=[("k_proj", "k_proj")])
    model = llama(2)
    share_lossy(model, form=Blocks(), tolerance=0.99, kinds=[("q_proj", "q_proj")])
    wrong("q_proj.weight is tied, or shared already: memplan.sharing.unshare(model) first", model)


def test_parametrized_weights():
    model = llama(2)
    nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)
    wrong("is parametrized", model, kinds=[("up_proj", "up_proj")])


def test_quantised_weights():
    for dtype in (torch.int8, torch.float8_e4m3fn):
        model = llama(2)
        owner = model.model.layers[1].mlp.up_proj
        owner.weight = nn.Parameter(owner.weight.detach().to(dtype), requires_grad=False)
        wrong(f"mlp.up_proj.weight is a Tensor of {dtype}: quantised weights cannot share", model)


def test_weights_that_are_not_read_by_name():
    wrong("is an RNN's", nn.ModuleList([nn.LSTM(8, 8), nn.LSTM(8, 8)]))


def test_values_that_are_not_there():
    model = llama(2)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    wrong("mlp.up_proj.weight has values that are not finite: load it anew", model)
    with torch.device("meta"):
        meta = llama(2)
    wrong("is on the meta device: load its values first", meta)
    model = llama(2)
    model.model.layers[1].mlp.up_proj.weight.data.zero_()
    (pair,) = share_lossy(model, form=Blocks(), tolerance=0.9, kinds=[("up_proj", "up_proj")]).pairs
    assert pair.why == "all zeros" and not pair.merged


def test_a_source_of_which_nothing_is_read():
    """Zeros where Q acts: rows that are pruned, of a query that has more of them than the key."""
    model = llama(2, kv=1)
    model.get_parameter(layer(0, "self_attn.q_proj")).data[:8] = 0
    (pair,) = survey(model, form=Householder(2), kinds=Q_AND_K).pairs
    assert pair.why == "all zeros" and pair.error is None


def test_a_report_of_another_model():
    report = share_lossy(llama(2), form=Blocks(), tolerance=0.99)

    def call(model, form, tolerance):
        share_as(model, report)

    wrong("has no parameter 'model.layers.0", nn.Linear(2, 2), call)
    other = llama(2, head_dim=4)
    wrong("in the report: is it another model?", other, call)
    report = None
    wrong("is no report: give what share_lossy returned", llama(2), call)


def test_an_image_out_of_range(tmp_path):
    """c is more than the dtype holds: no such image, and a report that can be saved."""
    net = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    net[1].weight.data = 1e5 * net[0].weight.data
    report = share_lossy(net.half(), form=Householder(2), tolerance=0.5)
    assert all(pair.why == "c or what it makes is out of the range of float16" for pair in report.pairs)
    assert all(pair.error is None and pair.least < 0.5 for pair in report.pairs)
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report


def test_one_more_parametrization_is_not_lost():
    model = llama(2)
    report = share_lossy(model, form=Blocks(), tolerance=0.99, kinds=[("q_proj", "q_proj")])
    owner = model.get_submodule(report.merged[0].target.removesuffix(".weight"))
    nn.utils.parametrize.register_parametrization(owner, "weight", nn.Identity(), unsafe=True)
    with pytest.raises(MemplanError, match="parametrized once more"):
        unshare(model)
