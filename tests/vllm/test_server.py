"""An engine in a process of its own, over HTTP, and everything that may go wrong between the two."""

import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from memplan.errors import MemplanError
from memplan.runtime.arena import Arena
from memplan.runtime.ledger import PHASES, Ledger
from memplan.runtime.tenants import ArenaTenant
from memplan.runtime.vllm import Server

from .conftest import CONFIGS, model_of

MIB = 2**20
CACHE = 256 * MIB
PROMPTS = [[3, 4, 5, 6 + k] for k in range(4)]
SAMPLING: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True, "seed": 7}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def running(address: str) -> int:
    """Sequences that a server is computing now, as it says."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("vllm:num_requests_running"))


class Process:
    """A vLLM server and its children."""

    def __init__(self, folder: Path) -> None:
        model_of(CONFIGS["llama"]).save_pretrained(folder)
        words = WordLevel({f"w{k}": k for k in range(131)}, unk_token="w0")
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)  # completions want one
        self.port, self.log = free_port(), folder / "log"
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
            "--port", str(self.port), "--host", "127.0.0.1", "--max-model-len", "128", "--dtype", "float32",
            "--enforce-eager", "--max-num-seqs", "16", "--kv-cache-memory-bytes", str(CACHE), "--seed", "0",
            "--worker-cls", "memplan.runtime.vllm.worker.ArenaWorker", "--no-enable-chunked-prefill",
        ]  # fmt: skip
        environment = os.environ | {
            "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        for _ in range(600):
            time.sleep(0.2)
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1).close()
                return
            except OSError:
                continue
        pytest.fail(f"the server has not started: {self.log.read_text()[-3000:]}")

    def resident(self) -> int:
        """Bytes of its own pages, its children's too."""
        found, pages = 0, os.sysconf("SC_PAGE_SIZE")
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if os.getsid(int(path.name)) == self.process.pid:
                    _, total, of_files, *_ = (path / "statm").read_text().split()
                    found += pages * (int(total) - int(of_files))
            except OSError:
                continue
        return found

    def kill(self) -> None:
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if os.getsid(int(path.name)) == self.process.pid:
                    os.kill(int(path.name), 9)
            except OSError:
                continue
        self.process.wait()


