"""Our kernels beside the same sums in plain XLA: the largest difference, seconds of each, and bytes read a second."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu.results import Reporter, options_of_a_part
from jaxllm.buckets import PAGE
from jaxllm.decoder import attention_kernels
from jaxllm.decoder.attention import AttentionSpec
from jaxllm.decoder.cache_spec import LayerCache
from jaxllm.decoder.paged_attention import by_passes
from jaxllm.decoder.tree_attention import TILE, by_lists, tile_pairs
from jaxllm.planning.measure import seconds_of

# rows, tokens of each, query heads, KV heads, head size, pages of a row, pages that the program reaches
PAGED = {
    "one row of 2,000": (1, 1, 32, 32, 128, 32, 32),
    "8 rows of 512": (8, 1, 32, 32, 128, 8, 8),
    "64 rows of 160": (64, 1, 32, 32, 128, 3, 8),
    "64 rows of 2,000, 8 KV heads": (64, 1, 32, 8, 128, 32, 32),
    "a prompt of 1,024": (64, 16, 32, 32, 128, 16, 32),
    "SmolLM2, 8 rows": (8, 1, 9, 3, 64, 3, 8),
}
PLAIN = AttentionSpec(0.09, 0.0, None)
SPECS = {"plain": PLAIN, "window, cap": AttentionSpec(0.1, 5.0, 100)}
BOTH = ("8 rows of 512", "a prompt of 1,024", "SmolLM2, 8 rows")
HOW_PAGES, HOW_TILES = [(4, 2), (4, 4), (8, 3), (2, 3)], [(4, 2), (8, 3), (4, 3)]  # beside ours


def main() -> None:
    parser = options_of_a_part(__doc__)
    parser.add_argument("--tokens", type=int, default=16384, help="of a scoring row")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    report, interpret = Reporter(args), jax.default_backend() == "cpu"
    for name, shape in PAGED.items():
        if args.small:
            shape = (2, shape[1], 2 * shape[2] // shape[3], 2, 16, 2, 3)
        arrays = paged(*shape)
        for kind, spec in SPECS.items() if name in BOTH else [("plain", PLAIN)]:
            with report.guarded(name):
                kernel = partial(attention_kernels.over_pages, spec, interpret=interpret)
                report(kernel=name, kind=kind, **compared(partial(by_passes, spec), kernel, arrays))
        for how in [] if args.small else HOW_PAGES:
            with report.guarded(f"{name}, {how}"):
                report(kernel=name, how=how, seconds=alone(partial(attention_kernels.over_pages, PLAIN, how=how), arrays))
    for heads, kv_heads in ((4, 2),) if args.small else ((32, 32), (32, 8)):
        arrays, pairs, width = trees(args.tokens, heads, kv_heads)
        flops = 4 * heads * arrays[0].shape[2] * TILE**2 * pairs
        over_tiles = partial(attention_kernels.over_tiles, PLAIN, tile=TILE, interpret=interpret)
        with report.guarded("trees"):
            found = compared(partial(by_lists, PLAIN, width), over_tiles, arrays)
            report(kernel=f"trees, {kv_heads} KV heads", flops_per_second=flops / found["seconds"], **found)
        for how in [] if args.small else HOW_TILES:
            with report.guarded(f"trees, {how}"):
                report(kernel=f"trees, {kv_heads} KV heads", how=how, seconds=alone(partial(over_tiles, how=how), arrays))


def alone(kernel: Callable[..., Any], arrays: tuple[Any, ...]) -> float:
    step = jax.jit(kernel)
    return seconds_of(lambda: step(*arrays))


def paged(rows: int, tokens: int, heads: int, kv_heads: int, head_dim: int, pages: int, width: int) -> tuple[Any, ...]:
    """Queries at the ends of rows, a cache, and its pages in disorder."""
    key = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(key[0], (rows, tokens, heads, head_dim), jnp.bfloat16)
    keys = jax.random.normal(key[1], (rows * pages + 1, kv_heads, head_dim, PAGE), jnp.bfloat16)
    values = jax.random.normal(key[2], (rows * pages + 1, kv_heads, PAGE, head_dim), jnp.bfloat16)
    rng = np.random.default_rng(0)
    table = np.zeros((rows, width), np.int32)
    table[:, :pages] = 1 + rng.permutation(rows * pages).reshape(rows, pages)
    start = pages * PAGE - tokens - (rng.integers(0, PAGE // 2, rows) if tokens == 1 else np.zeros(rows, np.int64))
    return q, LayerCache(keys, values), jnp.asarray(table), jnp.asarray(start, jnp.int32)


def trees(tokens: int, heads: int, kv_heads: int) -> tuple[tuple[Any, ...], int, int]:
    """A scoring row of questions as HellaSwag has them, the pairs of tiles that see each other, and the most of a tile."""
    rng = np.random.default_rng(0)
    position, end = np.zeros(tokens, np.int32), np.zeros(tokens, np.int32)
    at = 0
    while at < tokens:
        context, endings = int(rng.integers(20, 120)), rng.integers(5, 40, 4)
        last = min(at + context + int(endings.sum()), tokens)
        position[at : min(at + context, last)] = np.arange(min(context, last - at))
        end[at : min(at + context, last)] = last
        branch = at + context
        for n in endings:
            stop = min(branch + int(n), last)
            if branch < stop:
                position[branch:stop], end[branch:stop] = context + np.arange(stop - branch), stop
            branch = stop
        at = last
    first, key_tiles = tile_pairs(end)
    key = jax.random.split(jax.random.key(2), 3)
    shapes = (heads, kv_heads, kv_heads)
    q, k, v = (jax.random.normal(one, (tokens, n, 128), jnp.bfloat16) for one, n in zip(key, shapes, strict=True))
    arrays = (q, k, v, *map(jnp.asarray, (position, end, first, key_tiles)))
    return arrays, len(key_tiles), int(np.diff(first).max())


def compared(plain: Callable[..., Any], kernel: Callable[..., Any], arrays: tuple[Any, ...]) -> dict[str, float]:
    """Seconds of both, and the difference over the size of what they find."""
    plain, kernel = jax.jit(plain), jax.jit(kernel)
    one, other = (np.asarray(f(*arrays), np.float32) for f in (plain, kernel))
    difference = float(np.linalg.norm(one - other) / np.linalg.norm(one))
    return {
        "difference": difference,
        "seconds": seconds_of(lambda: kernel(*arrays)),
        "plain_seconds": seconds_of(lambda: plain(*arrays)),
    }


if __name__ == "__main__":
    main()
