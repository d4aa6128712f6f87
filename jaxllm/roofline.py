"""How long a scoring step takes at the ceilings of the hardware: what `auto` compares layouts by and what a prediction says."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from jaxllm.config import ModelConfig
from jaxllm.tree_attention import TILE
from sharding.hardware import Hardware
from sharding.layout import Layout

REACHED = 0.8  # of the published FLOPs, by large products: 790 of 989 TFLOP/s of bfloat16, measured on an H200


@dataclass(frozen=True)
class StepSeconds:
    """Where the time of a step goes on each device.

    Attributes:
      products: with weights, the LM head's among them.
      attention: its products, and its scores' way to memory and back, in case no cache holds them.
      activations: between products, to memory and back.
      gathers: of weights, behind all of the above.
      reduces: of activations, behind nothing.
    """

    products: float
    attention: float
    activations: float
    gathers: float
    reduces: float

    @property
    def total(self) -> float:
        return max(self.products + self.attention + self.activations, self.gathers) + self.reduces


def score_step(
    config: ModelConfig, layout: Layout, dtype: str, hardware: Hardware, tokens: int, width: int, scored: int
) -> StepSeconds:
    """A step of `tokens` on each part of the data axis, `scored` of them to the head, whose tiles see `width` tiles each."""
    size = jnp.dtype(dtype).itemsize
    flops = REACHED * (hardware.flops if size == 2 else hardware.float32_flops)
    layers, d, n, data, model = config.num_layers, config.hidden_size, config.num_heads, layout.data, layout.model
    heads = (n + 2 * config.num_kv_heads) * config.head_dim
    keys = width * TILE
    table = config.vocab_size * d
    # A product's result is float32: read once, rounded and written. Around it the residual and the norms.
    between = (heads + 2 * config.intermediate_size + 2 * d) * (4 + size) / model + 8 * d * size
    scores = n * keys / model * (3 * 4 + 2 * size)  # written, read twice; the probabilities written and read
    moved = (layers * config.layer_params + (1 if config.tied_head else 2) * table) * size / model
    return StepSeconds(
        products=2 * (layers * config.layer_params * tokens + table * scored) / model / flops,
        attention=layers * tokens * (4 * n * config.head_dim * keys / model / flops + scores / hardware.bandwidth),
        activations=layers * tokens * between / hardware.bandwidth,
        gathers=moved * (data - 1) / data / hardware.link if layout.gathered else 0.0,
        reduces=2 * layers * 2 * (model - 1) / model * tokens * d * size / hardware.link,
    )


def seconds_per_token(config: ModelConfig, layout: Layout, dtype: str, hardware: Hardware, tokens: int) -> float:
    """Of full steps, all devices together."""
    typical = {"width": 4, "scored": tokens // 2}
    return score_step(config, layout, dtype, hardware, tokens, **typical).total / (tokens * layout.data)
