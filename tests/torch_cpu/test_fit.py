"""memplan.fit: a model's own calls, planned in place. What is expected of each is what the model does without it."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig

import memplan
from memplan import DoesNotFit, MemplanError
from memplan.fitting import Outputs

pytestmark = [
    pytest.mark.usefixtures("one_thread", "fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # transformers' own names that peft still uses
]

VOCABULARY, TOKENS = 512, 32
AMPLE = "1GB"
PLANNED = {"inner": "eager", "policy": "greedy"}  # which takes a moment where optimal takes seconds


def language_model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    return AutoModelForCausalLM.from_config(config).train()


def batch(tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    ids = torch.arange(2 * tokens).view(2, tokens) * 7 % VOCABULARY
    return {"input_ids": ids, "labels": ids.clone()}


def gradients(model: nn.Module) -> list[torch.Tensor | None]:
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return found


def same(a, b) -> bool:
    return all(x is y if x is None else torch.equal(x, y) for x, y in zip(a, b, strict=True))


BATCH = batch()


def inside(model: nn.Module) -> torch.Tensor:
    return model(**BATCH).loss


def outside(model: nn.Module, **options: Any) -> torch.Tensor:
    """A loss that runs after the model's call; what comes back beside the logits is dropped."""
    ids = BATCH["input_ids"]
    logits = model(input_ids=ids, **options).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


LOSSES = {"inside": inside, "outside": lambda m: outside(m, use_cache=False), "outside, with a cache": outside}


def peaks(model: nn.Module, loss, steps: int = 3) -> list[int]:
    """Of steps with AdamW, measured, with parameters, states and batch; two go before."""
    optimizer = torch.optim.AdamW(model.parameters())
    # transformers keeps a second copy of the rotary frequencies, which no step reads
    buffers = [b for name, b in model.named_buffers() if "original" not in name]
    found = []
    for step in range(steps + 2):
        optimizer.zero_grad()
        if step < 2:
            loss(model).backward()
            optimizer.step()
            continue
        states = [v for of in optimizer.state.values() for v in of.values()]
        there = sum(t.nbytes for t in [*model.parameters(), *buffers, *states, *BATCH.values()])
        with memplan.record("cpu") as seen:
            loss(model).backward()
            optimizer.step()
        found.append(there + seen.timeline.peak_above_base)
    return found


@pytest.mark.parametrize("where", LOSSES)
def test_same_gradients_at_the_least_budget(where):
    model, loss = language_model(), LOSSES[where]
    loss(model).backward()
    expected, ample = gradients(model), max(peaks(language_model(), loss))
    budget = 1
    for _ in range(6):  # a loss outside is refused again when what runs there is known
        torch._dynamo.reset()
        model = memplan.fit(language_model(), budget, optimizer="adamw", show=None, **PLANNED)
        try:
            for _ in range(2):
                loss(model).backward()
                assert same(gradients(model), expected)
            break
        except DoesNotFit as refused:
            budget = refused.smallest
    torch._dynamo.reset()
    assert where != "inside" or budget < ample  # logits that leave the model are nearly all of this one's peak
    shown = []
    model = memplan.fit(language_model(), budget, show=shown.append, **PLANNED)
    assert max(peaks(model, loss)) <= budget
    notes = [note for plan in shown for note in plan.notes]
    named = f"f32[2, {TOKENS}, {VOCABULARY}] (131.1 KB) leaves the graph for code outside of it"
    assert any(named in note for note in notes) == (where != "inside")


def test_logits_need_not_be_there():
    """Why a training call returns the loss alone: its head can run in slices."""

    def least(**options) -> int:
        with pytest.raises(DoesNotFit) as refused:
            memplan.fit(language_model(), 1, batch=BATCH, show=None, **PLANNED, **options)
        return refused.value.smallest

    logits = 4 * VOCABULARY * 2 * TOKENS
    assert least() - least(tiles={"lm_head": 8}) > logits
    with pytest.raises(MemplanError, match=r"'lm_head', which cannot run in slices: .* is returned whole"):
        memplan.fit(language_model(), AMPLE, batch=BATCH, keep="logits", tiles={"lm_head": 8}, **PLANNED)


def test_what_is_kept_has_gradients():
    def loss(model):
        out = model(**BATCH)
        return out.loss + out.logits.square().mean()

    model = language_model()
    loss(model).backward()
    expected = gradients(model)
    memplan.fit(model, AMPLE, keep="logits", show=None, **PLANNED)
    loss(model).backward()
    assert same(gradients(model), expected)
    out = model(**BATCH)
    assert [*out] == ["loss", "logits"]
    with pytest.raises(MemplanError, match=r"keep names 'logit', .* it has loss, logits; did you mean 'logits'"):
        Outputs({"loss": out.loss}, ("logit",), ("logits",))


