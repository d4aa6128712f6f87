"""The decoder's small parts: parameter declarations, activations, sums and products.

Parameters are declared with shape and logical axes and hold no values: a module is built abstract, split once, and its leaves are
filled by a loader or with random numbers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sharding.layout import Axes, Layout

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def param(shape: tuple[int, ...], axes: Axes, dtype: str, **more: Any) -> nnx.Param:
    """Declare a parameter: its (padded) shape, one logical axis name or None for each dimension, its dtype, more metadata."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), axes=axes, **more)


def weight(layout: Layout, parameter: nnx.Param) -> jax.Array:
    """A parameter as the compute reads it: in a gathered layout this is where XLA gathers it."""
    return layout.constrain(parameter[...], *parameter.get_metadata()["axes"])


def add_in_order(x: jax.Array, axis: int) -> jax.Array:
    """The sum over a short axis, term by term: in this order, and faster than XLA's own on a CPU."""
    first, *rest = (jax.lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis]))
    return sum(rest, start=first)


def dot(equation: str, x: jax.Array, w: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """An einsum that accumulates in float32 and returns `dtype`. Float32 inputs are never rounded to TF32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, w, preferred_element_type=dtype, precision=precision)
