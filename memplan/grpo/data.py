"""Batches by tokens: samples of any length in batches that fill a budget of tokens, groups kept together.

    batches = TokenBatches([len(s["prompt"]) + len(s["completion"]) for s in samples], tokens=20_480, group=8)
    loader = DataLoader(samples, batch_sampler=batches, collate_fn=Collate(tokens=20_480))
    step = torch.compile(make_step(model), backend="memplan", options={"budget": "24GB", "limits": batches.limits})

In: lengths of samples, those of a group side by side. Out: lists of their indices, for torch's DataLoader, and batches
of the step. Packed, the model's row has the same length each time: so there is one plan, and no step needs more than
the first. Padded, the largest batch of an epoch comes first, so that one that does not fit is refused at once.
What must hold: each sample is in one batch of an epoch, no batch has more than `tokens`, and batches and their order
follow from the seed and the epoch alone.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, get_args

import torch
from torch.utils.data import Sampler

from memplan.errors import MemplanError
from memplan.grpo.objective import Batch
from memplan.grpo.packing import pack

TooLong = Literal["refuse", "truncate"]
LargeGroup = Literal["refuse", "split"]


class TokenBatches(Sampler[list[int]]):
    """Batches of an epoch. tokens: of a batch, padding included where it is not packed. group: samples side by side
    that belong together. prompts: tokens of each sample's prompt, given where a group shares one and Collate has
    `shared_prompts`. too_long: what a sample of more tokens is; Collate truncates it. large_group: whether a group of
    more may be in several batches, whose gradients add up.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        tokens: int,
        *,
        group: int = 1,
        packed: bool = True,
        prompts: Sequence[int] | None = None,
        too_long: TooLong = "refuse",
        large_group: LargeGroup = "refuse",
        seed: int = 0,
    ) -> None:
        for name, value, valid in (("too_long", too_long, TooLong), ("large_group", large_group, LargeGroup)):
            if value not in get_args(valid):
                raise MemplanError(f"{name}={value!r} is not offered: it is {' or '.join(map(repr, get_args(valid)))}")
        lengths = [int(n) for n in lengths]
        if not lengths:
            raise MemplanError("there are no samples: give the length of each, in tokens")
        if min(group, tokens, *lengths) < 1:
            raise MemplanError(f"group={group}, tokens={tokens}, and samples of {min(lengths)}: each is 1 at least")
        if len(lengths) % group:
            raise MemplanError(f"{len(lengths)} samples are no whole number of groups of {group}")
        if (longest := max(lengths)) > tokens and too_long == "refuse":
            raise MemplanError(
                f"sample {lengths.index(longest)} has {longest} tokens, and a batch {tokens}: give more, leave it out, "
                'or pass too_long="truncate"'
            )
        if prompts is not None and (len(prompts) != len(lengths) or not packed):
            raise MemplanError(
                f"{len(prompts)} prompts for {len(lengths)} samples, packed={packed}: give the tokens of each sample's "
                "prompt, and only where batches are packed"
            )
        self.lengths = [min(n, tokens) for n in lengths]
        # What a sample need not bring if the one before brought it: the prompt, but for its last token.
        self.shared = [min(n, tokens) - 1 for n in prompts] if prompts is not None else [0] * len(lengths)
        self.tokens, self.group, self.packed, self.seed, self.epoch = tokens, group, packed, seed, 0
        self._units = list[list[int]]()  # what is in one batch
        self._drawn: tuple[int, list[list[int]]] | None = None  # an epoch, and its batches
        for first in range(0, len(lengths), group):
            members = list(range(first, first + group))
            whole = self._size(members) <= tokens
            if not whole and large_group == "refuse":
                raise MemplanError(
                    f"the group of samples {first} to {members[-1]} has {self._size(members)} tokens, and a batch "
                    f'{tokens}: give more, or pass large_group="split"'
                )
            self._units += [members] if whole else [[member] for member in members]

    def set_epoch(self, epoch: int) -> None:
        """Other batches, in another order: the same for the same epoch."""
        self.epoch = epoch

    @property
    def limits(self) -> dict[str, int]:
        """The most rows that a batch of any epoch can have and the tokens of its longest, for option `limits`."""
        shortest = sorted(n - shared for n, shared in zip(self.lengths, self.shared, strict=True))
        sizes = list(accumulate(shortest)) if self.packed else [(k + 1) * n for k, n in enumerate(shortest)]
        return {"batch": bisect_right(sizes, self.tokens), "tokens": max(self.lengths)}

    @property
    def computed(self) -> int:
        """Tokens that the model computes in this epoch, with what fills its rows up."""
        return sum(self.tokens if self.packed else self._size(batch) for batch in self._batches())

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches())

    def __len__(self) -> int:
        return len(self._batches())

    def _size(self, members: Sequence[int]) -> int:
        """Tokens of a batch of these."""
        lengths = [self.lengths[i] for i in members]
        if not self.packed:
            return max(lengths, default=0) * len(lengths)
        same = (b for a, b in pairwise(members) if a // self.group == b // self.group)
        return sum(lengths) - sum(self.shared[i] for i in same)

    def _batches(self) -> list[list[int]]:
        if self._drawn is None or self._drawn[0] != self.epoch:
            draw = random.Random(f"{self.seed} {self.epoch}")
            units = draw.sample(self._units, len(self._units))
            batches = self._filled(units) if self.packed else self._sorted(units)
            draw.shuffle(batches)
            if not self.packed:
                largest = max(range(len(batches)), key=lambda k: self._size(batches[k]))
                batches.insert(0, batches.pop(largest))
            self._drawn = self.epoch, batches
        return self._drawn[1]

    def _filled(self, units: list[list[int]]) -> list[list[int]]:
        """Each in the first batch that has room, the largest before the others."""
        batches, sizes = list[list[int]](), list[int]()
        for unit in sorted(units, key=self._size, reverse=True):
            own, group, shared = self._size(unit), unit[0] // self.group, self.shared[unit[0]]
            for k, size in enumerate(sizes):
                more = own - (shared if batches[k][-1] // self.group == group else 0)
                if size + more <= self.tokens:
                    batches[k] += unit
                    sizes[k] += more
                    break
            else:
                batches.append(list(unit))
                sizes.append(own)
        return batches

    def _sorted(self, units: list[list[int]]) -> list[list[int]]:
        """By length, so that a row is as long as those beside it."""
        batches = list[list[int]]()
        for unit in sorted(units, key=lambda unit: max(self.lengths[i] for i in unit), reverse=True):
            if batches and self._size(batches[-1] + unit) <= self.tokens:
                batches[-1] += unit
            else:
                batches.append(list(unit))
        return batches


@dataclass(frozen=True)
class Collate:
    """Samples -> a batch. A sample has `prompt` and `completion`, lists of token ids, an `advantage`, and of each token
    of the completion `old_logprobs`, and `ref_logprobs` and `sampler_logprobs` where there are some.

    tokens, packed, too_long: as of TokenBatches; a sample is cut at its end. shared_prompts: as of `pack`. pad: the id
    on the right of shorter rows. Raises MemplanError for a batch of more tokens, and for samples of which some lack
    what others have; None counts as lacking.
    """

    tokens: int
    packed: bool = True
    shared_prompts: bool = False
    too_long: TooLong = "refuse"
    pad: int = 0

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        if not samples:
            raise MemplanError("a batch of no samples: TokenBatches makes none")
        rows = [[int(i) for i in (*s["prompt"], *s["completion"])] for s in samples]
        longest = max(map(len, rows))
        if longest > self.tokens and self.too_long == "refuse":
            raise MemplanError(
                f"a sample has {longest} tokens, and a batch {self.tokens}: give more, as to TokenBatches, or pass "
                'too_long="truncate" to both'
            )
        rows, longest = [row[: self.tokens] for row in rows], min(longest, self.tokens)
        if not self.packed and len(rows) * longest > self.tokens:
            raise MemplanError(
                f"{len(rows)} rows of {longest} tokens are more than the {self.tokens} of a batch: make batches by "
                "TokenBatches with packed=False"
            )
        batch = {
            "input_ids": torch.full((len(rows), longest), self.pad),
            "completion_mask": torch.zeros(len(rows), longest - 1),
            "advantages": torch.tensor([float(s["advantage"]) for s in samples]),
        }
        keys = [key for key in ("old_logprobs", "ref_logprobs", "sampler_logprobs") if _have(samples, key)]
        batch |= {key: torch.zeros(len(rows), longest - 1) for key in keys}
        for k, (row, sample) in enumerate(zip(rows, samples, strict=True)):
            start, end = len(sample["prompt"]) - 1, len(row) - 1
            if start < 0:
                raise MemplanError(f"sample {k} of a batch has no prompt: its first token would have nothing before it")
            batch["input_ids"][k, : len(row)] = torch.tensor(row)
            batch["completion_mask"][k, start:end] = 1
            for key in keys:
                if len(sample[key]) != len(sample["completion"]):
                    raise MemplanError(
                        f"sample {k} of a batch has {len(sample[key])} {key} for {len(sample['completion'])} tokens of "
                        "its completion: there is one for each"
                    )
                batch[key][k, start:end] = torch.as_tensor(sample[key])[: max(end - start, 0)]
        return pack(batch, self.tokens, shared_prompts=self.shared_prompts) if self.packed else batch


def _have(samples: Sequence[Mapping[str, Any]], key: str) -> bool:
    there = [sample.get(key) is not None for sample in samples]
    if any(there) and not all(there):
        raise MemplanError(f"sample {there.index(False)} of a batch has no {key}, and others have: all have it or none")
    return all(there)
