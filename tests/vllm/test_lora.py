"""LoRA beside an engine: one copy of the base, and what is sampled is from base and adapter as they are now."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from memplan.errors import MemplanError
from memplan.grpo import token_logprobs
from memplan.runtime.ledger import Ledger
from memplan.runtime.vllm import InProcess
from memplan.runtime.vllm.weights import Shared

from .conftest import CONFIGS, Start, model_of, started
from .test_weights import LONG, PROMPTS, SHARED, off_by, trained

peft = pytest.importorskip("peft")
init_empty_weights = pytest.importorskip("accelerate").init_empty_weights
FEW, ALL = ["q_proj", "v_proj"], "all-linear"
ROLLOUT: dict[str, Any] = {"max_tokens": 16, "ignore_eos": True, "seed": 3}


def adapted(model: nn.Module, r: int = 8, targets: Any = ALL, seed: int = 0, **options: Any) -> Any:
    """Adapters that change what the model says."""
    config = peft.LoraConfig(r=r, target_modules=targets, init_lora_weights=False, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config).eval()


def adapters_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "lora_" in name]


def assert_one_copy(engine: InProcess, model: nn.Module, shared: Shared) -> None:
    """What the engine has is the base, all of it, and of the trainer's the adapters alone are elsewhere."""
    assert shared.copied == {}
    theirs = [p.untyped_storage() for p in engine.params().values()]
    for name, p in model.named_parameters():
        inside = any(s.data_ptr() <= p.data_ptr() < s.data_ptr() + s.nbytes() for s in theirs)
        assert inside == ("lora_" not in name), name


@pytest.mark.parametrize("name", SHARED)
def test_engine_and_trainer_agree_before_and_after_steps_of_adapters(start: Start, name: str) -> None:
    engine = start(name)
    base = model_of(CONFIGS[name], seed=1)  # other values than the checkpoint's
    for r, targets, rslora in ((8, FEW, True), (16, ALL, False)):
        model = adapted(base, r, targets, use_rslora=rslora)
        optimizer = torch.optim.AdamW(adapters_of(model), lr=0.01)
        there = {n: p.detach().clone() for n, p in model.named_parameters()}
        shared = engine.share(model)
        assert all(torch.equal(p, there[n]) for n, p in model.named_parameters())
        assert_one_copy(engine, model, shared)
        said = set()
        for temperature in (1.0, 0.7, 1.0):
            found = engine.generate(PROMPTS, **ROLLOUT, temperature=temperature)
            assert off_by(model, found, temperature) < 1e-5
            with model.disable_adapter():
                assert off_by(model, found, temperature) > 1e-2
            said.add(tuple(c.logprobs for c in found))
            trained(model, optimizer)
        assert len(said) == 3
        base = model.unload()


def test_biases_are_adapted_too(start: Start) -> None:
    engine = start("qwen2")
    model = adapted(model_of(CONFIGS["qwen2"]), targets=FEW, lora_bias=True, bias="all")
    engine.share(model)
    changed = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert len(changed) == 2 * (3 + 2) and all(p.requires_grad for p in changed)
    with torch.no_grad():
        for p in changed:
            p.add_(torch.randn_like(p))
    assert off_by(model, engine.generate(PROMPTS, **ROLLOUT)) < 1e-5


def test_adapters_of_another_dtype_compute_in_it(start: Start) -> None:
    """As PEFT does with a base of bfloat16: products in float32, added, and rounded once."""
    engine = start(dtype="bfloat16")
    model = adapted(model_of(CONFIGS["llama"]).bfloat16())
    shared = engine.share(model)
    assert_one_copy(engine, model, shared)
    assert {p.dtype for p in adapters_of(model)} == {torch.float32}
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    theirs = engine._module.get_submodule("model.layers.0.mlp.down_proj")
    x = torch.randn(5, layer.in_features).bfloat16()
    with torch.inference_mode():
        assert torch.equal(theirs(x)[0], layer(x))


def test_adapters_of_what_is_not_shared_are_refused(start: Start) -> None:
    model = peft.get_peft_model(
        model_of(CONFIGS["gpt2"]), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    )
    why = "the adapter at 'transformer.h.0.attn.c_attn' has no place in the engine: vLLM keeps it in 3 pieces"
    with pytest.raises(MemplanError, match=why):
        start("gpt2").share(model)


