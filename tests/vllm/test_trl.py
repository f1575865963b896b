"""TRL's GRPOTrainer whose completions are sampled by memplan's engine, in phases of one ledger."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from memplan import MemplanError
from memplan.runtime.ledger import Ledger
from memplan.runtime.vllm import InProcess

from .conftest import CONFIGS, KV, Start, model_of

CHUNK = 2 * 2**20

Made = Callable[..., Any]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{k}": k for k in range(131)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", padding_side="left")


def even(completions: list[str], **_: Any) -> list[float]:
    """The reward: how many of the words have an even number."""
    numbers = [[int(word[1:]) for word in text.split()] for text in completions]
    return [sum(n % 2 == 0 for n in of) / max(len(of), 1) for of in numbers]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Trainers of the weights that engines start with."""
    # here, as TRL imports vLLM, and warns of versions that it does not know
    peft, trl = pytest.importorskip("peft"), pytest.importorskip("trl")

    def made(lora: bool = False, seed: int = 0, **args: Any) -> Any:
        given: dict[str, Any] = dict(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, num_generations=4, max_steps=3,
            max_completion_length=8, logging_steps=1, learning_rate=1e-2, use_cpu=True, bf16=False, report_to="none",
            save_strategy="no", disable_tqdm=True, temperature=0.9, seed=3,
        )  # fmt: skip
        return trl.GRPOTrainer(
            model_of(CONFIGS["llama"], seed),
            even,
            args=trl.GRPOConfig(**given | args),
            train_dataset=Dataset.from_dict({"prompt": [f"w3 w4 w{k} w5" for k in range(6, 22)]}),
            eval_dataset=Dataset.from_dict({"prompt": ["w3 w4 w22 w5"]}),
            processing_class=tokenizer(),
            peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]) if lora else None,
        )

    return made


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    there = Ledger("1GB", folder=tmp_path)
    yield there
    there.close()


def seen(trainer: Any, engine: InProcess, ledger: Ledger) -> list[tuple[str, int, str, bool]]:
    """When completions are sampled and when a pass runs: the cache's bytes on the device, and where the states are."""
    found = list[tuple[str, int, str, bool]]()

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            lease = ledger.leases.get("optimizer")
            found.append((name, engine.resident, lease.state if lease else "", torch.is_grad_enabled()))
            return real(*args, **kwargs)

        return run

    engine.generate = watched("rollout", engine.generate)  # type: ignore[method-assign]
    method = trainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = watched("pass", method)
    return found


@pytest.mark.parametrize("lora", [False, True])
def test_a_run(start: Start, made: Made, ledger: Ledger, lora: bool) -> None:
    from memplan.grpo.trl import planned

    engine, trainer = start(), made(lora, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=4)
    assert planned(trainer, ledger=ledger, engine=engine, inner="eager") is trainer
    assert engine.shared is not None and not engine.shared.copied
    before = {name: p.clone() for name, p in engine.params().items()}
    found = seen(trainer, engine, ledger)
    trainer.train()
    rollouts = [entry[1:3] for entry in found if entry[0] == "rollout"]
    assert rollouts[:2] == [(KV, ""), (KV, "backed up")] and set(rollouts[2:]) == {(KV, "backed up")}
    passes = [entry[1:] for entry in found if entry[0] == "pass"]
    first, later = [(0, "", False), (0, "", True)], [(0, "resident", False), (0, "resident", True)]
    assert passes[:4] == first + later and set(passes[4:]) == set(later)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert 0 <= ledger.leases["optimizer"].bytes - 8 * trained < 2 * CHUNK  # what an arena is rounded up to
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logs) == 3 and len({entry["reward"] for entry in logs}) > 1
    assert all(0 < entry["sampling/sampling_logp_difference/max"] < 1e-5 for entry in logs)  # after each step too
    changed = [name for name, p in engine.params().items() if not torch.equal(p, before[name])]
    assert bool(changed) is not lora  # what the engine samples from is what was trained
    assert all(not t.failed for t in ledger.transitions)


