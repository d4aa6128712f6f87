"""Contexts and continuations, as token ids -> log-probabilities.

One trie over everything that is asked, packed into rows (see `trie`), one row a data shard in each step. The host
stays ahead of the devices: a step's results are fetched when the next ones have been queued.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.buckets import power_of_two
from jaxllm.decoder.batch import PackedBatch
from jaxllm.execution.batch import TARGETS, Scored, abstract_batch, batch_shardings, empty_packed_batch
from jaxllm.execution.loglikelihood import CHUNK
from jaxllm.execution.runner import Tell, to_nobody
from jaxllm.execution.steps import Steps
from jaxllm.requests.encoding import Pair
from jaxllm.requests.outputs import RequestError
from jaxllm.scoring.ahead import fetched
from jaxllm.scoring.packed import PackedRow, attention_width, in_order, in_steps, pack_rows
from jaxllm.scoring.trie import Row
from sharding.mesh import to_devices
from sharding.padding import round_up


@dataclass(frozen=True)
class Score:
    """A continuation's log-probability, that of each of its tokens, and whether each of them is the likeliest one.

    `top_token_ids` are the likeliest in the tokens' places, `top_logprobs` their log-probabilities.
    """

    logprob: float
    token_logprobs: list[float]
    is_greedy: bool
    token_ids: list[int]
    top_token_ids: list[int]
    top_logprobs: list[float]


class Shape(NamedTuple):
    """Shape of a step's program: length of its rows, most tokens of a row that go to the head, width of its attention."""

    length: int
    max_scored: int
    width: int


class Cut(NamedTuple):
    """What decides into which rows pairs are packed: workers of equal ones give the same bits.

    Attributes:
      data: rows of a step.
      max_step_tokens: as `Scorer` has it.
      attention: its form (`jaxllm.platforms`).
      vocab: size of the vocabulary.
    """

    data: int
    max_step_tokens: int
    attention: str
    vocab: int


