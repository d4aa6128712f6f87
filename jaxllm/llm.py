"""`LLM`: a model, its tokenizer and an engine behind one door."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from checkpoints.arrays import of_arrays
from checkpoints.checkpoint import open_checkpoint
from checkpoints.convert import convert, plan
from checkpoints.hub import compiled_dir, resolve
from checkpoints.load import load
from jaxllm.compile_cache import use_compilation_cache
from jaxllm.compiling import COUNTER
from jaxllm.config import ModelConfig
from jaxllm.encoding import PairEncoder, check_ids, fit
from jaxllm.engine import Engine
from jaxllm.plan import Run, default_dtype
from jaxllm.remedies import plan_or_refuse
from jaxllm.requests import CompletionOutput, Logprob, RequestError, RequestOutput, SamplingParams
from jaxllm.scheduler import Sequence as EngineSequence
from jaxllm.score import Packing, Score, Scorer, row_length
from jaxllm.steps import MAX_STEPS, Steps
from jaxllm.text import Detokenizer
from sharding.mesh import pick_devices

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
Messages = list[dict[str, Any]]
ScoreRequest = tuple[str, Sequence[str]] | tuple[Sequence[int], Sequence[Sequence[int]]]
"""A context and its continuations."""

STREAM_STEPS = 8  # tokens between two looks at the text


@dataclass(frozen=True)
class Progress:
    """What a start tells whoever watches: each is called on the caller's thread or a loader's."""

    say: Callable[[str], None] = lambda line: None
    loaded: Callable[[int, int], None] = lambda done, total: None


class LLM:
    """Runs a Hugging Face LLM on the devices there are.

    Args:
      model: a folder (config.json and safetensors), a .gguf file, a hub id, or "smollm2-135m".
      layout: "tensor", "gathered", "replicated", "gathered-AxB", "replicated-AxB", or "auto".
      devices: how many, or which; None takes all.
      dtype: "float32", "bfloat16", "float16"; None: float32 on a CPU, else the checkpoint's (a GPU without bfloat16: float16).
      max_model_len: longest prompt and answer together; None: the model's own, as far as memory allows.
      max_num_seqs: most sequences at once; None: 64, as far as memory allows.
      seed: of requests that name none.
      workload: what layout="auto" is to suit: "generate" takes "tensor"; "score" the fastest that fits (`jaxllm.plan`).
      wait: until the weights are loaded; without it the first use does.

    Raises CheckpointError, DeviceError, DoesNotFitError or ValueError before anything is allocated.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        layout: str = "auto",
        devices: int | Sequence[jax.Device] | None = None,
        dtype: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        seed: int = 0,
        workload: Literal["generate", "score"] = "generate",
        progress: Progress | None = None,
        wait: bool = True,
    ):
        started = time.perf_counter()
        progress = progress or Progress()
        use_compilation_cache(compiled_dir())
        self.checkpoint = open_checkpoint(resolve(model, progress.say))
        self.config: ModelConfig = self.checkpoint.config
        self.seed = seed
        if seed < 0:
            raise ValueError(f"seed={seed}: a number from 0 up")
        picked = pick_devices(devices)
        dtype = default_dtype(self.config, picked) if dtype is None else dtype
        self.plan = plan_or_refuse(Run(self.config, picked, dtype, layout, max_model_len, max_num_seqs, workload))
        self.tokenizer = self.checkpoint.tokenizer()
        # Scoring needs no cache that could limit it; but rows of one step are turned alike.
        self.max_score_len = min(max_model_len or self.config.max_position, self.config.short_context or self.config.max_position)
        self._progress = progress
        self._requests = 0
        self._sequences = 0
        self._params: Future[list[jax.Array]] = Future()
        if wait:
            self._load(started)
            self._params.result()
        else:
            threading.Thread(target=self._load, args=(started,), daemon=True).start()

    def _load(self, started: float) -> None:
        try:
            checkpoint, plan = self.checkpoint, self.plan
            params = load(checkpoint.source, checkpoint.rules, self.config, plan.layout, plan.dtype, self._progress.loaded)
            jax.block_until_ready(params)
        except BaseException as error:
            self._params.set_exception(error)
            return
        self.load_seconds = time.perf_counter() - started
        self._params.set_result(params)

    @cached_property
    def _steps(self) -> Steps:
        return Steps(self.config, self.plan.layout, self.plan.dtype)

    @cached_property
    def engine(self) -> Engine:
        """What generates."""
        sizes = {"max_model_len": self.plan.max_model_len, "max_num_seqs": self.plan.max_num_seqs}
        return Engine(self._steps, self._params.result(), on_program=self._progress.say, **sizes)

    @cached_property
    def scorer(self) -> Scorer:
        """What scores token ids."""
        return Scorer(self._steps, self._params.result, row_length(self.plan.layout.platform))

    # The doors

    def generate(
        self, prompts: Prompts, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Complete each prompt (a text, or token ids). Results come in the prompts' order; on Ctrl-C everything is dropped."""
        texts = _as_list(prompts)
        params = _per_prompt(sampling_params, len(texts))
        requests = [self._request(*pair) for pair in zip(texts, params, strict=True)]
        for _ in self._turns(requests, MAX_STEPS):
            pass
        return [request.output() for request in requests]

    def chat(
        self, messages: Messages | Sequence[Messages], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Answer one conversation or several: lists of {"role": ..., "content": ...}, set by the model's chat template."""
        many = [messages] if messages and isinstance(messages[0], dict) else messages
        return self.generate([self.chat_prompt(one) for one in many], sampling_params)  # type: ignore[arg-type]

    def stream(self, prompt: str | Sequence[int], sampling_params: SamplingParams | None = None) -> Generator[str]:
        """Complete one prompt, yielding pieces of text as they are settled. Leaving the loop early cancels the request."""
        params = sampling_params or SamplingParams()
        if params.n != 1:
            raise RequestError(f"n={params.n}: a stream is one sample; use generate for more")
        request = self._request(prompt, params)
        if self.tokenizer is None:
            raise RequestError(f"{self.checkpoint.path} has no tokenizer to stream text with; use generate with token ids")
        return self._pieces(request)

    def _pieces(self, request: _Request) -> Generator[str]:
        sent = 0
        with closing(self._turns([request], STREAM_STEPS)) as turns:
            for _ in turns:
                text = request.samples[0].settled
                if len(text) > sent:
                    yield text[sent:]
                    sent = len(text)

    def score(
        self, requests: Sequence[ScoreRequest], *, truncate: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> list[list[Score]]:
        """Log-probabilities of each request's continuations, in the requests' order.

        A request is a context and its continuations, all of them texts, split as lm-eval splits them, or all of them token ids,
        taken as they are. What requests have in common runs once, and the scores are those of running each alone.

        Args:
          truncate: cut contexts that exceed the model's from the left, as lm-eval does, instead of refusing them.
          progress: called with (continuations scored, continuations in all).
        """
        packing = self.pack(requests, truncate=truncate)
        scores: list[Score | None] = [None] * len(packing.pairs)
        for done, (i, score) in enumerate(self.scorer.run(packing), start=1):
            scores[i] = score
            if progress is not None:
                progress(done, len(scores))
        flat = iter(scores)
        return [[score for _, score in zip(continuations, flat, strict=False) if score] for _, continuations in requests]

    def pack(self, requests: Sequence[ScoreRequest], *, truncate: bool = False, names: Sequence[str] | None = None) -> Packing:
        """What `score` would run for these requests; the pairs are their continuations in order.

        `names` are what errors call the requests.
        """
        names = [f"request {i}" for i in range(len(requests))] if names is None else names
        flat = [(context, continuation) for context, continuations in requests for continuation in continuations]
        counts = [len(continuations) for _, continuations in requests]
        of_pairs = [f"{name}, continuation {i}" for name, n in zip(names, counts, strict=True) for i in range(n)]
        texts = [pair for pair in flat if isinstance(pair[0], str)]
        encoded = iter(self.pair_encoder.pairs(texts) if texts else ())  # type: ignore[arg-type]
        pairs = [next(encoded) if isinstance(pair[0], str) else pair for pair in flat]
        fitting = fit(pairs, of_pairs, self.max_score_len, self.config.vocab_size, truncate)  # type: ignore[arg-type]
        return self.scorer.plan(fitting, of_pairs)

    @cached_property
    def pair_encoder(self) -> PairEncoder:
        """How `score` encodes texts."""
        if self.tokenizer is None:
            raise RequestError(f"{self.checkpoint.path} has no tokenizer; give token ids instead of text")
        return PairEncoder.of(self.tokenizer)

    def chat_prompt(self, messages: Messages) -> list[int]:
        """The token ids of a conversation under the model's chat template, up to where the answer begins."""
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise RequestError(f"{self.checkpoint.path} has no chat template; use generate with a prompt of your own")
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    def save(
        self,
        folder: str | Path,
        *,
        to: Literal["orbax", "safetensors"] = "orbax",
        dtype: str | None = None,
        max_shard_bytes: int = 5 * 10**9,
        force: bool = False,
    ) -> None:
        """Write the weights as they are in memory, unpadded, with config and tokenizer, as `jaxllm convert` does.

        The folder opens in any layout over any devices, and one of safetensors in transformers. It appears whole or not at all.

        Args:
          dtype: round to it; None keeps the dtype that the model runs in.
          force: overwrite a checkpoint that is there.

        Raises CheckpointError.
        """
        live = of_arrays(self.checkpoint, self._params.result(), self.plan.layout, self.plan.dtype)
        convert(plan(live, Path(folder), to=to, dtype=dtype, max_shard_bytes=max_shard_bytes), force=force)

    @property
    def compiled(self) -> int:
        """Programs compiled by this process, those found in the compilation cache left out."""
        return COUNTER.misses

    @property
    def compile_seconds(self) -> float:
        """Seconds spent compiling programs, or reading them from the compilation cache."""
        return COUNTER.seconds

    # Requests on their way

    def _request(self, prompt: str | Sequence[int], params: SamplingParams) -> _Request:
        text, ids = (prompt, self._encode(prompt)) if isinstance(prompt, str) else (None, [int(i) for i in prompt])
        self._check(ids, params)
        room = self.plan.max_model_len - len(ids)
        number, self._requests = self._requests, self._requests + 1
        own_ends = () if params.ignore_eos else self.config.eos_token_ids
        stop_ids = tuple(dict.fromkeys((*own_ends, *params.stop_token_ids)))
        samples = []
        for i in range(params.n):
            sequence = EngineSequence(
                self._sequences, ids, params, min(params.max_tokens or room, room), stop_ids, self._stream_seed(params, number, i)
            )
            self._sequences += 1
            samples.append(_Sample(sequence, self.tokenizer))
        return _Request(number, text, ids, samples)

    def _stream_seed(self, params: SamplingParams, number: int, sample: int) -> int:
        # The leading number keeps the two kinds apart: shorter entropy is filled up with zeros.
        entropy = (0, params.seed, sample) if params.seed is not None else (1, self.seed, number, sample)
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def _encode(self, prompt: str) -> list[int]:
        if self.tokenizer is None:
            raise RequestError(f"{self.checkpoint.path} has no tokenizer; give token ids instead of text")
        return list(self.tokenizer(prompt)["input_ids"])

    def _check(self, ids: list[int], params: SamplingParams) -> None:
        limit = self.plan.max_model_len
        if not ids:
            raise RequestError("the prompt is empty: give at least one token")
        if len(ids) >= limit:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and the context holds {limit} with the answer: shorten it, or raise "
                f"max_model_len (the model's own limit is {self.config.max_position})"
            )
        for name, tokens in (("prompt", ids), ("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids)):
            check_ids(name, tokens, self.config.vocab_size)
        if params.stops and self.tokenizer is None:
            raise RequestError(f"{self.checkpoint.path} has no tokenizer to find stop strings with; use stop_token_ids")

    def _turns(self, requests: list[_Request], steps: int) -> Generator[None]:
        """Run the engine until the requests have ended, looking at their texts after each turn."""
        unfinished = [sample for request in requests for sample in request.samples]
        if any(s.sequence.params.stops for s in unfinished):
            steps = min(steps, 2 * STREAM_STEPS)  # what is decoded past a stop string is wasted
        now = 0 if steps == STREAM_STEPS else steps  # a stream shows its first token at once
        try:
            for sample in unfinished:
                self.engine.scheduler.add(sample.sequence)
            while unfinished:
                self.engine.turn(now)
                now = steps
                for sample in unfinished:
                    sample.update()  # all of them: another stream's turn may have run these too
                unfinished = [s for s in unfinished if s.sequence.finish_reason is None]
                yield
        finally:
            if unfinished:
                for sample in unfinished:
                    self.engine.scheduler.cancel(sample.sequence.id)
                self.engine.drop_cancelled()


class _Sample:
    """A sequence of the engine and its text."""

    def __init__(self, sequence: EngineSequence, tokenizer: Any):
        self.sequence = sequence
        self.tokenizer = tokenizer
        params = sequence.params
        self.text = (
            None if tokenizer is None else Detokenizer(tokenizer, sequence.prompt, params.stops, params.skip_special_tokens)
        )

    def update(self) -> None:
        """Decode the tokens that are new; a stop string ends the sequence at the token that completed it."""
        sequence, text = self.sequence, self.text
        if text is None:
            return
        ended_by_id = sequence.finish_reason == "stop"
        while text.count < len(sequence.tokens) and text.stopped_by is None:
            if ended_by_id and text.count == len(sequence.tokens) - 1:
                text.count += 1  # the stop id itself is no text
            elif text.push(sequence.tokens[text.count]):
                del sequence.tokens[text.count :], sequence.logprobs[text.count :]
                sequence.finish_reason, sequence.stop_reason = "stop", text.stopped_by
        if sequence.finish_reason is not None and text.finish():
            sequence.finish_reason, sequence.stop_reason = "stop", text.stopped_by

    @property
    def settled(self) -> str:
        """The text that can be shown: all of it once the sequence has ended."""
        assert self.text is not None
        return self.text.settled if self.sequence.finish_reason is None else self.text.text

    def output(self, index: int) -> CompletionOutput:
        s = self.sequence
        logprobs = None if s.params.logprobs is None else [self._named(choices) for choices in s.logprobs]
        text = "" if self.text is None else self.text.text
        return CompletionOutput(index, text, list(s.tokens), logprobs, s.finish_reason, s.stop_reason)

    def _named(self, choices: dict[int, Logprob]) -> dict[int, Logprob]:
        if self.tokenizer is None:
            return choices
        return {token: replace(choice, decoded_token=self.tokenizer.decode([token])) for token, choice in choices.items()}


@dataclass(frozen=True)
class _Request:
    id: int
    prompt: str | None
    ids: list[int]
    samples: list[_Sample]

    def output(self) -> RequestOutput:
        return RequestOutput(self.id, self.prompt, self.ids, [s.output(i) for i, s in enumerate(self.samples)])


def _as_list(prompts: Prompts) -> list[Any]:
    """One text, or one list of token ids, is a list of one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    many: list[Any] = list(prompts)
    return [many] if many and not isinstance(many[0], str) and np.ndim(many[0]) == 0 else many


def _per_prompt(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling_params for {count} prompts: give one, or one for each")
    return list(params)
