"""Matrices of weights: how they are declared, read and multiplied with.

All that reads one goes through here, so that what a weight is stored as is known here alone. Weights stand as [in, out]: in the
checkpoint's order, [out, in], XLA's CPU compiler transposes every 16-bit weight in every call, and a gathered weight would be
transposed on a GPU. Always as a matrix: given heads as a dimension of their own, XLA copies the weight in every step, on CPUs, on
TPUs, and for a single row on GPUs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm.decoder.layers import add_in_order, dot, param, weight
from jaxllm.platforms import choices
from sharding.layout import Layout

Axis = tuple[int, str | None]
"""A padded size and its logical axis."""
PARTS = 8  # of a single row's sum over the ffn


class Weight(nnx.Module):
    """A matrix of weights on a layout."""

    layout: Layout
    weight: nnx.Param

    def matrix(self) -> jax.Array:
        """The weight as the compute reads it."""
        return weight(self.layout, self.weight)

    @property
    def spec(self) -> PartitionSpec:
        """How `matrix()` is split, for `shard_map`."""
        return self.layout.spec(self.weight.get_metadata()["axes"])


class Linear(Weight):
    """x [B, T, I] -> [B, T, O] float32: a weight [I, O], of experts [E, I, O], and a bias [O] if there is one."""

    def __init__(
        self, layout: Layout, inputs: Axis, outputs: Axis, dtype: str, *, bias: bool = False, experts: int | None = None
    ):
        self.layout = layout
        leading = () if experts is None else ((experts, "experts"),)
        sizes, axes = zip(*leading, inputs, outputs, strict=True)
        self.weight = param(sizes, axes, dtype)
        # One that is added to the residual stream is whole on every device.
        self.bias = param(sizes[-1:], (None if axes[-1] == "embed" else axes[-1],), dtype) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self._product(x)
        return y if self.bias is None else y + weight(self.layout, self.bias).astype(y.dtype).reshape(1, 1, -1)

    def _product(self, x: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        return self._filled_product(fill_rows(self.layout, x), dtype)[:, : x.shape[1]]

    def _filled_product(self, x: jax.Array, dtype: Any) -> jax.Array:
        matrix, platform = self.matrix(), self.layout.platform
        single = x.shape[0] // self.layout.data * x.shape[1] == 1
        over_ffn = self.weight.get_metadata()["axes"][0] == "ffn"
        if single and over_ffn and x.dtype == jnp.float32 and choices(platform).float32_convolutions:
            return self._in_parts(x, matrix)
        return product(platform, x, matrix, dtype)

    def _in_parts(self, x: jax.Array, matrix: jax.Array) -> jax.Array:
        """The product as a sum of PARTS over each device's share of the inputs."""
        model = self.layout.model
        parts = math.gcd(PARTS, matrix.shape[0] // model)
        y = dot("btmpi,mpio->mpbto", x.reshape(*x.shape[:2], model, parts, -1), matrix.reshape(model, parts, -1, matrix.shape[1]))
        return add_in_order(y, 1).sum(axis=0)


class Segment(NamedTuple):
    """One of several weights that are stored as one: its name, the padded size of its outputs, their logical axis."""

    name: str
    size: int
    axis: str


class Joint(Linear):
    """x [B, T, I] -> [B, T, O] of each segment: weights of the same x, multiplied at once.

    Along the outputs each device's shares stand together: its columns of the first weight, then those of the second. So each
    computes what it would of each weight alone, in one product.
    """

    def __init__(
        self,
        layout: Layout,
        inputs: Axis,
        segments: tuple[Segment, ...],
        dtype: str,
        *,
        bias: bool = False,
        experts: int | None = None,
    ):
        super().__init__(layout, inputs, (sum(s.size for s in segments), "joint"), dtype, bias=bias, experts=experts)
        self.segments = nnx.static(segments)
        for one in (self.weight, self.bias):
            if one is not None:
                one.set_metadata(segments=segments)

    def each(self, x: jax.Array) -> list[jax.Array]:
        """The segments' results, rounded to the model's dtype as a linear layer of the reference is."""
        within = choices(self.layout.platform).rounds_within_products and self.bias is None
        y, model = self._product(x, x.dtype) if within else self(x).astype(x.dtype), self.layout.model
        y = y.reshape(*y.shape[:-1], model, -1)
        cuts = [sum(s.size for s in self.segments[:i]) // model for i in range(1, len(self.segments))]
        return [part.reshape(*x.shape[:-1], -1) for part in jnp.split(y, cuts, axis=-1)]


class Table(Weight):
    """A row for each id of the vocabulary: a weight [V, D], to look tokens up in or to multiply hidden states with.

    It stays [V, D], and is the left operand of the head's product, for XLA's CPU compiler not to transpose it.
    """

    def __init__(self, layout: Layout, vocab: int, size: int, dtype: str):
        self.layout = layout
        self.weight = param((vocab, size), ("vocab", "embed"), dtype)

    def look_up(self, tokens: jax.Array) -> jax.Array:
        """tokens [B, T] -> their rows [B, T, D].

        Each device looks up the tokens of its shard of the vocabulary and the results are summed; left to itself, XLA gathers
        the whole table for a single token.
        """
        rows = self.layout.spec(("rows", None))

        def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
            own = tokens - jax.lax.axis_index("model") * table.shape[0]
            # Behind a barrier, or decode's loop has the integers copied before it begins.
            bits = table
            if table.dtype.itemsize == 2 and choices(self.layout.platform).tables_as_integers:
                table, own = jax.lax.optimization_barrier((table, own))
                bits = table.view(jnp.uint16)
            found = bits.at[own].get(mode="fill", fill_value=0, wrap_negative_indices=False)
            return jax.lax.psum(found.view(table.dtype), "model")

        out = self.layout.spec(("rows", None, None))
        return jax.shard_map(local, mesh=self.layout.mesh, in_specs=(self.spec, rows), out_specs=out)(self.matrix(), tokens)

    def products(self, x: jax.Array) -> jax.Array:
        """x [B, D] with every row: [B, V] float32, split over the vocabulary."""
        rows = fill_rows(self.layout, x[:, None, :])
        y = dot("md,vd->mv", rows.reshape(-1, rows.shape[-1]), self.matrix())
        return y.reshape(*rows.shape[:2], -1)[:, 0]


def product(platform: str, x: jax.Array, w: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """x [B, T, I] times a weight [I, O] -> [B, T, O] of `dtype`, added in float32."""
    if x.dtype != jnp.float32 or not choices(platform).float32_convolutions:
        return dot("bti,io->bto", x, w, dtype)
    dims = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x, w[None], (1,), "VALID", dimension_numbers=dims, precision=jax.lax.Precision.HIGHEST)


def fill_rows(layout: Layout, x: jax.Array) -> jax.Array:
    """x [B, T, I] of 16 bits with zeros added along T where its B * T rows are too few for a product with a weight to be fast."""
    fewest = choices(layout.platform).fewest_rows if x.dtype.itemsize == 2 else 1
    missing = fewest - x.shape[0] // layout.data * x.shape[1]
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0))) if missing > 0 else x
