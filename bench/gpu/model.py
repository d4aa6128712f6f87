"""A published shape with random weights: decoding, prompts, scoring, beside the ceilings and the plan; profiles of some steps."""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import jax

from bench.gpu.profile import profile
from bench.gpu.results import Reporter, options_of_a_part
from bench.hellaswag import encode, scorer_of, timed, tokenizer_of, utilisation
from bench.latency import measure, run
from bench.subject import Subject, add_options
from jaxllm.buckets import MAX_STEP_TOKENS
from jaxllm.evaluation.multiple_choice import read_questions
from jaxllm.execution import programs
from jaxllm.execution.compile_counter import COUNTER
from jaxllm.execution.warmup import compile_all
from jaxllm.planning.roofline import decode_step, prefill_step
from jaxllm.scoring.scorer import Packing, Scorer
from sharding.hardware import hardware

PROMPT = 32  # tokens of each prompt of a batch
QUESTIONS = 10042
FILE, TOKENIZER = "hellaswag_val.jsonl", "llama/tokenizer.model"


def main() -> None:
    parser = options_of_a_part(__doc__)
    add_options(parser)
    parser.set_defaults(dtype="bfloat16", repeats=3)
    parser.add_argument("--rows", type=int, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, required=True, help="new tokens of each row")
    parser.add_argument("--prompts", type=int, nargs="+", default=[])
    parser.add_argument("--questions", type=int, default=0, help="of HellaSwag")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help=f"a folder with {FILE} and {TOKENIZER}")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    longest = max([PROMPT + args.tokens, *(n + 2 for n in args.prompts)])
    one = Model(args, Subject(args, max_model_len=longest, max_num_seqs=max(args.rows)))
    with one.report.guarded("compiling ahead"):
        one.compile_ahead()
    for rows in args.rows:
        with one.report.guarded(f"decode of {rows}"):
            one.generate(rows, PROMPT, args.tokens)
    for tokens in args.prompts:
        with one.report.guarded(f"a prompt of {tokens}"):
            one.generate(1, tokens, 2)
    if args.questions:
        one.subject.engine.runner.forget()  # a new one is made when it is needed
        with one.report.guarded("scoring"):
            one.score()


class Model:
    """The subject and its ceilings."""

    def __init__(self, args: argparse.Namespace, subject: Subject):
        self.args, self.subject, self.report = args, subject, Reporter(args)
        results = self.report.results
        self.copy = results.ceiling("copy_bytes_per_second")
        self.matmul = results.ceiling(f"{args.dtype}_flops_per_second")
        self.weights = subject.config.num_params * (4 if args.dtype == "float32" else 2)
        stats = jax.devices()[0].memory_stats() or {}
        self.report(model=subject.name, dtype=args.dtype, weight_bytes=self.weights, planned=str(subject.plan),
                    bytes_in_use=stats.get("bytes_in_use"))  # fmt: skip

    def generate(self, rows: int, prompt: int, tokens: int) -> None:
        """Time a batch of prompts through the engine."""
        statistics = self.subject.engine.scheduler.statistics
        compiled = COUNTER.seconds
        run(self.subject, [[5] * prompt] * rows, tokens)
        compiled = COUNTER.seconds - compiled
        before = statistics.steps, statistics.host_seconds
        row = measure(self.subject, None, rows, prompt, tokens, self.args.repeats)
        steps, host = statistics.steps - before[0], statistics.host_seconds - before[1]
        context = prompt + tokens // 2
        config = self.subject.config
        read = self.weights + rows * context * config.kv_bytes_per_token(self.weights // config.num_params)
        flops = rows * prompt * config.flops_per_token(prompt // 2)
        self.report(
            **row,
            **_share("decode_mbu", read / row["step_seconds"], self.copy),
            **_share("prefill_mfu", flops / row["first_seconds"], self.matmul),
            **self._predicted(rows, prompt, context),
            host_seconds_per_step=host / steps,
            compile_seconds=compiled,
        )
        if self.args.profile:
            self._profile(rows, prompt, tokens)

    def _predicted(self, rows: int, prompt: int, context: int) -> dict[str, float]:
        """Seconds by the roofline of the published rates."""
        subject, plan = self.subject, self.subject.plan
        rates = hardware(plan.layout.mesh.devices.flat[0])
        if rates is None:
            return {}
        about = subject.config, plan.layout, plan.dtype, rates
        return {
            "predicted_step_seconds": decode_step(*about, rows, context).total,
            "predicted_first_seconds": prefill_step(*about, rows * prompt).total,
        }

    def _profile(self, rows: int, prompt: int, tokens: int) -> None:
        with self.report.guarded("profile"):
            prompts = [[5 + i] * prompt for i in range(rows)]
            self.report(profile=f"{rows} prompts of {prompt}, {tokens} tokens each",
                        **profile(lambda: run(self.subject, prompts, min(tokens, 9))))  # fmt: skip

    def compile_ahead(self) -> None:
        """Compile all programs at once: a GPU's take half a minute each, on one core."""
        engine, pool = self.subject.engine, self.subject.plan.pool
        decode = {engine.shapes.rows_for(rows) for rows in self.args.rows}
        tokens = [n * PROMPT for n in self.args.rows] + self.args.prompts
        prefill = {engine.shapes.tokens_for(min(n, MAX_STEP_TOKENS)) for n in tokens}
        found = [programs.decode(engine.steps, rows, pool) for rows in decode]
        found += [programs.prefill(engine.steps, n, pool) for n in prefill]
        start = time.perf_counter()
        with ThreadPoolExecutor() as threads:
            scoring = [threads.submit(self.scorer.compile, self.packing)] if self.args.questions else []
            compile_all(found, lambda program: self.report(compiled=program.name, after_seconds=time.perf_counter() - start))
            for job in scoring:
                job.result()
        self.report(programs=len(found) + len(scoring), compile_seconds=time.perf_counter() - start)

    @cached_property
    def scorer(self) -> Scorer:
        return scorer_of(self.subject)

    @cached_property
    def packing(self) -> Packing:
        """The first questions of HellaSwag."""
        data = self.args.data
        questions = read_questions(data / FILE)[: self.args.questions]
        tokenizer = tokenizer_of(argparse.Namespace(tokenizer=data / TOKENIZER), None)
        _, pairs, names = encode(questions, tokenizer, self.subject.config)
        return self.scorer.pack(pairs, names)

    def score(self) -> None:
        """Time the first questions of HellaSwag, and say what all of them would take."""
        scorer, packing = self.scorer, self.packing
        scorer.compile(packing)
        timed(scorer, packing.only(range(4)))
        seconds = statistics.median(timed(scorer, packing) for _ in range(2))
        found = utilisation(self.subject, packing, seconds, self.args.dtype)
        steps = [(len(rows), shape) for rows, shape in scorer.batches(packing)]
        self.report(
            questions=self.args.questions,
            score_seconds=seconds,
            **found,
            steps=len(steps),
            programs=len({shape for _, shape in steps}),
            extrapolated_challenge_seconds=seconds * QUESTIONS / self.args.questions,
        )
        if self.args.profile:
            with self.report.guarded("profile"):
                self.report(profile="a scoring step", **profile(lambda: timed(scorer, packing.only(range(4)))))


def _share(name: str, rate: float, ceiling: float | None) -> dict[str, float]:
    return {} if ceiling is None else {name: rate / ceiling}


if __name__ == "__main__":
    main()
