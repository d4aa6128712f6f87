"""Sequences -> what a step is given: the one place that makes arrays of them."""

from __future__ import annotations

from collections.abc import Sequence as Listed
from typing import Any, NamedTuple

import numpy as np

from jaxllm.buckets import PAGE, TILE
from jaxllm.execution.batch import (
    DecodeBatch,
    ListedPenalties,
    SamplingBatch,
    SamplingFilters,
    empty_decode_batch,
    empty_sampling_batch,
    empty_token_batch,
)
from jaxllm.execution.step_shapes import StepShapes
from jaxllm.generation.scheduler import Chunk, ScheduledStep
from jaxllm.generation.sequence import Sequence
from sharding.layout import Layout


class Placed(NamedTuple):
    """What a step takes beside the parameters and the cache, and which row of its samples is whose.

    `tiles`: the first row of each chunk of a prompt.
    """

    batch: Any
    rows: list[tuple[Sequence, int]]
    tiles: list[tuple[Chunk, int]] = []  # noqa: RUF012  # never added to


def prefill_inputs(chunks: Listed[Chunk], layout: Layout, shapes: StepShapes, groups: int) -> Placed:
    """The batch is (token batch, tokens to sample after, sampling batch, targets), see `Steps`.

    `groups`: of layers that share pages.
    """
    used, samples = [0] * layout.data, [0] * layout.data  # rows and samples so far, on each data shard
    for chunk in chunks:
        used[chunk.sequence.shard] += -(-chunk.length // TILE)
    size = next(n for n in shapes.tokens if n >= TILE * max(used))
    width = shapes.width_for(max(chunk.start + chunk.length for chunk in chunks))
    batch, last = empty_token_batch(layout, size, groups, width)
    per_shard, placed, tiled = size // TILE, [], []
    targets = np.zeros_like(batch.tokens) if any(chunk.sequence.wants_prompt_logprobs for chunk in chunks) else None
    sequences: list[Sequence | None] = [None] * len(last)
    used = [0] * layout.data
    for chunk in chunks:
        sequence, shard = chunk.sequence, chunk.sequence.shard
        first, tiles = shard * per_shard + used[shard], -(-chunk.length // TILE)
        batch.tokens[first : first + tiles].reshape(-1)[: chunk.length] = chunk.tokens
        batch.start[first : first + tiles] = chunk.start + TILE * np.arange(tiles)
        batch.lengths[first : first + tiles] = len(sequence.prefill_tokens)
        _fill_pages(batch.pages, slice(first, first + tiles), sequence, width)
        tiled.append((chunk, first))
        if targets is not None:
            following = sequence.prefill_tokens[chunk.start + 1 : chunk.start + chunk.length + 1]
            targets[first : first + tiles].reshape(-1)[: len(following)] = following
        if chunk.is_last:
            row = shard * per_shard + samples[shard]
            last[row] = used[shard] * TILE + chunk.length - 1
            sequences[row] = sequence
            placed.append((sequence, row))
            samples[shard] += 1
        used[shard] += tiles
    sampling = sampling_inputs(sequences, [chunk.sequence for chunk in chunks], width)
    return Placed((batch, last, sampling, targets), placed, tiled)


def decode_inputs(step: ScheduledStep, layout: Layout, shapes: StepShapes, groups: int) -> Placed:
    """The batch is a `DecodeBatch`: the rows of each data shard stand together."""
    shards = [[s for s in step.decode if s.shard == shard] for shard in range(layout.data)]
    per_shard = shapes.rows_for(max(map(len, shards)))
    placed = [(s, shard * per_shard + i) for shard, here in enumerate(shards) for i, s in enumerate(here)]
    sequences: list[Sequence | None] = [None] * (per_shard * layout.data)
    for sequence, row in placed:
        sequences[row] = sequence
    width = shapes.width_for(step.reach)
    batch = empty_decode_batch(len(sequences), groups, width, sampling_inputs(sequences, step.decode, width))
    rows = batch.rows
    for sequence, row in placed:
        rows.live[row], rows.tokens[row], rows.remaining[row] = True, sequence.tokens[-1], sequence.remaining
        rows.position[row] = sequence.cached
        _fill_pages(batch.pages, slice(row, row + 1), sequence, width)
    return Placed(_limited(batch, step), placed)


def further_inputs(step: ScheduledStep, before: Placed, shapes: StepShapes) -> DecodeBatch:
    """A call of the same rows that goes on where the one `before` it leaves them: its pages and limits are new. Rows that have
    ended have page 0, which is nobody's.
    """
    width, going_on = shapes.width_for(step.reach), set(map(id, step.decode))
    pages = tuple(np.zeros((len(array), width), np.int32) for array in before.batch.pages)
    for sequence, row in before.rows:
        if id(sequence) in going_on:
            _fill_pages(pages, slice(row, row + 1), sequence, width)
    return _limited(before.batch._replace(pages=pages), step)


def expected_decode(sequences: Listed[Sequence], layout: Layout, shapes: StepShapes, groups: int, steps: int) -> DecodeBatch:
    """An empty batch of the shapes that decoding these sequences, which have not begun, will have."""
    rows = shapes.rows_for(-(-len(sequences) // layout.data)) * layout.data
    width = shapes.width_for(max(len(s.prompt) + min(steps, s.remaining) for s in sequences))
    return empty_decode_batch(rows, groups, width, sampling_inputs([None] * rows, sequences, width))


def _limited(batch: DecodeBatch, step: ScheduledStep) -> DecodeBatch:
    until_stopped = len(batch.rows.tokens) + 1 if step.until_stopped is None else step.until_stopped
    return batch._replace(limit=np.int32(step.max_tokens), until_stopped=np.int32(until_stopped))


def _fill_pages(pages: tuple[np.ndarray, ...], rows: slice, sequence: Sequence, width: int) -> None:
    assert sequence.held is not None
    for array, held in zip(pages, sequence.held.pages, strict=True):
        array[rows, : len(held)] = held[:width]


def sampling_inputs(sequences: Listed[Sequence | None], here: Listed[Sequence], width: int) -> SamplingBatch:
    """How each row chooses its next token; rows without a sequence choose anything.

    Args:
      here: whose wishes the program follows.
      width: pages of the longest.
    """
    batch = empty_sampling_batch(
        len(sequences),
        max(len(s.stop_ids) for s in here),
        filters=any(s.params.temperature > 0 for s in here),
        listed=width * PAGE if any(_has_penalties(s) for s in here) else 0,
        biases=max(len(_biases(s)) for s in here),
        bad_words=_room_for_bad_words(here),
    )
    batch = batch._replace(allowed=_masks(sequences, here))
    for row, sequence in enumerate(sequences):
        if sequence is not None:
            batch.count[row] = len(sequence.tokens)
            batch.stop_ids[row, : len(sequence.stop_ids)] = sequence.stop_ids
            if batch.filters is not None:
                _fill_filters(batch.filters, row, sequence)
            if isinstance(batch.penalties, ListedPenalties):
                _fill_penalties(batch.penalties, row, sequence)
    return batch


def _masks(sequences: Listed[Sequence | None], here: Listed[Sequence]) -> np.ndarray | None:
    """The tokens that each row may choose; None where no grammar says it."""
    words = next((len(s.grammar.mask) for s in here if s.grammar is not None), 0)
    if not words:
        return None
    masks = np.full((len(sequences), words), -1, np.int32)
    for row, sequence in enumerate(sequences):
        if sequence is not None and sequence.grammar is not None:
            masks[row] = sequence.grammar.mask
    return masks


def _fill_filters(filters: SamplingFilters, row: int, sequence: Sequence) -> None:
    params = sequence.params
    filters.temperature[row], filters.seed[row] = params.temperature, sequence.seed
    filters.top_k[row], filters.top_p[row], filters.min_p[row] = max(params.top_k, 0), params.top_p, params.min_p


def _has_penalties(sequence: Sequence) -> bool:
    params = sequence.params
    constrained = params.allowed_token_ids is not None or bool(params.logit_bias) or bool(sequence.bad_words)
    penalised = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    return constrained or penalised or params.min_tokens > 0


def _fill_penalties(penalties: ListedPenalties, row: int, sequence: Sequence) -> None:
    params, tokens = sequence.params, sequence.prompt + sequence.tokens
    penalties.min_tokens[row], penalties.repetition[row] = params.min_tokens, params.repetition_penalty
    penalties.presence[row], penalties.frequency[row] = params.presence_penalty, params.frequency_penalty
    penalties.prompt[row] = len(sequence.prompt)
    penalties.tokens[row, : len(tokens)] = tokens
    biases = _biases(sequence)
    penalties.other_bias[row] = 0 if params.allowed_token_ids is None else -np.inf
    penalties.bias_ids[row, : len(biases)] = list(biases)
    penalties.bias[row, : len(biases)] = list(biases.values())
    if penalties.bad_words is not None:
        for i, word in enumerate(_of_several(sequence.bad_words)):
            penalties.bad_words[row, i, -len(word) :] = word


def _biases(sequence: Sequence) -> dict[int, float]:
    """Of each token whose logit is changed otherwise than that of most: what is added to it."""
    params = sequence.params
    biases: dict[int, float] = {} if params.allowed_token_ids is None else dict.fromkeys(params.allowed_token_ids, 0.0)
    for token, bias in (params.logit_bias or {}).items():
        if params.allowed_token_ids is None or token in biases:
            biases[token] = bias
    return biases | {word[0]: -np.inf for word in sequence.bad_words if len(word) == 1}


def _room_for_bad_words(sequences: Listed[Sequence]) -> tuple[int, int]:
    """The most bad words of several tokens that a sequence has, and the most tokens of one."""
    several = [_of_several(sequence.bad_words) for sequence in sequences]
    return max(map(len, several)), max((len(word) for words in several for word in words), default=0)


def _of_several(words: Listed[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [word for word in words if len(word) > 1]
