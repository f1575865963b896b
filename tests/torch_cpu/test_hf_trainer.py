"""transformers' Trainer, planned: the losses and weights of the Trainer alone for the same seed, to the bit.

A Llama of one layer made here, inner="eager". Peaks are of whole optimizer steps, measured.
"""

import sys

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments

import memplan
from memplan import DoesNotFit, MemplanError
from memplan.hf import planned

pytestmark = [
    pytest.mark.usefixtures("one_thread", "fresh_dynamo"),
    # transformers' own names that peft still uses, and a loader that would pin memory for a GPU
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

AMPLE = "1GB"
VOCABULARY, TOKENS, ROWS = 256, 24, 4
BATCH = 2 * ROWS * TOKENS * 8  # bytes: ids and labels
TIMES = ("runtime", "per_second")


def samples(count=16) -> Dataset:
    rows = [[(7 * i + 3 * j) % VOCABULARY for j in range(TOKENS)] for i in range(count)]
    return Dataset.from_list([{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows])


class Measured(TrainerCallback):
    """The peak of each optimizer step but the first, in which a planned one is compiled, with all that is held, but for
    micro-batches that wait.
    """

    def __init__(self) -> None:
        self.peaks: list[int] = []

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **_):
        if state.global_step == 0:
            return
        states = [v for of in optimizer.state.values() for v in of.values() if isinstance(v, torch.Tensor)]
        # transformers keeps a second copy of the rotary frequencies, which no step reads
        buffers = [b for name, b in model.named_buffers() if "original" not in name]
        self.held = sum(t.nbytes for t in [*model.parameters(), *buffers, *states]) + BATCH
        self.recording = memplan.record("cpu")
        self.seen = self.recording.__enter__()

    def on_step_end(self, args, state, control, **_):
        if state.global_step > 1:
            self.recording.__exit__(None, None, None)
            self.peaks.append(self.held + self.seen.timeline.peak_above_base)


def language_model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    return AutoModelForCausalLM.from_config(config)


def with_adapters() -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.1)
    return peft.get_peft_model(language_model(), config)


def own_loss(outputs, labels, num_items_in_batch=None):
    losses = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return losses / num_items_in_batch


class Weighted(Trainer):
    """A compute_loss of one's own, which reads logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = own_loss(outputs, labels, num_items_in_batch) + 1e-3 * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


def trainer(folder, model=language_model, of=Trainer, measured=False, **args) -> Trainer:
    others = {name: args.pop(name) for name in ("compute_loss_func", "eval_dataset") if name in args}
    given = dict(
        output_dir=str(folder), per_device_train_batch_size=ROWS, max_steps=3, logging_steps=1, learning_rate=1e-2,
        seed=3, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    made = of(model(), args=TrainingArguments(**given | args), train_dataset=samples(), **others)
    if measured:
        made.add_callback(Measured())
    return made


def outcome(made: Trainer) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """What was logged, and the weights."""
    logged = [{k: v for k, v in e.items() if not k.endswith(TIMES)} for e in made.state.log_history]
    return logged, {k: v.clone() for k, v in made.model.state_dict().items()}


def resumed(made: Trainer) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The same without the summary at the end, which is of the steps that one call ran."""
    logged, weights = outcome(made)
    return logged[:-1], weights


def assert_same(ours, theirs) -> None:
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys()
    assert [k for k in theirs[1] if not torch.equal(ours[1][k], theirs[1][k])] == []


def run(*args, **kwargs):
    made = trainer(*args, **kwargs)
    made.train()
    return outcome(made)


def peaks(made: Trainer) -> list[int]:
    return next(c for c in made.callback_handler.callbacks if isinstance(c, Measured)).peaks


SETTINGS = {
    "full": {},
    "lora": {"model": with_adapters},
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "compute_loss_func": {"compute_loss_func": own_loss},
    "a subclass": {"of": Weighted},
}


PLANNED = {"inner": "eager", "policy": "greedy"}  # which takes a moment where optimal takes seconds


@pytest.mark.parametrize("name", SETTINGS)
def test_same_losses_and_weights_inside_the_budget(tmp_path, name):
    """A budget below what the trainer alone takes, half of which are parameters, gradients and states."""
    alone = trainer(tmp_path, measured=True, **SETTINGS[name])
    alone.train()
    most = max(peaks(alone))
    budget = int(0.9 * most)
    made = planned(trainer(tmp_path, measured=True, **SETTINGS[name]), budget=budget, **PLANNED)
    before = counters["stats"]["unique_graphs"]
    made.train()
    assert_same(outcome(made), outcome(alone))
    assert len(peaks(made)) == 2 and max(peaks(made)) <= budget
    assert counters["stats"]["unique_graphs"] - before == 1


