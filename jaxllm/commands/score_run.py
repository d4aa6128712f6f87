"""The work of `jaxllm score`: read questions, score those that are left, report, draw."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from checkpoints.hub import cache_dir
from jaxllm.commands.model_options import load
from jaxllm.evaluation.delimiter import describe as describe_delimiter
from jaxllm.evaluation.multiple_choice import Accuracy, Question, accuracy, answers, digest, hellaswag, only, pack, read_questions
from jaxllm.evaluation.results import Kept, Results
from jaxllm.evaluation.shards import KEY, Shard
from jaxllm.llm import LLM
from jaxllm.requests.encoding import PairEncoder
from jaxllm.requests.outputs import RequestError
from jaxllm.scoring.scorer import Packing


@dataclass
class Timeline:
    """When phases began and ended, in seconds since the timeline was made."""

    phases: list[tuple[str, float, float]] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter() - self.started
        yield
        self.phases.append((name, begin, time.perf_counter() - self.started))

    def __str__(self) -> str:
        return ", ".join(f"{name} {end - begin:.1f} s" for name, begin, end in self.phases)


def run(args: argparse.Namespace) -> None:
    """Score the questions, compiling everything while the weights are on their way."""
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise RequestError("--plot needs matplotlib: pip install 'jaxllm[plot]', or leave it out")
    shard = None if args.shard is None else Shard.of(args.shard)
    if shard and not args.output:
        raise RequestError("--shard needs --output, a file for `jaxllm merge`: name one")
    timeline = Timeline()
    with timeline.phase("read"):
        questions = read(args)
    with timeline.phase("open the model"):
        llm = load(args, workload="score", max_num_seqs=1, wait=False)
    run = identity(args, questions, llm.plan.dtype, llm.max_score_len)
    if shard is not None:
        run[KEY] = shard.run(llm.scorer, questions)
    results = Results(args.output, run)
    left = say_left(args, questions, results)
    with contextlib.closing(results):
        if left:
            _score(args, llm, timeline, questions, left, shard, results)
    print(timeline)
    print(accuracy(questions, results.answers))
    if args.plot:
        plot(args.plot, timeline, questions, results)


def read(args: argparse.Namespace) -> list[Question]:
    """The questions; those of "hellaswag" have the delimiter of lm-eval's task, also where they begin with a space."""
    if args.file == "hellaswag" and args.delimiter is None:
        args.delimiter = " "
    return read_questions(hellaswag(cache_dir().parent) if args.file == "hellaswag" else Path(args.file))


def identity(args: argparse.Namespace, questions: list[Question], dtype: str, max_score_len: int) -> dict[str, Any]:
    """What tells runs apart."""
    return {
        "model": args.model,
        "questions": digest(questions),
        "delimiter": args.delimiter,
        "dtype": dtype,
        "truncate": args.truncate and max_score_len,
    }


def say_left(args: argparse.Namespace, questions: list[Question], results: Results) -> list[int]:
    """The questions that have no answer yet, by their index; and what is put before choices, in a line."""
    done = {kept.index for kept in results.answers}
    print(describe_delimiter([(q.query, choice) for q in questions for choice in q.choices], args.delimiter))
    if done:
        print(f"{len(done)} answers are in {args.output} already", file=sys.stderr)
    return [i for i in range(len(questions)) if i not in done]


def _score(
    args: argparse.Namespace,
    llm: LLM,
    timeline: Timeline,
    questions: list[Question],
    left: list[int],
    shard: Shard | None,
    results: Results,
) -> None:
    total = len(questions)
    with timeline.phase("tokenise and pack"):
        packing = pack(llm, questions, delimiter=args.delimiter, truncate=args.truncate)
        if shard is not None:
            own = {*shard.questions(packing, questions, llm.plan.layout.data)}
            left, total = [i for i in left if i in own], len(own)
        packing = only(packing, questions, left)
    layout = llm.plan.layout
    where = f"layout {layout.name} on {layout.mesh.size} devices, {llm.plan.dtype}"
    print(describe(packing, llm.pair_encoder, layout.data, where))
    with timeline.phase("compile"):
        llm.scorer.compile(packing)
    with timeline.phase("wait for weights"):
        llm.scorer.params()
    bar = tqdm(total=total, initial=total - len(left), unit="question", disable=not sys.stderr.isatty())
    with timeline.phase("score"), bar:
        for found in answers(llm, packing, questions):
            question = questions[found.index]
            results.add(Kept(found, question.gold, list(map(len, question.choices))))
            bar.update()


def describe(packing: Packing, encoder: PairEncoder, data: int, where: str) -> str:
    """A few lines on what is shared, how full the rows are and how many are left, in steps of `data` rows."""
    left = sum(map(len, packing.steps(data)))
    return (
        f"{len(packing.pairs)} choices, {packing.unshared:,} tokens, {packing.tokens:,} after sharing ({encoder})\n"
        f"rows: {len(packing.rows)} of {packing.length} tokens, {100 * packing.filled:.1f} % filled"
        f"{'' if left == len(packing.rows) else f', {left} of them left'}; {where}"
    )


def plot(path: Path, timeline: Timeline, questions: list[Question], results: Results) -> None:
    """Phases over time, and accuracy by the length of the questions, as a PNG. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), layout="constrained")
    for row, (name, begin, end) in enumerate(timeline.phases):
        above.barh(row, end - begin, left=begin)
        above.text(end, row, f" {name}, {end - begin:.1f} s", va="center")
    above.set(xlabel="seconds", yticks=[], title="phases")
    above.invert_yaxis()
    above.margins(x=0.3)
    groups = by_length(questions, results)
    below.errorbar(
        [length for length, _ in groups],
        [a.acc_norm for _, a in groups],
        yerr=[a.acc_norm_stderr for _, a in groups],
        marker="o",
        capsize=3,
    )
    below.set(xlabel="tokens of query and longest choice", ylabel="acc_norm", title="accuracy by length, with standard errors")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def by_length(questions: list[Question], results: Results, groups: int = 8) -> list[tuple[float, Accuracy]]:
    """(mean length, accuracy) of equal shares of the questions, shortest first."""
    found = sorted(results.answers, key=lambda a: a.tokens)
    size = -(-len(found) // groups)
    parts = [found[i : i + size] for i in range(0, len(found), size)]
    return [(sum(a.tokens for a in part) / len(part), accuracy(questions, part)) for part in parts]
