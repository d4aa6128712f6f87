"""Layers with a window hold the pages that they can see and no more, and answer as if they held all."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import records, write
from tiny import Row, Run, random_row

from jaxllm import LLM, SamplingParams
from jaxllm.buckets import MAX_STEP_TOKENS, PAGE, TILE, pages_held
from jaxllm.decoder import cache_spec, paged_attention
from jaxllm.decoder.attention import AttentionSpec
from jaxllm.decoder.batch import TokenBatch
from jaxllm.decoder.cache_spec import LayerCache, windows
from jaxllm.decoder.kv_cache import where_rows_go, write_rows
from jaxllm.decoder.paged_attention import by_passes, by_rows
from jaxllm.generation import pages as pages_module
from jaxllm.generation.pages import PageTable
from jaxllm.planning.plan import cache_bytes
from sharding.layout import make_layout

CONTEXT = 4096
# Every layer slides; most of them do; so they do among layers that see all.
MODELS = ["mistral", "gemma3_text", "qwen2"]
GREEDY = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("windows")
    changes = {"max_position_embeddings": CONTEXT}
    return {name: write(root / name, records()[name].config | changes, records()[name].shapes) for name in MODELS}


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No page is given back; with its `undo`, those are that fell out of a window."""
    monkeypatch.setattr(PageTable, "leave_window", lambda *_: None)
    monkeypatch.setattr(pages_module, "pages_held", lambda window, length: pages_held(None, length))
    monkeypatch.setattr(cache_spec, "pages_held", lambda window, length: pages_held(None, length))
    return monkeypatch


@pytest.mark.parametrize("window", [1, 7, 512, 513, 514, 1024, 4096])
def test_a_window_holds_a_step_and_what_its_first_token_sees(window: int) -> None:
    """Wherever the step begins, and however the pages lie."""
    most = pages_held(window, 1 << 20)
    for start in range(5000, 5000 + PAGE, TILE):
        first, last = (start - window + 1) // PAGE, (start + MAX_STEP_TOKENS - 1) // PAGE
        assert last - first + 1 <= most
    assert most <= (window + MAX_STEP_TOKENS) // PAGE + 2
    assert pages_held(window, 100) == 2 and pages_held(None, 1 << 20) == (1 << 20) // PAGE


def test_full_layers_hold_all(folders: dict[str, Path]) -> None:
    llm = LLM(folders["gemma3_text"], layout="tensor", devices=1, max_num_seqs=1)
    window = next(layer.window for layer in llm.config.layers if layer.window)
    assert llm.plan.pool.pages == {window: 1 + pages_held(window, CONTEXT), None: 1 + CONTEXT // PAGE}
    layout = make_layout("tensor", jax.devices()[:1], llm.config.hidden_size)
    page = PAGE * llm.config.kv_bytes_per_token(4) // llm.config.num_layers
    kept = [llm.plan.pool.pages[layer.window] - 1 for layer in llm.config.layers]
    assert cache_bytes(llm.config, layout, "float32", 2, CONTEXT) == page * sum(2 * n + 1 for n in kept)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("layout", "devices"), [("tensor", 3), pytest.param("gathered", 2, marks=pytest.mark.full)])
def test_logits_do_not_depend_on_what_fell_out(folders: dict[str, Path], name: str, layout: str, devices: int) -> None:
    """Prompts longer than a window, and decode steps over another's: of what was given back the pages hold no number."""
    slots = 2 // (devices if layout == "gathered" else 1)
    rows = [random_row(0, [512, 512, 512, 512, 40], 6, 61), random_row(1, [512, 509], 6, 61)]
    expected = Run(folders[name], layout, devices, chunk=512, slots=slots, length=2560).logits(rows)
    for ours, theirs in zip(Forgetting(folders[name], layout, devices, 512, slots, 2560).logits(rows), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)


