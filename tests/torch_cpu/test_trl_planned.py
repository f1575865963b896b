"""TRL's own GRPOTrainer, planned: the losses, metrics and weights of TRL alone for the same seed.

A Llama of one layer, a tokenizer of characters and a reward that counts vowels, all made here. With TRL's own head and
the eager inner compiler equal means to the bit; with memplan's head log-probs differ in the last digits.
"""

import math
import string
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, TrainerCallback

from memplan import DoesNotFit, MemplanError
from memplan.grpo.choices import LossType

pytest.importorskip("trl")
pytest.importorskip("peft")

from typing import get_args

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import utils

from memplan.grpo.trl import planned
from memplan.grpo.trl_rollouts import StatesLeave
from memplan.runtime.ledger import Ledger

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # transformers' and TRL's own names, and a loader that would pin memory for a GPU
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    # Dynamo's own, when it compiles a graph that begins with the result of another
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

AMPLE = "4GB"
CLOSE = 2e-6  # of weights, after two steps of AdamW of 1e-3 each, between two ways to compute log-probs
TIMES = {"step_time", "train_runtime", "train_steps_per_second", "train_samples_per_second"}


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a character, padded on the left."""
    alphabet = ["<pad>", "<eos>", *string.ascii_letters]
    model = Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet)}, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def vowels(completions, **_):
    return [sum(c in "aeiou" for c in text) / len(text) if text else 0.0 for text in completions]


def prompts(count=16):
    """Of 2 to 6 letters."""
    letters = string.ascii_lowercase
    return Dataset.from_dict(
        {"prompt": ["".join(letters[(7 * i + j) % 26] for j in range(2 + i % 5)) for i in range(count)]}
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The model that all start from, in a folder: TRL loads the reference from there."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=54, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


Outcome = tuple[list[dict], dict[str, torch.Tensor]]


def outcome(trainer) -> Outcome:
    """What was logged, and the weights."""
    logged = [{k: v for k, v in entry.items() if k not in TIMES} for entry in trainer.state.log_history]
    return logged, {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}


class Runs:
    """Trainers of one model object."""

    def __init__(self, folder: Path, outputs: Path) -> None:
        self.folder, self.outputs = folder, outputs
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.before = {name: value.clone() for name, value in self.model.state_dict().items()}

    def trainer(self, lora=False, fresh=False, of=GRPOTrainer, **args) -> GRPOTrainer:
        model = AutoModelForCausalLM.from_pretrained(self.folder) if lora or fresh else self.model
        vars(model).pop("forward", None)  # the head of the trainer before
        model.load_state_dict(self.before)
        model.zero_grad()
        given = dict(
            output_dir=str(self.outputs), per_device_train_batch_size=4, num_generations=4, max_completion_length=6,
            max_steps=2, logging_steps=1, learning_rate=1e-3, seed=3, use_cpu=True, bf16=False, report_to="none",
            save_strategy="no", disable_tqdm=True, temperature=0.9, gradient_checkpointing=False,
        )  # fmt: skip
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]) if lora else None
        return of(
            model,
            vowels,
            args=GRPOConfig(**given | args),
            train_dataset=prompts(),
            processing_class=tokenizer(),
            peft_config=config,
        )

    def run(
        self, head=None, budget=AMPLE, resume=None, limits=None, **args
    ) -> tuple[list[dict], dict[str, torch.Tensor]]:
        """What was logged and the weights, of TRL alone or planned."""
        trainer = self.trainer(**args)
        if callable(head):
            trainer._get_per_token_logps_and_entropies = head
        elif head is not None:
            given = {"budget": budget, "inner": "eager", "head": head, "limits": limits or {}}
            assert planned(trainer, **given) is trainer
        trainer.train(resume_from_checkpoint=resume and f"{trainer.args.output_dir}/{resume}")
        return outcome(trainer)


@pytest.fixture(scope="module")
def runs(checkpoint, tmp_path_factory) -> Runs:
    torch._dynamo.reset()
    return Runs(checkpoint, tmp_path_factory.mktemp("out"))


def same(value) -> object:
    """Equal where both are nan, too."""
    return "nan" if isinstance(value, float) and math.isnan(value) else value


def assert_equal(ours, theirs) -> None:
    logged, weights = ours
    assert [{k: same(v) for k, v in entry.items()} for entry in logged] == [
        {k: same(v) for k, v in entry.items()} for entry in theirs[0]
    ]
    assert weights.keys() == theirs[1].keys()
    assert [k for k in weights if not torch.equal(weights[k], theirs[1][k])] == []


def assert_close(ours, theirs) -> None:
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6, nan_ok=True)
    for name, value in ours[1].items():
        torch.testing.assert_close(value, theirs[1][name], rtol=0, atol=CLOSE, msg=lambda m, n=name: f"{n}: {m}")


SETTINGS = {loss: {"loss_type": loss} for loss in get_args(LossType)}
SETTINGS["luspo"] |= {"importance_sampling_level": "sequence"}
SETTINGS["cispo"] |= {"epsilon_high": 5.0}


@pytest.fixture(scope="module")
def passes(runs):
    """By head: the passes of a planned trainer, which do not depend on its loss."""
    found = {}
    for head in ("trl", "memplan"):
        trainer = planned(runs.trainer(), budget=AMPLE, inner="eager", head=head)
        found[head] = trainer._get_per_token_logps_and_entropies
    return found


SLOW = SETTINGS.keys() - {"grpo", "luspo", "cispo"}  # three whose terms, weights and sums differ most


@pytest.mark.parametrize("loss", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in SETTINGS])
def test_every_loss_is_trls(runs, passes, loss):
    """The compiled passes are those of one trainer, so that they are compiled once: the losses are each trainer's."""
    theirs = runs.run(**SETTINGS[loss])
    assert any(not torch.equal(theirs[1][k], runs.before[k]) for k in runs.before)  # it learned something
    assert_equal(runs.run(passes["trl"], **SETTINGS[loss]), theirs)
    assert_close(runs.run(passes["memplan"], **SETTINGS[loss]), theirs)


