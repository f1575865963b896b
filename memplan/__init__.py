"""memplan: the memory-planning compiler for RL training.

    step = torch.compile(step, backend="memplan", options={"budget": "24GB"})
    plan = memplan.plan(step, batch, budget="24GB", machine="rtx4090")
    with memplan.record() as seen: ...

The names below are the public interface. Each is loaded on first use, so that importing memplan is fast
and needs no torch.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout passes/ and runtime/ sit beside this folder; a wheel puts them inside it.
if not os.path.isdir(os.path.join(__path__[0], "passes")):
    __path__.append(os.path.dirname(__path__[0]))

_HOME = {
    "plan": "memplan.api",
    "largest": "memplan.api",
    "compile": "memplan.api",
    "fit": "memplan.fitting",
    "unfit": "memplan.fitting",
    "timeline": "memplan.api",
    "policy": "memplan.passes.policies",
    "record": "memplan.runtime.recorder",
    "Lists": "memplan.passes.policies.lists",
    "from_sac": "memplan.passes.sac",
    "to_sac": "memplan.passes.sac",
    "stream": "memplan.runtime.streamed",
    "unstream": "memplan.runtime.streamed",
    "on_oom": "memplan.oom",
    "compare": "memplan.report",
    "linear_logprob": "memplan.runtime.kernels.linear_logprob",
    "Keep": "memplan.ir",
    "Recompute": "memplan.ir",
    "Offload": "memplan.ir",
    "Plan": "memplan.ir",
    "Step": "memplan.ir",
    "Timeline": "memplan.ir",
    "Machine": "memplan.ir",
    "MemplanError": "memplan.errors",
    "DoesNotFit": "memplan.errors",
}
__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from memplan.api import compile as compile
    from memplan.api import largest as largest
    from memplan.api import plan as plan
    from memplan.api import timeline as timeline
    from memplan.errors import DoesNotFit as DoesNotFit
    from memplan.errors import MemplanError as MemplanError
    from memplan.fitting import fit as fit
    from memplan.fitting import unfit as unfit
    from memplan.ir import Keep as Keep
    from memplan.ir import Machine as Machine
    from memplan.ir import Offload as Offload
    from memplan.ir import Plan as Plan
    from memplan.ir import Recompute as Recompute
    from memplan.ir import Step as Step
    from memplan.ir import Timeline as Timeline
    from memplan.oom import on_oom as on_oom
    from memplan.passes.policies import policy as policy
    from memplan.passes.policies.lists import Lists as Lists
    from memplan.passes.sac import from_sac as from_sac
    from memplan.passes.sac import to_sac as to_sac
    from memplan.report import compare as compare
    from memplan.runtime.kernels.linear_logprob import linear_logprob as linear_logprob
    from memplan.runtime.recorder import record as record
    from memplan.runtime.streamed import stream as stream
    from memplan.runtime.streamed import unstream as unstream


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'memplan' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