class Forgetting(Run):
    """A run whose pages that fell out of a window hold no number any more."""

    def __init__(self, path: Path, layout: str, devices: int, chunk: int, slots: int, length: int):
        super().__init__(path, layout, devices, chunk=chunk, slots=slots, length=length)

    def _call(self, batch: TokenBatch) -> np.ndarray:
        spoiled = []
        for layer, spec in zip(self.cache, self.steps.cache_specs, strict=True):
            group = list(windows(self.config)).index(spec.window)
            gone = self._gone(batch, spec.window, self.pages[group])
            spoiled.append(LayerCache(*(x.at[gone].set(jnp.nan) for x in layer)))
        self.cache = spoiled
        return super()._call(batch)

    def _gone(self, batch: TokenBatch, window: int | None, pages: np.ndarray) -> np.ndarray:
        """Pages, over all data shards, that no token of the batch's sequences sees any more."""
        if window is None:
            return np.zeros(0, np.int32)
        each, gone = self.slots * pages.shape[1] + 1, []
        for row, own in enumerate(pages):
            shard = row // self.slots
            per_shard = len(batch.start) // self.layout.data
            here = slice(shard * per_shard, (shard + 1) * per_shard)
            first = self.pages[0][row][0]
            starts = [s for s, one in zip(batch.start[here], batch.pages[0][here], strict=True) if one[0] == first]
            if starts:
                gone += [shard * each + page for page in own[: max(int(min(starts)) - window + 1, 0) // PAGE]]
        return np.array(gone, np.int32)


@pytest.mark.parametrize("name", [pytest.param("mistral", marks=pytest.mark.full), "qwen2"])
def test_pages_given_back_are_not_missed(folders: dict[str, Path], whole: pytest.MonkeyPatch, name: str) -> None:
    """Long prompts that come while others decode, as alone, as where no page is given back."""
    prompts = [random_row(i, [n], 0, 61).prompt for i, n in enumerate((1000, 5, 1600, 1020))]

    def tokens(together: bool) -> list[list[int]]:
        llm = LLM(folders[name], layout="tensor", devices=1, max_num_seqs=2)
        outputs = llm.generate(prompts, GREEDY) if together else [llm.generate(prompt, GREEDY)[0] for prompt in prompts]
        llm.engine.scheduler.check_integrity()
        return [output.outputs[0].token_ids for output in outputs]

    expected = tokens(together=True)
    whole.undo()
    assert tokens(together=True) == expected
    assert tokens(together=False) == expected


@pytest.mark.parametrize("window", [None, 1, 300])
@pytest.mark.parametrize(("start", "tokens"), [(0, 16), (512, 16), (1024, 1), (2559, 1)])
def test_both_ways_to_attend_agree(monkeypatch: pytest.MonkeyPatch, start: int, tokens: int, window: int | None) -> None:
    """A GPU's, in one pass and in several, and a CPU's, page by page; of a row that stands anywhere, beside others."""
    rng, length = np.random.default_rng(0), 2560
    keys, values = (jnp.asarray(rng.normal(size=(length, 2, 8)), "float32") for _ in range(2))
    q = jnp.asarray(rng.normal(size=(3, tokens, 4, 8)), "float32")
    own = 1 + rng.permutation(length // PAGE)
    pool = np.full((1 + len(own), 2, 8, PAGE), 9.0, "float32")
    in_pages = (np.asarray(x[:start]).reshape(-1, 2, 8) for x in (keys, values))
    cache = LayerCache(*(_filled(pool, x, own) for x in in_pages))
    cache = cache._replace(values=cache.values.swapaxes(2, 3))
    table, begins = jnp.asarray(np.stack([0 * own, own, 0 * own]), jnp.int32), jnp.array([0, start, 0])
    new_keys, new_values = (jnp.tile(x[None, start : start + tokens], (3, 1, 1, 1)) for x in (keys, values))
    new = (new_keys.transpose(0, 2, 3, 1), new_values.swapaxes(1, 2), *where_rows_go(table, begins))
    by_loop, *by_scatter = (write_rows(cache, *new, platform) for platform in ("cpu", "gpu", "tpu"))
    for other in by_scatter:
        assert all(np.array_equal(one[1:], another[1:]) for one, another in zip(by_loop, other, strict=True))
    cache = by_loop
    spec = AttentionSpec(0.4, 0, window)
    found = [by_rows(spec, q, cache, table, begins)[1]]
    found += [by_passes(spec, q, cache, table, begins, turned=turned)[1] for turned in (False, True)]
    monkeypatch.setattr(paged_attention, "PASS_BYTES", 1 << 16)
    found.append(by_passes(spec, q, cache, table, begins)[1])
    position = np.arange(start + tokens)
    ahead = position[start:, None] - position[None, :]
    dots = np.einsum("tkgh,skh->kgts", q[1].reshape(tokens, 2, 2, 8), keys[: start + tokens]) * 0.4
    weights = np.exp(np.where((ahead >= 0) & (ahead < (window or length)), dots, -np.inf))
    expected = np.einsum("kgts,skh->tkgh", weights / weights.sum(-1, keepdims=True), values[: start + tokens])
    for one in found:
        np.testing.assert_allclose(one, expected.reshape(tokens, 4, 8), atol=1e-5)


def _filled(pool: np.ndarray, rows: np.ndarray, pages: np.ndarray) -> jax.Array:
    """A pool [P, K, H, PAGE] with rows [S, K, H] in a sequence's pages."""
    pool = pool.copy()
    for position, row in enumerate(rows):
        pool[pages[position // PAGE], :, :, position % PAGE] = row
    return jnp.asarray(pool)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_logits_past_a_ring_are_those_of_transformers(folders: dict[str, Path], name: str) -> None:
    pytest.importorskip("torch")
    import torch
    from record_families import load

    row: Row = random_row(0, [512, 512, 300], 40, 61)
    run = Run(folders[name], "tensor", 1, chunk=512, slots=1, length=1536)
    with torch.no_grad():
        expected = load(folders[name])(torch.tensor([row.prompt + row.decoded]), use_cache=False).logits[0].numpy()
    np.testing.assert_allclose(run.logits([row])[0], expected, atol=1e-4, rtol=0)