ALL_PASSES = dict(  # of policy, old policy and reference, in micro-batches, with all that reads entropies
    beta=0.1, gradient_accumulation_steps=2, steps_per_generation=4, entropy_coef=0.01, top_entropy_quantile=0.8,
    gradient_checkpointing=True,
)  # fmt: skip


HEADS = [pytest.param("trl", marks=pytest.mark.slow), "memplan"]
AS = {"trl": assert_equal, "memplan": assert_close}


@pytest.mark.parametrize("head", HEADS)
def test_save_and_resume(runs, tmp_path, head):
    """Every pass of full fine-tuning, with TRL's default of checkpointing. Checkpoints are TRL's: either goes on from
    one of the other.
    """
    given = ALL_PASSES | dict(fresh=True, save_strategy="steps", save_steps=1)
    folders = [str(tmp_path / name) for name in ("theirs", "ours")]
    theirs = runs.run(output_dir=folders[0], **given)
    trainer = planned(runs.trainer(output_dir=folders[1], **given), budget=AMPLE, inner="eager", head=head)
    trainer.train()
    assert not trainer.model.is_gradient_checkpointing
    AS[head](outcome(trainer), theirs)
    resumed = [runs.run(output_dir=folder, resume="checkpoint-1", **given) for folder in folders]
    AS[head](*resumed)
    again = planned(runs.trainer(output_dir=folders[0], **given), budget=AMPLE, inner="eager", head=head)
    again.train(resume_from_checkpoint=f"{folders[0]}/checkpoint-1")
    AS[head](outcome(again), resumed[0])


LORA = dict(lora=True, beta=0.1, steps_per_generation=2, gradient_checkpointing=True)


@pytest.mark.parametrize("head", HEADS)
def test_adapters(runs, head):
    """LoRA, whose reference is the model with its adapters off; one graph for each, with memplan's head."""
    theirs = runs.run(**LORA)
    assert any("kl" in entry for entry in theirs[0])
    before = counters["stats"]["unique_graphs"]
    AS[head](runs.run(head, **LORA), theirs)
    if head == "memplan":  # of policy, reference, and policy with gradients
        assert counters["stats"]["unique_graphs"] - before == 3


class Exploring(GRPOTrainer):
    """A loss of its own, with a bonus for entropy."""

    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        kept = inputs["completion_ids"].size(1)
        _, entropies, *_ = self._get_per_token_logps_and_entropies(model, ids, mask, kept, compute_entropy=True)
        return super()._compute_loss(model, inputs) - 0.5 * entropies.mean()


def test_a_loss_of_ones_own_may_descend_entropies(runs):
    theirs = runs.run(fresh=True, of=Exploring)
    assert_close(runs.run("memplan", fresh=True, of=Exploring), theirs)
    assert any(not torch.equal(theirs[1][k], v) for k, v in runs.run(fresh=True)[1].items())


def test_a_model_that_is_another_with_each_step_is_named(runs, monkeypatch):
    monkeypatch.setattr("memplan.compiled.VARIANTS", 2)
    trainer = planned(runs.trainer(fresh=True, max_steps=6), budget=AMPLE, inner="eager")
    attention = trainer.model.model.layers[0].self_attn

    class Annealed(TrainerCallback):
        def on_step_begin(self, *_, **__):
            attention.scaling *= 0.9

    trainer.add_callback(Annealed())
    with pytest.raises(MemplanError, match="it was compiled 2 times: something of the step or its model is another"):
        trainer.train()


