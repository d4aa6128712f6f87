"""Whatever comes, goes, is preempted or shared: each request gains what it gains alone, in every layout and kind of layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from crowd import Case, run
from families import records, write
from layers import layered

from jaxllm import LLM, SamplingParams
from jaxllm.buckets import PAGE
from jaxllm.decoder.cache_spec import Pool
from jaxllm.generation.engine import Engine

pytestmark = pytest.mark.optimised

MODELS = ["llama", "gemma3_text", "mixtral", "phi3 longrope"]  # full layers, windows among them, experts, two kinds of angles
LAYOUTS = [("tensor", 1), ("tensor", 3), ("replicated-2x2", 4), ("gathered", 4)]
KEPT = [("gemma3_text", "tensor", 3), ("mixtral", "replicated-2x2", 4)]
CASES = [(model, *layout) for model in MODELS for layout in LAYOUTS]
LONGEST = 256
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("laws")
    longer = {"max_position_embeddings": LONGEST}
    changes = {name: {} if "longrope" in name else longer for name in MODELS}
    return {name: write(root / name, records()[name].config | changes[name], records()[name].shapes) for name in MODELS}


def crowd(rng: np.random.Generator, vocab_size: int) -> list[Case]:
    """Four that outgrow the pages together, then short and long prompts, half with a common beginning; some are cancelled."""
    common = rng.integers(vocab_size, size=2 * PAGE).tolist()
    cases = [Case(rng.integers(vocab_size, size=90).tolist(), GREEDY, 110, seed=i, stop_ids=()) for i in range(4)]
    for i in range(12):
        own = rng.integers(vocab_size, size=int(rng.choice([1, 9, 40, 110]))).tolist()
        arrival = int(rng.integers(12))
        cases.append(
            Case(
                prompt=common[: int(rng.integers(3)) * PAGE] + own if i % 2 else own,
                params=GREEDY,
                max_tokens=int(rng.integers(4, 40)),
                seed=i,
                stop_ids=(int(rng.integers(vocab_size)),) if i % 3 == 0 else (),
                arrival=arrival,
                cancelled=arrival + int(rng.integers(1, 4)) if i % 5 == 4 else None,
            )
        )
    return cases


@pytest.mark.parametrize(("model", "layout", "devices"), layered(CASES, lambda *case: case in KEPT))
def test_each_gains_what_it_gains_alone(model: str, layout: str, devices: int, folders: dict[str, Path]) -> None:
    """With pages for little more than one sequence at a time on each data shard."""
    llm = LLM(folders[model], layout=layout, devices=devices, max_model_len=LONGEST, max_num_seqs=4)
    shards, rng = llm.plan.layout.data, np.random.default_rng(devices)
    pool = Pool.of(llm.config, LONGEST, LONGEST + PAGE, -(-4 // shards))
    engine = Engine(llm._steps.result(), llm._params.result(), pool=pool, max_num_seqs=4, max_num_batched_tokens=128)
    cases = crowd(rng, llm.config.vocab_size)
    together = run(engine, cases, lambda: int(rng.choice([1, 3, 8])))
    statistics = engine.scheduler.statistics
    assert statistics.preempted or None not in pool.pages or shards == 4  # windows hold little, or each shard one sequence
    for case, among in zip(cases, together, strict=True):
        engine.scheduler.lose_pages()  # nothing is there from before
        [alone] = run(engine, [Case(case.prompt, case.params, case.max_tokens, case.seed, case.stop_ids)])
        n = len(among.tokens) if among.finish_reason == "cancelled" else len(alone.tokens)
        assert among.tokens == alone.tokens[:n], case
    assert statistics.shared_tokens or shards > 1
