"""The contents of a checkpoint, and the padding that some number of devices adds; no weight is read."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from typing import Any

from checkpoints.checkpoint import Checkpoint
from sharding.padding import pad_heads, round_up


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """Architecture, parameters, bytes and dtypes of the tensors. A tied head counts once."""
    tensors = checkpoint.source.tensors
    numbers: Counter[str] = Counter()
    for info in tensors.values():
        numbers[info.dtype] += math.prod(info.shape)
    return {
        "where": checkpoint.source.where,
        "architecture": asdict(checkpoint.config),
        "parameters": checkpoint.config.num_params,
        "tensors": len(tensors),
        "bytes": sum(info.nbytes for info in tensors.values()),
        "numbers_by_dtype": dict(numbers.most_common()),
        "largest_tensor": max(tensors, key=lambda name: tensors[name].nbytes, default=None),
    }


def padding(checkpoint: Checkpoint, devices: int) -> dict[str, tuple[int, int]]:
    """The sizes that a `tensor` layout over so many devices pads: name -> (size, padded size)."""
    config = checkpoint.config
    heads = pad_heads(config.num_heads, config.num_kv_heads, devices)
    sizes = {
        "query heads": (config.num_heads, heads.slots * heads.group),
        "KV heads": (config.num_kv_heads, heads.slots),
        "ffn": (config.intermediate_size, round_up(config.intermediate_size, devices)),
        "vocabulary": (config.vocab_size, round_up(config.vocab_size, devices)),
    }
    if config.experts is not None:
        for name, size in (("an expert's ffn", config.experts.size), ("the shared expert's", config.experts.shared_size)):
            sizes[name] = (size, round_up(size, devices))
    return {name: (size, padded) for name, (size, padded) in sizes.items() if size != padded}