# From here on one engine for all tests: a process has one at a time, so those with others come first.


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    there = started(tmp_path_factory.mktemp("llama"), max_model_len=400)
    yield there
    there.close()


@pytest.fixture
def engine(llama: InProcess) -> Iterator[InProcess]:
    """One for all of these tests, which shares nothing at first."""
    yield llama
    if llama.shared is not None:
        llama.shared.adapters.remove()
        llama.shared = None


def test_the_reference_policy_is_the_model_with_its_adapters_disabled(engine: InProcess) -> None:
    base = model_of(CONFIGS["llama"])
    ids = torch.tensor(PROMPTS)
    reference = token_logprobs(base, ids).detach()
    model = adapted(base)
    engine.share(model)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(token_logprobs(model, ids), reference, rtol=0, atol=1e-6)
        disabled = engine.generate(PROMPTS, **ROLLOUT)
        assert off_by(model, disabled) < 1e-5
    enabled = engine.generate(PROMPTS, **ROLLOUT)
    assert off_by(model, enabled) < 1e-5
    assert enabled != disabled


def stepped(model: Any) -> None:
    trained(model, torch.optim.AdamW(adapters_of(model), lr=0.05, fused=True))  # which autograd does not see


def rescaled(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)


def merged(model: Any) -> None:
    model.merge_adapter()


def unmerged(model: Any) -> None:
    model.unmerge_adapter()


def second(model: Any) -> None:
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules=FEW, init_lora_weights=False))
    model.set_adapter("second")


def another_merged(model: Any) -> None:
    model.merge_adapter(adapter_names=["default"])


def both(model: Any) -> None:
    model.base_model.set_adapter(["default", "second"])


def disabled(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def test_the_engine_does_as_peft_does_now_and_forgets_what_it_computed_before(engine: InProcess) -> None:
    model = adapted(model_of(CONFIGS["llama"]))
    engine.share(model)
    seen = set()
    changes = (stepped, rescaled, merged, unmerged, second, another_merged, unmerged, both, disabled)
    for change in (None, *changes):
        if change is not None:
            change(model)
        found = engine.generate([LONG], max_tokens=4, temperature=1.0)
        ids = torch.tensor([[*LONG, *found[0].tokens]])
        with torch.no_grad():
            ours = token_logprobs(model, ids)[0, len(LONG) - 1 :]
        torch.testing.assert_close(ours, torch.tensor(found[0].logprobs), atol=2e-5, rtol=0)
        seen.add(round(float(token_logprobs(model, torch.tensor([LONG])).detach().sum()), 2))
    assert len(seen) == 6  # merged or not, it is the same


def test_a_base_without_memory_takes_the_engines_and_then_adapters(engine: InProcess) -> None:
    with init_empty_weights():
        base = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    engine.share(base)
    model = adapted(base)
    assert_one_copy(engine, model, engine.share(model))
    found = engine.generate(PROMPTS, **ROLLOUT)
    assert off_by(model, found) < 1e-5
    assert off_by(adapted(model_of(CONFIGS["llama"])), found) < 1e-5  # the checkpoint's, and the same adapters


def test_without_adapters_again_it_is_the_base(engine: InProcess) -> None:
    model = adapted(model_of(CONFIGS["llama"]))
    engine.share(model)
    base = model.unload()
    with pytest.raises(MemplanError, match=r"'model.*q_proj.base_layer.weight' .* share\(\) the model"):
        engine.generate(PROMPTS)
    engine.share(base)
    assert off_by(base, engine.generate(PROMPTS, **ROLLOUT)) < 1e-5


def test_adapters_are_in_the_lease_of_weights_and_in_the_report(engine: InProcess) -> None:
    model = adapted(model_of(CONFIGS["llama"]))
    alone = engine.weight_bytes
    shared = engine.share(model)
    size = sum(p.nbytes for p in adapters_of(model))
    assert engine.weight_bytes == alone + size
    assert shared.report().splitlines() == [
        "21 parameters are the engine's own memory",
        f"14 adapters are run by the engine where the trainer has them, {size} bytes",
    ]
    ledger = Ledger("1GB")
    engine.join(ledger)
    assert ledger.needed("rollout")["weights"] == ledger.needed("train")["weights"] == alone + size
    ledger.close()


def test_the_cache_leaves_in_the_middle_of_a_rollout(engine: InProcess) -> None:
    engine.share(adapted(model_of(CONFIGS["llama"])))
    whole = engine.generate(PROMPTS, n=2, **ROLLOUT)
    engine.submit(PROMPTS, n=2, **ROLLOUT)
    assert not engine.advance(5)
    engine.release()
    engine.restore()
    assert [c.tokens for c in engine.advance()] == [c.tokens for c in whole]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "DoRA": (
        lambda: peft.LoraConfig(target_modules=FEW, use_dora=True),
        "the adapter 'default' at 'model.layers.0.self_attn.q_proj' is a variant of LoRA, DoraLinearVariant",
    ),
    "embeddings": (
        lambda: peft.LoraConfig(target_modules=["embed_tokens"]),
        "'model.embed_tokens' is PEFT's Embedding",
    ),
    "head": (
        lambda: peft.LoraConfig(target_modules=["lm_head"]),
        "the adapter at 'lm_head' has no place in the engine: vLLM's ParallelLMHead is no linear layer",
    ),
    "modules_to_save": (
        lambda: peft.LoraConfig(target_modules=FEW, modules_to_save=["lm_head"]),
        "'lm_head' is PEFT's ModulesToSaveWrapper",
    ),
    "tokens": (
        lambda: peft.LoraConfig(target_modules=FEW, trainable_token_indices=[1, 2]),
        "'model.embed_tokens' is PEFT's TrainableTokensWrapper",
    ),
    "aLoRA": (
        lambda: peft.LoraConfig(target_modules=FEW, alora_invocation_tokens=[3], task_type="CAUSAL_LM"),
        "the adapter 'default' at 'model.layers.0.self_attn.q_proj' is a variant of LoRA, ALoraLinearVariant",
    ),
    "IA3": (
        lambda: peft.IA3Config(target_modules=FEW, feedforward_modules=[]),
        "'model.layers.0.self_attn.q_proj' is PEFT's Linear of peft.tuners.ia3.layer",
    ),
    "prompts": (
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "parameter 'prompt_encoder.default.embedding.weight' is not in a layer of the model",
    ),
}


