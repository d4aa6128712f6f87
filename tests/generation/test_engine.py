"""Law 3: among any neighbours a request gets, bit for bit, what it gets alone in as many rows. Nothing is compiled twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from crowd import STOP, Case, run
from layers import layered
from tiny_checkpoint import write_tiny

from checkpoints.checkpoint import Checkpoint, open_checkpoint
from checkpoints.load import load
from jaxllm.buckets import PAGE
from jaxllm.decoder.cache_spec import Pool
from jaxllm.execution import programs
from jaxllm.execution.steps import MAX_STEPS, Steps
from jaxllm.generation.engine import Engine
from jaxllm.generation.pages import ROOT
from jaxllm.generation.scheduler import Chunk, ScheduledStep
from jaxllm.requests.sampling_params import SamplingParams
from sharding.hlo import analyse
from sharding.layout import make_layout

SLOTS = 4
INVARIANT = {"batch_invariant": True, "max_num_batched_tokens": 256}
LAYOUTS = [("tensor", 1), ("tensor", 4), ("replicated", 2), ("replicated-2x2", 4)]
KINDS = [
    SamplingParams(temperature=0, logprobs=2),
    SamplingParams(temperature=0.9, logprobs=0),
    SamplingParams(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, logprobs=3),
    SamplingParams(
        temperature=0.8,
        repetition_penalty=1.3,
        presence_penalty=0.6,
        frequency_penalty=0.2,
        logit_bias={7: 2.0, 8: -1.0},
        min_tokens=4,
        logprobs=1,
    ),
    SamplingParams(temperature=0),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_tiny(tmp_path_factory.mktemp("engine")))


@pytest.fixture(scope="module")
def make_engine(checkpoint: Checkpoint) -> Callable[..., Engine]:
    def make(name: str, devices: int, tokens: int = 0, length: int = 700, **options: Any) -> Engine:
        layout = make_layout(name, jax.devices()[:devices], checkpoint.config.hidden_size)
        params = load(checkpoint.source, checkpoint.rules, checkpoint.config, layout, "float32")
        each = -(-SLOTS // layout.data)
        pool = Pool.of(checkpoint.config, length, tokens or each * length, each)
        return Engine(Steps(checkpoint.config, layout, "float32"), params, pool=pool, max_num_seqs=SLOTS, **options)

    return make


def random_cases(rng: np.random.Generator, count: int, kinds: list[SamplingParams]) -> list[Case]:
    """Short prompts, prompts of several chunks, some with a common beginning."""
    cases, beginning = [], rng.integers(97, size=3 * PAGE).tolist()
    for i in range(count):
        low, high = [(1, 17), (1, 17), (513, 528)][rng.integers(3)]
        common = beginning[: int(rng.integers(3)) * PAGE] if high < 500 else []
        arrival = int(rng.integers(8))
        cases.append(
            Case(
                prompt=common + rng.integers(97, size=rng.integers(low, high)).tolist(),
                params=kinds[i % len(kinds)],
                max_tokens=int(rng.integers(4, 40)),
                seed=int(rng.integers(1 << 32)),
                stop_ids=STOP if rng.random() < 0.7 else (),
                arrival=arrival,
                cancelled=arrival + int(rng.integers(1, 5)) if rng.random() < 0.2 else None,
            )
        )
    return cases


LONG = Case(list(range(10)), KINDS[1], max_tokens=300, seed=3, stop_ids=())  # grows past one block of the cache
LEFT = Case(list(range(9)), KINDS[0], max_tokens=300, seed=3, stop_ids=(), cancelled=6)


@pytest.mark.parametrize(("name", "devices"), layered(LAYOUTS, lambda *layout: layout in (LAYOUTS[0], LAYOUTS[-1])))
def test_each_gets_what_it_gets_alone(name: str, devices: int, make_engine: Callable[..., Engine]) -> None:
    engine, rng = make_engine(name, devices, **INVARIANT), np.random.default_rng(devices)
    # Every kind is a program of its own: a few of them on several devices.
    cases = [LONG, LEFT, *random_cases(rng, 16, KINDS if devices == 1 else KINDS[:2])]
    together = run(engine, cases, lambda: int(rng.choice([1, 3, 8, MAX_STEPS])))
    assert {s.finish_reason for s in together} == {"stop", "length", "cancelled"}
    assert together[1].finish_reason == "cancelled" and together[1].tokens
    for case, among in zip(cases, together, strict=True):
        [alone] = run(engine, [replace(case, arrival=0, cancelled=None)])
        whole = among.finish_reason != "cancelled"
        n = len(alone.tokens) if whole else len(among.tokens)
        assert among.tokens == alone.tokens[:n], case
        assert among.logprobs == alone.logprobs[:n], case
        assert not whole or (among.finish_reason, among.stop_reason) == (alone.finish_reason, alone.stop_reason)


def test_the_next_step_is_queued_before_this_one_is_known(make_engine: Callable[..., Engine]) -> None:
    """Unless the host must look at the text first, someone waits for a place, or nothing is left to do."""
    engine = make_engine("tensor", 1)

    def ahead(*cases: Case) -> list[int]:
        """How many steps were on their way when each was known."""
        for i, case in enumerate(cases):
            engine.scheduler.add(case.sequence(i))
        found = []
        while engine.busy:
            engine.step(4)
            found.append(len(engine.flying))
        return found

    long = Case([1, 2, 3], KINDS[0], max_tokens=20, seed=0, stop_ids=())
    assert ahead(long) == [0, 1, 1, 1, 1, 0]  # the prompt's token is needed; then 4 tokens a call
    assert ahead(replace(long, params=SamplingParams(temperature=0, stop="x"))) == [0] * 6
    assert ahead(*[replace(long, prompt=[i] * 512) for i in range(3)])[:2] == [1, 0]  # the rest of a prompt
    assert sum(ahead(*[long] * SLOTS, replace(long, max_tokens=4))) < 5


def test_penalties_see_all_tokens_however_far_a_step_reaches(make_engine: Callable[..., Engine]) -> None:
    """Steps queued ahead go on with the lists on the device, which have as much room as the program reaches."""
    params = SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=1.0)
    case = Case([1, 2, 3], params, max_tokens=150, seed=0, stop_ids=())
    engine = make_engine("tensor", 1)
    engine.shapes = engine.scheduler.shapes = replace(engine.shapes, widths=(1, 2, 11))

    def tokens(*, ahead: bool) -> list[int]:
        sequence = case.sequence(0)
        engine.scheduler.add(sequence)
        while engine.busy:
            engine.step(8, ahead=ahead)
        return sequence.tokens

    assert tokens(ahead=True) == tokens(ahead=False)


# In place, and compiled once


def pointers(engine: Engine) -> list[int]:
    arrays = [array for layer in engine.runner.cache for array in layer]
    return [shard.data.unsafe_buffer_pointer() for array in arrays for shard in array.addressable_shards]


@pytest.mark.parametrize(("name", "devices"), [("tensor", 1), ("tensor", 4)])
def test_the_cache_is_updated_in_place(name: str, devices: int, make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(name, devices)
    engine.scheduler.add(Case([1, 2, 3], KINDS[0], max_tokens=40, seed=0, stop_ids=()).sequence(0))
    engine.step(0)
    for _ in range(2):
        before, where = list(engine.runner.cache), pointers(engine)
        engine.step(4, ahead=False)
        assert all(array.is_deleted() for layer in before for array in layer)
        assert pointers(engine) == where
    before, where = list(engine.runner.cache), pointers(engine)
    engine.scheduler.cancel(0)
    engine.scheduler.add(Case([4] * 16, KINDS[0], max_tokens=1, seed=0).sequence(1))
    engine.step(0)  # prefills another prompt into the same cache
    assert all(array.is_deleted() for layer in before for array in layer)
    assert pointers(engine) == where


@pytest.mark.parametrize(
    ("name", "devices", "dtype"), [("tensor", 1, "float32"), ("tensor", 3, "bfloat16"), ("replicated", 2, "float32")]
)
def test_prefill_copies_no_cache(name: str, devices: int, dtype: str, checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    layout = make_layout(name, jax.devices()[:devices], config.hidden_size)
    steps, pool = Steps(config, layout, dtype), Pool.of(config, 512, 4096, 8)
    program = analyse(programs.prefill(steps, 64, pool).compile())
    whole = pool.nbytes(layout, steps.cache_specs)
    assert program.aliased_bytes == whole
    assert program.large_copies(whole // config.num_layers // 2) == []


def test_a_second_run_compiles_nothing(make_engine: Callable[..., Engine], caplog: pytest.LogCaptureFixture) -> None:
    announced: list[str] = []
    engine = make_engine("tensor", 2, on_program=announced.append)
    few = [Case([i] * n, KINDS[i % 2], 20, seed=i, arrival=i) for i, n in enumerate((3, 270, 9, 12, 15))]
    first = run(engine, few, lambda: 5)
    programs = len(engine.runner.programs)
    assert programs == len(announced) > 3
    with jax.log_compiles(), caplog.at_level("WARNING"):
        second = run(engine, few, lambda: 5)
    compiled = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling jit(")]
    assert compiled == []
    assert len(engine.runner.programs) == programs == len(announced)
    assert [(s.tokens, s.logprobs) for s in first] == [(s.tokens, s.logprobs) for s in second]


def test_a_prompt_of_a_full_context(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine("tensor", 1)
    [one] = run(engine, [Case([1] * 699, KINDS[0], max_tokens=1, seed=0)])
    assert len(one.tokens) == 1


# Pages


@pytest.mark.parametrize("sharing", [True, False])
def test_a_small_pool_makes_sequences_wait_and_be_computed_again(sharing: bool, make_engine: Callable[..., Engine]) -> None:
    """Four sequences that outgrow the pages that there are gain what each gains alone."""
    engine = make_engine("tensor", 1, tokens=700, **INVARIANT)
    engine.scheduler.tables[0].sharing = sharing
    cases = [Case(list(range(i, i + 120)), KINDS[0], max_tokens=200, seed=i, stop_ids=()) for i in range(4)]
    together = run(engine, cases)
    assert engine.scheduler.statistics.preempted
    for case, among in zip(cases, together, strict=True):
        [alone] = run(engine, [case])
        assert (among.tokens, among.logprobs) == (alone.tokens, alone.logprobs)


def test_a_common_beginning_is_computed_once(make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """On each data shard, in whole pages; and what follows is what it is without sharing."""
    engine = make_engine("replicated", 2, length=1024)
    computed: list[int] = []
    prefill = engine.scheduler._prefill

    def counted(chunks: tuple[Chunk, ...]) -> ScheduledStep:
        computed.extend(chunk.length for chunk in chunks)
        return prefill(chunks)

    monkeypatch.setattr(engine.scheduler, "_prefill", counted)
    beginning = np.random.default_rng(0).integers(97, size=1000).tolist()
    cases = [Case([*beginning, i % 97, i // 97, 2], KINDS[0], max_tokens=5, seed=0, stop_ids=()) for i in range(100)]
    shared, in_pages = run(engine, cases), 1000 // PAGE * PAGE
    assert sum(computed) == 2 * in_pages + 100 * (1003 - in_pages)
    assert [s.num_shared for s in shared] == 2 * [0] + 98 * [in_pages]
    for table in engine.scheduler.tables:
        table.sharing = False
    for one, other in zip(shared, run(engine, cases), strict=True):
        assert one.tokens == other.tokens and other.num_shared == 0


def test_an_interrupted_step_leaves_no_page_behind(make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was to compute is not taken for computed."""
    engine = make_engine("tensor", 1)
    case = Case(list(range(2 * PAGE + 3)), KINDS[0], max_tokens=5, seed=0, stop_ids=())
    [alone] = run(engine, [case])
    for table in engine.scheduler.tables:
        table.clear()
    sequences = [case.sequence(i) for i in range(3)]
    for sequence in sequences:
        engine.scheduler.add(sequence)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine.runner.programs, "prefill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    engine.scheduler.check_integrity()
    while engine.scheduler.busy:
        engine.step()
    engine.scheduler.check_integrity()
    assert [s.tokens for s in sequences] == 3 * [alone.tokens]


def test_a_lost_cache_is_not_shared_from(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine("tensor", 1)
    case = Case(list(range(2 * PAGE + 3)), KINDS[0], max_tokens=50, seed=0, stop_ids=())
    [alone] = run(engine, [case])
    lost = case.sequence(0)
    engine.scheduler.add(lost)
    engine.step(0)
    for array in jax.tree.leaves(engine.runner.cache):
        array.delete()  # as a step does that fails
    with pytest.raises(RuntimeError, match="deleted"):
        engine.step(4)
    engine.scheduler.check_integrity()
    assert engine.scheduler.tables[0].find(case.prompt) == [ROOT]
    [again] = run(engine, [case])
    assert again.tokens == lost.tokens == alone.tokens
