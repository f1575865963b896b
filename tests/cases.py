"""The models of a test, of which CI runs some: each takes seconds to compile."""

from typing import Any

import pytest

from tests.models import CASES


def cases(*names: str) -> list[Any]:
    """All models as parameters of a test; those that are not named are slow."""
    return [pytest.param(case, id=str(case), marks=[pytest.mark.slow] * (case.name not in names)) for case in CASES]
