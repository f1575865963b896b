"""Recorded steps, as gzipped JSON beside this file: tests, demo and policies run on them without torch.

In: a name. Out: the Step. `llama8b_layers_4k_v32000`: 32 layers of Llama-8B's shape, one sequence of 4,096
tokens, vocabulary 32,000, plain cross entropy, bfloat16; parameter gradients count no bytes. Its times are
the roofline's at 600 TFLOP/s and 2.6 TB/s.
"""

import functools
import gzip
import zlib
from pathlib import Path

from memplan.errors import MemplanError, did_you_mean
from memplan.ir import Step
from memplan.serialize import from_json

__all__ = ["load", "names"]

SUFFIX = ".json.gz"


def names() -> list[str]:
    """The recorded steps, sorted."""
    return sorted(path.name.removesuffix(SUFFIX) for path in Path(__file__).parent.glob(f"*{SUFFIX}"))


@functools.cache
def load(name: str) -> Step:
    """The recorded step of that name. Raises MemplanError when there is none."""
    if name not in names():
        hint = did_you_mean(name, names())
        raise MemplanError(f"no recorded step is called {name!r}{hint}; there are {', '.join(names())}")
    path = Path(__file__).with_name(name + SUFFIX)
    try:
        text = gzip.decompress(path.read_bytes()).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
        raise MemplanError(f"cannot read the recorded step {name!r}: {e}; install memplan again") from e
    return from_json(text, Step, name)
