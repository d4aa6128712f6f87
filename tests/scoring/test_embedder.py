"""Vectors are those that transformers' hidden states give, and classes its logits, in every layout, whatever is shared."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CASES
from tiny import torch_model, write
from tiny_checkpoint import write_tiny, write_tokenizer

from checkpoints.errors import CheckpointError
from checkpoints.families import read_hf
from jaxllm import LLM, RequestError

LAYOUTS = [("tensor", 1), ("tensor", 4), ("replicated", 3), ("gathered", 4), ("gathered-2x2", 4)]
RNG = np.random.default_rng(0)
BEGINNING = RNG.integers(0, 60, 50).tolist()
# Alone, sharing a beginning, one that another begins with, twice the same, of one token, over several rows.
SEQUENCES = [
    RNG.integers(0, 60, 30).tolist(),
    *[BEGINNING + RNG.integers(0, 60, n).tolist() for n in (1, 40, 100)],
    BEGINNING,
    BEGINNING,
    [7],
    *[RNG.integers(0, 60, 60).tolist() for _ in range(140)],
]
SOME = [ids[:90] for ids in SEQUENCES[:8]]
POOLINGS: list[Any] = ["last", "cls", "mean"]
CLASSIFIER, BODY = "AutoModelForSequenceClassification", "AutoModel"
near = partial(np.testing.assert_allclose, atol=1e-4, rtol=0)


def pooled(model: Any, sequences: list[list[int]], pooling: str) -> np.ndarray:
    pool = {"last": lambda states: states[-1], "cls": lambda states: states[0], "mean": lambda states: states.mean(0)}[pooling]
    with torch.no_grad():
        return np.stack([pool(model(torch.tensor([ids])).last_hidden_state[0]) for ids in sequences])


def classes(model: Any, sequences: list[list[int]]) -> np.ndarray:
    model.config.pad_token_id = None  # or it looks for the last token that is another
    with torch.no_grad():
        return np.stack([model(torch.tensor([ids])).logits[0] for ids in sequences])


@pytest.mark.parametrize(("layout", "devices"), LAYOUTS)
def test_vectors_and_classes_are_those_of_transformers(
    tmp_path_factory: pytest.TempPathFactory, layout: str, devices: int
) -> None:
    folder = write(tmp_path_factory, {"num_labels": 3, "max_position_embeddings": 256, "pad_token_id": None}, CLASSIFIER)
    llm, model = LLM(folder, layout=layout, devices=devices), torch_model(folder, CLASSIFIER)
    llm.embedder.max_step_tokens = 1024  # several steps
    near(llm.classify(SEQUENCES), classes(model, SEQUENCES))
    for pooling in POOLINGS:
        found, expected = llm.embed(SEQUENCES, pooling=pooling, normalise=False), pooled(model.model, SEQUENCES, pooling)
        assert found.shape == (len(SEQUENCES), 24) and found.dtype == np.float32
        near(found, expected)
        near(llm.embed(SEQUENCES[:3], pooling=pooling), expected[:3] / np.linalg.norm(expected[:3], axis=1, keepdims=True))


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "opt sums", "gpt2", "gpt_neox"])
def test_classifiers_of_families(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = write(tmp_path_factory, CASES[name] | {"pad_token_id": None}, CLASSIFIER)
    llm, model = LLM(folder, layout="tensor", devices=3, max_model_len=128), torch_model(folder, CLASSIFIER)
    assert llm.config.labels == 2
    near(llm.classify(SOME), classes(model, SOME))
    near(llm.embed(SOME, pooling="mean", normalise=False), pooled(model.base_model, SOME, "mean"))


def test_a_model_without_a_head_embeds_and_does_no_more(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = write(tmp_path_factory, {}, BODY)
    llm = LLM(folder, devices=1)
    near(llm.embed(SOME, normalise=False), pooled(torch_model(folder, BODY), SOME, "last"))
    for use in (lambda: llm.generate([[1]]), lambda: llm.score([([1], [[2]])])):
        with pytest.raises(RequestError, match=r"is no language model but without a head: use LLM\.embed"):
            use()
    with pytest.raises(RequestError, match=r"is no classifier: give a model of \.\.\.ForSequenceClassification"):
        llm.classify([[1]])


def test_a_language_model_embeds_alike_in_every_format(tmp_path: Path) -> None:
    llm = LLM(write_tokenizer(write_tiny(tmp_path, vocab_size=258, max_position_embeddings=64)), devices=1)
    np.testing.assert_array_equal(llm.embed("abc"), llm.embed([[97, 98, 99]]))
    assert llm.embed([]).shape == (0, 24)
    cases: list[tuple[Any, str]] = [
        ([[1], []], "prompt 1 is empty"),
        (["a" * 65], "prompt 0 has 65 tokens, and the model takes 64: shorten it"),
        ([[1, 258]], "token id 258, outside the vocabulary of 258"),
    ]
    for wrong, message in cases:
        with pytest.raises(RequestError, match=message):
            llm.embed(wrong)
    with pytest.raises(RequestError, match="pooling='max': there are 'last', 'cls', 'mean'"):
        llm.embed("abc", pooling="max")  # type: ignore[arg-type]


def test_a_classifier_travels(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    llm = LLM(write(tmp_path_factory, {"num_labels": 5}, CLASSIFIER), devices=1)
    llm.save(tmp_path / "orbax")
    assert LLM(tmp_path / "orbax", layout="tensor", devices=2).config.labels == 5
    near(LLM(tmp_path / "orbax", layout="tensor", devices=2).classify(SOME), llm.classify(SOME))


def test_labels_are_those_of_the_config(tmp_path_factory: pytest.TempPathFactory) -> None:
    values = json.loads((write(tmp_path_factory, {"num_labels": 5}, CLASSIFIER) / "config.json").read_text())
    assert read_hf(dict(values), "x")[1].labels == 5
    assert read_hf({key: value for key, value in values.items() if key != "id2label"}, "x")[1].labels == 2
    assert read_hf(values | {"architectures": ["LlamaModel"]}, "x")[1].labels == 0
    assert read_hf(values | {"architectures": ["LlamaModel"], "tie_word_embeddings": True}, "x")[1].labels is None
    with pytest.raises(CheckpointError, match="x: a classifier of 0 labels; name them in `id2label`"):
        read_hf(values | {"id2label": {}}, "x")
