"""Every control of the sampler against a plain reference, and the statistics and seeds of what it draws."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.execution.batch import ALL_LOGPROBS, History, LogitsPenalties, Sampled, SamplingBatch, SamplingFilters
from jaxllm.execution.penalties import adjust, extended
from jaxllm.execution.sampling import LOGPROBS_MODES, sample
from jaxllm.execution.sampling import _filter as filter_logits

pytestmark = pytest.mark.fast

V = 50
run = jax.jit(sample, static_argnames=("top_logprobs", "mode"))


def logits(rows: int, seed: int = 0, vocab: int = V) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal((rows, vocab))).astype(np.float32)


def sampling_filters(rows: int, **columns: Any) -> SamplingFilters:
    """A column for each field: one value for all rows, or a list of them. Seeds count up unless given."""
    values = {"temperature": 1.0, "seed": range(rows), "top_k": 0, "top_p": 1.0, "min_p": 0.0} | columns
    dtypes = {"temperature": np.float32, "seed": np.uint32, "top_k": np.int32, "top_p": np.float32, "min_p": np.float32}
    return SamplingFilters(**{name: np.broadcast_to(np.array(values[name], dtypes[name]), rows).copy() for name in dtypes})


def logits_penalties(rows: int, **columns: Any) -> LogitsPenalties:
    plain: dict[str, Any] = {"min_tokens": np.zeros(rows, np.int32), "repetition": np.ones(rows, np.float32)}
    plain |= {name: np.zeros(rows, np.float32) for name in ("presence", "frequency")}
    plain |= {"prompt": np.zeros((rows, V), bool), "bias": np.zeros((rows, V), np.float32)}
    return LogitsPenalties(**(plain | {"history": History(np.zeros((rows, V), np.int32))} | columns))


def batch(
    rows: int, filters: SamplingFilters | None = None, penalties: LogitsPenalties | None = None, **columns: Any
) -> SamplingBatch:
    plain = {"count": np.zeros(rows, np.int32), "stop_ids": np.full((rows, 8), -1, np.int32)}
    return SamplingBatch(**(plain | columns), filters=filters, penalties=penalties)


def tokens(x: np.ndarray, batch: SamplingBatch) -> np.ndarray:
    return np.asarray(run(x, batch, None).token)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# Greedy


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    x = logits(4)
    x[0, [9, 30]] = 20.0
    x[1] = 0.0
    expected = x.argmax(axis=-1)
    assert expected[0] == 9 and expected[1] == 0
    np.testing.assert_array_equal(tokens(x, batch(4)), expected)


def test_greedy_rows_stay_greedy_among_rows_that_draw() -> None:
    x = logits(6)
    mixed = sampling_filters(6, temperature=[0, 1, 0, 5, 0, 1], top_k=[1, 0, 5, 0, 0, 2])
    np.testing.assert_array_equal(tokens(x, batch(6, mixed))[::2], x.argmax(axis=-1)[::2])


@pytest.mark.parametrize("filters", [None, sampling_filters(3), sampling_filters(3, top_k=5, top_p=0.9, min_p=0.1)])
def test_a_row_of_nan_stays_in_range_and_alone(filters: SamplingFilters | None) -> None:
    x = logits(3)
    clean = tokens(x, batch(3, filters))
    x[1] = np.nan
    found = tokens(x, batch(3, filters))
    assert 0 <= found[1] < V
    np.testing.assert_array_equal(found[[0, 2]], clean[[0, 2]])


# Filters


def kept(x: np.ndarray, **columns: Any) -> np.ndarray:
    return np.isfinite(np.asarray(jax.jit(filter_logits)(x, sampling_filters(len(x), **columns))))


def reference_top_k(x: np.ndarray, k: int) -> np.ndarray:
    return x >= np.sort(x, axis=-1)[:, [-min(k, V)]]


def reference_top_p(x: np.ndarray, p: float) -> np.ndarray:
    """The fewest tokens, likeliest first, that weigh at least p."""
    order = np.argsort(-x, axis=-1, kind="stable")
    sorted_p = np.take_along_axis(softmax(x), order, -1)
    before = np.cumsum(sorted_p, axis=-1) - sorted_p
    out = np.zeros(x.shape, bool)
    np.put_along_axis(out, order, before < p, -1)
    return out


def reference_min_p(x: np.ndarray, p: float) -> np.ndarray:
    probabilities = softmax(x)
    return probabilities >= p * probabilities.max(axis=-1, keepdims=True)


REFERENCES: dict[str, Callable[[np.ndarray, Any], np.ndarray]] = {
    "top_k": reference_top_k,
    "top_p": reference_top_p,
    "min_p": reference_min_p,
}
FILTERS = [
    *(("top_k", k) for k in (1, 2, 7, V - 1, V, V + 9)),
    *(("top_p", p) for p in (1e-6, 0.1, 0.5, 0.9, 0.99)),
    *(("min_p", p) for p in (0.001, 0.05, 0.3, 0.999)),
]


@pytest.mark.parametrize(("name", "value"), FILTERS)
def test_a_filter_keeps_what_the_reference_keeps(name: str, value: float) -> None:
    x = logits(64, seed=1)
    found = kept(x, **{name: value})
    np.testing.assert_array_equal(found, REFERENCES[name](x, value))
    assert found.any(axis=-1).all()


@pytest.mark.parametrize(("name", "value"), FILTERS)
def test_a_filter_keeps_what_transformers_keeps(name: str, value: float) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    warper = {"top_k": "TopKLogitsWarper", "top_p": "TopPLogitsWarper", "min_p": "MinPLogitsWarper"}[name]
    x = logits(64, seed=1)
    expected = getattr(transformers, warper)(value)(None, torch.tensor(x)).isfinite().numpy()
    np.testing.assert_array_equal(kept(x, **{name: value}), expected)


@pytest.mark.parametrize(("column", "off"), [("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)])
def test_a_filter_that_is_off_keeps_all(column: str, off: float) -> None:
    assert kept(logits(4), **{column: off}).all()


def test_filters_apply_in_order_min_p_top_k_top_p() -> None:
    x = np.log(np.tile(np.array([[0.4, 0.3, 0.15, 0.1, 0.05]], np.float32), (2, 1)))
    # Of all tokens 0.6 needs two; of those that top-k leaves, {0.4, 0.3} of 0.7, one is 0.57 and two are needed for 0.6.
    assert kept(x, top_k=2, top_p=0.6).sum() == 4
    assert kept(x, top_k=2, top_p=0.55).sum() == 2  # without top-k first 0.4 would not be enough for 0.55
    assert kept(x, min_p=0.5, top_p=0.55).sum() == 2  # min-p leaves {0.4, 0.3}


def test_ties_at_the_threshold_all_stay() -> None:
    x = np.full((1, V), -4.0, np.float32)
    x[0, [3, 10, 20]] = 2.0
    x[0, 30] = 5.0
    for columns in ({"top_k": 2}, {"top_k": 3}, {"top_p": 0.93}, {"min_p": float(np.exp(-3.01))}):
        np.testing.assert_array_equal(np.flatnonzero(kept(x, **columns)), [3, 10, 20, 30])
    np.testing.assert_array_equal(kept(np.zeros((1, V), np.float32), top_k=1), True)


def test_filters_are_each_rows_own() -> None:
    x = np.repeat(logits(1), 4, axis=0)
    found = kept(x, top_k=[0, 3, 0, 0], top_p=[1, 1, 0.5, 1], min_p=[0, 0, 0, 0.2])
    np.testing.assert_array_equal(found[0], True)
    np.testing.assert_array_equal(found[1], reference_top_k(x, 3)[1])
    np.testing.assert_array_equal(found[2], reference_top_p(x, 0.5)[2])
    np.testing.assert_array_equal(found[3], reference_min_p(x, 0.2)[3])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_filters_of_extreme_and_signed_logits(scale: float) -> None:
    x = np.array([[-3.0, -0.0, 0.0, 2.0, -2.0, 1.0, -np.inf, 3.0]], np.float32) * np.float32(scale)
    for k, expected in ((1, [7]), (2, [3, 7]), (3, [3, 5, 7]), (7, [0, 1, 2, 3, 4, 5, 7])):
        np.testing.assert_array_equal(np.flatnonzero(kept(x, top_k=k)), expected)


# Penalties


def adjusted(x: np.ndarray, batch: SamplingBatch) -> np.ndarray:
    assert batch.penalties is not None
    return np.asarray(jax.jit(adjust)(x, batch.penalties, batch))


def test_repetition_penalty_equals_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    x, ids = logits(5), np.random.default_rng(2).integers(V, size=(5, 12))
    seen = np.zeros((5, V), bool)
    np.put_along_axis(seen, ids, True, -1)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(ids), torch.tensor(x)).numpy()
    how = {"repetition": np.full(5, 1.7, np.float32)}
    for where in ({"prompt": seen}, {"history": History(seen.astype(np.int32))}):
        found = adjusted(x, batch(5, penalties=logits_penalties(5, **how, **where)))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_controls_come_in_order_bias_minimum_penalty() -> None:
    x = np.array([[1.0, -1.0, 2.0, 4.0]], np.float32)
    penalties = logits_penalties(
        1,
        min_tokens=np.array([2], np.int32),
        repetition=np.array([2.0], np.float32),
        prompt=np.array([[True, True, False, True]]),
        bias=np.array([[-3.0, 5.0, 1.0, 0.0]], np.float32),
        history=History(np.zeros((1, 4), np.int32)),
    )
    stop_ids = np.array([[3, -1]], np.int32)
    for index, last in ((0, -np.inf), (1, -np.inf), (2, 2.0)):
        found = adjusted(x, batch(1, penalties=penalties, stop_ids=stop_ids, count=np.array([index], np.int32)))
        # 1 - 3 = -2 is doubled, -1 + 5 = 4 is halved, the unseen one only gains its bias.
        np.testing.assert_array_equal(found, [[-4.0, 2.0, 3.0, last]])


def test_no_stop_id_before_min_tokens_even_with_a_bias() -> None:
    x = logits(4)
    stop_ids = np.tile(np.arange(8, dtype=np.int32), (4, 1))
    stop_ids[:, 6:] = -1  # padding names no token
    x[:, :6] += 50
    x[:, V - 1] += 30
    index = np.array([0, 2, 3, 9], np.int32)
    penalties = logits_penalties(4, min_tokens=np.array([3, 3, 3, 0], np.int32), bias=np.full((4, V), 7.0, np.float32))
    found = tokens(x, batch(4, penalties=penalties, stop_ids=stop_ids, count=index))
    assert (found[:2] == V - 1).all() and (found[2:] < 6).all()


def test_bias_of_minus_infinity_forbids() -> None:
    x = logits(300)
    bias = np.full((300, V), -np.inf, np.float32)
    bias[:, [4, 40]] = 0
    found = tokens(x, batch(300, sampling_filters(300, temperature=2.0), logits_penalties(300, bias=bias)))
    assert set(found) == {4, 40}


def test_presence_and_frequency_come_after_repetition_and_count_what_was_generated() -> None:
    x = np.array([[4.0, -4.0, 4.0, -1.0]], np.float32)
    penalties = logits_penalties(
        1,
        repetition=np.array([2.0], np.float32),
        presence=np.array([0.5], np.float32),
        frequency=np.array([-0.25], np.float32),
        prompt=np.array([[False, False, True, False]]),
        bias=np.zeros((1, 4), np.float32),
        history=History(np.array([[3, 1, 0, 0]], np.int32)),
    )
    expected = [[4 / 2 + 3 * 0.25 - 0.5, -4 * 2 + 0.25 - 0.5, 4 / 2, -1.0]]
    np.testing.assert_array_equal(adjusted(x, batch(1, penalties=penalties)), expected)


BAD_WORDS = [[7, 8], [7, 9, 10], [1, 2, 3, 4], [9, 10]]


@pytest.mark.parametrize(
    ("generated", "forbidden"),
    [([], []), ([8], []), ([7], [8]), ([9, 7], [8]), ([7, 9], [10]), ([8, 9], [10]), ([2, 3], []), ([1, 2, 3], [4])],
)
def test_the_last_token_of_a_bad_word_is_forbidden_after_the_others(generated: list[int], forbidden: list[int]) -> None:
    words = np.full((2, 4, 4), -1, np.int32)  # the second row has none
    for i, word in enumerate(BAD_WORDS):
        words[0, i, -len(word) :] = word
    history = History(np.zeros((2, V), np.int32), np.full((2, 3), -1, np.int32))
    for token in generated:
        history = jax.jit(extended)(history, np.array([token, token]))
    np.testing.assert_array_equal(history.counts, np.tile(np.bincount(generated, minlength=V), (2, 1)))
    x = logits(2)
    expected = x.copy()
    expected[0, forbidden] = -np.inf
    found = adjusted(x, batch(2, penalties=logits_penalties(2, history=history, bad_words=words)))
    np.testing.assert_array_equal(found, expected)


# Log-probabilities


def test_logprobs_are_those_of_the_raw_logits() -> None:
    x = logits(5)
    penalties = logits_penalties(5, bias=np.eye(5, V, dtype=np.float32) * 40)
    found = run(x, batch(5, penalties=penalties), 4)
    expected = np.log(softmax(x))
    np.testing.assert_array_equal(found.token, np.arange(5))
    np.testing.assert_allclose(found.logprobs.chosen, expected[np.arange(5), np.arange(5)], atol=1e-5)
    np.testing.assert_array_equal(found.logprobs.rank, [1 + (expected[i] > expected[i, i]).sum() for i in range(5)])
    order = np.argsort(-x, axis=-1)[:, :4]
    np.testing.assert_array_equal(found.logprobs.top_ids, order)
    np.testing.assert_allclose(found.logprobs.top, np.take_along_axis(expected, order, -1), atol=1e-5)
    assert found.logprobs.rank.min() >= 1 and found.logprobs.rank.max() > 1


def test_rank_of_ties_is_the_best_of_them() -> None:
    x = np.zeros((1, V), np.float32)
    x[0, 7] = 1.0
    penalties = logits_penalties(1, bias=40 * np.eye(V, dtype=np.float32)[[9]])
    assert run(x, batch(1, penalties=penalties), 0).logprobs.rank.tolist() == [2]


def test_all_logprobs_come_in_the_vocabularys_order() -> None:
    x = logits(3)
    found = run(x, batch(3), ALL_LOGPROBS)
    np.testing.assert_allclose(found.logprobs.top, np.log(softmax(x)), atol=1e-5)
    assert found.logprobs.top_ids.shape == (3, 0)


@pytest.mark.parametrize("name", LOGPROBS_MODES)
def test_what_a_mode_reports(name: str) -> None:
    """Of a greedy row, whose filters do nothing, a hot one, and a cold one with all filters."""
    x = logits(3)
    bias = np.zeros((3, V), np.float32)
    bias[:, 11] = -np.inf
    bias[1, 3] = 4.0
    how = {"temperature": [0.0, 2.0, 0.5], "top_k": [2, 0, 5], "top_p": [0.1, 1, 0.95], "min_p": [0.9, 0, 0.01]}
    asked = batch(3, sampling_filters(3, **how), logits_penalties(3, bias=bias))
    found = run(x, asked, ALL_LOGPROBS, mode=LOGPROBS_MODES[name])
    expected = x
    if name.startswith("processed"):
        expected = (x + bias) / np.array([[1.0], [2.0], [0.5]], np.float32)
        cold = expected[2:]
        cold = np.where(reference_min_p(cold, 0.01), cold, -np.inf)
        cold = np.where(reference_top_k(cold, 5), cold, -np.inf)
        expected[2] = np.where(reference_top_p(cold, 0.95), cold, -np.inf)[0]
        assert 2 <= np.isfinite(expected[2]).sum() <= 5
    if name.endswith("logprobs"):
        with np.errstate(divide="ignore"):
            expected = np.log(softmax(expected))
    at = (np.arange(3), found.token)
    np.testing.assert_allclose(found.logprobs.top, expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(found.logprobs.chosen, expected[at], rtol=1e-5, atol=2e-5)
    np.testing.assert_array_equal(found.logprobs.rank, 1 + (expected > expected[at][:, None]).sum(axis=-1))
    np.testing.assert_array_equal(found.token, tokens(x, asked))


def test_no_logprobs_unless_asked_for() -> None:
    found: Sampled = run(logits(2), batch(2), None)
    assert found.logprobs is None


# Draws


DRAWS = 20_000


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Distance of the counts in standard deviations of the chi-square distribution; a fair draw seldom passes 4."""
    expected = probabilities * counts.sum()
    assert expected.min() > 5
    degrees = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("by", ["seed", "count"])
