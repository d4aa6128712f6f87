"""Runs the steps of generating: the programs, the parameters, the cache, and where the rows that decode stand.

What it is given is the host's alone, so that several processes can be told the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax

from jaxllm.decoder import kv_cache as kv
from jaxllm.decoder.cache_spec import Pool
from jaxllm.execution.batch import DecodeBatch, Sampled, batch_shardings
from jaxllm.execution.program_table import Programs
from jaxllm.execution.steps import Steps
from sharding.mesh import to_devices

Tell = Callable[..., AbstractContextManager[None]]
"""Called with the name of a method and what it is given; within what it returns that is done."""


def to_nobody(*message: Any) -> AbstractContextManager[None]:
    """There are no other processes."""
    return nullcontext()


class Runner:
    """Runs one model's steps.

    Args:
      on_program: called with a program's name before its first use, which may compile it.
      tell: told of each call.
    """

    def __init__(
        self, steps: Steps, params: list[jax.Array], pool: Pool, on_program: Callable[[str], None], tell: Tell = to_nobody
    ):
        self.steps, self.params, self.pool = steps, params, pool
        self.cache: kv.Cache = []
        self.programs = Programs(steps, pool, on_program)
        self._decoding: DecodeBatch | None = None  # of the last decode call, as it stands after it
        self._gather = jax.jit(lambda x: x, out_shardings=steps.layout.sharding(()))
        self._tell = tell

    def prefill(self, batch: tuple[Any, ...], top_logprobs: int | None) -> Sampled:
        """`batch`: see `prefill_inputs`."""
        with self._tell("prefill", batch, top_logprobs):
            placed, tokens = self._to_devices(batch), batch[0].tokens.size // self.steps.layout.data
            program = self.programs.prefill(tokens, placed, top_logprobs)
            self.cache, sampled = program(self.params, self._cache(), *placed)
            return sampled

    def decode(self, batch: DecodeBatch, top_logprobs: int | None) -> tuple[Sampled, jax.Array]:
        """The samples, and the steps that were taken."""
        with self._tell("decode", batch, top_logprobs):
            return self._decode(self._to_devices(batch), top_logprobs)

    def decode_on(self, pages: tuple[Any, ...], limit: Any, until_stopped: Any, top_logprobs: int | None) -> Any:
        """Go on where the last call leaves its rows: pages and limits are new (`DecodeBatch`)."""
        with self._tell("decode_on", pages, limit, until_stopped, top_logprobs):
            assert self._decoding is not None, "there was a call"
            pages, limit, until_stopped = self._to_devices((pages, limit, until_stopped))
            further = self._decoding._replace(pages=pages, limit=limit, until_stopped=until_stopped)
            return self._decode(further, top_logprobs)

    def _decode(self, batch: DecodeBatch, top_logprobs: int | None) -> tuple[Sampled, jax.Array]:
        program = self.programs.decode(batch, top_logprobs)
        self.cache, sampled, taken, rows = program(self.params, self._cache(), batch)
        self._decoding = batch._replace(rows=rows)
        return sampled, taken

    def expect_decode(self, batch: DecodeBatch, top_logprobs: int | None) -> None:
        """A batch of these shapes will come soon."""
        with self._tell("expect_decode", batch, top_logprobs):
            self.programs.expect_decode(batch, top_logprobs)

    def rest(self) -> None:
        """The next decode call will not go on with the last one's rows."""
        self._decoding = None

    def forget(self) -> None:
        """Let go of the cache: a new one is made when it is needed."""
        with self._tell("forget"):
            self.cache = []

    def whole(self, i: int) -> jax.Array:
        """A parameter, all of it on every device: of several processes no other has the whole of it."""
        with self._tell("whole", i):
            return self._gather(self.params[i])

    def _cache(self) -> kv.Cache:
        return self.cache or kv.init(self.steps.cache_specs, self.steps.layout, self.pool.pages)

    def _to_devices(self, batch: Any) -> Any:
        return to_devices(batch, batch_shardings(self.steps.layout, batch))
