"""A data set in, a row of results for each of its rows out, by workers on the nodes of a Ray cluster.

The driver needs no device. It opens the tokenizer, and gives workers rows that begin alike together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from jaxllm.integrations.ray.cluster import Place
from jaxllm.integrations.ray.crew import Crew, Failed
from jaxllm.integrations.ray.kept_rows import ERROR, ROW, KeptRows, open_rows
from jaxllm.integrations.ray.scoring import pack_for, score_parts, tokens_left
from jaxllm.integrations.ray.workers import Facts, Generator, Model, Prompts, ScoreWorker, crew_of
from jaxllm.requests.encoding import Pair, PairEncoder, fit
from jaxllm.requests.outputs import RequestError, RequestOutput
from jaxllm.requests.prompts import parse_prompt, parse_score_requests
from jaxllm.requests.sampling_params import SamplingParams
from jaxllm.scoring.partition import groups_for
from jaxllm.scoring.scorer import Score

ANSWER = 64  # tokens of an answer whose length nobody says, where work is divided

TOKENS, NUMBERS = pa.list_(pa.int32()), pa.list_(pa.float64())
GENERATED = {"text": pa.string(), "token_ids": TOKENS, "token_logprobs": NUMBERS, "finish_reason": pa.string()}
SCORED = {"logprobs": NUMBERS, "is_greedy": pa.list_(pa.bool_()), "token_logprobs": pa.list_(NUMBERS)}


@dataclass(frozen=True)
class Summary:
    """What became of a job's rows: how many there are, were done before and failed, and tokens after sharing.

    `tokens`: of what this run was to do; of prompts alone, where it generates.
    """

    rows: int
    before: int
    failed: int
    tokens: int


def generate_dataset(
    model: str | Path,
    dataset: Iterable[Mapping[str, Any]] | Any,
    output: str | Path,
    *,
    sampling_params: SamplingParams | None = None,
    prompt: str = "prompt",
    place: Place | None = None,
    virtual_devices: int | None = None,
    **options: Any,
) -> Summary:
    """Complete the prompt of each row: a text, or token ids. Ray must be connected: `cluster(address)`, or `ray.init`.

    Rows that begin alike go to one worker. A row draws what one process would draw for it, whoever has it and beside whom.

    Args:
      dataset: a `ray.data.Dataset`, whose rows must come in the same order each time, or mappings; all are held in memory.
      output: a file of JSON lines (.jsonl), or a folder for Parquet files: `row`, the number of the row from 0, `text`,
        `token_ids`, `token_logprobs` where `sampling_params` ask for them, `finish_reason`, and `error`, why it has none.
        What is there is not done again, but for what failed.
      sampling_params: of all rows, with n=1; None: as the model's generation config has it.
      prompt: the column of prompts.
      place: how many workers, and what each takes.
      options: of `LLM`.

    Raises RequestError, and what `LLM` does; what was done until then is kept.
    """
    if sampling_params is not None and sampling_params.n != 1:
        raise RequestError(f"n={sampling_params.n}: a row has one sample; give as many rows")
    prompts = [row[prompt] for row in _rows(dataset, [prompt])]
    job = _job("generate", model, prompts, {**options, "sampling_params": repr(sampling_params)})
    with closing(open_rows(Path(output), job, GENERATED)) as kept:
        left = [i for i in range(len(prompts)) if i not in kept.done]
        if not left:
            return Summary(len(prompts), len(kept.done), 0, 0)
        place, described = (place or Place()).filled(), Model.of(model, options, virtual_devices)
        ids = _encoded(described, [prompts[i] for i in left])
        answer = ANSWER if sampling_params is None or sampling_params.max_tokens is None else sampling_params.max_tokens
        groups = groups_for(ids, place.workers or 1, extra=answer)
        members = [[left[k] for k in group.members] for group in groups]
        tasks = [Prompts(rows, [prompts[i] for i in rows], [sampling_params] * len(rows)) for rows in members]
        with crew_of(Generator, place, described) as crew:
            failed = _keep_generated(crew, tasks, kept)
        return Summary(len(prompts), len(kept.done), failed, sum(group.tokens for group in groups))


def _keep_generated(crew: Crew, tasks: list[Prompts], kept: KeptRows) -> int:
    """Keep what comes of the tasks; how many rows failed."""
    failed = 0
    for task, result in crew.run(tasks):
        rows = tasks[task].rows
        outputs = [result.reason] * len(rows) if isinstance(result, Failed) else result
        kept.add([{ROW: row} | generated(output) for row, output in zip(rows, outputs, strict=True)])
        failed += sum(isinstance(output, str) for output in outputs)
    return failed


def generated(output: RequestOutput | str) -> dict[str, Any]:
    """The columns of an output, or of why there is none."""
    if isinstance(output, str):
        return {ERROR: output}
    [sample] = output.outputs
    logprobs = None
    if sample.logprobs is not None:
        logprobs = [of_one[token].logprob for token, of_one in zip(sample.token_ids, sample.logprobs, strict=True)]
    values = (sample.text, sample.token_ids, logprobs, sample.finish_reason)
    return dict(zip(GENERATED, values, strict=True)) | {ERROR: None}


def score_dataset(
    model: str | Path,
    dataset: Iterable[Mapping[str, Any]] | Any,
    output: str | Path,
    *,
    context: str = "context",
    continuations: str = "continuations",
    truncate: bool = False,
    place: Place | None = None,
    virtual_devices: int | None = None,
    **options: Any,
) -> Summary:
    """Log-probabilities of each row's continuations after its context, all texts or all token ids, as `LLM.score` has them.

    What rows begin with alike is computed once, as one process does it, and with its bits: where it has a step for each worker,
    and with batch_invariant=True always. Ray must be connected.

    Args:
      output: as in `generate_dataset`, with `logprobs`, `is_greedy` and `token_logprobs` of each continuation.
      context, continuations: the columns.
      truncate: cut contexts that exceed the model's from the left.

    The rest is as in `generate_dataset`.
    """
    asked = [(row[context], row[continuations]) for row in _rows(dataset, [context, continuations])]
    job = _job("score", model, asked, {**options, "truncate": truncate})
    with closing(open_rows(Path(output), job, SCORED)) as kept:
        left = [i for i in range(len(asked)) if i not in kept.done]
        if not left:
            return Summary(len(asked), len(kept.done), 0, 0)
        place, described = (place or Place()).filled(), Model.of(model, options, virtual_devices)
        with crew_of(ScoreWorker, place, described) as crew:
            tokenizer = described.tokenizer() if any(isinstance(c, str) for c, _ in asked) else None
            encoded = _Encoded(asked, tokenizer, crew.facts, truncate)
            exact = bool(options.get("batch_invariant"))
            packing = pack_for(crew.size, encoded.pairs, encoded.names, crew.facts.cut, exact)
            packing = packing.only(encoded.pairs_of(left))
            kept.add([{ROW: i, ERROR: encoded.refused[i]} for i in left if i in encoded.refused])
            failed = sum(i in encoded.refused for i in left)
            for found in score_parts(crew, packing):
                rows = [*encoded.whole(found)]
                kept.add(rows)
                failed += sum(row[ERROR] is not None for row in rows)
        return Summary(len(asked), len(kept.done), failed, tokens_left(packing, crew.facts.cut.data))


class _Encoded:
    """Rows as pairs of token ids, one after another, and the rows that could not be.

    All rows are packed, those too that are done: what is left then has the bits of the whole.
    """

    def __init__(self, asked: Sequence[tuple[Any, Any]], tokenizer: Any, facts: Facts, truncate: bool):
        self.refused: dict[int, str] = {}
        self.pairs: list[Pair] = []
        self.names: list[str] = []
        self._rows: list[int] = []  # of each pair
        self._first: dict[int, int] = {}  # the first pair of each row
        self._found: dict[int, dict[int, Score | str]] = defaultdict(dict)
        encoder = None if tokenizer is None else PairEncoder.of(tokenizer)
        for i, one in enumerate(asked):
            try:
                self._add(i, one, encoder, facts, truncate)
            except RequestError as error:
                self.refused[i] = str(error)

    def _add(self, i: int, one: tuple[Any, Any], encoder: PairEncoder | None, facts: Facts, truncate: bool) -> None:
        [(context, continuations)] = parse_score_requests([one])
        pairs: list[Any] = [(context, continuation) for continuation in continuations]
        if isinstance(context, str):
            assert encoder is not None
            pairs = [*encoder.pairs(pairs)]
        names = [f"row {i}, continuation {k}" for k in range(len(pairs))]
        fitting = fit(pairs, names, facts.max_score_len, facts.cut.vocab, truncate)
        if not fitting:
            raise RequestError(f"row {i} has no continuation: give one at least")
        self._first[i] = len(self.pairs)
        self.pairs += fitting
        self.names += names
        self._rows += [i] * len(fitting)

    def pairs_of(self, rows: Iterable[int]) -> list[int]:
        wanted = {*rows}
        return [pair for pair, row in enumerate(self._rows) if row in wanted]

    def whole(self, scores: Iterable[tuple[int, Score | str]]) -> Iterator[dict[str, Any]]:
        """The rows of which all pairs have come with these."""
        for pair, score in scores:
            row = self._rows[pair]
            self._found[row][pair - self._first[row]] = score
            last = self._first[row] + len(self._found[row])
            if last == len(self._rows) or self._rows[last] != row:
                yield {ROW: row} | scored([score for _, score in sorted(self._found.pop(row).items())])


def scored(scores: Sequence[Score | str]) -> dict[str, Any]:
    """The columns of a row's scores, or of why it has none."""
    good = [one for one in scores if isinstance(one, Score)]
    if len(good) < len(scores):
        return {ERROR: next(one for one in scores if isinstance(one, str))}
    values = ([one.logprob for one in good], [one.is_greedy for one in good], [one.token_logprobs for one in good])
    return dict(zip(SCORED, values, strict=True)) | {ERROR: None}