@pytest.mark.parametrize("micro_batches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_least_budget(tmp_path, micro_batches):
    """A refusal names a budget that fits, before the first step; of two micro-batches the second is refused again."""
    given = {"gradient_accumulation_steps": micro_batches}
    budget = 1
    for _ in range(micro_batches):
        made = planned(trainer(tmp_path, **given), budget=budget, **PLANNED)
        with pytest.raises(DoesNotFit) as refused:
            made.train()
        assert made.state.global_step == 0
        torch._dynamo.reset()
        budget = refused.value.smallest
    made = planned(trainer(tmp_path, measured=True, **given), budget=budget, **PLANNED)
    made.train()
    assert max(peaks(made)) <= budget


@pytest.mark.parametrize("model", [language_model, pytest.param(with_adapters, marks=pytest.mark.slow)])
def test_evaluation_save_and_resume(tmp_path, model):
    """Checkpoints are the trainer's: either goes on from one of the other."""
    given = dict(
        model=model, eval_dataset=samples(5), eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        activation_checkpointing=True,
    )  # fmt: skip
    theirs, folder = tmp_path / "theirs", tmp_path / "ours"
    alone = trainer(theirs, **given | {"activation_checkpointing": False})
    alone.train()
    assert any("eval_loss" in entry for entry in alone.state.log_history)
    made = planned(trainer(folder, **given), budget=AMPLE, **PLANNED)
    before = counters["stats"]["unique_graphs"]
    made.train()
    assert counters["stats"]["unique_graphs"] - before == 1  # evaluation is the trainer's own
    assert not made.model.is_activation_checkpointing
    assert_same(outcome(made), outcome(alone))
    again = planned(trainer(folder, **given), budget=AMPLE, **PLANNED)
    again.train(resume_from_checkpoint=str(theirs / "checkpoint-2"))
    assert_same(resumed(again), resumed(alone))
    back = trainer(theirs, **given | {"activation_checkpointing": False})
    back.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert_same(resumed(back), resumed(alone))


def test_checkpointing_that_is_on_already(tmp_path, caplog):
    """Its hooks let inputs require gradients, and Dynamo cannot trace them."""
    expected = run(tmp_path, model=with_adapters)

    def checkpointed() -> nn.Module:
        model = with_adapters()
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
        return model

    with caplog.at_level("WARNING", "torch.memplan"):
        made = planned(trainer(tmp_path, model=checkpointed), budget=AMPLE, **PLANNED)
    assert "activation_checkpointing is switched off: what is computed again is the plan's to decide" in caplog.text
    made.train()
    assert_same(outcome(made), expected)


def test_lengths_inside_limits_make_one_plan(tmp_path, made):
    def of_lengths(batch):
        length = 8 + 3 * (batch[0]["input_ids"][0] % 5)
        return {k: torch.tensor([row[k][:length] for row in batch]) for k in batch[0]}

    before = counters["stats"]["unique_graphs"]
    ours = planned(trainer(tmp_path, max_steps=4), budget=AMPLE, limits={"tokens": TOKENS}, **PLANNED)
    ours.data_collator = of_lengths
    ours.train()
    assert counters["stats"]["unique_graphs"] - before == 1
    assert len(made) == 1


def test_a_fitted_model_in_a_trainer(tmp_path):
    """Where there is only the model to hold on to: the loss inside the model is all that the Trainer reads."""
    expected = run(tmp_path, eval_dataset=samples(5), eval_strategy="steps", eval_steps=1)

    def fitted() -> nn.Module:
        return memplan.fit(language_model(), AMPLE, show=None, **PLANNED)

    assert_same(run(tmp_path, model=fitted, eval_dataset=samples(5), eval_strategy="steps", eval_steps=1), expected)
    wrong = trainer(tmp_path, model=fitted, activation_checkpointing=True)
    with pytest.raises(MemplanError, match=r"gradient checkpointing on.*leave it out of a trainer's arguments"):
        wrong.train()


def test_what_is_refused(tmp_path, monkeypatch):
    made = trainer(tmp_path)

    def says(match, **options):
        with pytest.raises(MemplanError, match=match):
            planned(made, **options)
        assert "compute_loss" not in vars(made)
        monkeypatch.undo()

    says(r'did you mean "1GB"', budget="1")
    says(r"did you mean 'tiles'", tile=4)
    says(r"limits has 'token'.*did you mean 'tokens'", limits={"token": 4})
    with pytest.raises(MemplanError, match=r"given a Linear: it takes a transformers.Trainer"):
        planned(nn.Linear(1, 1))
    with pytest.raises(MemplanError, match="given Trainer, a class"):
        planned(Trainer)
    with pytest.raises(MemplanError, match=r"a GRPOTrainer is planned by memplan.grpo.trl.planned"):
        planned(object.__new__(type("GRPOTrainer", (Trainer,), {})))
    for name in ("torch_compile", "use_liger_kernel"):
        monkeypatch.setattr(made.args, name, True)
        says(f"{name}=True")
    monkeypatch.setattr(type(made.args), "n_gpu", 2)
    says("1 processes and 2 GPUs in this one")
    monkeypatch.setattr(made, "is_fsdp_enabled", True)
    says("fsdp moves parameters")
    monkeypatch.setattr(made.model, "_compiled_call_impl", print)
    says("the model is compiled already, by memplan.fit or torch.compile")
    monkeypatch.setitem(sys.modules, "transformers", None)
    says("Trainer cannot be imported")
    planned(made)
    with pytest.raises(MemplanError, match="this trainer is planned already"):
        planned(made)


def test_a_trainer_whose_steps_go_another_way_is_named(tmp_path):
    class Own(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**self._prepare_inputs(inputs)).loss
            loss.backward()
            return loss.detach()

    own = trainer(tmp_path, of=Own, max_steps=1)
    with pytest.raises(MemplanError, match="nothing of this trainer's step was planned: its training_step does not"):
        planned(own, budget=AMPLE, **PLANNED).train()
