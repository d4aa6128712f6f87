"""Rotary position embeddings (Su et al. 2021) and the ways their frequencies are stretched to longer contexts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int, *, longer: bool = False) -> np.ndarray:
    """[H/2] float32 rotation per position of each pair, where H numbers of a head rotate.

    `longer`: those of longrope for rows that exceed the trained context; of `dynamic` they depend on the row's length.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, plain, head_dim)
    if rope.kind == "longrope":
        return plain / np.array(rope.long_factors if longer else rope.short_factors, np.float32)
    return plain


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, a ramp between."""
    wavelength = 2 * math.pi / plain
    ramp = (rope.original_max_position / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    ramp = np.clip(ramp, 0, 1)
    return ((1 - ramp) * plain / rope.factor + ramp * plain).astype(np.float32)


def _yarn(rope: RopeConfig, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """YaRN (Peng et al. 2023): pairs that rotate often are kept, slow ones are divided by `factor`, a ramp between."""

    def pair_of(rotations: float) -> float:
        positions_per_radian = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(positions_per_radian) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001
    keep = 1 - np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0, 1)
    return (plain / rope.factor * (1 - keep) + plain * keep).astype(np.float32)


def rope_angles(rope: RopeConfig, head_dim: int, positions: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, R/2] float32 for `positions` [B, T] of rows that are `lengths` [B] tokens long so far.

    R of a head's numbers are rotated.
    """
    head_dim = rope.rotary_dim(head_dim)
    frequencies = jnp.asarray(inverse_frequencies(rope, head_dim))[None, None, :]
    if rope.kind == "dynamic":
        frequencies = _dynamic(rope, head_dim, lengths)[:, None, :]
    if rope.kind == "longrope":
        longer = jnp.asarray(inverse_frequencies(rope, head_dim, longer=True))[None, None, :]
        frequencies = jnp.where((lengths > rope.original_max_position)[:, None, None], longer, frequencies)
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
    """Rotate the pairs (i, i + R/2) of `x` [B, T, N, H] by the angles [B, T, R/2] (Su et al. 2021, in the half-split order).

    What is beyond R in a head stays.
    """
    pairs = cos.shape[-1]
    first, second = jnp.split(x[..., : 2 * pairs], 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated if x.shape[-1] == 2 * pairs else [*rotated, x[..., 2 * pairs :]], axis=-1)
