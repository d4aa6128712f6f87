"""The jitted steps: functions of (parameters, cache, batch) that consume the cache and return it.

Prefill runs tiles of any number of prompts and samples after those that end one. Decode loops on the device, a token a row and
step, until its limit, or until enough rows have stopped. Parameters are passed as a flat list of leaves; the module's structure
is fixed here, once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxllm.buckets import MAX_LOGPROBS
from jaxllm.config import ModelConfig
from jaxllm.decoder.batch import PackedBatch, TokenBatch
from jaxllm.decoder.cache_spec import AXES, cache_specs
from jaxllm.decoder.kv_cache import Cache
from jaxllm.decoder.model import Decoder
from jaxllm.execution.batch import (
    ALL_LOGPROBS,
    DecodeBatch,
    DecodeRows,
    History,
    ListedPenalties,
    LogitsPenalties,
    Logprobs,
    Sampled,
    SamplingBatch,
    Scored,
)
from jaxllm.execution.loglikelihood import score_hidden
from jaxllm.execution.penalties import extended, with_tables
from jaxllm.execution.pooling import Pooled, pool_hidden
from jaxllm.execution.sampling import RAW_LOGPROBS, LogprobsMode, logprobs_of, sample
from jaxllm.platforms import KERNELS, PASSES, attention_form
from sharding.layout import AMPERE, HOPPER, Layout

MAX_STEPS = 64  # tokens a row can gain in one decode call
PROMPT_TILES = 4  # of each data shard that go to the head at once for the log-probabilities of prompts
ALL_LOGPROBS_STEPS = 4  # the same, where each brings a number for every token of the vocabulary


class DecodeLoop(NamedTuple):
    """The state that one step of the decode loop hands to the next."""

    step: jax.Array
    cache: Cache
    rows: DecodeRows
    history: History | None
    outputs: Sampled
    stopped: jax.Array


def compiler_options(layout: Layout) -> dict[str, Any]:
    """XLA's options for every step's program."""
    if layout.capability < AMPERE:
        # Merging products that share an input would, without Triton kernels, copy their weights together in every step.
        return {"xla_gpu_dot_merger_threshold_mb": 0}
    if layout.platform == "cpu":
        # Library kernels for products alone: given more, XLA takes them for a softmax of more than 4096 elements and not for a
        # smaller one, and with another exp a row's bits depend on the length of the cache.
        options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
        if layout.gathers:  # or XLA gathers the weights of all layers first, and holds the whole model
            options["xla_cpu_scheduler_type"] = "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
        return options
    return {}


def scoring_options(layout: Layout) -> dict[str, Any]:
    """XLA's further options for a scoring program: before Hopper it gathers weights ahead of their use only when asked to.

    The estimator matters: without it, XLA takes a gather for so slow that it begins those of the first layers all at once.
    """
    if not layout.gathered or layout.capability >= HOPPER:
        return {}
    return {"xla_gpu_enable_latency_hiding_scheduler": True, "xla_gpu_enable_analytical_latency_estimator": True}


def _attention(config: ModelConfig, layout: Layout, dtype: str) -> str:
    """The form of attention. From 0.11 on jax lowers kernels of Pallas for GPUs that are here, and for no others."""
    form = attention_form(layout.platform, layout.capability, dtype, config.head_dim)
    absent = jax.__version_info__ >= (0, 11) and not {*layout.mesh.devices.flat} & {*jax.local_devices(backend=None)}
    return PASSES if form == KERNELS and absent else form


class Steps:
    """The steps of one model on one layout."""

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        dtype: str,
        logprobs_mode: LogprobsMode = RAW_LOGPROBS,
        options: Mapping[str, Any] = MappingProxyType({}),
        attention: str | None = None,
    ):
        """`options`: further ones of XLA for every program. `attention`: another form of it than the
        platform's, see `attention_form`.
        """
        self.config, self.layout, self.dtype, self.logprobs_mode = config, layout, dtype, logprobs_mode
        self.cache_specs = cache_specs(config, layout, dtype)
        self.attention = attention or _attention(config, layout, dtype)
        self.graph, state = nnx.split(Decoder(config, layout, dtype, self.attention))
        self.params, self.tree = jax.tree.flatten(state)
        self.shardings = [layout.stored(v.get_metadata()["axes"], v.get_value().shape) for _, v in nnx.to_flat_state(state)]
        options = compiler_options(layout) | dict(options)
        jit = partial(jax.jit, static_argnames="top_logprobs", donate_argnames="cache", compiler_options=options)
        # Said, for jax would write the same partition otherwise, and compile what is given it a second time.
        cache = layout.sharding(AXES)
        # What the host fetches is whole in each of several processes.
        whole = layout.sharding(()) if layout.spans_processes else None
        self.prefill = jit(self._prefill, out_shardings=(cache, whole))
        self.decode = jit(self._decode, out_shardings=(cache, whole, whole, layout.sharding(("rows",))))
        packed = partial(jax.jit, compiler_options=scoring_options(layout) | options, out_shardings=whole)
        self.score = packed(self._score, static_argnames="width")
        self.pool = packed(self._pool, static_argnames=("what", "width"))

    def model(self, leaves: list[jax.Array]) -> Decoder:
        """The decoder with these parameters."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, leaves))

    def abstract_params(self) -> list[jax.ShapeDtypeStruct]:
        """Shape, dtype and sharding of every leaf, for compiling without values."""
        return [jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s) for p, s in zip(self.params, self.shardings, strict=True)]

    def _prefill(
        self,
        leaves: list[jax.Array],
        cache: Cache,
        batch: TokenBatch,
        last: jax.Array,
        sampling: SamplingBatch,
        targets: jax.Array | None = None,
        top_logprobs: int | None = None,
    ) -> tuple[Cache, Sampled]:
        """Tiles of prompts into the cache; a token sampled after each of `last` [S], tokens counted within their data shard.

        `targets` [B, T]: report how likely each of these is as the next token.
        """
        model = self.model(leaves)
        hidden, cache = model(batch, cache)
        sampling = with_tables(sampling, self.config.vocab_size)
        sampled = self._sample(model, self._pick(hidden, last), sampling, top_logprobs)
        return cache, sampled._replace(prompt=None if targets is None else self._prompt_logprobs(model, hidden, targets))

    def _pick(self, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
        """Hidden states [B, T, D] -> those [S, D] of tokens [S], counted within their data shard."""
        rows = self.layout.spec(("rows", None, None))

        def local(hidden: jax.Array, tokens: jax.Array) -> jax.Array:
            return jnp.take(hidden.reshape(-1, hidden.shape[-1]), tokens, axis=0, mode="clip")

        picked = self.layout.spec(("rows", None))
        return jax.shard_map(local, mesh=self.layout.mesh, in_specs=(rows, P("data")), out_specs=picked)(hidden, tokens)

    def _prompt_logprobs(self, model: Decoder, hidden: jax.Array, targets: jax.Array) -> Logprobs:
        """Hidden states [B, T, D], targets [B, T] -> log-probabilities of B * T tokens, a few tiles of each shard at a time."""
        b, t, d = hidden.shape
        data, at_once = self.layout.data, math.gcd(b // self.layout.data, PROMPT_TILES)

        def few(x: tuple[jax.Array, jax.Array]) -> Logprobs:
            logits = model.logits(x[0].reshape(-1, d))
            return logprobs_of(jax.nn.log_softmax(logits, axis=-1), x[1].reshape(-1), MAX_LOGPROBS)

        def cut(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x.reshape(data, -1, at_once, *x.shape[1:]), 1, 0)

        def joined(x: jax.Array) -> jax.Array:  # [steps, data * at_once * t, ...]
            return jnp.moveaxis(x.reshape(-1, data, at_once * t, *x.shape[2:]), 0, 1).reshape(b * t, *x.shape[2:])

        return jax.tree.map(joined, jax.lax.map(few, (cut(hidden), cut(jnp.asarray(targets)))))

    def _sample(self, model: Decoder, hidden: jax.Array, sampling: SamplingBatch, top_logprobs: int | None) -> Sampled:
        # The barrier keeps the sampler from being fused into the head: a row's logits are the same bits however it,
        # or a neighbour, is sampled.
        return sample(jax.lax.optimization_barrier(model.logits(hidden)), sampling, top_logprobs, self.logprobs_mode)

    def _score(self, leaves: list[jax.Array], batch: PackedBatch, width: int) -> Scored:
        """Log-probabilities that a packed batch asks for; there is no cache. `width`: see `jaxllm.decoder.tree_attention`."""
        model = self.model(leaves)
        return score_hidden(model, model.packed(batch, width), batch)

    def _pool(self, leaves: list[jax.Array], batch: PackedBatch, what: Pooled, width: int) -> jax.Array:
        """[B, P, D or labels] float32, see `pool_hidden`."""
        model = self.model(leaves)
        return pool_hidden(model, model.packed(batch, width), batch, what)

    def _decode(
        self, leaves: list[jax.Array], cache: Cache, batch: DecodeBatch, top_logprobs: int | None = None
    ) -> tuple[Cache, Sampled, jax.Array, DecodeRows]:
        """Up to `batch.limit` tokens a row -> cache, samples [steps, R] with room for MAX_STEPS, or for ALL_LOGPROBS_STEPS, the
        steps taken, and where the rows stand then.
        """
        sampling = batch.sampling
        if isinstance(sampling.penalties, ListedPenalties) and batch.rows.listed is not None:
            sampling = sampling._replace(penalties=sampling.penalties._replace(tokens=batch.rows.listed))
        sampling = with_tables(sampling._replace(count=batch.rows.count), self.config.vocab_size)
        batch = jax.tree.map(jnp.asarray, batch)._replace(sampling=sampling)
        decode_step = partial(self._decode_step, self.model(leaves), batch, top_logprobs)
        end = jax.lax.while_loop(
            partial(_goes_on, batch), decode_step, _start(cache, batch, top_logprobs, self.config.vocab_size)
        )
        return end.cache, end.outputs, end.step, end.rows

    def _decode_step(self, model: Decoder, batch: DecodeBatch, top_logprobs: int | None, now: DecodeLoop) -> DecodeLoop:
        """One token for every live row."""
        rows = now.rows
        tokens = TokenBatch(rows.tokens[:, None], rows.position, rows.position + 1, batch.pages)
        hidden, cache = model(tokens, now.cache)
        sampling = batch.sampling._replace(count=rows.count)
        if isinstance(sampling.penalties, LogitsPenalties) and now.history is not None:
            sampling = sampling._replace(penalties=sampling.penalties._replace(history=now.history))
        new = self._sample(model, hidden[:, 0], sampling, top_logprobs)
        step = rows.live.astype(jnp.int32)
        remaining = rows.remaining - step
        hit = jnp.any(new.token[:, None] == batch.sampling.stop_ids, axis=-1)
        live = rows.live & ~hit & (remaining > 0)
        stand = DecodeRows(
            tokens=jnp.where(rows.live, new.token, rows.tokens),
            position=rows.position + step,  # a row that has stopped writes its last token's keys, where they belong, again
            live=live,
            remaining=remaining,
            count=rows.count + step,
            listed=None if rows.listed is None else _noted(rows, new.token),
        )
        return DecodeLoop(
            step=now.step + 1,
            cache=cache,
            rows=stand,
            history=None if now.history is None else extended(now.history, new.token),
            outputs=jax.tree.map(partial(_put, now.step), now.outputs, new),
            stopped=now.stopped + jnp.sum(rows.live & ~live, dtype=jnp.int32),
        )


def _noted(rows: DecodeRows, token: jax.Array) -> jax.Array:
    """Each row's list of tokens with a new one, which follows the row's last."""
    assert rows.listed is not None
    at = jnp.where(rows.live, rows.position + 1, rows.listed.shape[1])  # off the end
    return rows.listed.at[jnp.arange(len(token)), at].set(token, mode="drop")


def _goes_on(batch: DecodeBatch, now: DecodeLoop) -> jax.Array:
    limit = jnp.minimum(batch.limit, now.outputs.token.shape[0])
    return (now.step < limit) & jnp.any(now.rows.live) & (now.stopped < batch.until_stopped)


def _put(step: jax.Array, outputs: jax.Array, new: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(outputs, new, step, axis=0)


def _start(cache: Cache, batch: DecodeBatch, top_logprobs: int | None, vocab_size: int) -> DecodeLoop:
    rows = batch.rows.tokens.shape[0]
    steps = ALL_LOGPROBS_STEPS if top_logprobs == ALL_LOGPROBS else MAX_STEPS

    def empty(dtype: Any, *shape: int) -> jax.Array:
        return jnp.zeros((steps, rows, *shape), dtype)

    logprobs = None
    if top_logprobs is not None:
        ids, n = (0, vocab_size) if top_logprobs == ALL_LOGPROBS else (top_logprobs, top_logprobs)
        logprobs = Logprobs(empty(jnp.float32), empty(jnp.int32), empty(jnp.int32, ids), empty(jnp.float32, n))
    penalties = batch.sampling.penalties
    return DecodeLoop(
        step=jnp.int32(0),
        cache=cache,
        rows=batch.rows,
        history=penalties.history if isinstance(penalties, LogitsPenalties) else None,
        outputs=Sampled(empty(jnp.int32), logprobs),
        stopped=jnp.int32(0),
    )
