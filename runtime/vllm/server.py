"""A vLLM engine in a process of its own, over HTTP: its KV cache is a tenant of the ledger too.

    VLLM_SERVER_DEV_MODE=1 vllm serve checkpoint/ --enable-sleep-mode  # on a CPU see README
    engine = Server("http://127.0.0.1:8000", kv_cache="8GB")

In: the address of a server on this machine, and the bytes of its cache. Out: the same as of an engine in process, but
for the weights: the server has a copy of its own, which its user keeps up to date. What cannot be seen over HTTP is
not measured: the cache is taken to be there as a whole until the server has said that it has left, and from the moment
on at which it is asked to come back.
What must hold: nothing waits forever. What may be said twice is said again, `retries` times; the error names the
request, how often it was tried, and what came back.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from memplan.errors import MemplanError
from memplan.runtime.ledger import Restored
from memplan.runtime.vllm.protocol import Completion, checked_prompts
from memplan.units import parse_bytes

# Said to a server each time: it would take what the checkpoint says else.
_WHOLE = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
_PAUSE = 0.2  # seconds before the first retry; twice as long before each further one


class Server:
    """See the module. timeout: seconds without an answer, of `generate` `generating`; both of one try. processed: its
    log-probs are of what it samples from, temperature and all, as --logprobs-mode processed_logprobs makes them.
    """

    restored: Restored = "nothing"

    def __init__(
        self, address: str, kv_cache: str | int, *, timeout: float = 60, generating: float = 3600,
        retries: int = 2, processed: bool = False,
    ) -> None:  # fmt: skip
        self.address, self.kv_bytes = address.rstrip("/"), parse_bytes(kv_cache)
        self.timeout, self.generating, self.retries = timeout, generating, retries
        self.processed = processed
        self._away = False
        try:
            self.model = str(self._ask("GET", "/v1/models")["data"][0]["id"])
        except (LookupError, TypeError):
            raise MemplanError(f"what is at {self.address} is not a vLLM server: it does not list its model") from None
        if self._ask("GET", "/is_sleeping")["is_sleeping"]:
            raise MemplanError(
                f"the engine at {self.address} is asleep already: wake it up, or end who has put it to sleep"
            )

    # ---- a tenant of the ledger

    @property
    def resident(self) -> int:
        """Bytes of the KV cache that are on the device, as far as the server has said."""
        return 0 if self._away else self.kv_bytes

    def release(self) -> int:
        """Forget the KV cache. Requests under way are kept, and go on after `restore`."""
        self._ask("POST", "/pause?mode=keep")
        self._ask("POST", "/release_kv_cache_memory", done="memory to be resident")  # it has left before
        self._away = True
        return 0

    def restore(self) -> int:
        """Bring it back."""
        self._away = False
        self._ask("POST", "/wake_up?tags=kv_cache")
        self._ask("POST", "/resume")
        return 0

    # ---- rollouts

    def generate(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[Completion]:
        """Completions of all prompts, in their order, n for each. sampling: of vLLM's completions (n, max_tokens,
        temperature, seed, stop_token_ids, ...). Not tried again when it fails.
        """
        if not self.processed and any(sampling.get(name, value) != value for name, value in _WHOLE.items()):
            raise MemplanError(
                f"sampling {sampling!r} is not from the whole distribution, of which this server's log-probs are: "
                "start it with --logprobs-mode processed_logprobs, and give Server processed=True"
            )
        asked = {
            "model": self.model, "prompt": checked_prompts(prompts), "return_token_ids": True, **_WHOLE, **sampling,
            "logprobs": 0,
        }  # fmt: skip
        if self._away:
            raise MemplanError(
                "the engine's KV cache is not on the device: generate inside `with ledger.phase('rollout')`, or call "
                "restore() first"
            )
        n = sampling.get("n", 1)
        return [
            Completion(
                choice["index"] // n,
                choice["index"] % n,
                tuple(choice["token_ids"]),
                tuple(choice["logprobs"]["token_logprobs"]),
                str(choice["finish_reason"]),
            )
            for choice in sorted(
                self._ask("POST", "/v1/completions", asked, timeout=self.generating, tries=1)["choices"],
                key=lambda choice: int(choice["index"]),
            )
        ]

    def invalidate(self) -> None:
        """Weights have changed: forget what was computed with the old ones."""
        self._ask("POST", "/reset_prefix_cache")

    # ---- HTTP

    def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,
        tries: int | None = None,
        done: str = "",
    ) -> Any:
        """The answer, of JSON. done: words in an error that say that what is asked for is so already."""
        tries = tries or 1 + self.retries
        waited = timeout or self.timeout
        why = ""
        for number in range(tries):
            time.sleep(_PAUSE * 2 ** (number - 1) if number else 0)
            try:
                return self._once(method, path, body, waited)
            except urllib.error.HTTPError as error:
                said = _said(error)
                if done and done in said:
                    return None
                why = f"answers {error.code}: {said}"
                if error.code < 500:
                    break  # saying it again does not help
            except TimeoutError:
                why = f"does not answer within {waited:g} s"
            except (OSError, ValueError, http.client.HTTPException) as error:
                why = f"is not there, or has died: {getattr(error, 'reason', error)}"
        times = f"tried {number + 1} times" if number else "tried once"
        hint = "; start the server with VLLM_SERVER_DEV_MODE=1" if why.startswith("answers 404") else ""
        raise MemplanError(f"{method} {path}: the engine at {self.address} {why} ({times}){hint}")

    def _once(self, method: str, path: str, body: dict[str, Any] | None, timeout: float) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                text = answer.read()
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise error.reason from None
            raise
        return json.loads(text) if text else None


def _said(error: urllib.error.HTTPError) -> str:
    """The body of an error, as far as it comes."""
    try:
        return error.read().decode(errors="replace")[:500]
    except (OSError, http.client.HTTPException):
        return str(error.reason)
