"""The decoder's small parts: parameter declarations and products with weights.

Parameters are declared with shape and logical axes and hold no values: a module is built abstract, split once, and its leaves are
filled by a loader or with random numbers. Weights stand as [in, out]: in the checkpoint's order, [out, in], XLA's CPU compiler
transposes every 16-bit weight in every call, and a gathered weight would be transposed on a GPU. Always as a matrix: given heads
as a dimension of their own, XLA copies the weight in every step, on CPUs, on TPUs, and for a single row on GPUs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.platforms import choices
from sharding.layout import Axes, Layout

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def param(shape: tuple[int, ...], axes: Axes, dtype: str) -> nnx.Param:
    """Declare a parameter: its (padded) shape, one logical axis name or None for each dimension, its dtype."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), axes=axes)


def weight(layout: Layout, parameter: nnx.Param) -> jax.Array:
    """A parameter as the compute reads it: in a gathered layout this is where XLA gathers it."""
    return layout.constrain(parameter[...], *parameter.get_metadata()["axes"])


def linear(layout: Layout, x: jax.Array, w: nnx.Param, bias: nnx.Param | None = None) -> jax.Array:
    """x [B, T, I] through a weight [I, O] -> [B, T, O] float32."""
    y = _product(layout, fill_rows(layout, x), weight(layout, w), w.get_metadata()["axes"][0])[:, : x.shape[1]]
    return y if bias is None else y + weight(layout, bias).astype(y.dtype).reshape(1, 1, -1)


MANY = 1024  # tokens of a row; only scoring has so many


def ffn_sum_splits(layout: Layout, inputs: int, tokens: int) -> int:
    """Number of partial sums that a float32 product over a device's `inputs` of the ffn is split into.

    Few rows cost nothing more; for many this product takes two and a half times as long, and an answer's log-probability asks for
    less.
    """
    splits = choices(layout.platform).sum_splits
    return splits if inputs % splits == 0 and tokens < MANY else 1


def _product(layout: Layout, x: jax.Array, matrix: jax.Array, axis: str) -> jax.Array:
    """x [B, T, I] times [I, O], whose inputs lie along the logical `axis` -> [B, T, O] float32."""
    inputs = matrix.shape[0] // layout.model
    splits = ffn_sum_splits(layout, inputs, x.shape[1]) if axis == "ffn" and x.dtype == jnp.float32 else 1
    if splits == 1:
        return dot("bti,io->bto", x, matrix)
    shape = (layout.model, splits, inputs // splits)
    y = dot("btmpi,mpio->mpbto", x.reshape(*x.shape[:2], *shape), matrix.reshape(*shape, -1))
    return add_in_order(y, 1).sum(axis=0)


def add_in_order(x: jax.Array, axis: int) -> jax.Array:
    """The sum over a short axis, term by term: in this order, and faster than XLA's own on a CPU."""
    first, *rest = (jax.lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis]))
    return sum(rest, start=first)


def fill_rows(layout: Layout, x: jax.Array) -> jax.Array:
    """x [B, T, I] of 16 bits with zeros added along T where its B * T rows are too few for a product with a weight to be fast."""
    fewest = choices(layout.platform).fewest_rows if x.dtype.itemsize == 2 else 1
    missing = fewest - x.shape[0] // layout.data * x.shape[1]
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0))) if missing > 0 else x


def dot(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """An einsum that accumulates and returns float32. Float32 inputs are never rounded to TF32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, w, preferred_element_type=jnp.float32, precision=precision)