def test_draws_follow_the_distribution(temperature: float, by: str) -> None:
    row = np.log(np.array([0.3, 0.25, 0.2, 0.15, 0.1], np.float32))
    seed = np.arange(DRAWS) if by == "seed" else np.full(DRAWS, 11)
    index = np.arange(DRAWS, dtype=np.int32) if by == "count" else np.zeros(DRAWS, np.int32)
    found = tokens(
        np.tile(row, (DRAWS, 1)), batch(DRAWS, sampling_filters(DRAWS, temperature=temperature, seed=seed), count=index)
    )
    counts = np.bincount(found, minlength=5)
    assert chi_square(counts, softmax(row / temperature)) < 4
    assert chi_square(counts, softmax(row / (temperature * 1.2))) > 4  # the test can tell


def test_draws_after_a_filter_follow_what_is_left() -> None:
    p = np.array([0.3, 0.25, 0.2, 0.15, 0.1], np.float32)
    found = tokens(np.tile(np.log(p), (DRAWS, 1)), batch(DRAWS, sampling_filters(DRAWS, top_k=3)))
    assert found.max() == 2
    assert chi_square(np.bincount(found), p[:3] / p[:3].sum()) < 4


def test_two_streams_and_two_steps_are_independent() -> None:
    row = np.zeros((DRAWS, 4), np.float32)
    for first, second in (((0, 0), (0, 1)), ((0, 0), (1, 0))):
        pair = [
            tokens(row, batch(DRAWS, sampling_filters(DRAWS, seed=2 * np.arange(DRAWS) + s), count=np.full(DRAWS, i, np.int32)))
            for s, i in (first, second)
        ]
        assert chi_square(np.bincount(4 * pair[0] + pair[1], minlength=16), np.full(16, 1 / 16)) < 4


