"""What tests that compile steps share."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from memplan.ir import Plan


@pytest.fixture(autouse=True, scope="session")
def a_share_of_the_cores() -> Iterator[None]:
    """For each worker of pytest -n, and for what it starts: threads of several would mostly wait for each other."""
    threads = max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "OMP_NUM_THREADS", str(threads))
        yield


@pytest.fixture(autouse=True, scope="session")
def what_imports_made_is_not_looked_at() -> Iterator[None]:
    """Each recording and each compile walks the collector's objects, and so does the collector: for half a million of
    imports, that was half of the time.
    """
    import transformers  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before, nothing left behind, and the same random numbers."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Many small products: threads would wait for each other, and for other processes, most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that the backend reports, as they come."""
    seen: list[Plan] = []
    monkeypatch.setattr("memplan.backend._report", lambda plan, options: seen.append(plan))
    return seen