def test_what_is_left_out_is_refused_where_it_is_read():
    model = memplan.fit(language_model(), AMPLE, show=None, **PLANNED)
    out = model(**BATCH)
    assert isinstance(out, Outputs) and out.loss is out["loss"] is out[0] is out.get("loss")
    for read in (lambda: out.logits, lambda: out["logits"], lambda: out.get("logits"), lambda: out[1], lambda: out[:2]):
        with pytest.raises(MemplanError, match=r"of the output is not there: .*keep='logits'"):
            read()
    assert not hasattr(out, "logit") and out.get("logit", 1) == 1
    with pytest.raises(KeyError):
        out["logit"]


def test_it_shows_the_plan_of_a_batch_first():
    model, shown = language_model().eval(), []
    assert memplan.fit(model, AMPLE, batch=BATCH, optimizer="adamw", show=shown.append, **PLANNED) is model
    assert not model.training and not any(m.training for m in model.modules())
    (plan,) = shown
    assert plan.budget.bytes == 10**9 and plan.gap is not None
    model.train()
    model(**BATCH).loss.backward()
    assert shown == [plan]  # the plan that runs keeps what was promised


def test_it_shows_the_plan_at_the_first_training_call(capsys):
    model = memplan.fit(language_model(), AMPLE, **PLANNED)
    with torch.no_grad():
        model(**BATCH)
    assert capsys.readouterr().out == ""
    model(**BATCH)
    assert "decision" in (out := capsys.readouterr().out) and "fits: peak" in out


def test_a_batch_that_does_not_fit_leaves_the_model_as_it_was():
    model = language_model()
    with pytest.raises(DoesNotFit):
        memplan.fit(model, 1000, batch=BATCH, **PLANNED)
    assert model._compiled_call_impl is None


def test_calls_without_gradients_are_the_models_own():
    model = language_model().eval()
    prompt = batch(4)["input_ids"]

    def calls():
        with torch.no_grad():
            found = [model(**BATCH).logits, model(**BATCH)["loss"], model(**BATCH)[1]]
        with torch.inference_mode():
            found.append(model(**BATCH).logits.clone())
        return [*found, model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)]

    expected = calls()
    memplan.fit(model, 1000, **PLANNED)  # which no training call fits
    before = counters["stats"]["unique_graphs"]
    assert same(calls(), expected)
    assert counters["stats"]["unique_graphs"] == before
    with pytest.raises(DoesNotFit):
        model(**BATCH)


def test_the_model_stays_what_it_was(tmp_path):
    model, plain = language_model(), language_model()
    names = list(model.state_dict())
    memplan.fit(model, AMPLE, show=None, **PLANNED)
    assert type(model) is type(plain) and list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(loaded.parameters(), plain.parameters())
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._compiled_call_impl is None
        assert other.train()(**batch()).logits is not None
    assert memplan.unfit(model) is model
    assert model(**BATCH).logits is not None


def test_inside_another_compiled_step():
    """There the outer budget counts, and the output is whole."""
    model = language_model()

    def step():
        out = model(**BATCH)
        return out.loss + out.logits.square().mean()

    step().backward()
    expected = gradients(model)
    memplan.fit(model, 1000, **PLANNED)
    memplan.plan(step, budget=AMPLE, **PLANNED)
    memplan.compile(step, budget=AMPLE, **PLANNED)().backward()
    assert same(gradients(model), expected)


