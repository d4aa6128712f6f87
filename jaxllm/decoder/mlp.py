"""The feed-forward block."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import ModelConfig
from jaxllm.decoder.layers import ACTIVATIONS
from jaxllm.decoder.linear import Joint, Linear, Segment
from sharding.layout import Layout
from sharding.padding import round_up


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020), or without a gate down(act(up(x)))."""

    def __init__(self, config: ModelConfig, layout: Layout, dtype: str, shared_size: int = 0):
        """`shared_size`: ffn size of the one beside experts, which has no biases; 0: a dense block."""
        d, f = config.hidden_size, round_up(shared_size or config.intermediate_size, layout.divisor)
        bias = config.mlp_bias and not shared_size
        axis = "shared_ffn" if shared_size else "ffn"
        self.activation = config.activation
        self.gate_up = Joint(layout, (d, "embed"), gate_and_up(config, f, axis), dtype, bias=bias)
        self.down = Linear(layout, (f, axis), (d, "embed"), dtype, bias=bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, D] float32."""
        *gate, up = self.gate_up.each(x)
        return self.down(activate(self.activation, gate[0] if gate else None, up))


def gate_and_up(config: ModelConfig, size: int, axis: str) -> tuple[Segment, ...]:
    """What a block multiplies its input with: up alone where there is no gate."""
    names = ("gate", "up") if config.gated_mlp else ("up",)
    return tuple(Segment(name, size, axis) for name in names)


def activate(name: str, gate: jax.Array | None, up: jax.Array) -> jax.Array:
    """act(gate) * up, or act(up), of their dtype."""
    y = ACTIVATIONS[name]((up if gate is None else gate).astype(jnp.float32)).astype(up.dtype)
    return y if gate is None else y * up
