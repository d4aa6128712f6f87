"""Tiny random LLaMA checkpoints, and the logits that transformers and jaxllm give for the same tokens."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from bench.peers import empty_cache
from checkpoints.checkpoint import open_checkpoint
from checkpoints.load import load
from jaxllm.buckets import TILE, pages_of
from jaxllm.decoder import kv_cache as kv
from jaxllm.decoder.batch import TokenBatch
from jaxllm.execution import steps
from jaxllm.execution.steps import Steps
from sharding.layout import make_layout

DEFAULTS: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 33,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


class Row(NamedTuple):
    """A prompt as the chunks it is prefilled in, and the tokens that are then decoded one by one, whatever was predicted."""

    chunks: list[list[int]]
    decoded: list[int]

    @property
    def prompt(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk]


def random_row(seed: int, chunks: list[int], decoded: int, vocab: int) -> Row:
    """Random tokens in chunks of these lengths."""
    rng = np.random.default_rng(seed)
    return Row([rng.integers(vocab, size=n).tolist() for n in chunks], rng.integers(vocab, size=decoded).tolist())


def write(factory: pytest.TempPathFactory, config: dict[str, Any], kind: str = "AutoModelForCausalLM") -> Path:
    """A folder as transformers' own class for `model_type` (LLaMA's by default) saves it, once a session for each config."""
    values = config if "model_type" in config else DEFAULTS | config
    name = hashlib.sha256(json.dumps([values, kind], sort_keys=True).encode()).hexdigest()[:16]
    folder = factory.getbasetemp() / f"tiny-{name}"
    if not folder.exists():
        import torch
        import transformers

        config_of = transformers.AutoConfig.for_model(**({"model_type": "llama"} | values))
        model = getattr(transformers, kind).from_config(config_of, dtype=torch.float32)
        randomise(model)
        model.save_pretrained(folder)
    return folder


def randomise(model: Any) -> None:
    """Gives a model of transformers other parameters.

    Nothing is left at a value that could hide its absence: norms are not 1, biases not 0, and the matrices are large enough for
    attention to be sharp and for logits to be a few units apart.
    """
    import torch

    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=random)
            if "norm" in key or ".ln_" in key:
                offset = 0 if key.endswith("bias") or "gemma" in model.config.model_type else 1
                weight.copy_(offset + 0.3 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.5 * noise)
            elif "embed" in key or "wte" in key or "wpe" in key:
                weight.copy_(noise / 2)
            else:
                fan_in = weight.shape[0] if ".c_" in key else weight.shape[-1]
                weight.copy_(noise * (2 if "q_proj" in key or "k_proj" in key else 1) / fan_in**0.5)


@cache
def torch_model(path: Path, kind: str = "AutoModelForCausalLM") -> Any:
    import torch
    import transformers

    # A GGUF file is named twice: its folder and itself.
    source: dict[str, Any] = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    loader = getattr(transformers, kind)
    model = loader.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **source).eval()
    if hasattr(model.config, "num_experts") or hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")  # grouped products want sizes of multiples of four
    return model


_REFERENCES: dict[tuple[Path, str], np.ndarray] = {}


def reference(path: Path, row: Row) -> np.ndarray:
    """Logits [T, V] after every token of the row from transformers: the prompt in one piece, then token by token."""
    import torch

    key = (path, json.dumps([row.prompt, row.decoded]))
    if key not in _REFERENCES:
        model = torch_model(path)
        body = model.base_model
        if hasattr(body, "rotary_emb"):  # the one before may have left the frequencies of `dynamic` stretched to its own length
            body.rotary_emb = type(body.rotary_emb)(model.config)
        cache, parts = empty_cache(model), []
        with torch.no_grad():
            for piece in [row.prompt, *([token] for token in row.decoded)]:
                parts.append(model(torch.tensor([piece]), **cache).logits[0].numpy())
        _REFERENCES[key] = np.concatenate(parts)
    return _REFERENCES[key]


class Run:
    """A checkpoint on a layout, giving the logits after every token."""

    def __init__(self, path: Path, layout: str, devices: int, *, chunk: int = 16, slots: int = 2, length: int = 128):
        """`chunk` tokens a prefill call; `slots` sequences of `length` positions on each data shard."""
        checkpoint = open_checkpoint(path)
        self.config = checkpoint.config
        self.layout = make_layout(layout, jax.devices()[:devices], self.config.hidden_size)
        self.steps = Steps(self.config, self.layout, "float32")
        self.leaves = load(checkpoint.source, checkpoint.rules, self.config, self.layout, "float32")
        self.chunk, self.slots, self.length = chunk, slots, length
        self.rows = self.layout.data * slots
        self.forward = jax.jit(self._forward, donate_argnames="cache", compiler_options=steps.compiler_options(self.layout))

    def logits(self, rows: list[Row]) -> list[np.ndarray]:
        """[T, V] for each row. Rows of one data shard follow each other; each has pages of its own, dealt out in disorder."""
        assert len(rows) == self.rows and len({len(row.decoded) for row in rows}) == 1
        each = pages_of(self.length)
        windows = dict.fromkeys(spec.window for spec in self.steps.cache_specs)
        self.cache = kv.init(self.steps.cache_specs, self.layout, dict.fromkeys(windows, 1 + self.slots * each))
        disorder = [
            np.random.default_rng(i).permutation(self.slots * each).reshape(self.slots, each) for i in range(len(windows))
        ]
        self.pages = [np.tile(1 + one, (self.layout.data, 1)).astype(np.int32) for one in disorder]
        found: list[list[np.ndarray]] = [[] for _ in rows]
        for slot in range(self.slots):
            at = range(slot, self.rows, self.slots)
            for number in range(max(len(rows[i].chunks) for i in at)):
                for i, logits in zip(at, self._prefill([rows[i] for i in at], list(at), number), strict=True):
                    if number < len(rows[i].chunks):
                        found[i].append(logits[: len(rows[i].chunks[number])])
        for step in range(len(rows[0].decoded)):
            start = np.array([len(row.prompt) + step for row in rows], np.int32)
            tokens = np.array([[row.decoded[step]] for row in rows], np.int32)
            for logits, new in zip(found, self._call(TokenBatch(tokens, start, start + 1, tuple(self.pages))), strict=True):
                logits.append(new)
        return [np.concatenate(parts) for parts in found]

    def _prefill(self, rows: list[Row], at: list[int], number: int) -> np.ndarray:
        """Chunk `number` of one row for each data shard, in tiles; rows that have no more write to the page of nobody."""
        tiles = self.chunk // TILE
        tokens = np.full((len(rows), self.chunk), self.config.vocab_size - 1, np.int32)
        start = np.zeros((len(rows), tiles), np.int32)
        pages = [np.zeros((len(rows), tiles, array.shape[1]), np.int32) for array in self.pages]
        for i, row in enumerate(rows):
            if number < len(row.chunks):
                tokens[i, : len(row.chunks[number])] = row.chunks[number]
                start[i] = sum(len(chunk) for chunk in row.chunks[:number]) + TILE * np.arange(tiles)
                for array, whole in zip(pages, self.pages, strict=True):
                    array[i, : -(-len(row.chunks[number]) // TILE)] = whole[at[i]]
        lengths = np.repeat([len(row.prompt) for row in rows], tiles).astype(np.int32)
        batch = TokenBatch(
            tokens.reshape(-1, TILE), start.reshape(-1), lengths, tuple(array.reshape(-1, array.shape[2]) for array in pages)
        )
        return self._call(batch).reshape(len(rows), self.chunk, -1)

    def _call(self, batch: TokenBatch) -> np.ndarray:
        logits, self.cache = self.forward(self.leaves, self.cache, batch)
        return np.asarray(logits)

    def _forward(self, leaves: list[jax.Array], cache: kv.Cache, batch: TokenBatch) -> tuple[jax.Array, kv.Cache]:
        model = self.steps.model(leaves)
        hidden, cache = model(batch, cache)
        b, t, d = hidden.shape
        return model.logits(hidden.reshape(b * t, d)).reshape(b, t, -1), cache