def test_completions_end_where_trl_ends_them(start: Start, made: Made, ledger: Ledger) -> None:
    from memplan.grpo.trl_rollouts import joined, let_generate

    engine, trainer = start(), made(max_completion_length=100)
    joined(trainer, ledger, engine)
    let_generate(trainer, ledger, engine)
    prompts = [[3, 4, 5, 6 + k // 4] for k in range(16)]
    ids, completions, logprobs, tokens = trainer.vllm_generation.generate(prompts, [None] * 16, 4)
    assert ids == prompts and [len(of) for of in logprobs] == [len(of) for of in completions]
    assert [[one for (one,) in of] for of in tokens] == completions
    ended = [of for of in completions if of[-1] == 2]
    assert ended and all(2 not in of[:-1] for of in completions)
    assert all(len(of) == 100 for of in completions if of not in ended)
    assert len({tuple(of) for of in completions}) == 16
    assert engine.resident == 0 and ledger.at == "train"


def test_an_interrupted_rollout_leaves_the_trainer_its_states(start: Start, made: Made, ledger: Ledger) -> None:
    from memplan.grpo.trl import planned

    engine, trainer = start(), made()
    planned(trainer, ledger=ledger, engine=engine, inner="eager")
    step, interrupted = engine.llm.llm_engine.step, list[int]()

    def once_interrupted() -> Any:
        if trainer.state.global_step == 2 and ledger.at == "rollout" and not interrupted:
            interrupted.append(2)
            raise KeyboardInterrupt
        return step()

    engine.llm.llm_engine.step = once_interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert interrupted and ledger.at == "train" and engine.resident == 0
    states = [state["exp_avg_sq"] for state in trainer.optimizer.state.values()]
    assert states and all(bool((tensor != 0).any()) for tensor in states)
    trainer.train()
    assert trainer.state.global_step == 3 and all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_run_goes_on_from_a_checkpoint(start: Start, made: Made, tmp_path: Path) -> None:
    """To the same weights, with another engine, as in another process; its states leave in the first rollout too."""
    from memplan.grpo.trl import planned

    weights, states = [], []
    for checkpoint in (None, str(tmp_path / "out" / "checkpoint-2")):
        engine, trainer = start(), made(max_steps=4, save_strategy="steps", save_steps=2)
        ledger = Ledger("1GB", folder=tmp_path)
        planned(trainer, ledger=ledger, engine=engine, inner="eager")
        found = seen(trainer, engine, ledger)
        trainer.train(resume_from_checkpoint=checkpoint)
        states.append([entry[2] for entry in found if entry[0] == "rollout"])
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
        ledger.close()
        engine.close()
    assert states == [["", *["backed up"] * 3], ["backed up"] * 2]
    assert all(map(torch.equal, *weights))


def test_states_that_a_checkpoint_replaces_are_leased_in_their_place(start: Start, made: Made, ledger: Ledger) -> None:
    from memplan.grpo.trl import planned

    engine, trainer = start(), made(max_steps=4, save_strategy="steps", save_steps=2)
    planned(trainer, ledger=ledger, engine=engine, inner="eager")
    trainer.train()
    before = ledger.tenant("optimizer")
    trainer.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-2"))
    after: Any = ledger.tenant("optimizer")
    assert after is not before
    states = [state["exp_avg_sq"] for state in trainer.optimizer.state.values()]
    there = after.arena.tensor(0, (1,), torch.uint8, (1,)).data_ptr()
    assert all(there <= tensor.data_ptr() < there + after.arena.size for tensor in states)


def test_what_is_copied_is_said_and_counted(
    start: Start, made: Made, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    from memplan.grpo.trl_rollouts import joined

    engine, trainer = start(dtype="bfloat16"), made()
    budget = joined(trainer, ledger, engine)
    assert "parameters are copied to the engine before each rollout" in caplog.text
    engines = sum(p.nbytes for p in engine.params().values())
    trainers = sum(p.nbytes for p in trainer.model.parameters())
    leases = {tag: lease.bytes for tag, lease in ledger.leases.items()}
    assert (leases["engine_weights"], leases["copied"], "weights" in leases) == (engines, trainers, False)
    assert dict(budget.others) | {"engine_fixed": 0} == {"engine_weights": engines, "engine_fixed": 0}


def test_what_cannot_be_is_refused_and_the_trainer_is_as_it_was(start: Start, made: Made, ledger: Ledger) -> None:
    from memplan.grpo.trl import planned

    engine, trainer = start(), made()
    both = {"ledger": ledger, "engine": engine}
    for given, why in (
        ({"ledger": ledger}, "ledger= and engine= go together"),
        ({"engine": engine}, "ledger= and engine= go together"),
        ({**both, "budget": "1GB"}, "budget='1GB' cannot be given beside ledger="),
        ({**both, "inner": "no such"}, "inner"),
        ({**both, "ledger": "1GB"}, "ledger= is '1GB': it takes a memplan.runtime Ledger"),
        ({**both, "engine": engine.llm}, "it takes a memplan.runtime InProcess"),
    ):
        with pytest.raises(MemplanError, match=why):
            planned(trainer, **given)
    for args, why in (
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, "would be on the device in rollouts"),
        ({"loss_type": "vespo"}, "does not go with loss_type 'vespo'"),
        ({"vllm_structured_outputs_regex": "a+"}, "needs a tokenizer in the engine"),
        ({"max_completion_length": 128}, "leaves no room for a prompt: the engine has 128 tokens"),
    ):
        with pytest.raises(MemplanError, match=why):
            planned(made(**args), **both)
    other = made()
    other.rollout_func = print
    with pytest.raises(MemplanError, match="rollout_func generates as it likes"):
        planned(other, **both)
    with pytest.raises(MemplanError, match="another model's weights"):
        planned(made(seed=1), **both)
    assert trainer.use_vllm is False and not hasattr(trainer, "vllm_generation")
    planned(trainer, **both)
    with pytest.raises(MemplanError, match="takes no images"):
        trainer.vllm_generation.generate([[3, 4]], ["image"], 1)
    engine.close()
    with pytest.raises(MemplanError, match="the ledger has leases of another engine"):
        planned(made(), ledger=ledger, engine=start())
