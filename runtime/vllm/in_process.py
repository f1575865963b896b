"""A vLLM engine in the trainer's process: its KV cache is a tenant of the ledger, its weights are the trainer's.

    engine = InProcess.start(folder, kv_cache="8GB", max_model_len=4096)
    engine.share(model)                       # one copy of the weights from here on
    engine.join(ledger)                       # leases "weights", "engine_fixed" and "kv_cache"
    with ledger.phase("rollout"):
        completions = engine.generate(prompts, n=8, max_tokens=512)

In: a checkpoint's folder; prompts as token ids. Out: tokens and the log-probs that they were sampled with. Requests may
be unfinished when the cache leaves (`submit`, `advance`): they go on after it is back, computed again up to there.
What must hold: what the engine samples is from the weights as they are; so before it runs, a weight that changed since
has the prefix cache forgotten, which vLLM does not do by itself. The trainer's process is left as it was (beside.py).
On the CPU alone: the arenas that the cache is in have no pages of a CUDA device yet.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from memplan import memory
from memplan.errors import MemplanError
from memplan.runtime.arena import Arena, have
from memplan.runtime.ledger import PHASES, Ledger, Restored, RLPhase, Tenant
from memplan.runtime.tenants import Reserved, Resident
from memplan.runtime.vllm.adapters import base_of, layers_of
from memplan.runtime.vllm.beside import Beside
from memplan.runtime.vllm.protocol import Completion, checked_prompts, installed
from memplan.runtime.vllm.weights import Shared, share
from memplan.units import parse_bytes

_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_OURS = ("worker_cls", "kv_cache_memory_bytes", "model")


class InProcess:
    """See the module. As a tenant it is the KV cache, which is restored by nothing."""

    restored: Restored = "nothing"

    def __init__(self, llm: Any, beside: Beside, fixed: int) -> None:
        self.fixed = fixed  # bytes that it took beside weights and cache, when it started
        self.shared: Shared | None = None
        self.llm, self._beside = llm, beside
        with beside.running():
            self._worker = llm.collective_rpc(_itself)[0]
            self._module: nn.Module = llm.apply_model(_itself)[0]
        self._away, self._stale = False, False  # stale: weights may have changed
        self._unfinished: dict[str, int] = {}  # by request: which prompt it was, counted from the first one
        self._submitted = 0
        _mark_stale_after_steps(self)
        self.close = weakref.finalize(self, _close, llm, self._worker, beside)

    @staticmethod
    def start(folder: str | os.PathLike[str], kv_cache: str | int, **options: Any) -> InProcess:
        """An engine of the checkpoint in `folder`, with so many bytes of KV cache. options: of vllm.LLM.

        Log-probs are those of the distribution that is sampled from (temperature counts), unless `logprobs_mode` says
        otherwise. Raises MemplanError where vLLM cannot be started.
        """
        if taken := [name for name in _OURS if name in options]:
            raise MemplanError(f"{taken[0]!r} cannot be given: memplan has a worker of its own, and kv_cache its bytes")
        beside, before, size = Beside(), memory.resident(), parse_bytes(kv_cache)
        with _environment(), beside.starting():
            vllm = installed()
            if vllm.distributed.parallel_state.model_parallel_is_initialized():
                raise MemplanError("there is a vLLM engine in this process, and it can have one: close() that first")
            usual = {
                "logprobs_mode": "processed_logprobs",
                "seed": 0,
                "enforce_eager": True,
                "skip_tokenizer_init": True,
                "enable_chunked_prefill": False,  # on the CPU vLLM cannot take back what a seeded request samples
            }
            try:
                args = vllm.engine.arg_utils.EngineArgs(os.fspath(folder), **{**usual, **options})
                if args.create_model_config().using_transformers_backend():
                    raise MemplanError(
                        "vLLM has no model of its own for it, and would change transformers' for you too"
                    )
                llm = vllm.LLM(
                    os.fspath(folder),
                    worker_cls="memplan.runtime.vllm.worker.ArenaWorker",
                    kv_cache_memory_bytes=size,
                    **{**usual, **options},
                )
            except BaseException as error:
                vllm.distributed.parallel_state.cleanup_dist_env_and_memory()
                if not isinstance(error, Exception):
                    raise
                raise MemplanError(f"vLLM has not started with {os.fspath(folder)!r}: {error}") from error
        engine = InProcess(llm, beside, 0)
        engine.fixed = max(memory.resident() - before - engine.resident - engine.weight_bytes, 0)
        return engine

    # ---- a tenant of the ledger

    @property
    def _arenas(self) -> list[Arena]:
        arenas: list[Arena] = self._worker.arenas
        return arenas

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache, rounded up to chunks of an arena, 2 MiB."""
        return sum(arena.size for arena in self._arenas)

    @property
    def resident(self) -> int:
        """Bytes of the KV cache that are on the device."""
        return sum(arena.resident for arena in self._arenas)

    def release(self) -> int:
        """Forget the KV cache. What is unfinished is kept, and goes on after `restore`."""
        if not self.close.alive:
            return 0  # it has nothing any more, and is not in the way of others
        with self._beside.running():
            self._away = True
            self.llm.sleep(level=0, mode="keep")
            self.llm.llm_engine.step()  # what has just finished is forgotten only then
            self.llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
            self._worker.discard(("kv_cache",))
        return 0

    def restore(self) -> int:
        """Bring it back, at the same addresses."""
        self._alive()
        with self._beside.running():
            self._worker.wake_up(["kv_cache"])
            self.llm.wake_up(tags=["scheduling"])
            self._away, self._stale = False, True
        return 0

    def prefetch(self, size: int) -> None:
        """While it is away, bring back pages of its first `size` bytes, as a step of the trainer leaves room."""
        if self._away and self.close.alive:
            have(self._arenas, size)

    def join(self, ledger: Ledger, running: str | int | None = None) -> None:
        """Lease what the engine has: weights and what it always takes in all phases, the KV cache in rollout. Adapters
        are among the weights, if they are shared by now. Of a model that is not shared whole "weights" are what both
        have, "engine_weights" the engine's alone, and "copied" the trainer's of which the engine has copies.

        running: bytes that it takes besides while it generates, as for a prompt's activations; in rollout too.
        """
        always, rollout = PHASES, PHASES[:1]
        leases: list[tuple[str, Tenant, int, tuple[RLPhase, ...]]] = [
            *((tag, Resident(size), size, always) for tag, size in self._weights().items()),
            ("engine_fixed", Resident(self.fixed), self.fixed, always),
            ("kv_cache", self, self.kv_bytes, rollout),
        ]
        if running is not None:
            leases.append(("engine_running", Reserved(), parse_bytes(running), rollout))
        made = list[str]()
        try:
            for tag, tenant, size, phases in leases:
                if size:
                    ledger.lease(tag, tenant, size, phases)
                    made.append(tag)
        except BaseException:
            for tag in made:
                ledger.end(tag)
            raise

    # ---- weights

    @property
    def weight_bytes(self) -> int:
        """Bytes of vLLM's parameters; of the trainer's too, its adapters with them, once they are shared."""
        adapters = self.shared.adapters.bytes if self.shared is not None else 0
        return sum(p.nbytes for p in {id(p): p for p in self._module.parameters()}.values()) + adapters

    def _weights(self) -> dict[str, int]:
        """Bytes by the tag of their lease."""
        if self.shared is None or not self.shared.copied:
            return {"weights": self.weight_bytes}
        both, copied = self.shared.sizes()
        return {
            "weights": both + self.shared.adapters.bytes,
            "engine_weights": self.weight_bytes - self.shared.adapters.bytes - both,
            "copied": copied,
        }

    def params(self) -> dict[str, torch.Tensor]:
        """The live parameters, by vLLM's names."""
        return dict(self._module.named_parameters())

    def share(self, model: nn.Module) -> Shared:
        """Make the parameters of a transformers model views of vLLM's, with the values that the model has.

        Parameters on meta get vLLM's values and are new objects: make an optimizer afterwards. What cannot be shared is
        copied before the engine runs, and `report()` of what is returned names it. PEFT's LoRA adapters stay where they
        are, and the engine runs them. Call it again for the same model with other layers, as after get_peft_model.
        """
        self._alive()
        base, config = base_of(model), self.llm.llm_engine.vllm_config.model_config
        if self.shared is not None and self.shared.model is not base:
            raise MemplanError("the engine shares another model's weights already: start another engine for this one")
        if layers_of(base) and not config.enforce_eager:
            raise MemplanError(
                "the engine's model is compiled, and adapters reach layers that run one by one: start it with "
                "enforce_eager=True"
            )
        before, self.shared = self.shared, share(base, self._module, config.hf_config)
        if before is not None:
            before.adapters.remove()
        self.invalidate()
        return self.shared

    def invalidate(self) -> None:
        """Say that weights have changed. What autograd can see, and what torch's optimizers do, is found without."""
        self._alive()
        self._stale = True
        if self.shared is not None:
            self.shared.copy()
        with self._beside.running():
            self.llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
        if self.shared is not None:
            self.shared.seen = self.shared.versions()
        self._stale = False

    # ---- rollouts

    def seed(self, number: int) -> None:
        """Have what is drawn from now on follow from a number, below 2**32; requests with a seed have their own."""
        self._alive()
        self._beside.seed(number)

    def generate(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[Completion]:
        """Completions of all prompts, in their order, n for each. sampling: of vllm.SamplingParams (n, max_tokens,
        temperature, seed, stop_token_ids, ...).
        """
        self._ready()
        if self._unfinished:
            raise MemplanError(
                f"{len(self._unfinished)} requests are unfinished: advance() to their end before generate, or submit "
                "these beside them"
            )
        first = self._submitted
        self.submit(prompts, **sampling)
        done = self.advance()
        return [completion._replace(prompt=completion.prompt - first) for completion in done]

    def submit(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> range:
        """Queue prompts. Returns their numbers, which their completions will have."""
        self._alive()
        known = self.llm.llm_engine.vllm_config.model_config.hf_config.vocab_size
        wanted = [{"prompt_token_ids": prompt} for prompt in checked_prompts(prompts, known)]
        vllm = installed()
        try:
            params = vllm.SamplingParams(**{"detokenize": False, **sampling, "logprobs": 0})
        except Exception as error:
            raise MemplanError(f"sampling {sampling!r} is not what vLLM takes: {error}") from error
        params.output_kind = vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        first = self._submitted
        self._submitted += len(wanted)
        with self._beside.running():
            try:
                for number, prompt in enumerate(wanted, first):
                    self._unfinished[str(number)] = number
                    self.llm.llm_engine.add_request(str(number), prompt, params.clone())
            except BaseException as error:
                self._abort([str(number) for number in range(first, first + len(wanted))])
                if not isinstance(error, Exception):
                    raise
                raise MemplanError(f"vLLM has not taken the prompts: {error}") from error
        return range(first, self._submitted)

    def advance(self, steps: int | None = None) -> list[Completion]:
        """Run the engine for so many of its steps, or until all is finished. Returns what has finished, by prompt."""
        self._ready()
        done = list[Completion]()
        with self._beside.running():
            try:
                while self._unfinished and steps != 0:
                    if not self.llm.llm_engine.has_unfinished_requests():
                        raise MemplanError(f"vLLM has lost {len(self._unfinished)} requests: submit them again")
                    for output in self.llm.llm_engine.step():
                        if output.finished:
                            done += _completions(self._unfinished.pop(output.request_id), output)
                    steps = None if steps is None else steps - 1
                if done and self.shared is not None:
                    self.shared.adapters.check_run()
            except BaseException:
                self._abort(list(self._unfinished))
                raise
        return sorted(done, key=lambda completion: (completion.prompt, completion.number))

    def _abort(self, requests: Iterable[str]) -> None:
        self.llm.llm_engine.abort_request([r for r in requests if self._unfinished.pop(r, None) is not None])

    def _ready(self) -> None:
        self._alive()
        if self._away:
            raise MemplanError(
                "the engine's KV cache is not on the device: generate inside `with ledger.phase('rollout')`, or call "
                "restore() first"
            )
        if self._stale or (self.shared is not None and self.shared.changed()):
            self.invalidate()

    def _alive(self) -> None:
        if not self.close.alive:
            raise MemplanError("the engine is closed: start another one")


def _mark_stale_after_steps(engine: InProcess) -> None:
    """After a step of any optimizer weights may have changed: a fused one writes where autograd does not see it."""
    there = weakref.ref(engine)

    def stepped(*_: Any) -> None:
        if (found := there()) is not None:
            found._stale = True

    weakref.finalize(engine, register_optimizer_step_post_hook(stepped).remove)


def _itself(what: Any) -> Any:
    return what


def _completions(prompt: int, output: Any) -> Iterator[Completion]:
    for found in output.outputs:
        chosen = [at[token].logprob for at, token in zip(found.logprobs, found.token_ids, strict=True)]
        yield Completion(prompt, found.index, tuple(found.token_ids), tuple(chosen), str(found.finish_reason))


def _close(llm: Any, worker: Any, beside: Beside) -> None:
    with beside.running():
        llm.llm_engine.engine_core.shutdown()
        worker.discard(("kv_cache",))


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What vLLM reads of the environment, unless it is said there already."""
    missing = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]