def test_other_adapters_are_refused_by_name_and_nothing_is_moved(engine: InProcess) -> None:
    for config, why in REFUSED.values():
        model = peft.get_peft_model(model_of(CONFIGS["llama"]), config())
        at = {name: p.data_ptr() for name, p in model.named_parameters()}
        with pytest.raises(MemplanError, match=re.escape(why)):
            engine.share(model)
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == at
    assert not any(module._forward_hooks for module in engine._module.modules())


def test_adapters_that_become_others_are_refused_before_the_next_rollout(engine: InProcess) -> None:
    model = adapted(model_of(CONFIGS["llama"]))
    engine.share(model)
    model.merge_adapter()
    with model.disable_adapter(), pytest.raises(MemplanError, match="q_proj' is merged and disabled: unmerge it first"):
        engine.generate(PROMPTS)
    model.unmerge_adapter()
    assert off_by(model, engine.generate(PROMPTS, **ROLLOUT)) < 1e-5
    model.add_adapter("dora", peft.LoraConfig(target_modules=FEW, use_dora=True))
    with pytest.raises(MemplanError, match=r"the adapter 'dora' at .* is a variant of LoRA"):
        engine.generate(PROMPTS)


def test_adapters_on_meta_are_refused(engine: InProcess) -> None:
    with init_empty_weights():
        model = adapted(AutoModelForCausalLM.from_config(CONFIGS["llama"]))
    with pytest.raises(MemplanError, match=r"'.*q_proj.lora_A.default.weight' is on meta, and no adapter is"):
        engine.share(model)


def test_a_layer_that_the_engine_passes_by_is_found(engine: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(model_of(CONFIGS["llama"]))
    engine.share(model)
    mlp: Any = engine._module.get_submodule("model.layers.1.mlp")
    monkeypatch.setattr(mlp, "forward", lambda x: mlp.down_proj.forward(mlp.act_fn(mlp.gate_up_proj(x)[0]))[0])
    with pytest.raises(MemplanError, match=r"not run the adapter at 'model.layers.1.mlp.down_proj' \(and 0 "):
        engine.generate(PROMPTS)


def test_an_engine_that_is_compiled_is_refused(engine: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.llm.llm_engine.vllm_config.model_config, "enforce_eager", False)
    engine.share(base := model_of(CONFIGS["llama"]))
    with pytest.raises(MemplanError, match="adapters reach layers that run one by one: start it with enforce_eager"):
        engine.share(adapted(base))
