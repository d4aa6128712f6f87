"""HellaSwag, the task of the SAIT Computer Engineering Challenge 2023: time from the start of the process to the accuracy.

    python -m bench.hellaswag FILE --dtype bfloat16 --peer lm-eval
    python -m bench.hellaswag FILE --config llama-30b --tokenizer tokenizer.model --dtype bfloat16
    python -m bench.hellaswag FILE --config llama-30b --tokenizer tokenizer.model --dtype float16 --layout gathered --on 4xV100

FILE holds JSON lines of "query", "choices" and "gold"; a space goes before every choice, as in lm-eval's task. Prints what is
shared and how it is packed, the time by phase, MFU against a measured matmul rate, and the challenge's board. With `--peer`,
lm-eval's `hf` model scores the same requests in turns with ours, each side timed without loading and tokenising. With `--on`,
nothing is scored: the run is compiled for GPUs that are not here and its time predicted. The last line of stdout is one JSON
document.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import jax

from bench.challenge import board
from bench.machine import describe, matmul_rate, process_seconds, report
from bench.prediction import predict, target_layout, target_scorer
from bench.subject import Subject, add_options
from jaxllm.config import ModelConfig
from jaxllm.evaluation.multiple_choice import Question, accuracy, read_questions
from jaxllm.evaluation.results import Answer
from jaxllm.platforms import choices
from jaxllm.requests.encoding import Pair, PairEncoder, fit
from jaxllm.scoring.scorer import Packing, Scorer
from sharding.layout import Layout


def main() -> None:
    args, target = arguments()
    phases = {"imports": process_seconds()}

    def lap(name: str) -> None:
        phases[name] = process_seconds() - sum(phases.values())

    questions = read_questions(args.file)
    lap("read")
    subject = None if target else Subject(args, max_model_len=1024, max_num_seqs=1)
    scorer = target_scorer(args, target) if target else scorer_of(subject)
    lap("load")
    texts, pairs, names = encode(questions, tokenizer_of(args, subject), scorer.steps.config)
    lap("tokenise")
    packing = scorer.pack(pairs, names)
    lap("pack")
    print(f"{len(pairs)} choices: {packing.unshared:,} tokens, {packing.tokens:,} after sharing, {len(packing.rows)} rows of "
          f"{packing.length}, {100 * packing.filled:.1f} % filled")  # fmt: skip
    run = {
        "bench": "hellaswag",
        "file": args.file.name,
        "dtype": args.dtype,
        "layout": args.layout,
        "machine": describe(),
        "unshared_tokens": packing.unshared,
        "tokens": packing.tokens,
        "rows": len(packing.rows),
        "filled": packing.filled,
    }
    if subject is None:
        predicted = predict(scorer, packing)
        until = sum(phases.values())
        print(f"the board adds {until:.1f} s until the first step, taken here, and leaves out loading and compiling")
        print(board(args.config, len(questions), until + predicted["predicted_score_seconds"], predicted=True))
        return report({**run, "model": args.config, "phases": phases, **predicted}, args.save)
    scorer.compile(packing)
    lap("compile")
    scores = dict(scorer.run(packing))
    lap("score")
    found = iter(scores[i].logprob for i in range(len(pairs)))
    result = accuracy(questions, [Answer(i, [next(found) for _ in q.choices], 0) for i, q in enumerate(questions)])
    total = process_seconds()
    print(f"{subject.name}, {args.dtype}, layout {args.layout}: {result}")
    print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items()), f"; {total:.1f} s from the process's start")
    outcome = {**result.__dict__, "total_seconds": total, "phases": phases}
    outcome |= repeated(subject, args, scorer, packing, texts, phases["score"])
    outcome |= utilisation(subject, packing, outcome["score_seconds"], args.dtype)
    print(board(subject.name, len(questions), total))
    report({**run, "model": subject.name, **outcome}, args.save)


def arguments() -> tuple[argparse.Namespace, Layout | None]:
    """The command line's arguments, and the layout over the GPUs that `--on` names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.set_defaults(repeats=1)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="folder with a tokenizer, or LLaMA's tokenizer.model; with --config")
    parser.add_argument("--on", metavar="4xV100", help="predict the run on these GPUs")
    parser.add_argument("--peer", choices=["lm-eval"])
    parser.add_argument("--peer-batch", type=int, default=16)
    args = parser.parse_args()
    if bool(args.config) != bool(args.tokenizer):
        parser.error("--config and --tokenizer go together")
    if args.config and args.peer:
        parser.error("random weights have no peer: leave out --config or --peer")
    if not args.on:
        return args, None
    if not args.config:
        parser.error("--on needs --config")
    try:
        return args, target_layout(args)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))


