"""The work of `jaxllm score --ray`: the steps of one run, dealt out to workers; the file of results is one run's."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator

from tqdm import tqdm

from jaxllm.commands.ray_options import crew_on_ray, model_of
from jaxllm.commands.score_run import Timeline, describe, identity, read, say_left
from jaxllm.evaluation.multiple_choice import Question, accuracy, gathered, only, requests
from jaxllm.evaluation.results import Kept, Results
from jaxllm.integrations.ray.crew import Crew
from jaxllm.integrations.ray.scoring import pack_for, score_parts
from jaxllm.integrations.ray.workers import Facts, ScoreWorker
from jaxllm.requests.encoding import PairEncoder, fit
from jaxllm.requests.outputs import RequestError
from jaxllm.scoring.scorer import Packing, Score


def run(args: argparse.Namespace) -> None:
    """Score the questions that are left. Raises RequestError for one that could not be scored, after the others have been."""
    if args.shard or args.plot:
        raise RequestError("--ray divides the work itself and draws nothing: leave --shard and --plot out")
    timeline = Timeline()
    with timeline.phase("read"):
        questions = read(args)
    model = model_of(args)
    with crew_on_ray(args, ScoreWorker, model) as crew:
        with timeline.phase("start the first worker"):
            facts: Facts = crew.facts
        results = Results(args.output, identity(args, questions, facts.dtype, facts.max_score_len))
        with contextlib.closing(results):
            if left := say_left(args, questions, results):
                with timeline.phase("tokenise and pack"):
                    encoder = PairEncoder.of(model.tokenizer())
                    packing = _pack(args, questions, encoder, facts, crew.size)
                where = f"layout {facts.layout} on {facts.devices} devices of each of {crew.size} workers, {facts.dtype}"
                print(describe(packing := only(packing, questions, left), encoder, facts.cut.data, where))
                with timeline.phase("score"):
                    _score(crew, packing, questions, results)
    print(timeline)
    print(accuracy(questions, results.answers))


def _pack(args: argparse.Namespace, questions: list[Question], encoder: PairEncoder, facts: Facts, workers: int) -> Packing:
    """All questions, packed for so many workers."""
    asked = requests(questions, args.delimiter)
    names = [f"{q.where}, continuation {i}" for q in questions for i in range(len(q.choices))]
    pairs = encoder.pairs([(query, choice) for query, choices in asked for choice in choices])
    fitting = fit(pairs, names, facts.max_score_len, facts.cut.vocab, args.truncate)
    return pack_for(workers, fitting, names, facts.cut)


def _score(crew: Crew, packing: Packing, questions: list[Question], results: Results) -> None:
    failures: list[str] = []

    def scores() -> Iterator[tuple[int, Score]]:
        for part in score_parts(crew, packing):
            for pair, score in part:
                if isinstance(score, Score):
                    yield pair, score
                else:
                    failures.append(score if score.startswith(packing.name(pair)) else f"{packing.name(pair)}: {score}")

    total, before = len(questions), len(results.answers)
    with tqdm(total=total, initial=before, unit="question", disable=not sys.stderr.isatty()) as bar:
        for found in gathered(scores(), packing.pairs, questions):
            question = questions[found.index]
            results.add(Kept(found, question.gold, list(map(len, question.choices))))
            bar.update()
    if failures:
        raise RequestError(
            f"{failures[0]} ({total - len(results.answers)} questions have no answer; the others are kept with --output)"
        )
