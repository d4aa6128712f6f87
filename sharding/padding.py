"""Exact padding of a model's sizes to a mesh axis.

Heads, ffn and vocabulary rarely divide by the number of devices. Zeros are added at load so that they do: a head of zeros
contributes nothing through a zero output projection, a zero ffn unit likewise, and the logits of padded vocabulary are masked.
Nothing else in the project knows of padded sizes; this module also says which source index stands at which padded one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

PAD = -1  # stands in an index for "no source: zeros"


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class PaddedHeads:
    """Query and KV heads laid out so that every KV head stands on the device of the query heads that read it.

    Each KV head is repeated `copies` times, each copy serving `group` query heads, and the whole is rounded up to `slots`
    KV heads. 9 query and 3 KV heads over 4 devices: 1 copy, groups of 3, 4 slots (the last all zeros). 13 query heads and 1 KV
    head over 4: 4 copies, groups of 4.
    """

    num_heads: int
    num_kv_heads: int
    copies: int
    group: int
    slots: int

    @cached_property
    def kv_index(self) -> tuple[int, ...]:
        """For each of `slots` padded KV heads its source head, or PAD."""
        real = self.num_kv_heads * self.copies
        return tuple(s // self.copies if s < real else PAD for s in range(self.slots))

    @cached_property
    def query_index(self) -> tuple[int, ...]:
        """For each of `slots * group` padded query heads its source head, or PAD."""
        per_kv = self.num_heads // self.num_kv_heads
        index = []
        for slot, kv in enumerate(self.kv_index):
            first = (slot % self.copies) * self.group
            for offset in range(first, first + self.group):
                index.append(kv * per_kv + offset if kv != PAD and offset < per_kv else PAD)
        return tuple(index)


def pad_heads(num_heads: int, num_kv_heads: int, divisor: int) -> PaddedHeads:
    """The cheapest exact layout of the heads over `divisor` devices: fewest query heads, then fewest KV heads."""
    per_kv = num_heads // num_kv_heads
    options = []
    for copies in range(1, per_kv + 1):
        group = -(-per_kv // copies)
        slots = round_up(num_kv_heads * copies, divisor)
        options.append((slots * group, slots, copies, group))
    _, slots, copies, group = min(options)
    return PaddedHeads(num_heads, num_kv_heads, copies, group, slots)


def pad_tail(size: int, divisor: int) -> tuple[int, ...]:
    """The source index of each padded position when zeros are added at the end (ffn, vocabulary)."""
    return tuple(range(size)) + (PAD,) * (round_up(size, divisor) - size)