def test_a_seed_draws_the_same_in_any_row_among_any_neighbours() -> None:
    x = logits(8, seed=5)
    columns = {
        "temperature": np.linspace(0.5, 2, 8), "seed": np.arange(8) * 77, "top_k": [0, 5] * 4, "top_p": [0.9, 1.0] * 4,
    }  # fmt: skip
    index = np.arange(8, dtype=np.int32)
    expected = tokens(x, batch(8, sampling_filters(8, **columns), count=index))
    order = np.random.default_rng(0).permutation(8)
    moved = {name: np.array(values)[order] for name, values in columns.items()}
    np.testing.assert_array_equal(tokens(x[order], batch(8, sampling_filters(8, **moved), count=index[order])), expected[order])
    for i in range(8):
        alone = {name: np.array(values)[[i]] for name, values in columns.items()}
        assert tokens(x[[i]], batch(1, sampling_filters(1, **alone), count=index[[i]])) == expected[i]


@pytest.mark.parametrize("temperature", [1e-6, 1e-20, 1e-37])
def test_a_temperature_near_zero_is_nearly_greedy(temperature: float) -> None:
    x = logits(200) + 5
    np.testing.assert_array_equal(tokens(x, batch(200, sampling_filters(200, temperature=temperature))), x.argmax(axis=-1))


def test_a_large_vocabulary_draws_the_same_tokens_with_and_without_an_idle_filter() -> None:
    """The filter is skipped when nobody asks for it; a neighbour that asks changes nothing for the others."""
    x = logits(4, vocab=30_000)
    alone = tokens(x, batch(4, sampling_filters(4)))
    among = tokens(x, batch(4, sampling_filters(4, top_k=[0, 0, 0, 2])))
    np.testing.assert_array_equal(alone[:3], among[:3])


def test_no_sort_of_the_vocabulary() -> None:
    """A sampler without a sort is cheap; log-probabilities, which rank the vocabulary, are asked for apart."""
    lowered = partial(run.lower, jnp.zeros((2, 1000)), batch(2, sampling_filters(2, top_k=5, top_p=0.5)))
    assert "sort" not in lowered(None).as_text()
    assert "chlo.top_k" in lowered(3).as_text()
    assert not any(word in lowered(ALL_LOGPROBS).as_text() for word in ("stablehlo.sort", "chlo.top_k"))
