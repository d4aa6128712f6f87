"""Classes for `ray.data.Dataset.map_batches`: batches of rows in, the same with columns of results out.

    dataset.map_batches(Generate, fn_constructor_kwargs={"model": MODEL}, batch_size=256, concurrency=2, num_gpus=1)

Ray deals the rows out as they lie, so what rows of different batches begin with is computed again: `generate_dataset` and
`score_dataset` bring together what begins alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.integrations.ray.datasets import GENERATED, SCORED, generated, plain, scored
from jaxllm.integrations.ray.kept_rows import ERROR
from jaxllm.integrations.ray.workers import Generator, Model, Prompts
from jaxllm.llm import LLM
from jaxllm.requests.outputs import RequestError
from jaxllm.requests.sampling_params import SamplingParams

Batch = dict[str, np.ndarray]


class Generate:
    """Completes the prompts of a column; adds `text`, `token_ids`, `token_logprobs`, `finish_reason` and `error`.

    Args:
      sampling_params: of all rows, or a mapping of their names; None: as the model's generation config has it. Rows without a
        seed draw by their place in the batch.
      options: of `LLM`.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        prompt: str = "prompt",
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        **options: Any,
    ):
        self.prompt = prompt
        self.params = SamplingParams(**sampling_params) if isinstance(sampling_params, Mapping) else sampling_params
        self._generator = Generator(Model.of(model, options))
        self._generator.start()

    def __call__(self, batch: Batch) -> Batch:
        prompts = [plain(prompt) for prompt in _column(batch, self.prompt)]
        outputs = self._generator.run(Prompts([*range(len(prompts))], prompts, [self.params] * len(prompts)))
        return batch | _columns([generated(output) for output in outputs], [*GENERATED, ERROR])


class Score:
    """Scores the continuations of a column after the contexts of another.

    Adds `logprobs`, `is_greedy`, `token_logprobs` and `error`. What rows of a batch begin with alike is computed once.

    Args:
      truncate: cut contexts that exceed the model's from the left.
      options: of `LLM`.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        context: str = "context",
        continuations: str = "continuations",
        truncate: bool = False,
        **options: Any,
    ):
        self.context, self.continuations, self.truncate = context, continuations, truncate
        self.llm = Model.of(model, options).make(workload="score", max_num_seqs=1)

    def __call__(self, batch: Batch) -> Batch:
        rows = zip(_column(batch, self.context), _column(batch, self.continuations), strict=True)
        asked = [(plain(context), plain(continuations)) for context, continuations in rows]
        try:
            found = [scored(scores) for scores in self.llm.score(asked, truncate=self.truncate)]
        except RequestError:  # one row's
            found = [_alone(self.llm, one, self.truncate) for one in asked]
        return batch | _columns(found, [*SCORED, ERROR])


def _alone(llm: LLM, one: Any, truncate: bool) -> dict[str, Any]:
    try:
        [scores] = llm.score([one], truncate=truncate)
        return scored(scores)
    except RequestError as error:
        return {ERROR: str(error)}


def _column(batch: Batch, name: str) -> np.ndarray:
    if name not in batch:
        raise RequestError(f"there is no column {name!r}: there are {', '.join(map(repr, batch))}; name the right one")
    return batch[name]


def _columns(rows: list[dict[str, Any]], names: list[str]) -> Batch:
    """Arrays of objects: lists of tokens are not equally long."""
    found = {name: np.empty(len(rows), object) for name in names}
    for name, column in found.items():
        for i, row in enumerate(rows):
            column[i] = row.get(name)
    return found