class Proxy(ThreadingHTTPServer):
    """Passes requests on to a server, but for those at which something goes wrong; `faults` by path, used up."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port, self.faults, self.seen = port, dict[str, list[str]](), list[str]()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Proxy

    def do_GET(self) -> None:
        self.passed_on()

    def do_POST(self) -> None:
        self.passed_on()

    def passed_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.server.seen.append(path)
        fault = self.server.faults.get(path, []).pop(0) if self.server.faults.get(path) else ""
        if fault == "dies":
            self.connection.close()
            return
        if fault == "500 before":
            return self.answered(500, b"boom")
        try:
            request = urllib.request.Request(
                f"http://127.0.0.1:{self.server.port}{self.path}", body or None, dict(self.headers), method=self.command
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                code, found = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            code, found = error.code, error.read()
        if fault == "hangs":
            time.sleep(3)
        elif fault == "500 after":
            code, found = 500, b"boom"
        elif fault == "nonsense":
            found = b"<html>"
        self.answered(code, found)

    def answered(self, code: int, body: bytes) -> None:
        try:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            pass  # nobody waits for it any more

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    there = Process(tmp_path_factory.mktemp("server"))
    yield there
    there.kill()


@pytest.fixture(scope="module")
def proxy(process: Process) -> Iterator[Proxy]:
    with Proxy(process.port) as there:
        yield there
        there.shutdown()


@pytest.fixture
def server(proxy: Proxy) -> Iterator[Server]:
    there = Server(proxy.address, CACHE, timeout=2, generating=60)
    proxy.seen.clear()
    yield there
    proxy.faults.clear()
    there.restore()


def test_the_cache_leaves_and_comes_back(server: Server, process: Process) -> None:
    first = server.generate(PROMPTS, n=2, **SAMPLING)
    assert [(c.prompt, c.number) for c in first] == [(p, k) for p in range(4) for k in range(2)]
    assert all(len(c.tokens) == len(c.logprobs) == 12 and c.finished == "length" for c in first)
    with_it = process.resident()
    for _ in range(3):
        server.release()
        assert server.resident == 0
        assert abs(with_it - process.resident() - CACHE) < 32 * MIB
        with pytest.raises(MemplanError, match="the engine's KV cache is not on the device"):
            server.generate(PROMPTS)
        server.restore()
        assert server.resident == CACHE
        assert abs(with_it - process.resident()) < 32 * MIB
        again = server.generate(PROMPTS, n=2, **SAMPLING)
        assert [c.tokens for c in again] == [c.tokens for c in first]


def test_it_may_be_said_again_and_in_any_order(server: Server) -> None:
    for name in ("release", "release", "restore", "restore", "release", "restore"):
        getattr(server, name)()
    assert server.generate(PROMPTS, **SAMPLING)
    server.invalidate()


def test_a_rollout_in_the_middle_of_which_it_leaves(server: Server) -> None:
    long: dict[str, Any] = {"n": 24, "max_tokens": 120, "ignore_eos": True, "seed": 3}
    start = time.perf_counter()
    whole = server.generate(PROMPTS, **long)
    taken = time.perf_counter() - start
    for _ in range(5):  # a server that computes may answer late: then the rollout was over before it was paused
        found = list[Any]()
        thread = threading.Thread(target=lambda: found.extend(server.generate(PROMPTS, **long)))  # noqa: B023
        thread.start()
        while thread.is_alive() and not running(server.address):
            pass
        server.release()
        thread.join(timeout=2 * taken)
        if interrupted := thread.is_alive():
            break
        server.restore()
    assert interrupted, "it went on without its cache"
    server.restore()
    thread.join(timeout=60)
    assert [c.tokens for c in found] == [c.tokens for c in whole]


def test_what_fails_is_tried_again_and_then_named(server: Server, proxy: Proxy) -> None:
    for fault in ("500 before", "500 after", "dies", "nonsense", "hangs"):
        proxy.faults["/pause"] = [fault]
        server.release()
        assert proxy.seen.count("/pause") == 2
        server.restore()
        proxy.seen.clear()
    for fault, why in (
        ("500 before", "answers 500: boom"),
        ("dies", "is not there, or has died: "),
        ("hangs", "does not answer within 2 s"),
        ("nonsense", "is not there, or has died: Expecting value"),
    ):
        proxy.faults["/pause"] = [fault] * 3
        with pytest.raises(MemplanError, match=rf"POST /pause\?mode=keep: the engine at .* {why}.* \(tried 3 times\)"):
            server.release()
        assert server.resident == CACHE
    proxy.faults["/v1/completions"] = ["500 before"]
    with pytest.raises(MemplanError, match=r"POST /v1/completions: .* answers 500: boom \(tried once\)"):
        server.generate(PROMPTS)
    with pytest.raises(MemplanError, match=r"POST /v1/completions: .* answers 400: .*max_tokens.* \(tried once\)"):
        server.generate(PROMPTS, max_tokens=-1)
    with pytest.raises(MemplanError, match="is not from the whole distribution, of which this server's log-probs are"):
        server.generate(PROMPTS, temperature=0.5)


def test_an_engine_that_is_asleep_or_no_engine_is_refused(server: Server, proxy: Proxy) -> None:
    server.release()
    with pytest.raises(MemplanError, match="is asleep already: wake it up, or end who has put it to sleep"):
        Server(proxy.address, CACHE)
    with pytest.raises(MemplanError, match=r"GET /v1/models: .* is not there, or has died: .* \(tried once\)"):
        Server(f"http://127.0.0.1:{free_port()}", CACHE, retries=0)


def test_sequences_of_phases_in_which_the_server_fails(server: Server, proxy: Proxy, tmp_path: Path) -> None:
    draw, states = random.Random(0), ArenaTenant(Arena.reserve(8 * MIB), "copy")

    def on_device() -> int:
        return server.resident + states.resident

    ledger = Ledger(CACHE, measure=on_device, tolerance=1, folder=tmp_path)
    server.release()
    ledger.lease("kv_cache", server, CACHE, ("rollout",))
    ledger.lease("optimizer", states, 8 * MIB, ("train",))
    tokens, failed = list[Any](), set[str]()
    for _ in range(60):
        name = draw.choice([phase for phase in PHASES if phase != ledger.at])
        path = draw.choice(["/pause", "/release_kv_cache_memory", "/wake_up", "/resume"])
        fault = draw.choice(["500 before", "500 after", "dies", "nonsense"])
        proxy.faults[path] = [fault] * draw.choice([0, 1, 3])
        try:
            with ledger.phase(name):
                pass
        except MemplanError:
            failed.add(f"{path} {fault}")
        proxy.faults.clear()
        with ledger.phase(name):
            assert on_device() <= CACHE
            if name == "rollout":
                tokens.append([c.tokens for c in server.generate(PROMPTS, **SAMPLING)])
    ledger.close()
    assert len(failed) > 5 and len(tokens) > 10
    assert all(found == tokens[0] for found in tokens)


def test_a_server_that_has_died_is_named_and_training_goes_on(tmp_path: Path, process: Process, proxy: Proxy) -> None:
    """The last test: the server is not there afterwards."""
    engine = Server(proxy.address, CACHE, timeout=2)
    states = ArenaTenant(Arena.reserve(8 * MIB), "copy")
    engine.release()

    def on_device() -> int:
        return states.resident + (engine.resident if process.process.poll() is None else 0)

    ledger = Ledger(CACHE, measure=on_device, tolerance=1, folder=tmp_path)
    ledger.lease("kv_cache", engine, CACHE, ("rollout",))
    ledger.lease("optimizer", states, 8 * MIB, ("train",))
    with ledger.phase("train"):
        pass
    process.kill()
    with (
        pytest.raises(MemplanError, match=r"'kv_cache', 268.4 MB, has not come back: .*POST /wake_up"),
        ledger.phase("rollout"),
    ):
        pass
    ledger.end("kv_cache")
    with ledger.phase("train"):
        assert states.resident
    ledger.close()
