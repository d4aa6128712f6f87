"""The gated feed-forward block (Shazeer 2020)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import ModelConfig
from jaxllm.layers import ACTIVATIONS, linear, param
from sharding.layout import Layout
from sharding.padding import round_up


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, layout: Layout, dtype: str):
        d, f = config.hidden_size, round_up(config.intermediate_size, layout.parts)
        self.layout = layout
        self.activation = config.activation
        self.gate = param((d, f), ("embed", "ffn"), dtype)
        self.up = param((d, f), ("embed", "ffn"), dtype)
        self.down = param((f, d), ("ffn", "embed"), dtype)
        self.gate_bias = param((f,), ("ffn",), dtype) if config.mlp_bias else None
        self.up_bias = param((f,), ("ffn",), dtype) if config.mlp_bias else None
        self.down_bias = param((d,), (None,), dtype) if config.mlp_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, D] float32."""
        gate = linear(self.layout, x, self.gate, self.gate_bias).astype(x.dtype)
        up = linear(self.layout, x, self.up, self.up_bias).astype(x.dtype)
        y = ACTIVATIONS[self.activation](gate.astype(jnp.float32)).astype(x.dtype) * up
        return linear(self.layout, y, self.down, self.down_bias)
