"""The feed-forward block."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import ModelConfig
from jaxllm.decoder.layers import ACTIVATIONS, linear, param
from sharding.layout import Layout
from sharding.padding import round_up


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020), or without a gate down(act(up(x)))."""

    def __init__(self, config: ModelConfig, layout: Layout, dtype: str, shared_size: int = 0):
        """`shared_size`: ffn size of the one beside experts, which has no biases; 0: a dense block."""
        d, f = config.hidden_size, round_up(shared_size or config.intermediate_size, layout.divisor)
        bias, ffn = config.mlp_bias and not shared_size, "shared_ffn" if shared_size else "ffn"
        self.layout = layout
        self.activation = config.activation
        self.gate = param((d, f), ("embed", ffn), dtype) if config.gated_mlp else None
        self.up = param((d, f), ("embed", ffn), dtype)
        self.down = param((f, d), (ffn, "embed"), dtype)
        self.gate_bias = param((f,), (ffn,), dtype) if bias and config.gated_mlp else None
        self.up_bias = param((f,), (ffn,), dtype) if bias else None
        self.down_bias = param((d,), (None,), dtype) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, D] float32."""
        gate = None if self.gate is None else linear(self.layout, x, self.gate, self.gate_bias).astype(x.dtype)
        up = linear(self.layout, x, self.up, self.up_bias).astype(x.dtype)
        return linear(self.layout, activate(self.activation, gate, up), self.down, self.down_bias)


def activate(name: str, gate: jax.Array | None, up: jax.Array) -> jax.Array:
    """act(gate) * up, or act(up), of their dtype."""
    y = ACTIVATIONS[name]((up if gate is None else gate).astype(jnp.float32)).astype(up.dtype)
    return y if gate is None else y * up
