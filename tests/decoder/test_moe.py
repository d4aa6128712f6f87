"""Every form of the experts' products gives what each token's experts give it one at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import Experts
from jaxllm.decoder import moe as experts
from jaxllm.execution import programs
from jaxllm.execution.steps import Steps
from jaxllm.planning.presets import PRESETS
from sharding.layout import make_layout
from sharding.targets import target_devices

COUNT, D, F = 6, 8, 5
FORMS: dict[str, experts.Form] = {
    "one by one": experts._one_by_one,
    "with own weights": experts._with_own_weights,
    "ragged": experts._ragged,
    "in rounds": partial(experts._in_rounds, capacity=8),
}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("routing", ["even", "one", "random"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("name", [*FORMS, "in a round"])
def test_each_pair_runs_through_its_expert(name: str, tokens: int, routing: str, gated: bool) -> None:
    """Where all choose one expert it takes many rounds; no token is dropped."""
    form = FORMS.get(name, partial(experts._in_rounds, capacity=tokens))
    rng = np.random.default_rng(0)
    k = 2
    chosen = {
        "even": np.arange(tokens * k).reshape(tokens, k) % COUNT,
        "one": np.tile([4, 1], (tokens, 1)),
        "random": np.array([rng.permutation(COUNT)[:k] for _ in range(tokens)]),
    }[routing]
    x, gate, up, down = (
        rng.normal(size=s).astype(np.float32) for s in ((tokens, D), (COUNT, D, F), (COUNT, D, F), (COUNT, F, D))
    )
    expected = []
    for token, pair in zip(x, chosen, strict=True):
        for e in pair:
            inner = (
                np.asarray(jax.nn.silu(token @ gate[e])) * (token @ up[e]) if gated else np.asarray(jax.nn.silu(token @ up[e]))
            )
            expected.append(inner @ down[e])
    matrices = (jnp.asarray(np.concatenate([gate, up], axis=-1) if gated else up), jnp.asarray(down))
    run = jax.jit(partial(form, partial(experts._ffn, "silu")))
    found = run(jnp.asarray(x), jnp.asarray(chosen.reshape(-1), jnp.int32), matrices)
    np.testing.assert_allclose(found, np.array(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout_name", ["tensor", "gathered"])
def test_more_layers_hold_no_more_on_gpus(layout_name: str) -> None:
    """XLA would make the first of a loop's results for all layers at once, and begin to gather all of their experts."""
    config = replace(PRESETS["mixtral-8x7b"], vocab_size=4000, hidden_size=1024, intermediate_size=1024,
                     experts=Experts(count=8, top_k=2, size=2048))  # fmt: skip
    layout = make_layout(layout_name, target_devices("h100", 4), config.hidden_size)

    def held(layers: int) -> int:
        steps = Steps(replace(config, num_layers=layers), layout, "bfloat16")
        return programs.score(steps, 4096, 8).temp_bytes()

    assert held(8) - held(4) < 2 * 8 * 1024 * 2048  # bytes of one matrix of a layer's experts
