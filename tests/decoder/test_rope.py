"""Rotary embeddings of every kind are transformers': the frequencies, and logits within and beyond the trained context."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import DEFAULTS, Run, random_row, reference, write

from checkpoints.families import read_hf
from jaxllm.config import ModelConfig, RopeConfig
from jaxllm.decoder.rope import inverse_frequencies, rope_angles, rotate

MAX_POSITION = 24
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": MAX_POSITION}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": LLAMA3 | {"original_max_position_embeddings": MAX_POSITION},
    "yarn": YARN,
    "yarn with attention_factor": YARN | {"attention_factor": 1.3},
    "yarn with mscale": YARN | {"mscale": 1.4, "mscale_all_dim": 0.6},
    "yarn with betas": YARN | {"beta_fast": 6.0, "beta_slow": 0.5, "truncate": False},
}
PLAIN = "default"


def settings(kind: str, theta: float = 500.0) -> dict[str, Any]:
    """A model of head size 16. The base is small for every pair to rotate, some often and some little, in these few positions."""
    # What `yarn` and `llama3` call the original context they say themselves; `dynamic` and the others take it from the model.
    stretched = "original_max_position_embeddings" in KINDS[kind]
    return {
        "head_dim": 16,
        "max_position_embeddings": 4 * MAX_POSITION if stretched else MAX_POSITION,
        "rope_parameters": KINDS[kind] | {"rope_theta": theta},
    }


def read(kind: str, theta: float) -> ModelConfig:
    return read_hf({"model_type": "llama"} | DEFAULTS | settings(kind, theta), "config.json")[1]


@pytest.mark.parametrize("theta", [500.0, 10000.0, 100000.0])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_those_of_transformers(kind: str, theta: float) -> None:
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaConfig(**(DEFAULTS | settings(kind, theta)))
    functions = ROPE_INIT_FUNCTIONS | {"default": LlamaRotaryEmbedding.compute_default_rope_parameters}
    frequencies, scale = functions[KINDS[kind]["rope_type"]](theirs, device="cpu")
    rope, plain = read(kind, theta).rope, read(PLAIN, theta).rope
    assert rope is not None and plain is not None
    np.testing.assert_allclose(inverse_frequencies(rope, 16), frequencies.numpy(), rtol=1e-6, atol=0)
    assert rope.attention_factor == pytest.approx(scale, rel=1e-6)
    if KINDS[kind]["rope_type"] not in ("default", "dynamic"):
        assert not np.allclose(inverse_frequencies(rope, 16), inverse_frequencies(plain, 16), rtol=1e-3)


@pytest.mark.parametrize("length", [1, MAX_POSITION, MAX_POSITION + 1, 100, 5000])
def test_dynamic_frequencies_are_those_of_transformers(length: int) -> None:
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = LlamaConfig(**(DEFAULTS | settings("dynamic")))
    frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, device="cpu", seq_len=length)
    # At position 1 the angle is the frequency, and below 1 its sine tells it.
    rope = read("dynamic", 500.0).rope
    assert rope is not None
    _, sine = rope_angles(rope, 16, jnp.ones((1, 1), jnp.int32), jnp.array([length]))
    np.testing.assert_allclose(np.asarray(sine)[0, 0], np.sin(frequencies.numpy()), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("kind", "layout", "devices"), [*((kind, "tensor", 1) for kind in KINDS), ("dynamic", "gathered", 2), ("yarn", "tensor", 3)]
)
def test_logits_are_those_of_transformers(tmp_path_factory: pytest.TempPathFactory, kind: str, layout: str, devices: int) -> None:
    """One row grows past the trained context while it decodes, one starts beyond it, in chunks of which the first is within."""
    pytest.importorskip("torch")
    path = write(tmp_path_factory, settings(kind))
    run = Run(path, layout, devices)
    shapes = [[16, 5], [16, 16, 16, 15]]
    rows = [random_row(i, shapes[i % 2], 9, DEFAULTS["vocab_size"]) for i in range(run.rows)]
    assert len(rows[0].prompt) < MAX_POSITION < len(rows[0].prompt + rows[0].decoded)
    expected = [reference(path, row) for row in rows]
    for ours, theirs in zip(run.logits(rows), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    if kind != PLAIN:  # what is compared depends on the kind, in every row
        plain = write(tmp_path_factory, settings(PLAIN))
        for row, theirs in zip(rows, expected, strict=True):
            assert np.abs(theirs - reference(plain, row)).max() > 0.01


def test_a_rotation_is_a_complex_product() -> None:
    """Pair (i, i + H/2) is a number x + iy; position p rotates it by p times its frequency."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 3, 8)).astype(np.float32)
    positions = rng.integers(50, size=(2, 5))
    rope = RopeConfig(theta=100.0)
    angles = rope_angles(rope, 8, jnp.asarray(positions), jnp.array([50, 50]))
    numbers = x[..., :4] + 1j * x[..., 4:]
    turned = numbers * np.exp(1j * positions[:, :, None, None] * inverse_frequencies(rope, 8))
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotate(jnp.asarray(x), *angles), expected, atol=1e-5)


def test_the_length_of_a_row_is_its_own() -> None:
    """A neighbour beyond the trained context does not stretch the frequencies of a row within it."""
    rope = RopeConfig(kind="dynamic", factor=2.0, original_max_position=32)
    positions = jnp.arange(8)[None, :].repeat(2, axis=0)
    together = rope_angles(rope, 8, positions, jnp.array([8, 500]))
    alone = rope_angles(rope, 8, positions[:1], jnp.array([8]))
    plain = rope_angles(RopeConfig(), 8, positions[:1], jnp.array([8]))
    for ours, one, unstretched in zip(together, alone, plain, strict=True):
        np.testing.assert_array_equal(ours[:1], one)
        np.testing.assert_allclose(one, unstretched, atol=1e-6)
        assert np.abs(np.asarray(ours[1] - ours[0])).max() > 0.1
