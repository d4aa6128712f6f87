"""Norms: of a token's hidden state, of its heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.config import ModelConfig
from jaxllm.decoder.layers import param
from sharding.padding import PAD


class Norm(nnx.Module):
    """RMS norm (Zhang and Sennrich 2019) or layer norm (Ba et al. 2016) of the last `size` numbers, in float32."""

    def __init__(self, config: ModelConfig, dtype: str, size: int | None = None):
        size = size or config.hidden_size
        self.scale = param((size,), (None,), dtype) if config.norm_affine else None
        self.bias = param((size,), (None,), dtype) if config.norm_affine and config.norm == "layer" else None
        self.kind, self.eps, self.offset = config.norm, config.norm_eps, config.norm_offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., size], of its dtype again."""
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        if self.scale is None:
            return y.astype(x.dtype)
        scale = jnp.expand_dims(self.scale[...], range(x.ndim - 1))
        if self.kind == "rms":
            # Rounded before the scale, as the reference does: in 16 bits the order shows.
            return (scale + jnp.asarray(self.offset, scale.dtype) if self.offset else scale) * y.astype(x.dtype)
        y = y * (self.offset + scale.astype(jnp.float32))
        if self.bias is not None:
            y = y + jnp.expand_dims(self.bias[...], range(x.ndim - 1)).astype(jnp.float32)
        return y.astype(x.dtype)


class NormOfAllHeads(nnx.Module):
    """RMS norm over the numbers of all heads together. `index`: the source of each padded head, or PAD."""

    def __init__(self, config: ModelConfig, dtype: str, axis: str, index: tuple[int, ...]):
        self.scale = param((len(index) * config.head_dim,), (axis,), dtype) if config.norm_affine else None
        self.eps = config.norm_eps
        self.size = len(set(index) - {PAD}) * config.head_dim
        # Copies of a head count once.
        self.counts = nnx.static(tuple(float(head != PAD and head not in index[:i]) for i, head in enumerate(index)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, N, H], of its dtype again."""
        y = x.astype(jnp.float32)
        counts = np.array(self.counts, np.float32).reshape(1, 1, -1, 1)
        total = jnp.sum(y * y * counts, axis=(2, 3), keepdims=True)
        y = y * jax.lax.rsqrt(total / self.size + self.eps)
        if self.scale is not None:
            y = y * self.scale[...].astype(jnp.float32).reshape(1, 1, *x.shape[2:])
        return y.astype(x.dtype)
