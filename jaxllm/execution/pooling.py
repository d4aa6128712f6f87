"""The head for embeddings and classifiers: a vector for each of the sequences in packed trees."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxllm.decoder.batch import PackedBatch
from jaxllm.decoder.layers import dot
from jaxllm.decoder.model import Decoder
from jaxllm.execution.loglikelihood import CHUNK

Pooled = Literal["states", "means", "labels"]
"""The states of tokens, the means of tokens and all before them, the classifier's logits at tokens."""


def pool_hidden(model: Decoder, hidden: jax.Array, batch: PackedBatch, what: Pooled) -> jax.Array:
    """Last hidden states [B, T, D] of the batch's tokens -> [B, P, D or labels] float32, at the tokens `batch.scored`."""
    layout = model.layout
    rows, tokens = layout.spec(("rows", None, None)), layout.spec(("rows", None))

    def local(x: jax.Array, scored: jax.Array, end: jax.Array, chunks: jax.Array) -> jax.Array:
        if what != "means":
            return jnp.take_along_axis(x, scored[:, :, None], axis=1)
        index = jnp.arange(x.shape[1])[None, None, :]

        def chunk(i: jax.Array, out: jax.Array) -> jax.Array:
            last = jax.lax.dynamic_slice_in_dim(scored, i * CHUNK, CHUNK, axis=1)[:, :, None]
            path = (index <= last) & (last < end[:, None, :])  # the token's ancestors, and itself
            mean = dot("bpt,btd->bpd", path.astype(x.dtype), x) / path.sum(axis=-1, keepdims=True)
            return jax.lax.dynamic_update_slice_in_dim(out, mean, i * CHUNK, axis=1)

        return jax.lax.fori_loop(0, chunks, chunk, jnp.zeros((*scored.shape, x.shape[-1]), jnp.float32))

    specs = (rows, tokens, tokens, layout.spec(()))
    pooled = jax.shard_map(local, mesh=layout.mesh, in_specs=specs, out_specs=rows, check_vma=False)
    found = pooled(model.final(hidden), batch.scored, batch.end, batch.chunks)
    return (model.classes(found) if what == "labels" else found).astype(jnp.float32)
