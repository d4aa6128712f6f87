"""A pool with room for everyone."""

from __future__ import annotations

from jaxllm.config import ModelConfig
from jaxllm.decoder.cache_spec import Pool
from sharding.layout import Layout


def full_pool(config: ModelConfig, layout: Layout, rows: int, length: int) -> Pool:
    """Pages for `rows` sequences, spread over the data shards, all of `length` tokens."""
    rows = -(-rows // layout.data)
    return Pool.of(config, length, rows * length, rows)
