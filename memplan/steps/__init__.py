"""Recorded steps, as gzipped JSON beside this file: tests, demo and policies run on them without torch.

In: a name. Out: the Step. All but the first are written by `python benchmarks/record_steps.py`, from the models of
benchmarks/recorded_models.py on the meta device, bfloat16, as the eager inner compiler gets them, with the workspaces
that an H100's flash attention takes. No layer was left out. LoRA is of rank 16, its base frozen.

    llama8b_layers_4k_v32000   32 layers of Llama-8B's shape, one sequence of 4,096 tokens, vocabulary 32,000, plain
                               cross entropy; parameter gradients count no bytes; times are the roofline's at
                               600 TFLOP/s and 2.6 TB/s; convert_recorded_step.py made it of another recording
    llama8b_lora_grpo_8x20k    Llama-3.1-8B, GRPO with KL, LoRA on all projections: the reference pass, then the policy
                               pass over 8 completions of 20,480 tokens; heads in slices of 1,024 rows, MLPs of 4,096
    llama8b_lora_grpo_1x20k    the same of one completion: a micro-batch of it; with _streamed the frozen weights are
                               off the device, and fetched for each layer
    llama70b_lora_8k           Llama-3.1-70B, 80 layers, GRPO, LoRA on queries and values, 1 x 8,192 tokens
    llama405b_lora_8k          Llama-3.1-405B, 126 layers, likewise
    qwen3_moe_30b_4k           Qwen3-30B-A3B, 48 layers of 128 experts, GRPO, LoRA on attention, 2 x 4,096 tokens
    gemma2_9b_4k               Gemma-2-9B, 42 layers, GRPO, LoRA on attention, 1 x 4,096 tokens, scores written out
    t5_large                   encoder and decoder of 24 layers, all trained, with dropout, 16 x 512 tokens in, 128 out
    unet_256                   a U-Net of four levels, 16 images of 256 x 256: skips from one end to the other
    densenet121_224            DenseNet-121 with group norm, 64 images of 224 x 224: every layer reads all before it
    lstm_128                   two LSTM layers of width 2,048, 256 sequences of 128 tokens, a token at a time
    shared_blocks_2x2k         12 layers that are traversed twice, for the two sides of a DPO loss, 2 x 4 x 2,048 tokens

Without torch's own saved sets are the 8B GRPO steps, 70B and 405B: its partitioner takes many minutes there.
generated.py makes others: linear chains whose best plans are known, and random layered graphs.
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
USUAL = "llama8b_layers_4k_v32000"  # what is ranked where nothing else is asked for


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
