"""What all tests share."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def no_plans_of_before() -> Iterator[None]:
    """Every test plans anew, and leaves nothing in anybody's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "MEMPLAN_CACHE", "0")
        yield
