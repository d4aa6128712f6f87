"""Layers with a window keep the positions that they can see and no more, and answer as if they kept all."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import records, write
from tiny import Row, Run, random_row

from jaxllm import LLM, SamplingParams
from jaxllm.buckets import MAX_CHUNK
from jaxllm.decoder import cache_spec
from jaxllm.decoder import kv_cache as kv
from jaxllm.decoder.attention import AttentionSpec, attend, attend_by_blocks
from jaxllm.decoder.batch import TokenBatch
from jaxllm.decoder.cache_spec import BLOCK, LayerCache
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
    """With its `undo`, caches are rings again."""
    monkeypatch.setattr(cache_spec, "window_capacity", lambda window, platform: None)
    return monkeypatch


@pytest.mark.parametrize("window", [1, 7, 512, 513, 514, 1024, 4096])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_ring_holds_a_chunk_and_what_its_first_token_sees(window: int, platform: str) -> None:
    length = cache_spec.window_capacity(window, platform)
    assert length is not None and window + MAX_CHUNK - 1 <= length < window + 3 * MAX_CHUNK
    assert length % MAX_CHUNK == 0  # where a chunk starts at a multiple of itself it never passes the end
    assert cache_spec.window_capacity(None, platform) is None


def test_full_layers_keep_all(folders: dict[str, Path]) -> None:
    llm = LLM(folders["gemma3_text"], layout="tensor", devices=1, max_num_seqs=1)
    lengths = [spec.length(CONTEXT) for spec in llm.engine.steps.cache_specs]
    assert lengths == [1024] * 5 + [CONTEXT] + [1024]
    layout = make_layout("tensor", jax.devices()[:1], llm.config.hidden_size)
    token = llm.config.kv_bytes_per_token(4) // llm.config.num_layers
    assert cache_bytes(llm.config, layout, "float32", 2, CONTEXT) == 2 * token * sum(lengths)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("layout", "devices"), [("tensor", 3), ("gathered", 2)])
def test_logits_are_those_of_a_whole_cache(
    folders: dict[str, Path], whole: pytest.MonkeyPatch, name: str, layout: str, devices: int
) -> None:
    """Prompts that pass a ring's end once and twice, and decode steps over another's."""

    def logits() -> list[np.ndarray]:
        run = Run(folders[name], layout, devices, chunk=512, slots=2 // (devices if layout == "gathered" else 1), length=2560)
        rows = [random_row(0, [512, 512, 512, 512, 40], 6, 61), random_row(1, [512, 509], 6, 61)]
        return run.logits(rows)

    expected = logits()
    whole.undo()
    for ours, theirs in zip(logits(), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", [pytest.param("mistral", marks=pytest.mark.full), "qwen2"])
def test_a_growing_cache_keeps_what_is_seen(folders: dict[str, Path], whole: pytest.MonkeyPatch, name: str) -> None:
    """Row by row and rung by rung: long prompts that come while others decode, as alone, as with a whole cache."""
    prompts = [random_row(i, [n], 0, 61).prompt for i, n in enumerate((1000, 5, 1600, 1020))]

    def tokens(together: bool) -> list[list[int]]:
        llm = LLM(folders[name], layout="tensor", devices=1, max_num_seqs=2)
        outputs = llm.generate(prompts, GREEDY) if together else [llm.generate(prompt, GREEDY)[0] for prompt in prompts]
        return [output.outputs[0].token_ids for output in outputs]

    expected = tokens(together=True)
    whole.undo()
    assert tokens(together=True) == expected
    assert tokens(together=False) == expected


@pytest.mark.parametrize("start", [0, 512, 1024, 2560])
def test_both_ways_to_attend_over_a_ring_agree(start: int) -> None:
    """A GPU's, over all that is there, and a CPU's, block by block; of a chunk that stands anywhere."""
    layout, rng, window = make_layout("tensor", jax.devices()[:1], 8), np.random.default_rng(0), 300
    length = cache_spec.window_capacity(window, "cpu")
    assert length == 1024
    keys, values = (jnp.asarray(rng.normal(size=(1, 2, start + 512, 8)), "float32") for _ in range(2))
    q = jnp.asarray(rng.normal(size=(1, 512, 4, 8)), "float32")
    blocks = length // BLOCK
    cache = LayerCache(jnp.full((1, 2, blocks, 8, BLOCK), 9.0), jnp.full((1, 2, blocks, BLOCK, 8), 9.0))
    for first in range(0, start + 512, 512):
        batch = TokenBatch(np.zeros((1, 512)), jnp.array([first]), jnp.array([first + 512]), jnp.array([0]))
        part = slice(first, first + 512)
        cache = kv.write(cache, layout, keys[:, :, part].swapaxes(2, 3), values[:, :, part], batch, wraps=True)
    spec, begin = AttentionSpec(0.4, 0, window), jnp.array([start])
    whole = attend(q, *kv.read(cache, layout, batch), begin, spec, "gpu")
    parts = attend_by_blocks(q, lambda i: kv.read_block(cache, layout, batch, i % blocks), begin, spec)
    position = np.arange(start + 512)
    ahead = position[start:, None] - position[None, :]
    dots = np.einsum("tkgh,ksh->kgts", q[0].reshape(512, 2, 2, 8), keys[0]) * 0.4
    weights = np.exp(np.where((ahead >= 0) & (ahead < window), dots, -np.inf))
    expected = np.einsum("kgts,ksh->tkgh", weights / weights.sum(-1, keepdims=True), values[0]).reshape(512, 4, 8)
    np.testing.assert_allclose(whole[0], expected, atol=1e-5)
    np.testing.assert_allclose(parts[0], expected, atol=1e-5)


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