class Scorer:
    """Scores continuations with one model's steps.

    Args:
      params: returns the parameters when they are first needed; packing and compiling go without.
      max_step_tokens: tokens that each data shard takes in a step, at most; a longer pair has a step of its own length.
      tell: told of each step.
    """

    def __init__(self, steps: Steps, params: Callable[[], list[jax.Array]], max_step_tokens: int, tell: Tell = to_nobody):
        self.steps, self.params, self.max_step_tokens = steps, params, max_step_tokens
        self.layout = steps.layout
        self._programs: dict[Shape, Callable[..., Scored]] = {}
        self._tell = tell

    @property
    def cut(self) -> Cut:
        """How it packs."""
        return Cut(self.layout.data, self.max_step_tokens, self.steps.attention, self.steps.config.vocab_size)

    def pack(self, pairs: Sequence[Pair], names: Sequence[str] = ()) -> Packing:
        """Pack all pairs into rows of tokens. `names`: the pairs' names in errors."""
        return pack_pairs(pairs, names, self.cut)

    def compile(self, packing: Packing) -> None:
        """Compile what `run` will need, ahead of it."""
        for _, shape in self.batches(packing):
            self._program(shape)

    def run(self, packing: Packing) -> Generator[tuple[int, Score]]:
        """(index of the pair, its score), as they come. Raises RequestError where the model's logits are no numbers.

        Where it is left early, the devices have ended what they were given.
        """
        params = self.params()
        steps = ((rows, self._step(params, shape, self._batch(rows, shape))) for rows, shape in self.batches(packing))
        with closing(fetched(steps)) as results:
            for rows, scored in results:
                yield from _scores(packing, rows, scored)

    def batches(self, packing: Packing) -> list[tuple[list[RowTargets], Shape]]:
        """(rows, shape of the program) of each step that scores a wanted pair."""
        return [(rows, self._shape(rows, packing.length)) for rows in packing.steps(self.layout.data)]

    def _shape(self, rows: list[RowTargets], length: int) -> Shape:
        max_scored = power_of_two(max(length, round_up(max(len(one.scored) for one in rows), CHUNK)))
        return Shape(length, max_scored, attention_width(rows, length, self.steps))

    def step(self, shape: tuple[int, ...], batch: PackedBatch) -> None:
        """Take part in another process's step."""
        self._step(self.params(), Shape(*shape), batch)

    def _step(self, params: list[jax.Array], shape: Shape, batch: PackedBatch) -> Scored:
        with self._tell("step", shape, batch):
            return self._program(shape)(params, to_devices(batch, batch_shardings(self.layout, batch)))

    def _program(self, shape: Shape) -> Callable[..., Scored]:
        if shape not in self._programs:
            batch = abstract_batch(self.layout, empty_packed_batch(self.layout, shape.length, shape.max_scored))
            self._programs[shape] = self.steps.score.lower(self.steps.abstract_params(), batch, width=shape.width).compile()
        return self._programs[shape]

    def _batch(self, rows: list[RowTargets], shape: Shape) -> PackedBatch:
        batch = empty_packed_batch(self.layout, shape.length, shape.max_scored)
        for i, one in enumerate(rows):
            n = len(one.scored)
            one.put(batch, i)
            batch.scored[i, :n], batch.targets[i, :n] = one.scored, one.targets
        chunks = np.int32(max(-(-len(one.scored) // CHUNK) for one in rows))
        return batch._replace(chunks=chunks)


def pack_pairs(pairs: Sequence[Pair], names: Sequence[str], cut: Cut) -> Packing:
    """Pack all pairs into rows of tokens; no device is needed."""
    sequences = [[*context, *continuation[:-1]] for context, continuation in pairs]
    rows, length = pack_rows(sequences, cut.data, cut.max_step_tokens)
    targets = [RowTargets(pairs, row, cut.vocab) for row in rows]
    return Packing(pairs, names, in_order(targets, cut.attention), length, frozenset(range(len(pairs))))


@dataclass(frozen=True)
class Packing:
    """Pairs, the rows of `length` tokens that hold them, and those whose scores are wanted, by their index."""

    pairs: Sequence[Pair]
    names: Sequence[str]
    rows: list[RowTargets]
    length: int
    wanted: frozenset[int]

    def only(self, pairs: Iterable[int]) -> Packing:
        """The same steps, less those that score none of these pairs: those left give the same bits as in the whole run."""
        return replace(self, wanted=frozenset(pairs))

    def steps(self, data: int) -> list[list[RowTargets]]:
        """The rows of each step, `data` of them, that scores a wanted pair."""
        return [rows for rows in in_steps(self.rows, data) if any(i in self.wanted for one in rows for i in one.row.members)]

    def part(self, rows: Sequence[RowTargets]) -> tuple[list[int], Packing]:
        """Whole steps of it by themselves, to be sent elsewhere: the pairs in them, by their index here, and their packing.

        A pair stands in one row alone, so that parts share none.
        """
        pairs = sorted(i for one in rows for i in one.row.members)
        place = {pair: i for i, pair in enumerate(pairs)}
        wanted = frozenset(place[pair] for pair in self.wanted & place.keys())
        names = [self.name(pair) for pair in pairs]
        rows = [one.renumbered(place) for one in rows]
        return pairs, Packing([self.pairs[pair] for pair in pairs], names, rows, self.length, wanted)

    def name(self, pair: int) -> str:
        """The pair's name in errors."""
        return self.names[pair] if self.names else f"request {pair}"

    @property
    def unshared(self) -> int:
        """Tokens that scoring each pair on its own would take."""
        return sum(len(context) + len(continuation) - 1 for context, continuation in self.pairs)

    @property
    def tokens(self) -> int:
        """Tokens after sharing and splitting."""
        return sum(one.row.size for one in self.rows)

    @property
    def filled(self) -> float:
        """Fraction of the rows' positions that hold tokens."""
        return self.tokens / max(len(self.rows) * self.length, 1)


class RowTargets(PackedRow):
    """A row and its targets: each (token, target) once, and where each pair finds its own.

    Attributes:
      scored: [p] int32, tokens of the row that go to the head.
      targets: [p, TARGETS] int32.
      found: for each pair in the row, where its targets are in the flattened [p, TARGETS].
    """

    def __init__(self, pairs: Sequence[Pair], row: Row, vocab: int):
        super().__init__(row)
        parts = [(path[len(pairs[i][0]) - 1 :], pairs[i][1]) for i, path in zip(row.members, row.paths, strict=True)]
        nodes = np.concatenate([path for path, _ in parts]).astype(np.int64)
        ids = np.concatenate([np.asarray(ids, np.int64) for _, ids in parts])
        keys, inverse = np.unique(nodes * vocab + ids, return_inverse=True)
        node, target = keys // vocab, keys % vocab
        rank = np.arange(len(keys)) - np.searchsorted(node, node)  # of a target among those of its token
        place = np.cumsum(rank % TARGETS == 0) - 1
        self.scored = node[rank % TARGETS == 0].astype(np.int32)
        self.targets = np.zeros((len(self.scored), TARGETS), np.int32)
        self.targets[place, rank % TARGETS] = target
        cuts = np.cumsum([len(path) for path, _ in parts])[:-1]
        self.found = np.split((place * TARGETS + rank % TARGETS)[inverse], cuts)

    def renumbered(self, place: Mapping[int, int]) -> RowTargets:
        """The same row, its pairs called by other numbers."""
        other = copy(self)
        other.row = replace(self.row, members=[place[pair] for pair in self.row.members])
        return other


def _scores(packing: Packing, rows: list[RowTargets], host: Scored) -> Iterator[tuple[int, Score]]:
    for one, logprob, likeliest, top in zip(rows, host.logprob, host.likeliest, host.top_logprob, strict=False):
        for i, found in zip(one.row.members, one.found, strict=True):
            if i not in packing.wanted:
                continue
            logprobs = logprob.reshape(-1)[found].astype(np.float64)
            if np.isnan(logprobs).any():
                raise RequestError(
                    f"{packing.name(i)}: the model's logits are not numbers; try dtype='float32', or check its weights"
                )
            ids, at = list(packing.pairs[i][1]), found // TARGETS
            best, of_best = likeliest[at].tolist(), top[at].tolist()
            yield i, Score(float(logprobs.sum()), logprobs.tolist(), best == ids, ids, best, of_best)
