"""The LM head for scoring: log-probabilities of given ids at given tokens, never all logits at once.

Only the tokens asked for reach the head, a chunk of them at a time, each device with its shard of the vocabulary. A chunk's
logits are reduced to their log-sum-exp, their maximum and the targets' own, in float32, before the next chunk's take their
memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.decoder.batch import PackedBatch
from jaxllm.decoder.layers import dot
from jaxllm.decoder.model import Decoder
from jaxllm.execution.batch import Scored

CHUNK = 128  # tokens


def score_hidden(model: Decoder, hidden: jax.Array, batch: PackedBatch) -> Scored:
    """Last hidden states [B, T, D] of the batch's tokens -> log-probabilities of its targets."""
    layout, vocab = model.layout, model.config.vocab_size
    rows, each = layout.spec(("rows", None, None)), layout.spec(("rows", None))

    def local(hidden: jax.Array, table: jax.Array, scored: jax.Array, targets: jax.Array, chunks: jax.Array) -> Scored:
        b, p, m = targets.shape
        own = jax.lax.axis_index("model") * table.shape[0] + jnp.arange(table.shape[0])

        def chunk(i: jax.Array, out: Scored) -> Scored:
            at = jax.lax.dynamic_slice_in_dim(scored, i * CHUNK, CHUNK, axis=1)
            wanted = jax.lax.dynamic_slice_in_dim(targets, i * CHUNK, CHUNK, axis=1)
            x = jnp.take_along_axis(hidden, at[:, :, None], axis=1)
            logits = model.capped(dot("md,vd->mv", x.reshape(b * CHUNK, -1), table))
            logits = jnp.where(own[None, :] < vocab, logits, -jnp.inf)  # padding of the vocabulary
            new = _reduce(logits, own, wanted.reshape(b * CHUNK, m))
            return jax.tree.map(
                lambda all, part: jax.lax.dynamic_update_slice_in_dim(
                    all, part.reshape(b, CHUNK, *all.shape[2:]), i * CHUNK, axis=1
                ),
                out,
                new,
            )

        empty = Scored(jnp.zeros((b, p, m), jnp.float32), jnp.zeros((b, p), jnp.int32), jnp.zeros((b, p), jnp.float32))
        return jax.lax.fori_loop(0, chunks, chunk, empty)

    specs = (rows, layout.spec(("vocab", None)), each, rows, layout.spec(()))
    whole = jax.shard_map(local, mesh=layout.mesh, in_specs=specs, out_specs=Scored(rows, each, each), check_vma=False)
    return whole(model.final(hidden), model.table.matrix(), batch.scored, batch.targets, batch.chunks)


def _reduce(logits: jax.Array, own: jax.Array, targets: jax.Array) -> Scored:
    """logits [C, own shard of V], the ids of that shard, targets [C, M] -> [C, M], [C], [C]. Runs on each device of "model"."""
    top = jax.lax.pmax(jnp.max(logits, axis=-1, keepdims=True), "model")
    total = jnp.log(jax.lax.psum(jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True), "model"))
    here = (targets >= own[0]) & (targets <= own[-1])
    found = jnp.take_along_axis(logits, jnp.clip(targets - own[0], 0, len(own) - 1), axis=-1)
    logit = jax.lax.psum(jnp.where(here, found, 0), "model")
    first = jnp.min(jnp.where(logits == top, own[None, :], jnp.iinfo(jnp.int32).max), axis=-1)
    return Scored(logit - top - total, jax.lax.pmin(first, "model"), -total[:, 0])
