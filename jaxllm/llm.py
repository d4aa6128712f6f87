"""`LLM`: a model, its tokenizer and an engine behind one door."""

from __future__ import annotations

import inspect
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from checkpoints.arrays import of_arrays
from checkpoints.checkpoint import Checkpoint, open_checkpoint, open_tokenizer
from checkpoints.convert import convert, prepare
from checkpoints.hub import TOKENIZER_PATTERNS, compiled_dir, resolve
from checkpoints.load import load
from checkpoints.trees import Placement, TreeSource, of_tree
from jaxllm.buckets import MAX_STEP_TOKENS, TILE
from jaxllm.config import ModelConfig
from jaxllm.execution.compile_cache import use_compilation_cache
from jaxllm.execution.compile_counter import COUNTER
from jaxllm.execution.pooling import Pooled
from jaxllm.execution.runner import Tell, to_nobody
from jaxllm.execution.sampling import LOGPROBS_MODES
from jaxllm.execution.steps import Steps
from jaxllm.generation.engine import Engine
from jaxllm.generation.loop import STREAM_STEPS, EngineLoop, Submission
from jaxllm.generation.request import Request, RequestMaker
from jaxllm.generation.scheduler import Statistics
from jaxllm.planning.plan import Run, default_dtype
from jaxllm.planning.remedies import plan_or_refuse
from jaxllm.platforms import choices
from jaxllm.processes.distributed import Distributed
from jaxllm.processes.following import WholeArrays, digest, follow, least_memory, teller
from jaxllm.processes.group import join
from jaxllm.requests import checks
from jaxllm.requests.arguments import Bar, ManyParams, dtype_name, params_for_each, progress_bar, show_progress
from jaxllm.requests.chat_template import encode_chat
from jaxllm.requests.encoding import PairEncoder, encode_whole, fit
from jaxllm.requests.outputs import RequestError, RequestOutput
from jaxllm.requests.prompts import (
    Messages,
    ParsedPrompt,
    Prompt,
    ScoreRequest,
    parse_conversation,
    parse_conversations,
    parse_prompt,
    parse_prompts,
    parse_score_requests,
    with_priorities,
)
from jaxllm.requests.sampling_params import SamplingParams, from_generation_config
from jaxllm.requests.vllm_arguments import LLM_ELSEWHERE
from jaxllm.scoring.embedder import Embedder, Pooling
from jaxllm.scoring.scorer import Packing, Score, Scorer
from sharding.mesh import pick_devices

Prompts = Prompt | Sequence[Prompt]

_LOG = logging.getLogger("jaxllm")


@dataclass(frozen=True)
class Progress:
    """What a start tells whoever watches: each is called on the caller's thread or a loader's."""

    say: Callable[[str], None] = lambda line: None
    loaded: Callable[[int, int], None] = lambda done, total: None