def scorer_of(subject: Subject | None) -> Scorer:
    """A scorer with the steps and weights of the subject's engine."""
    assert subject is not None
    engine = subject.engine
    return Scorer(engine.steps, lambda: engine.runner.params, choices(engine.layout.platform).scoring_row)


def encode(questions: list[Question], tokenizer: Any, config: ModelConfig) -> tuple[list[tuple[str, str]], list[Pair], list[str]]:
    """Each choice with its query: as texts, as token ids, and the name that errors give it."""
    texts = [(q.query, " " + choice) for q in questions for choice in q.choices]
    names = [f"{q.where}, choice {i}" for q in questions for i in range(len(q.choices))]
    pairs = fit(PairEncoder.of(tokenizer).pairs(texts), names, config.max_position, config.vocab_size, truncate=False)
    return texts, pairs, names


def tokenizer_of(args: argparse.Namespace, subject: Subject | None) -> Any:
    """The tokenizer of the model, or that of `--tokenizer`."""
    if subject is not None and subject.checkpoint is not None:
        return subject.checkpoint.tokenizer()
    from transformers import AutoTokenizer, LlamaTokenizer

    if args.tokenizer.is_dir():
        return AutoTokenizer.from_pretrained(args.tokenizer, local_files_only=True)
    # Given the file itself, transformers 5 makes a tokenizer that knows no words.
    return LlamaTokenizer.from_pretrained(args.tokenizer.parent, local_files_only=True, add_bos_token=True)


def timed(scorer: Scorer, packing: Packing) -> float:
    """Seconds to score everything once more."""
    start = time.perf_counter()
    for _ in scorer.run(packing):
        pass
    return time.perf_counter() - start


def utilisation(subject: Subject, packing: Packing, seconds: float, dtype: str) -> dict[str, float]:
    """MFU: FLOPs of the useful tokens, the LM head over those that score something, over the measured matmul rate."""
    config = subject.config
    heads = sum(len(one.scored) for one in packing.rows)
    layers = config.flops_per_token(0) - 2 * config.vocab_size * config.hidden_size
    flops = layers * packing.tokens + 2 * config.vocab_size * config.hidden_size * heads
    shared = jax.devices()[0].platform == "cpu"  # virtual devices share one machine's cores
    rate = matmul_rate(dtype) * (1 if shared else subject.plan.layout.mesh.size)
    print(f"{packing.tokens / seconds:.0f} tokens/s, {packing.unshared / seconds:.0f} of them unshared; "
          f"MFU {flops / seconds / rate:.2f} of {rate / 1e12:.3f} TFLOP/s")  # fmt: skip
    return {
        "flops": flops,
        "matmul_flops_per_second": rate,
        "mfu": flops / seconds / rate,
        "tokens_per_second": packing.tokens / seconds,
    }


def repeated(
    subject: Subject, args: argparse.Namespace, scorer: Scorer, packing: Packing, texts: list[tuple[str, str]], first: float
) -> dict[str, float]:
    """Medians of `--repeats` runs, the first among them, in turns with lm-eval's `hf` model on the same requests if asked for."""
    from bench.peers import LMEval

    assert not args.peer or subject.path is not None, "the peer needs a real model"
    peer = LMEval(subject.path, args.dtype, args.peer_batch) if args.peer and subject.path else None
    ours, theirs = [first], []
    for i in range(args.repeats):
        if i:
            ours.append(timed(scorer, packing))
        if peer is not None:
            theirs.append(peer.score(texts, packing.pairs))
    seconds = statistics.median(ours)
    if not theirs:
        return {"score_seconds": seconds}
    peer_seconds, count = statistics.median(theirs), len(packing.pairs)
    print(f"lm-eval hf, batch {args.peer_batch}: {peer_seconds:.1f} s, {count / peer_seconds:.1f} requests/s; "
          f"ours {seconds:.1f} s, {count / seconds:.1f} requests/s; ratio {peer_seconds / seconds:.2f}")  # fmt: skip
    return {"score_seconds": seconds, "peer_seconds": peer_seconds, "ratio": peer_seconds / seconds}


if __name__ == "__main__":
    main()
