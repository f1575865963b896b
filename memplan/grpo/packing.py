"""Packing: the sequences of a batch side by side in one row of a fixed length, for the model's pass alone.

In: a batch as objective.py has it. Out: the same batch, and what the model is given in the place of its rows; log-probs
come back as [B, N], so that every loss is what it was. Tokens behind the last that counts are left out, and so is a row
of which none does.
With `shared_prompts` rows that are side by side and have the same prompt read it from one copy: each completion follows
the prompt's last token, which is there once for each, and sees the rest of the prompt and itself.
What must hold: a token's log-prob is that of its row alone, to rounding. Attention sees to it, by a mask of [tokens,
tokens] that the step makes; layers that look back a window make their own, as transformers finds out by itself that a
sequence begins where positions begin again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from memplan.errors import MemplanError
from memplan.grpo.objective import Batch

# Types of transformers' models whose packed log-probs are those of padded rows, as `pytest -m slow` finds for each. In
# others a token may see the sequence before its own, and nothing would say so: OPT, BLOOM, MPT, GPT-OSS and AFMoE do.
PACKABLE = frozenset(
    """
    apertus apertus1p5_text arcee aria_text beam bitnet codegen cohere cohere2 cohere2_moe ctrl cwm diffllama
    doge dory ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe flex_olmo flint gemma gemma2 gemma3_text glm glm4
    glm4_moe gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gptj granite granite_swa granitemoe
    granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3
    iquestcoder jais2 jetmoe kolibri1 laguna llama llama4_text mellum mimo_v2_flash minimax_m2
    minimax_m3_vl_text ministral ministral3 mistral mixtral modernbert-decoder nanochat nemotron olmo olmo2
    olmo3 olmoe persimmon phi phi3 phimoe qwen2 qwen3 qwen3_moe sarvam_moe seed_oss smollm3 solar_open stablelm
    starcoder2 vaultgemma
    """.split()  # noqa: SIM905  82 lines else
)

# packed_ids        [1, tokens] int64
# packed_positions  [1, tokens] int64: of each token in its sequence
# packed_labels     [1, tokens] int64: the token that comes next, 0 where none does
# packed_places     [B, N] int64: where in the packed row the token before is; `tokens` where nothing counts
# packed_prompts    [1, tokens] int64: of each token the number of its prompt
# packed_parts      [1, tokens] int64, only for shared prompts: 0 in the prompt, else the number of the completion
IDS, POSITIONS, LABELS, PLACES = "packed_ids", "packed_positions", "packed_labels", "packed_places"
PROMPTS, PARTS = "packed_prompts", "packed_parts"


class Piece(NamedTuple):
    """Tokens side by side. row: of the batch, None for what rows share; first: their first position there."""

    row: int | None
    first: int
    ids: Tensor
    prompt: int
    part: int


def pack(batch: Batch, tokens: int, *, shared_prompts: bool = False) -> Batch:
    """The batch with its sequences packed into `tokens` tokens. Raises MemplanError where they are more."""
    ids, counts = batch["input_ids"].cpu(), batch["completion_mask"].cpu() > 0
    pieces = _pieces(ids, counts, shared_prompts)
    if (size := sum(len(piece.ids) for piece in pieces)) > tokens:
        raise MemplanError(
            f"the batch has {size} tokens, and {tokens} have room: make batches by TokenBatches with tokens={tokens}, "
            "or give more"
        )
    made = {name: torch.zeros(1, tokens, dtype=torch.int64) for name in (IDS, POSITIONS, LABELS, PROMPTS, PARTS)}
    places, at = torch.full(counts.shape, tokens), 0
    for piece in pieces:
        n = len(piece.ids)
        here = slice(at, at + n)
        made[IDS][0, here], made[LABELS][0, at : at + n - 1] = piece.ids, piece.ids[1:]
        made[POSITIONS][0, here] = torch.arange(piece.first, piece.first + n)
        made[PROMPTS][0, here], made[PARTS][0, here] = piece.prompt, piece.part
        if piece.row is not None:
            places[piece.row, piece.first : piece.first + n - 1] = torch.arange(at, at + n - 1)
        at += n
    # What is left is sequences that nobody asks about, no longer than the others: positions have an end.
    longest = max((piece.first + len(piece.ids) for piece in pieces), default=1)
    made[POSITIONS][0, at:] = torch.arange(tokens - at) % longest
    made[PROMPTS][0, at:] = -1
    if not shared_prompts:
        del made[PARTS]
    made[PLACES] = torch.where(counts, places, tokens)
    return batch | {name: value.to(batch["input_ids"].device) for name, value in made.items()}


def _pieces(ids: Tensor, counts: Tensor, shared_prompts: bool) -> list[Piece]:
    """In the order in which they are packed."""
    pieces, prompt, part = list[Piece](), Tensor(), 0
    number = -1
    for row in range(len(ids)):
        there = counts[row].nonzero()
        if not len(there):
            continue
        start, end = int(there[0]) + 1, int(there[-1]) + 2
        own = ids[row, :start]
        if not shared_prompts or not torch.equal(own, prompt):
            number, part, prompt = number + 1, 0, own
            if shared_prompts and start > 1:
                pieces.append(Piece(None, 0, own[:-1], number, 0))
        part += 1
        first = start - 1 if shared_prompts else 0
        pieces.append(Piece(row, first, ids[row, first:end], number, part))
    return pieces


def packed_logits(model: nn.Module, batch: Batch) -> Tensor:
    """[1, tokens, V]. Raises MemplanError for a model whose layers look further than attention with a mask of ours."""
    check_packable(model, PARTS in batch)
    mask, attention = None, _attention(model)
    # transformers' own takes several times as long to make; what is neither of these two reads no such mask.
    if not _windows(model) and attention in ("sdpa", "eager"):
        mask = seen(batch[PROMPTS][0], batch[PARTS][0] if PARTS in batch else None)[None, None]
        if attention == "eager":  # which adds it
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    logits: Tensor = model(
        input_ids=batch[IDS], position_ids=batch[POSITIONS], attention_mask=mask, use_cache=False
    ).logits
    return logits


def seen(prompts: Tensor, parts: Tensor | None = None) -> Tensor:
    """[tokens, tokens]: does the first see the second? It is of its prompt or its completion, and not behind it."""
    order = torch.arange(len(prompts), device=prompts.device)
    same = (prompts[:, None] == prompts) & (order[:, None] >= order)
    return same if parts is None else same & ((parts[:, None] == parts) | (parts == 0))


def check_packable(model: nn.Module, shared_prompts: bool) -> None:
    """Raises MemplanError for a model of which a token would see another sequence."""
    config, name = getattr(model, "config", None), type(model).__name__
    if getattr(model, "_is_stateful", False):
        raise MemplanError(f"{name} carries a state from token to token, and would into the next sequence: do not pack")
    if (kind := getattr(config, "model_type", name)) not in PACKABLE:
        raise MemplanError(
            f"{name} is of type {kind!r}, of which it is not known that its packed sequences do not see each other: do "
            "not pack (packed=False)"
        )
    if any(kind in str(getattr(config, "rope_parameters", None)) for kind in ("dynamic", "longrope")):
        raise MemplanError(
            f"{name} turns all positions by the longest sequence that it is given, so that a token's log-prob is "
            "another beside other sequences: do not pack (packed=False)"
        )
    if shared_prompts and (attention := _attention(model)) not in ("sdpa", "eager"):
        raise MemplanError(
            f"{name} has attention {attention!r}, which does not read the mask of shared prompts: make it with "
            'attn_implementation="sdpa", or pack without shared_prompts'
        )
    if shared_prompts and (windows := _windows(model)):
        raise MemplanError(
            f"{name} has layers that look back a window ({', '.join(sorted(windows))}), which a mask for shared "
            "prompts would undo: pack without shared_prompts"
        )


def _attention(model: nn.Module) -> str:
    return getattr(model.config, "_attn_implementation", None) or "sdpa"


def _windows(model: nn.Module) -> set[str]:
    """What a model has beside attention to all tokens before."""
    config = getattr(model, "config", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    window = {"sliding_window"} if not kinds and getattr(config, "sliding_window", None) else set()
    return kinds - {"full_attention"} | window


def unpacked(values: Tensor, batch: Batch) -> Tensor:
    """[1, tokens] of the packed row -> [B, N], 0 where nothing counts."""
    return torch.cat([values[0], values.new_zeros(1)])[batch[PLACES]]
