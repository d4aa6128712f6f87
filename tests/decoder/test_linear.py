"""Products with weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.decoder.linear import Linear
from sharding.layout import make_layout

INPUTS, OUTPUTS = 1536, 576


@pytest.mark.fast
@pytest.mark.parametrize("rows", [1, 8, 256])
def test_what_is_added_after_a_massive_activation_is_not_lost(rows: int) -> None:
    """Rounding is well below that of one float32 sum from end to end."""
    layout = make_layout("tensor", jax.devices()[:1], OUTPUTS)
    graph, state = nnx.split(Linear(layout, (INPUTS, "ffn"), (OUTPUTS, "embed"), "float32"))
    (leaf,), tree = jax.tree.flatten(state)
    multiply = jax.jit(lambda w, x: nnx.merge(graph, jax.tree.unflatten(tree, [w]))(x))
    ours, plain = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        x, w = rng.standard_normal((rows, 1, INPUTS)), rng.standard_normal(leaf.shape)
        x[:, :, rng.integers(INPUTS, size=2)] *= 3000
        x, w = x.astype(np.float32), w.astype(np.float32)
        exact = x.astype(np.float64) @ w.astype(np.float64)
        one_sum = np.zeros_like(exact, np.float32)
        for i in range(INPUTS):
            one_sum += x[:, :, i, None] * w[i]
        ours.append(np.sqrt(np.mean((multiply(jnp.asarray(w), jnp.asarray(x)) - exact) ** 2)))
        plain.append(np.sqrt(np.mean((one_sum - exact) ** 2)))
    assert np.mean(ours) < 0.6 * np.mean(plain)
