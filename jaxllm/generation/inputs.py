"""Sequences -> what a step is given: the one place that makes arrays of them."""

from __future__ import annotations

from collections.abc import Sequence as Listed

import numpy as np

from jaxllm.buckets import chunk_bucket
from jaxllm.decoder.batch import TokenBatch
from jaxllm.execution.batch import (
    DecodeBatch,
    LogitsPenalties,
    SamplingBatch,
    SamplingFilters,
    empty_decode_batch,
    empty_sampling_batch,
    empty_token_batch,
)
from jaxllm.generation.scheduler import Chunk, ScheduledStep
from jaxllm.generation.sequence import Sequence


def cache_row(slot: int, rows: int, data: int) -> int:
    """The row of a cache of `rows` that belongs to a slot: slots are dealt out over the data shards in turn."""
    return slot % data * (rows // data) + slot // data


def prefill_inputs(chunks: Listed[Chunk], data: int, vocab_size: int) -> tuple[TokenBatch, np.ndarray, SamplingBatch]:
    """What `Steps.prefill` takes beside the parameters and the cache: a chunk on each data shard, or none."""
    batch, last = empty_token_batch(data, chunk_bucket(chunks[0].length))
    # Of shards that have no chunk, the farthest: blocks of the cache before it are skipped.
    batch.start[:] = max(chunk.start for chunk in chunks)
    sequences: list[Sequence | None] = [None] * data
    for chunk in chunks:
        sequence = chunk.sequence
        assert sequence.slot is not None and batch.slots is not None
        shard = sequence.slot % data
        sequences[shard] = sequence
        batch.tokens[shard, : chunk.length] = chunk.tokens
        batch.start[shard], batch.lengths[shard] = chunk.start, len(sequence.prefill_tokens)
        batch.slots[shard], last[shard] = sequence.slot // data, chunk.length - 1
        if batch.valid is not None:
            batch.valid[shard] = True
    return batch, last, sampling_inputs(sequences, vocab_size)


def decode_inputs(step: ScheduledStep, running: Listed[Sequence], rows: int, data: int, vocab_size: int) -> DecodeBatch:
    """What `Steps.decode` takes beside the parameters and a cache of `rows`."""
    sequences: list[Sequence | None] = [None] * rows
    for sequence in step.decode:
        assert sequence.slot is not None
        sequences[cache_row(sequence.slot, rows, data)] = sequence
    batch = empty_decode_batch(rows, sampling_inputs(sequences, vocab_size))
    for sequence in running:
        # A row in the middle of its prompt is carried along: what it writes is overwritten by its next chunk.
        assert sequence.slot is not None
        batch.position[cache_row(sequence.slot, rows, data)] = sequence.cached
    for row, decoding in enumerate(sequences):
        if decoding is not None:
            batch.live[row], batch.tokens[row], batch.remaining[row] = True, decoding.tokens[-1], decoding.remaining
    return batch._replace(limit=np.int32(step.max_tokens), until_any=np.bool_(step.until_any))


def sampling_inputs(sequences: Listed[Sequence | None], vocab_size: int) -> SamplingBatch:
    """How each row chooses its next token; rows without a sequence choose anything."""
    here = [s for s in sequences if s is not None]
    batch = empty_sampling_batch(
        len(sequences),
        max(len(s.stop_ids) for s in here),
        filters=any(s.params.temperature > 0 for s in here),
        penalties=any(_has_penalties(s) for s in here),
        bad_words=_room_for_bad_words(here),
        vocab_size=vocab_size,
    )
    for row, sequence in enumerate(sequences):
        if sequence is not None:
            batch.count[row] = len(sequence.tokens)
            batch.stop_ids[row, : len(sequence.stop_ids)] = sequence.stop_ids
            if batch.filters is not None:
                _fill_filters(batch.filters, row, sequence)
            if batch.penalties is not None:
                _fill_penalties(batch.penalties, row, sequence)
    return batch


def _fill_filters(filters: SamplingFilters, row: int, sequence: Sequence) -> None:
    params = sequence.params
    filters.temperature[row], filters.seed[row] = params.temperature, sequence.seed
    filters.top_k[row], filters.top_p[row], filters.min_p[row] = max(params.top_k, 0), params.top_p, params.min_p


def _has_penalties(sequence: Sequence) -> bool:
    params = sequence.params
    constrained = params.allowed_token_ids is not None or bool(params.logit_bias) or bool(sequence.bad_words)
    penalised = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    return constrained or penalised or params.min_tokens > 0


def _fill_penalties(penalties: LogitsPenalties, row: int, sequence: Sequence) -> None:
    params = sequence.params
    penalties.min_tokens[row], penalties.repetition[row] = params.min_tokens, params.repetition_penalty
    penalties.presence[row], penalties.frequency[row] = params.presence_penalty, params.frequency_penalty
    penalties.prompt[row, sequence.prompt] = True
    for token in sequence.tokens:
        penalties.history.counts[row, token] += 1
    if params.allowed_token_ids is not None:
        penalties.bias[row] = -np.inf
        penalties.bias[row, params.allowed_token_ids] = 0
    for token, bias in (params.logit_bias or {}).items():
        penalties.bias[row, token] += bias
    _fill_bad_words(penalties, row, sequence)


def _fill_bad_words(penalties: LogitsPenalties, row: int, sequence: Sequence) -> None:
    """Words of one token into the bias, the others with what they are compared with."""
    for word in sequence.bad_words:
        if len(word) == 1:
            penalties.bias[row, word[0]] = -np.inf
    if penalties.bad_words is None or penalties.history.recent is None:
        return
    for i, word in enumerate(_of_several(sequence.bad_words)):
        penalties.bad_words[row, i, -len(word) :] = word
    recent = sequence.tokens[-penalties.history.recent.shape[1] :]
    penalties.history.recent[row, penalties.history.recent.shape[1] - len(recent) :] = recent


def _room_for_bad_words(sequences: Listed[Sequence]) -> tuple[int, int]:
    """The most bad words of several tokens that a sequence has, and the most tokens of one."""
    several = [_of_several(sequence.bad_words) for sequence in sequences]
    return max(map(len, several)), max((len(word) for words in several for word in words), default=0)


def _of_several(words: Listed[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [word for word in words if len(word) > 1]
