"""Seconds of a step at the ceilings of the hardware (Williams et al. 2009), by which `auto` compares layouts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import jax.numpy as jnp

from jaxllm.config import Layer, ModelConfig
from jaxllm.decoder.cache_spec import cache_specs
from jaxllm.decoder.moe import products
from jaxllm.decoder.tree_attention import TILE
from sharding.hardware import NETWORK, Hardware
from sharding.layout import Layout

Axis = Literal["data", "model"]

MAX_MFU = 0.8  # of the published FLOPs, by large products: 790 of 989 TFLOP/s of bfloat16, measured on an H200
MATRICES = 4  # of a layer: a gather each
OPERATIONS = {"cpu": 40, "gpu": 20}  # of a layer, as XLA compiles it; a TPU's follow each other at once


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step on each device, by what they are spent on.

    Attributes:
      products: matmuls with weights, the LM head's among them.
      attention: its matmuls, and the traffic of its scores and of the cache.
      activations: memory traffic between the matmuls.
      gathers: all-gathers of weights, hidden behind all of the above.
      reduces: all-reduces of activations, hidden behind nothing.
      launches: overhead of starting operations.
    """

    products: float
    attention: float
    activations: float
    gathers: float
    reduces: float
    launches: float

    @property
    def total(self) -> float:
        """Seconds of the step: gathers overlap with all but the all-reduces."""
        return max(self.products + self.attention + self.activations + self.launches, self.gathers) + self.reduces


def score_step(
    config: ModelConfig, layout: Layout, dtype: str, hardware: Hardware, tokens: int, width: int, scored: int
) -> StepSeconds:
    """Seconds of a scoring step of `tokens` on each data shard, `scored` of them to the head, whose tiles see `width` tiles."""
    return _Step(config, layout, dtype, hardware).seconds(tokens, scored, width * TILE, cached=0)


def prefill_step(config: ModelConfig, layout: Layout, dtype: str, hardware: Hardware, tokens: int) -> StepSeconds:
    """Seconds of a prefill of the first `tokens` of a prompt on each data shard."""
    return _Step(config, layout, dtype, hardware).seconds(tokens, 1, tokens, cached=tokens)


def decode_step(config: ModelConfig, layout: Layout, dtype: str, hardware: Hardware, rows: int, context: int) -> StepSeconds:
    """Seconds of a decode step of `rows` rows on each data shard, all with `context` positions in the cache."""
    return _Step(config, layout, dtype, hardware).seconds(rows, rows, context, cached=rows * context, looped=True)


