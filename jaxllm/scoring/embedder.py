"""Token ids -> vectors: as in scoring, what sequences begin with alike runs once, packed into rows."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Literal, NamedTuple

import jax
import numpy as np

from jaxllm.buckets import power_of_two
from jaxllm.decoder.batch import PackedBatch
from jaxllm.execution.batch import abstract_batch, batch_shardings, empty_packed_batch
from jaxllm.execution.loglikelihood import CHUNK
from jaxllm.execution.pooling import Pooled
from jaxllm.execution.runner import Tell, to_nobody
from jaxllm.execution.steps import Steps
from jaxllm.scoring.ahead import fetched
from jaxllm.scoring.packed import PackedRow, attention_width, in_order, in_steps, pack_rows
from sharding.mesh import to_devices
from sharding.padding import round_up

Pooling = Literal["last", "cls", "mean"]


class Shape(NamedTuple):
    """Shape of a step's program: length of its rows, most sequences in a row, width of its attention."""

    length: int
    sequences: int
    width: int


class Embedder:
    """Embeds, or classifies, with one model's steps.

    Args:
      params: returns the parameters.
      max_step_tokens: tokens that each data shard takes in a step, at most; a longer sequence has a step of its own length.
      tell: told of each step.
    """

    def __init__(self, steps: Steps, params: Callable[[], list[jax.Array]], max_step_tokens: int, tell: Tell = to_nobody):
        self.steps, self.params, self.max_step_tokens = steps, params, max_step_tokens
        self.layout = steps.layout
        self._programs: dict[tuple[Pooled, Shape], Callable[..., jax.Array]] = {}
        self._tell = tell

    def run(self, sequences: Sequence[Sequence[int]], what: Pooled, at: int = -1) -> Generator[tuple[int, np.ndarray]]:
        """(index of a sequence, what is wanted at its token `at`, [D] or [labels] float32), as they come.

        Where it is left early, the devices have ended what they were given.
        """
        found, length = pack_rows(sequences, self.layout.data, self.max_step_tokens)
        rows = in_order([PackedRow(row) for row in found], self.steps.attention)
        params = self.params()
        steps = ((group, self._step(params, group, length, what, at)) for group in in_steps(rows, self.layout.data))
        with closing(fetched(steps)) as results:
            for group, vectors in results:
                for one, of_row in zip(group, vectors, strict=False):
                    yield from zip(one.row.members, of_row, strict=False)

    def _step(self, params: list[jax.Array], rows: list[PackedRow], length: int, what: Pooled, at: int) -> jax.Array:
        most = max(len(one.row.members) for one in rows)
        shape = Shape(length, power_of_two(round_up(most, CHUNK)), attention_width(rows, length, self.steps))
        batch = empty_packed_batch(self.layout, shape.length, shape.sequences)
        for i, one in enumerate(rows):
            one.put(batch, i)
            batch.scored[i, : len(one.row.paths)] = [path[at] for path in one.row.paths]
        return self._run(params, what, shape, batch._replace(chunks=np.int32(-(-most // CHUNK))))

    def step(self, what: Pooled, shape: tuple[int, ...], batch: PackedBatch) -> None:
        """Take part in another process's step."""
        self._run(self.params(), what, Shape(*shape), batch)

    def _run(self, params: list[jax.Array], what: Pooled, shape: Shape, batch: PackedBatch) -> jax.Array:
        with self._tell("step", what, shape, batch):
            return self._program(what, shape)(params, to_devices(batch, batch_shardings(self.layout, batch)))

    def _program(self, what: Pooled, shape: Shape) -> Callable[..., jax.Array]:
        if (what, shape) not in self._programs:
            batch: PackedBatch = abstract_batch(self.layout, empty_packed_batch(self.layout, shape.length, shape.sequences))
            lowered = self.steps.pool.lower(self.steps.abstract_params(), batch, what=what, width=shape.width)
            self._programs[what, shape] = lowered.compile()
        return self._programs[what, shape]