class LLM:
    """Runs a Hugging Face LLM on the devices there are.

    Args:
      model: a folder (config.json and safetensors), a .gguf file, a hub id, or "smollm2-135m"; or a checkpoint that is open.
      tokenizer: another than the model's own: a folder, a hub id, or a transformers tokenizer.
      layout: "tensor", "gathered", "replicated", "gathered-AxB", "replicated-AxB", or "auto".
      devices: how many, or which; None takes all.
      dtype: "float32", "bfloat16", "float16"; None: float32 on a CPU, else the checkpoint's (a GPU without bfloat16: float16).
      max_model_len: longest prompt and answer together; None: the model's own, as far as memory allows.
      max_num_seqs: most sequences at once; None: 64, as far as memory allows.
      max_num_batched_tokens: most prompt tokens of one step on each data shard, up to 1024.
      enable_prefix_caching: requests that begin with the same tokens, in whole pages of 64, compute them once.
      batch_invariant: a request has the same log-probabilities, to the bit, alone and in any crowd, whatever was shared or
        computed again; every step then has the size of the largest (docs/benchmarks.md has the price).
      seed: of requests that name none.
      revision: of the model on the hub: a branch, a tag or a commit.
      hf_overrides: laid over the values of config.json.
      generation_config: "auto": requests without SamplingParams sample as the model's generation_config.json says; "vllm": by
        the defaults of SamplingParams.
      logprobs_mode: what answers report of tokens: "raw_logprobs", "raw_logits", and after all that SamplingParams change, the
        temperature and the filters too, "processed_logprobs", "processed_logits"; a token that cannot be drawn has -inf there.
      workload: what layout="auto" is to suit, the fastest of those that fit: "generate" or "score" (`jaxllm.planning.plan`).
      wait: until the weights are loaded; without it the first use does.
      distributed: this process is one of several that run the model together: each makes its LLM with the same arguments, and
        those that are not process 0 then `follow` it.

    Any number of threads may use it: their requests run together. Neither a forked process nor a pickle can take it along.

    Raises CheckpointError, DeviceError, DoesNotFitError, RequestError or ValueError before anything is allocated.
    """

    def __init__(
        self,
        model: str | Path | Checkpoint,
        *,
        tokenizer: str | Path | Any | None = None,
        layout: str = "auto",
        devices: int | Sequence[jax.Device] | None = None,
        dtype: str | Any | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        enable_prefix_caching: bool = True,
        batch_invariant: bool = False,
        seed: int | None = 0,
        revision: str | None = None,
        hf_overrides: Mapping[str, Any] | None = None,
        generation_config: str = "auto",
        logprobs_mode: str = "raw_logprobs",
        workload: Literal["generate", "score"] = "generate",
        progress: Progress | None = None,
        wait: bool = True,
        distributed: Distributed | None = None,
        **unknown: Any,
    ):
        started = time.perf_counter()
        checks.refuse_unknown("LLM", unknown, _arguments(), LLM_ELSEWHERE)
        self.seed = 0 if seed is None else checks.whole("seed", seed)
        if self.seed < 0:
            raise ValueError(f"seed={seed}: a number from 0 up")
        max_model_len, max_num_seqs = (
            None if size is None else checks.whole(name, size)
            for name, size in (("max_model_len", max_model_len), ("max_num_seqs", max_num_seqs))
        )
        self._step_tokens = MAX_STEP_TOKENS
        if max_num_batched_tokens is not None:
            self._step_tokens = checks.whole("max_num_batched_tokens", max_num_batched_tokens)
        if not TILE <= self._step_tokens <= MAX_STEP_TOKENS:
            raise ValueError(f"max_num_batched_tokens={max_num_batched_tokens}: a number from {TILE} to {MAX_STEP_TOKENS}")
        self._enable_prefix_caching = checks.flag("enable_prefix_caching", enable_prefix_caching)
        self.batch_invariant = checks.flag("batch_invariant", batch_invariant)
        if generation_config not in ("auto", "vllm"):
            raise RequestError(f"generation_config={checks.shown(generation_config)}: there are 'auto' and 'vllm'")
        if checks.text("logprobs_mode", logprobs_mode) not in LOGPROBS_MODES:
            raise RequestError(f"logprobs_mode={checks.shown(logprobs_mode)}: there are {', '.join(LOGPROBS_MODES)}")
        self.logprobs_mode = LOGPROBS_MODES[logprobs_mode]
        progress = progress or Progress()
        use_compilation_cache(compiled_dir())
        self.group = None if distributed is None else join(distributed)
        with nullcontext() if self.group is None else self.group.failing():
            if isinstance(model, Checkpoint):
                if revision is not None or hf_overrides is not None:
                    raise ValueError("revision and hf_overrides are of a model that is yet to be opened: leave them out")
                self.checkpoint = model
            else:
                self.checkpoint = open_checkpoint(resolve(model, progress.say, revision=revision), hf_overrides)
            self.config: ModelConfig = self.checkpoint.config
            picked = pick_devices(devices)
            name = dtype_name(dtype) or default_dtype(self.config, picked)
            memory = None if self.group is None else least_memory(self.group)
            self.plan = plan_or_refuse(Run(self.config, picked, name, layout, max_model_len, max_num_seqs, workload, memory))
            if self.group is not None:
                self.group.agree(self._described())
            self.tokenizer = self.checkpoint.tokenizer() if tokenizer is None else _tokenizer_of(tokenizer, progress.say)
            # Scoring needs no cache that could limit it; but the keys of one step are rotated alike.
            self.max_score_len = min(
                max_model_len or self.config.max_position, self.config.short_context or self.config.max_position
            )
            self.generation_defaults = from_generation_config(
                self.checkpoint.generation_defaults if generation_config == "auto" else {}
            )
            self._said_defaults = False
            self._progress = progress
            self._lock = threading.RLock()  # of what is made at its first use, and of numbering and encoding requests
            self._engine: Engine | None = None
            self._loop = EngineLoop(lambda: self.engine, self._check_process)
            self._process = os.getpid()
            self._request_maker = RequestMaker(
                self.checkpoint.path, self.config, self.plan.max_model_len, self.tokenizer, self.seed
            )
            self._params: Future[list[jax.Array]] = Future()
            self._steps: Future[Steps] = Future()
            threading.Thread(target=self._make_steps, daemon=True).start()  # beside the weights
            if wait:
                self._load(started)
                self._params.result()
            else:
                threading.Thread(target=self._load, args=(started,), daemon=True).start()

    def _load(self, started: float) -> None:
        try:
            checkpoint, plan = self.checkpoint, self.plan
            if isinstance(checkpoint.source, TreeSource):
                params = self._placement.place(self._placement.match(checkpoint.source))
                checkpoint.source.arrays.clear()  # they are their owner's
            else:
                params = load(checkpoint.source, checkpoint.rules, self.config, plan.layout, plan.dtype, self._progress.loaded)
            jax.block_until_ready(params)
        except BaseException as error:
            self._params.set_exception(error)
            return
        self.load_seconds = time.perf_counter() - started
        self._params.set_result(params)

    def _make_steps(self) -> None:
        try:
            self._steps.set_result(Steps(self.config, self.plan.layout, self.plan.dtype, self.logprobs_mode))
        except BaseException as error:
            self._steps.set_exception(error)

    @property
    def engine(self) -> Engine:
        """What generates."""
        if self._engine is not None:  # without the lock, under which others may encode for long
            return self._engine
        with self._lock:
            if self._engine is None:
                self._engine = Engine(
                    self._steps.result(),
                    self._params.result(),
                    pool=self.plan.pool,
                    max_num_seqs=self.plan.max_num_seqs,
                    max_num_batched_tokens=self._step_tokens,
                    enable_prefix_caching=self._enable_prefix_caching,
                    batch_invariant=self.batch_invariant,
                    on_program=self._on_program,
                    tell=self._tell("engine"),
                )
            return self._engine

    def _on_program(self, name: str) -> None:
        self._progress.say(name)
        self._loop.say(name)

    @cached_property
    def scorer(self) -> Scorer:
        """What scores token ids."""
        return Scorer(*self._for_rows, self._tell("scorer"))

    @cached_property
    def embedder(self) -> Embedder:
        """What embeds and classifies token ids."""
        return Embedder(*self._for_rows, self._tell("embedder"))

    @property
    def _for_rows(self) -> tuple[Steps, Callable[[], list[jax.Array]], int]:
        return self._steps.result(), lambda: self._params.result(), choices(self.plan.layout.platform).scoring_row

    @cached_property
    def _placement(self) -> Placement:
        return Placement(self.checkpoint.family, self.config, self.plan.layout, self.plan.dtype)

    # Several processes

    def follow(self) -> None:
        """Take part in all that process 0 does, until it ends.

        Raises RequestError in process 0, and where there is no other.
        """
        if self.group is None or self.group.leads:
            raise RequestError("this process follows none: call follow() in the others of `distributed`")
        owners = {"engine": lambda: self.engine.runner, "scorer": lambda: self.scorer, "embedder": lambda: self.embedder}
        with self.group.failing():
            self._params.result()
            follow(self.group, owners)

    def abandon(self, error: BaseException) -> None:
        """Tell all who wait for an answer that none will come: for where a step will not end, another process being gone."""
        self._loop.abandon(error)

    def _described(self) -> dict[str, Any]:
        """What all processes must have alike."""
        tensors = [(name, info.shape, info.dtype) for name, info in sorted(self.checkpoint.source.tensors.items())]
        plan = self.plan
        return {
            "model": digest(self.config, tensors),
            "layout": f"{plan.layout.name} over {plan.layout.mesh.size} devices",
            "dtype": plan.dtype,
            "max_model_len": plan.max_model_len,
            "max_num_seqs": plan.max_num_seqs,
            "memory": str(plan.pool.pages),
            "batch_invariant": self.batch_invariant,
            "logprobs_mode": str(self.logprobs_mode),
        }

    def _tell(self, owner: str) -> Tell:
        return to_nobody if self.group is None or not self.group.leads else teller(self.group, owner)

    # Weights in memory

    @classmethod
    def from_arrays(cls, config: Mapping[str, Any] | str | Path | Any, tree: Any, **options: Any) -> LLM:
        """A model of weights that are in memory, which stay as they are and their owner's.

        Args:
          config: the values of a config.json, transformers' config, or a folder with one and perhaps a tokenizer.
          tree: arrays by Hugging Face's names or the decoder's own (`blocks.0.attention.query.weight`), nested or dotted.
          options: of `LLM`.

        Raises what `LLM` does.
        """
        return cls(of_tree(config, tree), **options)

    def update_weights(self, tree: Any, *, donate: bool = False) -> None:
        """Go on with other weights, between two steps: no step has some of these and some of those.

        What runs goes on after the tokens that it has, as if they had been its prompt; a scoring run that has begun ends with
        the weights that it began with. Nothing of the prefix cache is left, and nothing is compiled anew.

        Args:
          tree: as `from_arrays` takes it. Arrays on devices go to this model's without passing the host.
          donate: delete those as soon as they are not needed; the tree is lost, whatever happens.

        Raises CheckpointError for a tree that has not this model's weights; nothing is changed then.
        """
        if self.group is not None:
            raise RequestError("several processes run this model: update_weights is for a single one; make a new LLM in each")
        found = self._placement.match(TreeSource(tree))
        self._params.result()

        def replace() -> None:
            params = jax.block_until_ready(self._placement.place(found, donate=donate))
            self._params = Future()
            self._params.set_result(params)
            if self._engine is not None:
                self._engine.replace_params(params)

        self._loop.run(replace)

    # The doors

    def generate(
        self,
        prompts: Prompts,
        sampling_params: ManyParams = None,
        use_tqdm: Bar = True,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt: a text, token ids, or vLLM's dicts of `prompt` or `prompt_token_ids`.

        Results come in the prompts' order; on Ctrl-C everything is dropped.

        Args:
          sampling_params: one for all prompts or one for each; None: `get_default_sampling_params()`.
          use_tqdm: show a bar where stderr is a terminal; or what makes the bar, in tqdm's place.
          priority: of each prompt: those of a smaller number are admitted first.
        """
        return self._generate(with_priorities(parse_prompts(prompts), priority), sampling_params, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: ManyParams = None,
        use_tqdm: Bar = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several: lists of {"role": ..., "content": ...}, set by the model's chat template.

        `template` are the arguments of `chat_prompt`.
        """
        prompts = [ParsedPrompt(None, self.chat_prompt(one, **template)) for one in parse_conversations(messages)]
        return self._generate(prompts, sampling_params, use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Generator[str]:
        """Complete one prompt, yielding pieces of text as they are settled. Leaving the loop early cancels the request."""
        [params] = self._params_for(sampling_params, 1)
        if params.n != 1:
            raise RequestError(f"n={params.n}: a stream is one sample; use generate for more")
        [request] = self.make_requests([parse_prompt(prompt)], [params])
        if self.tokenizer is None:
            raise RequestError(f"{self.checkpoint.path} has no tokenizer to stream text with; use generate with token ids")
        return self._pieces(request)

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
        requests = parse_score_requests(requests)
        packing = self.pack(requests, truncate=truncate)
        scores: list[Score | None] = [None] * len(packing.pairs)
        for done, (i, score) in enumerate(self.run_packing(packing), start=1):
            scores[i] = score
            if progress is not None:
                progress(done, len(scores))
        flat = iter(scores)
        return [[score for _, score in zip(continuations, flat, strict=False) if score] for _, continuations in requests]

    def embed(self, prompts: Prompts, *, pooling: Pooling = "last", normalise: bool = True) -> np.ndarray:
        """Vectors [n, D] float32 of texts or token ids: the model's last hidden states, after its final norm.

        What prompts begin with alike runs once.

        Args:
          pooling: the state of a prompt's last token, of its first ("cls"), or the mean of all.
          normalise: make each vector's length 1.

        Raises RequestError.
        """
        if pooling not in (known := get_args(Pooling)):
            raise RequestError(f"pooling={checks.shown(pooling)}: there are {', '.join(map(repr, known))}")
        vectors = self._pooled(prompts, "means" if pooling == "mean" else "states", 0 if pooling == "cls" else -1)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalise else vectors

    def classify(self, prompts: Prompts) -> np.ndarray:
        """Logits [n, labels] float32 of texts or token ids by a classifier or a reward model, at the last token of each.

        Raises RequestError.
        """
        if not self.config.labels:
            raise RequestError(f"{self.checkpoint.path} is no classifier: give a model of ...ForSequenceClassification")
        return self._pooled(prompts, "labels")

    def _pooled(self, prompts: Prompts, what: Pooled, at: int = -1) -> np.ndarray:
        parsed = parse_prompts(prompts)
        if any(one.ids is None for one in parsed):
            self.get_tokenizer()
        with self._exclusive():
            ids = encode_whole(parsed, self.tokenizer, self.max_score_len, self.config.vocab_size)
        size = (self.config.labels or 0) if what == "labels" else self.config.table_size
        vectors = np.zeros((len(ids), size), np.float32)
        for i, vector in self._loop.iterate(self.embedder.run(ids, what, at)):
            vectors[i] = vector
        if (wrong := np.flatnonzero(~np.isfinite(vectors).all(axis=1))).size:
            raise RequestError(
                f"prompt {wrong[0]}: the model's states are not numbers; try dtype='float32', or check its weights"
            )
        return vectors

    def pack(self, requests: Sequence[ScoreRequest], *, truncate: bool = False, names: Sequence[str] | None = None) -> Packing:
        """What `score` would run for these requests; the pairs are their continuations in order.

        `names` are what errors call the requests.
        """
        checks.language_model(self.checkpoint.path, self.config.labels)
        names = [f"request {i}" for i in range(len(requests))] if names is None else names
        flat = [(context, continuation) for context, continuations in requests for continuation in continuations]
        counts = [len(continuations) for _, continuations in requests]
        of_pairs = [f"{name}, continuation {i}" for name, n in zip(names, counts, strict=True) for i in range(n)]
        texts = [pair for pair in flat if isinstance(pair[0], str)]
        with self._exclusive():
            encoded = iter(self.pair_encoder.pairs(texts) if texts else ())  # type: ignore[arg-type]
        pairs = [next(encoded) if isinstance(pair[0], str) else pair for pair in flat]
        fitting = fit(pairs, of_pairs, self.max_score_len, self.config.vocab_size, truncate)  # type: ignore[arg-type]
        return self.scorer.pack(fitting, of_pairs)

    @cached_property
    def pair_encoder(self) -> PairEncoder:
        """How `score` encodes texts."""
        if self.tokenizer is None:
            raise RequestError(f"{self.checkpoint.path} has no tokenizer; give token ids instead of text")
        return PairEncoder.of(self.tokenizer)

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer. Raises RequestError where the checkpoint has none."""
        if self.tokenizer is None:
            raise RequestError(f"{self.checkpoint.path} has no tokenizer; name one: tokenizer=FOLDER")
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What requests without SamplingParams have: vLLM's defaults, changed as the model's generation_config.json says."""
        try:
            return SamplingParams(**self.generation_defaults)
        except RequestError as error:
            where = f"{self.checkpoint.path}: its generation config"
            raise RequestError(f"{where}: {error}; give sampling_params, or generation_config='vllm'") from error

    def chat_prompt(
        self,
        messages: Messages,
        *,
        tools: Sequence[Any] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The token ids of a conversation under a chat template, up to where the answer begins.

        Args:
          tools: functions, or their JSON schemas, that the template tells the model of.
          chat_template: Jinja, in place of the model's own.
          chat_template_kwargs: more values that the template reads, such as enable_thinking.
          continue_final_message: leave the last message open, to be gone on with; needs add_generation_prompt=False.
        """
        options: dict[str, Any] = {"chat_template": chat_template, "continue_final_message": continue_final_message}
        options |= {"tools": None if tools is None else list(tools), "add_generation_prompt": add_generation_prompt}
        with self._exclusive():
            return encode_chat(self.tokenizer, parse_conversation(messages), dict(chat_template_kwargs or {}) | options)

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
        arrays: Sequence[jax.Array] = self._params.result()
        if self.group is not None:
            arrays = WholeArrays(len(arrays), lambda i: self._loop.run(lambda: self.engine.runner.whole(i)))
        live = of_arrays(self.checkpoint, arrays, self.plan.layout, self.plan.dtype)
        convert(prepare(live, Path(folder), to=to, dtype=dtype, max_shard_bytes=max_shard_bytes), force=force)

    def run_packing(self, packing: Packing) -> Generator[tuple[int, Score]]:
        """(index of the pair, its score) as they come, each made by the thread that has the devices, between its steps."""
        return self._loop.iterate(self.scorer.run(packing))

    @property
    def statistics(self) -> Statistics:
        """What generating has done so far: tokens of prompts, how many of them were shared, sequences computed again."""
        return self.engine.scheduler.statistics

    @property
    def compiled(self) -> int:
        """Programs compiled by this process, those found in the compilation cache left out."""
        return COUNTER.misses

    @property
    def compile_seconds(self) -> float:
        """Seconds spent compiling programs, or reading them from the compilation cache."""
        return COUNTER.seconds

    # Requests on their way

    def submit(
        self, requests: list[Request], steps: int = STREAM_STEPS, on_news: Callable[[BaseException | None], None] | None = None
    ) -> Submission:
        """Run requests, with news of them after at most `steps` tokens: to whoever iterates, or on the engine's thread."""
        return self._loop.submit(requests, steps, on_news)

    @property
    def seconds_without_step(self) -> float:
        """How long ago the engine last ended a step, while it has something to do."""
        return self._loop.seconds_without_step

    def _generate(self, prompts: list[ParsedPrompt], params: ManyParams, use_tqdm: Bar) -> list[RequestOutput]:
        requests = self.make_requests(prompts, self._params_for(params, len(prompts)))
        with progress_bar(use_tqdm, len(requests)) as bar:
            submission = self._loop.submit(requests)
            for _ in submission:
                show_progress(bar, sum(request.finished for request in requests), submission.waits_for)
        return [request.output() for request in requests]

    def _pieces(self, request: Request) -> Generator[str]:
        sent = 0
        with closing(iter(self._loop.submit([request], STREAM_STEPS))) as news:
            for _ in news:
                text = request.samples[0].shown
                if len(text) > sent:
                    yield text[sent:]
                    sent = len(text)

    def _params_for(self, params: ManyParams, count: int) -> list[SamplingParams]:
        if params is not None:
            return params_for_each(params, count)
        default = self.get_default_sampling_params()
        if self.generation_defaults and not self._said_defaults:
            self._said_defaults = True
            said = ", ".join(f"{name}={value}" for name, value in self.generation_defaults.items())
            _LOG.warning("sampling as the model's generation config says: %s; generation_config='vllm' leaves it out", said)
        return [default] * count

    def make_requests(
        self, prompts: list[ParsedPrompt], params: list[SamplingParams], numbers: Sequence[int] | None = None
    ) -> list[Request]:
        """Numbered requests for `submit`; `numbers`, of which those without a seed draw theirs, in place of the next ones.

        Raises RequestError.
        """
        given: Sequence[int | None] = [None] * len(prompts) if numbers is None else numbers
        with self._exclusive():
            return [self._request_maker.make(*one) for one in zip(prompts, params, given, strict=True)]

    # Threads and processes

    def _check_process(self) -> None:
        """Raises RequestError in a forked process, before it waits for a thread that is not there."""
        if os.getpid() != self._process:
            raise RequestError(
                f"this LLM belongs to process {self._process}, and a forked one has not its devices: make the LLM in the process "
                "that uses it, and start that with multiprocessing's spawn"
            )

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One thread at a time."""
        self._check_process()
        with self._lock:
            yield

    def __reduce__(self) -> str:
        raise TypeError("an LLM holds devices and cannot be pickled or copied: make it in the process that uses it")


def _arguments() -> list[str]:
    return [name for name in inspect.signature(LLM).parameters if name != "unknown"]


def _tokenizer_of(tokenizer: str | Path | Any, say: Callable[[str], None]) -> Any:
    if isinstance(tokenizer, (str, Path)):
        return open_tokenizer(resolve(tokenizer, say, TOKENIZER_PATTERNS))
    if not callable(getattr(tokenizer, "apply_chat_template", None)):
        raise RequestError(f"tokenizer={checks.shown(tokenizer)}: give a folder, a hub id or a transformers tokenizer")
    return tokenizer
