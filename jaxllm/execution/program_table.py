"""The compiled programs of an engine, each made before its first use, or on a thread beside when it is expected."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
from jax.stages import Compiled, Wrapped

from jaxllm.decoder import kv_cache as kv
from jaxllm.decoder.cache_spec import Pool
from jaxllm.execution.batch import DecodeBatch, abstract_batch
from jaxllm.execution.steps import Steps


class Programs:
    """Programs by the shapes of what they are given. What was compiled once never compiles again: other shapes are an error.

    Args:
      on_program: called with a program's name before its first use, which may compile it.
    """

    def __init__(self, steps: Steps, pool: Pool, on_program: Callable[[str], None]):
        self._steps, self._on_program = steps, on_program
        cache = kv.abstract(steps.cache_specs, steps.layout, pool.pages)
        self._before_batch = (steps.abstract_params(), cache)
        self._made: dict[Hashable, Future[Compiled]] = {}
        self._used: set[Hashable] = set()
        self._beside = ThreadPoolExecutor(1, "jaxllm-compile")

    def __len__(self) -> int:
        """Programs that were used."""
        return len(self._used)

    def prefill(self, tokens: int, batch: tuple[Any, ...], top_logprobs: int | None) -> Compiled:
        """The program for a batch of so many tokens on each data shard."""
        return self._get(f"prefill of {tokens} tokens", self._steps.prefill, batch, top_logprobs)

    def decode(self, batch: DecodeBatch, top_logprobs: int | None) -> Compiled:
        return self._get(_name(batch), self._steps.decode, (batch,), top_logprobs)

    def expect_decode(self, batch: DecodeBatch, top_logprobs: int | None) -> None:
        """A batch of these shapes will come soon."""
        self._prepare(_name(batch), self._steps.decode, (batch,), top_logprobs)

    def _get(self, name: str, step: Wrapped, batch: tuple[Any, ...], top_logprobs: int | None) -> Compiled:
        key = _key(name, batch, top_logprobs)
        if key not in self._used:
            self._on_program(name)
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = Future()
            try:
                made.set_result(self._compile(step, self._abstract(batch), top_logprobs))
            except BaseException as error:
                made.set_exception(error)
        try:
            program = made.result()
        except BaseException:
            del self._made[key]  # the next use tries again
            raise
        self._used.add(key)
        return program

    def _prepare(self, name: str, step: Wrapped, batch: tuple[Any, ...], top_logprobs: int | None) -> None:
        key = _key(name, batch, top_logprobs)
        if key not in self._made:
            self._made[key] = self._beside.submit(partial(self._compile, step, self._abstract(batch), top_logprobs))

    def _abstract(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        whole: tuple[Any, ...] = abstract_batch(self._steps.layout, batch)
        return whole

    def _compile(self, step: Wrapped, batch: tuple[Any, ...], top_logprobs: int | None) -> Compiled:
        return step.lower(*self._before_batch, *batch, top_logprobs=top_logprobs).compile()


def _name(batch: DecodeBatch) -> str:
    return f"decode of {len(batch.rows.tokens)} rows"


def _key(name: str, batch: tuple[Any, ...], top_logprobs: int | None) -> Hashable:
    leaves, structure = jax.tree.flatten(batch)
    return name, structure, tuple(x.shape for x in leaves), top_logprobs
