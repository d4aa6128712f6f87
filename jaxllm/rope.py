"""Rotary position embeddings (Su et al. 2021) and the ways their frequencies are stretched to longer contexts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """[H/2] float32 rotation per position of each pair, before the length-dependent part of `dynamic`."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, plain, head_dim)
    return plain


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, a ramp between."""
    wavelength = 2 * math.pi / plain
    ramp = (rope.original_max_position / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    ramp = np.clip(ramp, 0, 1)
    return ((1 - ramp) * plain / rope.factor + ramp * plain).astype(np.float32)


def _yarn(rope: RopeConfig, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """YaRN (Peng et al. 2023): pairs that turn often are kept, slow ones are divided by `factor`, a ramp between."""

    def pair_of(rotations: float) -> float:
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001
    keep = 1 - np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0, 1)
    return (plain / rope.factor * (1 - keep) + plain * keep).astype(np.float32)


def rope_angles(rope: RopeConfig, head_dim: int, positions: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, H/2] float32 for `positions` [B, T] of rows that are `lengths` [B] tokens long so far."""
    frequencies = jnp.asarray(inverse_frequencies(rope, head_dim))[None, None, :]
    if rope.kind == "dynamic":
        frequencies = _dynamic(rope, head_dim, lengths)[:, None, :]
    angles = positions[:, :, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def _dynamic(rope: RopeConfig, head_dim: int, lengths: jax.Array) -> jax.Array:
    """[B, H/2]: NTK scaling whose base grows with the row's length once it passes the trained context."""
    longer = jnp.maximum(lengths, rope.original_max_position).astype(jnp.float32)
    stretch = rope.factor * longer / rope.original_max_position - (rope.factor - 1)
    base = rope.theta * stretch ** (head_dim / (head_dim - 2))
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return 1.0 / base[:, None] ** exponent[None, :]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the pairs (i, i + H/2) of `x` [B, T, N, H] by the angles [B, T, H/2] (Su et al. 2021, in the half-split order)."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