def seconds_per_token(config: ModelConfig, layout: Layout, dtype: str, hardware: Hardware, tokens: int) -> float:
    """Seconds a token of full scoring steps, all devices together."""
    typical = {"width": 4, "scored": tokens // 2}
    return score_step(config, layout, dtype, hardware, tokens, **typical).total / (tokens * layout.data)


def _between(curve: tuple[tuple[int, float], ...], rows: int) -> float:
    """Seconds a weight of a matmul with `rows` rows: linear between points of the curve, and in proportion beyond it."""
    if rows >= curve[-1][0]:
        return curve[-1][1] * rows / curve[-1][0]
    (low, fast), (high, slow) = next(pair for pair in pairwise(curve) if rows < pair[1][0])
    return fast + (slow - fast) * max(rows - low, 0) / (high - low)


class _Step:
    def __init__(self, config: ModelConfig, layout: Layout, dtype: str, hardware: Hardware):
        self.config, self.layout, self.hardware = config, layout, hardware
        self.specs, self.size = cache_specs(config, layout, dtype), jnp.dtype(dtype).itemsize
        self.flops = MAX_MFU * (hardware.flops if self.size == 2 else hardware.float32_flops)

    def seconds(self, tokens: int, scored: int, keys: int, cached: int, looped: bool = False) -> StepSeconds:
        """Seconds of a step of `tokens` that see `keys` keys each, `scored` of them to the head.

        `cached`: positions read of the cache. `looped`: the tokens are single ones of many rows, in decode's loop.
        """
        config, model, size, hardware = self.config, self.layout.model, self.size, self.hardware
        layers, d, n = config.num_layers, config.hidden_size, config.num_heads
        table = config.vocab_size * config.table_size
        heads = (n + 2 * config.num_kv_heads) * config.head_dim
        # A product's result is float32: read once, rounded and written. Around it the residual and the norms.
        between = (heads + 2 * self._ffn_width() + 2 * d) * (4 + size) / model + 8 * d * size
        kept = self._kept(keys)
        scores = n * keys * kept / model * (3 * 4 + 2 * size)  # written, read twice; the probabilities written and read
        read = cached * kept * self._cache_bytes() / model
        attention = layers * tokens * (4 * n * config.head_dim * keys * kept / model / self.flops + scores / hardware.bandwidth)
        attention += read / hardware.bandwidth
        if looped and hardware.cache_rate:  # of single tokens, it was measured as a whole
            attention = read / hardware.cache_rate
        return StepSeconds(
            products=(sum(map(partial(self._layer, tokens), config.layers)) + self._product(table, scored)) / model,
            attention=attention,
            activations=layers * tokens * between / hardware.bandwidth,
            gathers=self._gathers(looped),
            reduces=self._reduces(tokens),
            launches=layers * OPERATIONS.get(self.layout.platform, 0) * hardware.launch,
        )

    def _kept(self, keys: int) -> float:
        """Mean fraction of the keys that a layer's queries see."""
        return sum(spec.seen(keys) for spec in self.specs) / len(self.specs) / keys

    def _cache_bytes(self) -> int:
        """Bytes of keys and values of one token, padding included."""
        return sum(spec.bytes_per_position for spec in self.specs)

    def _ffn_width(self) -> int:
        """Mean width of the ffn that a token passes, over the layers."""
        config = self.config
        if config.experts is None:
            return config.intermediate_size
        routed = config.experts.top_k * config.experts.size + config.experts.shared_size
        return sum(routed if layer.routed else config.intermediate_size for layer in config.layers) // config.num_layers

    def _layer(self, tokens: int, layer: Layer) -> float:
        """Seconds of the matmuls of one layer."""
        config, experts = self.config, self.config.experts
        seconds = self._product(config.attention_params, tokens)
        if layer.routed and experts is not None:
            count, rows = products(experts, self.layout.platform, tokens)
            common, expert = (
                config.ffn_params(True, experts=0),
                config.ffn_params(True, experts=1) - config.ffn_params(True, experts=0),
            )
            return seconds + self._product(common, tokens) + count * self._product(expert, rows)
        return seconds + self._product(config.ffn_params(False), tokens)

    def _product(self, weights: int, rows: int) -> float:
        """Seconds of one matmul: the larger of its memory time and its FLOP time."""
        if self.hardware.curve:
            return weights * _between(self.hardware.curve, rows)
        return max(weights * self.size / self.hardware.bandwidth, 2 * weights * rows / self.flops)

    def _gathers(self, looped: bool) -> float:
        """Seconds of a step's all-gathers. In decode's loop XLA for CPUs gathers no table: it has done so before."""
        config = self.config
        if not self.layout.gathers:
            return 0.0
        tables = config.num_tables * config.vocab_size * config.table_size
        if looped and self.layout.platform == "cpu":
            tables = 0
        moved = (config.num_layers * config.layer_params + tables) * self.size / self.layout.model
        rate = self.hardware.gather_rate or self.hardware.link
        return self._exchange("data", moved, rate) + MATRICES * config.num_layers * self._hop("data")

    def _reduces(self, tokens: int) -> float:
        """Seconds of a step's all-reduces: two a layer, and the embedding's."""
        config = self.config
        if self.layout.model == 1:
            return 0.0
        moved = 2 * tokens * config.hidden_size * self.size
        return (2 * config.num_layers + 1) * (self._hop("model") + self._exchange("model", moved, self.hardware.link))

    def _exchange(self, axis: Axis, nbytes: float, rate: float) -> float:
        """Seconds in which devices along an axis get the others' shares of an array: those of other hosts over the network, each
        device from its own counterparts, and then those of its host.
        """
        size = self.layout.data if axis == "data" else self.layout.model
        hosts = self.layout.hosts(axis)
        network = self.hardware.network or rate
        return nbytes * ((size - hosts) / size / rate + (hosts - 1) / size / network)

    def _hop(self, axis: Axis) -> float:
        return self.hardware.hop + (NETWORK if self.layout.hosts(axis) > 1 and self.hardware.network else 0)