def _rows(dataset: Any, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Those columns of all rows, arrays as lists. Raises RequestError for a row that lacks one."""
    found = []
    for i, row in enumerate(dataset.iter_rows() if hasattr(dataset, "iter_rows") else dataset):
        if lacking := [name for name in columns if name not in row]:
            raise RequestError(f"row {i} has no column {lacking[0]!r}: there are {', '.join(map(repr, row))}; name the right one")
        found.append({name: plain(row[name]) for name in columns})
    return found


def plain(value: Any) -> Any:
    """A cell of a data set as Python has it: arrays, and arrays of arrays, as lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _encoded(model: Model, prompts: Sequence[Any]) -> list[list[int]]:
    """Token ids of prompts; none for what is no prompt, which the worker will say."""
    opened = model.tokenizer() if any(not isinstance(prompt, list) for prompt in prompts) else None
    found: list[list[int]] = []
    for prompt in prompts:
        try:
            one = parse_prompt(prompt)
        except RequestError:
            found.append([])
            continue
        found.append(list(opened(one.text or "")["input_ids"]) if one.ids is None and opened else one.ids or [])
    return found


def _job(task: str, model: str | Path, rows: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What tells jobs apart."""
    digest = hashlib.sha256(json.dumps(rows, default=repr).encode()).hexdigest()
    said = {name: repr(value) for name, value in sorted(options.items()) if value is not None}
    return {"job": task, "model": os.fspath(model), "rows": digest, "options": said}