def test_mixed_precision(runs):
    assert_equal(runs.run("trl", bf16=True, fresh=True), runs.run(bf16=True, fresh=True))


def test_lengths_make_no_plans(runs, made):
    """Prompts and completions of every length: one graph for all of them."""
    trainer = planned(runs.trainer(max_steps=12, fresh=True), budget=AMPLE, inner="eager")
    lengths, method = set(), trainer._get_per_token_logps_and_entropies

    def watched(model, ids, *args, **kwargs):
        lengths.add(ids.shape[1])
        return method(model, ids, *args, **kwargs)

    trainer._get_per_token_logps_and_entropies = watched
    before = counters["stats"]["unique_graphs"]
    trainer.train()
    assert len(lengths) >= 4
    assert counters["stats"]["unique_graphs"] - before == 1
    assert len(made) <= 4


def test_a_budget_that_is_too_small(runs):
    """It is refused before the first step, and what the error names is enough for the longest to come."""
    head, limits = utils._ChunkedLogProbFunction, {"tokens": 12}
    with pytest.raises(DoesNotFit) as refused:
        runs.run("memplan", budget=1000, limits=limits, fresh=True)
    assert utils._ChunkedLogProbFunction is head
    ours = runs.run("memplan", budget=refused.value.smallest, limits=limits, fresh=True)
    assert utils._ChunkedLogProbFunction is head
    assert_close(ours, runs.run(fresh=True))


def test_what_is_refused(runs, monkeypatch):
    trainer = runs.trainer(fresh=True)

    def says(match, **options):
        with pytest.raises(MemplanError, match=match):
            planned(trainer, **options)
        assert not hasattr(trainer, "memplan_passes")

    says(r"head 'tlr' is not offered: it is 'memplan' or 'trl'", head="tlr")
    says(r'did you mean "1GB"', budget="1")
    says(r"did you mean 'tiles'", tile=4)
    with pytest.raises(MemplanError, match=r"given a Linear: it takes a trl.GRPOTrainer"):
        planned(torch.nn.Linear(1, 1))
    with pytest.raises(MemplanError, match=r"given GRPOTrainer, a class"):
        planned(GRPOTrainer)
    for name, match in {"use_liger_kernel": "use_liger_kernel=True", "torch_compile": "torch_compile=True"}.items():
        monkeypatch.setattr(trainer.args, name, True)
        says(match)
        monkeypatch.undo()
    monkeypatch.setattr(trainer.model.config, "vision_config", object(), raising=False)
    says("LlamaForCausalLM is a vision model")
    monkeypatch.undo()
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_: None)
    says("GRPOTrainer has its own _get_per_token_logps_and_entropies, and memplan plans TRL's")
    monkeypatch.undo()
    monkeypatch.setattr(trainer, "_is_vlm", True)
    says("LlamaForCausalLM is a vision model")
    monkeypatch.undo()
    monkeypatch.delattr(utils, "_use_triton")
    says("trl.trainer.utils has no _use_triton")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "trl", None)
    says("TRL cannot be imported")
    monkeypatch.undo()
    planned(trainer)
    with pytest.raises(MemplanError, match="this trainer is planned already"):
        planned(trainer)


@pytest.mark.parametrize("shared", [False, True])
def test_states_that_cannot_leave_in_rollouts_are_counted_there(tmp_path, shared) -> None:
    """A ledger without an engine: what StatesLeave leases after an optimizer's first step, and after another's."""
    ledger, p = Ledger("1GB", folder=tmp_path), torch.nn.Parameter(torch.ones(2**20))
    callback = StatesLeave(ledger)
    callback.on_step_end(None, None, None, optimizer=torch.optim.AdamW([p]))
    assert not ledger.leases  # it has no states yet
    for _ in range(2):
        optimizer = torch.optim.AdamW([p])
        p.grad = torch.ones_like(p)
        optimizer.step()
        if shared:
            both = torch.zeros(2, *p.shape)
            optimizer.state[p] |= {"exp_avg": both[0], "exp_avg_sq": both[1]}
        for _ in range(2):
            callback.on_step_end(None, None, None, optimizer=optimizer)
        lease = ledger.leases["optimizer"]
        assert 8 * 2**20 <= lease.bytes < 11 * 2**20
        assert lease.phases == ({"rollout", "score", "train"} if shared else {"train"})
        before = optimizer.state[p]["exp_avg"].clone()
        for phase in ("rollout", "train"):
            with ledger.phase(phase):
                assert ledger.leases["optimizer"].state == ("resident" if shared or phase == "train" else "backed up")
        assert torch.equal(optimizer.state[p]["exp_avg"], before)
    ledger.close()