def test_limits_make_one_plan_for_all_lengths():
    shown, limits = [], {"tokens": TOKENS}
    model = memplan.fit(language_model(), AMPLE, limits=limits, show=shown.append, **PLANNED)
    before = counters["stats"]["unique_graphs"]
    for tokens in (8, 13, TOKENS):
        model(**batch(tokens)).loss.backward()
    assert counters["stats"]["unique_graphs"] - before == 1
    assert len(shown) == 1
    tight = memplan.fit(language_model(), shown[0].peak // 2, limits=limits, show=None, **PLANNED)
    with pytest.raises(DoesNotFit):
        tight(**batch(8))


def test_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    model = peft.get_peft_model(language_model(), config)
    torch.manual_seed(1)
    inside(model).backward()
    expected = gradients(model)
    memplan.fit(model, AMPLE, show=None, **PLANNED)
    torch.manual_seed(1)
    inside(model).backward()
    assert same(gradients(model), expected)


class Plain(nn.Module):
    """Returns its loss as a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.name = nn.Linear(4, 4), "a"

    def forward(self, x):
        return self.layer(x).square().mean() * len(self.name)


def test_any_module():
    """And the ways to write its batch."""
    model, x = Plain(), torch.ones(2, 4)
    model(x).backward()
    expected, shown = gradients(model), []
    for form in (x, (x,), [x], {"x": x}):
        memplan.unfit(memplan.fit(model, AMPLE, batch=form, show=shown.append, **PLANNED))
    assert len({plan.peak for plan in shown}) == 1 and not shown[0].notes
    memplan.fit(model, AMPLE, show=None, **PLANNED)
    model(x).backward()
    assert same(gradients(model), expected)


def test_a_model_that_is_another_with_each_call_is_named(monkeypatch):
    monkeypatch.setattr("memplan.compiled.VARIANTS", 2)
    model = memplan.fit(Plain(), AMPLE, show=None, **PLANNED)
    with pytest.raises(MemplanError, match="compiled 2 times: something of the step or its model is another"):
        for _ in range(6):
            model.name += "a"
            model(torch.ones(2, 4))


def test_what_is_refused():
    def says(match, model, **options):
        with pytest.raises(MemplanError, match=match):
            memplan.fit(model, **options)

    says("given a function: it takes a torch.nn.Module", lambda x: x)
    says("given Linear, a class", nn.Linear)
    says("is the result of torch.compile", torch.compile(nn.Linear(1, 1)))
    says("a DataParallel copies gradients", nn.DataParallel(nn.Linear(1, 1)))
    says("no parameter of this Linear requires a gradient", nn.Linear(1, 1).requires_grad_(False))
    says(r'did you mean "1GB"', nn.Linear(1, 1), budget="1")
    says(r"did you mean 'tiles'", nn.Linear(1, 1), tile=4)
    compiled = nn.Linear(1, 1)
    compiled.compile()
    says("was compiled by model.compile", compiled)
    with pytest.raises(MemplanError, match="this Linear is not fitted"):
        memplan.unfit(compiled)
    fitted = memplan.fit(nn.Linear(1, 1))
    says("this Linear is fitted already: memplan.unfit", fitted)
    assert memplan.fit(memplan.unfit(fitted)) is fitted


def test_checkpointing_is_refused_whenever_it_is_switched_on():
    model = language_model()
    model.activation_checkpointing_enable()
    with pytest.raises(
        MemplanError, match=r"gradient checkpointing on.*call model.activation_checkpointing_disable\(\)"
    ):
        memplan.fit(model, AMPLE)
    model.activation_checkpointing_disable()
    memplan.fit(model, AMPLE, show=None, **PLANNED)
    model.activation_checkpointing_enable()
    with pytest.raises(MemplanError, match="gradient checkpointing on"):
        model(**BATCH)


class Recurrent(nn.Module):
    """What Dynamo does not trace, and says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0].sum()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo asks
def test_a_model_that_dynamo_leaves_alone_is_named_and_spoils_no_other():
    x = torch.ones(3, 2, 4)
    model = memplan.fit(Recurrent(), budget=AMPLE, show=None, **PLANNED)
    step = memplan.compile(lambda: Recurrent()(x).backward(), budget=AMPLE, **PLANNED)
    for call, what in ((lambda: model(x), "this Recurrent"), (step, "the step <lambda>")):
        with pytest.raises(MemplanError, match=f"nothing of {what} was planned: Dynamo left it as it is"):
            call()
    with torch.no_grad():
        model(x)
    with pytest.raises(DoesNotFit):  # planned, and so refused
        memplan.fit(nn.Linear(4, 4), budget=1, show=None, **PLANNED)(x)


def test_each_fitted_model_has_compilations_of_its_own(monkeypatch):
    monkeypatch.setattr("memplan.compiled.VARIANTS", 2)
    for width in range(1, 5):
        memplan.fit(nn.Linear(width, 1), budget=AMPLE, show=None, **PLANNED)(torch.ones(2, width)).sum().backward()


def test_an_lstm_is_planned_without_running_what_reads_addresses():
    lstm = nn.LSTM(8, 8)
    plan = memplan.plan(lambda x: lstm(x)[0].sum(), torch.ones(3, 2, 8), budget=AMPLE, **PLANNED)
    assert plan.fits


def test_what_keep_names_is_looked_for_in_a_batch_at_once():
    with pytest.raises(MemplanError, match=r"keep names 'logit', which the model did not return: .*'logits'"):
        memplan.fit(language_model(), budget=AMPLE, batch=BATCH, keep="logit", show=None, **PLANNED)
    with torch.no_grad():
        model = memplan.fit(language_model(), budget=AMPLE, batch=BATCH, show=None, **PLANNED)
    out = model(**BATCH)
    assert not hasattr(out, "logits") and type(out)({"loss": out.loss}).loss is out.loss
