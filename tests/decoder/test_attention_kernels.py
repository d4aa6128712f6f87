"""Our kernels give the sums of plain XLA: here in Pallas's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CONTEXT, CONTINUATIONS, RECORDED, ROWS, records, write
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import Run

from jaxllm.buckets import PAGE
from jaxllm.decoder import attention_kernels as kernels
from jaxllm.decoder.attention import AttentionSpec
from jaxllm.decoder.cache_spec import LayerCache
from jaxllm.decoder.paged_attention import by_passes
from jaxllm.decoder.tree_attention import TILE, by_lists, tile_pairs
from jaxllm.execution.steps import Steps
from jaxllm.platforms import KERNELS, LOOPS, PASSES, attention_form
from jaxllm.scoring.scorer import Scorer
from sharding.hlo import analyse
from sharding.targets import compile_for_cuda, target_devices

SPECS = {"plain": AttentionSpec(0.2, 0.0, None), "window and cap": AttentionSpec(0.3, 2.0, 70)}
TOLERANCE = 2e-6
POOL = 500  # pages


@pytest.mark.fast
@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "head_dim", "form"),
    [
        ("cpu", np.inf, "bfloat16", 128, LOOPS),
        ("tpu", np.inf, "bfloat16", 128, PASSES),
        ("gpu", 9.0, "bfloat16", 128, KERNELS),
        ("gpu", 8.0, "float16", 64, KERNELS),
        ("gpu", 7.0, "float16", 128, PASSES),  # no Triton
        ("gpu", np.inf, "bfloat16", 128, PASSES),  # not NVIDIA's
        ("gpu", 9.0, "float32", 128, PASSES),
        ("gpu", 9.0, "bfloat16", 80, PASSES),
        ("gpu", 9.0, "bfloat16", 512, PASSES),
    ],
)
def test_where_there_are_kernels(platform: str, capability: float, dtype: str, head_dim: int, form: str) -> None:
    assert attention_form(platform, capability, dtype, head_dim) == form


@pytest.mark.fast
@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize(
    ("rows", "tokens", "heads", "kv_heads", "width"),
    [(3, 1, 4, 4, 5), (2, 16, 6, 2, 6), (1, 1, 8, 1, 9), (2, 16, 12, 2, 3)],  # the last: a row's queries fill two blocks
)
def test_over_pages(kind: str, rows: int, tokens: int, heads: int, kv_heads: int, width: int) -> None:
    """Rows that end anywhere in their pages, which lie in disorder; those after a row's last are another's."""
    rng, h = np.random.default_rng(0), 32
    cache = LayerCache(
        jnp.asarray(rng.normal(size=(rows * width + 1, kv_heads, h, PAGE)), jnp.float32),
        jnp.asarray(rng.normal(size=(rows * width + 1, kv_heads, PAGE, h)), jnp.float32),
    )
    pages = jnp.asarray(1 + rng.permutation(rows * width).reshape(rows, width), jnp.int32)
    start = jnp.asarray(tokens * rng.integers(0, width * PAGE // tokens, rows), jnp.int32)
    q = jnp.asarray(rng.normal(size=(rows, tokens, heads, h)), jnp.float32)
    found = kernels.over_pages(SPECS[kind], q, cache, pages, start, interpret=True)
    np.testing.assert_allclose(found, by_passes(SPECS[kind], q, cache, pages, start), atol=TOLERANCE, rtol=0)


def forest(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Random trees in preorder: depth and end of each token."""
    rng, path = np.random.default_rng(1), list[int]()
    position, end = np.zeros(tokens, np.int32), np.zeros(tokens, np.int32)
    for j in range(tokens):
        if path and rng.random() < 0.05:
            del path[rng.integers(0, len(path)) :]
        position[j] = len(path)
        path.append(j)
        end[path] = j + 1
    return position, end


@pytest.mark.fast
@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 32), (2, 1, 128)])  # the wider go in halves of a tile
def test_over_tiles(kind: str, heads: int, kv_heads: int, head_dim: int) -> None:
    rng, tokens = np.random.default_rng(0), 4 * TILE
    position, end = forest(tokens)
    first, key_tiles = tile_pairs(end)
    assert len(key_tiles) > tokens // TILE  # some see others
    q, k, v = (jnp.asarray(rng.normal(size=(tokens, n, head_dim)), jnp.float32) for n in (heads, kv_heads, kv_heads))
    arrays = (q, k, v, *map(jnp.asarray, (position, end, first, key_tiles)))
    found = kernels.over_tiles(SPECS[kind], *arrays, tile=TILE, interpret=True)
    plain = by_lists(SPECS[kind], int(np.diff(first).max()), *arrays)
    np.testing.assert_allclose(found, plain, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_a_model_answers_with_them_as_transformers_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in one chunk and in two, then decode steps; continuations that share a context."""
    one = records()[name]
    folder = write(tmp_path / "model", one.config, one.shapes)
    monkeypatch.setattr("tiny.Steps", partial(Steps, attention=KERNELS))
    run = Run(folder, "tensor", 1)
    for i, logits in enumerate(run.logits(list(ROWS))):
        np.testing.assert_allclose(logits[RECORDED[i]], one.logits[i], atol=1e-4, rtol=0)
    scorer = Scorer(Steps(run.config, run.layout, "float32", attention=KERNELS), lambda: run.leaves, 256)
    found = dict(scorer.run(scorer.pack([(CONTEXT, continuation) for continuation in CONTINUATIONS])))
    np.testing.assert_allclose([found[i].logprob for i in range(len(found))], one.scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["h100", "a100-80gb"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 32, 128), (9, 3, 64), (8, 2, 256)])
def test_they_compile(kind: str, heads: int, kv_heads: int, head_dim: int) -> None:
    """For one row, for many, for prompts and for scoring, each as one kernel that needs no copy of the cache."""
    mesh = jax.sharding.Mesh(np.array(target_devices(kind, 1)), ("x",))

    def array(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    spec = SPECS["plain"]
    pool = (array((POOL, kv_heads, head_dim, PAGE)), array((POOL, kv_heads, PAGE, head_dim)))
    for rows, tokens in ((1, 1), (64, 1), (64, 16)):
        over = jax.jit(lambda q, keys, values, pages, start: kernels.over_pages(spec, q, LayerCache(keys, values), pages, start))
        pages, start = array((rows, 8), jnp.int32), array((rows,), jnp.int32)
        program = analyse(compile_for_cuda(over, array((rows, tokens, heads, head_dim)), *pool, pages, start))
        assert not [copy for copy in program.large_copies(1 << 20) if copy.result.shape[0] == POOL]
    t = 4096
    q, k = array((t, heads, head_dim)), array((t, kv_heads, head_dim))
    lists = (*(array((t,), jnp.int32),) * 2, array((t // TILE + 1,), jnp.int32), array((1000,), jnp.int32))
    compile_for_cuda(jax.jit(partial(kernels.over_tiles, spec, tile=TILE)), q, k, k, *lists)
