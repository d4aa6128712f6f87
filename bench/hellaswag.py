"""HellaSwag, the task of the SAIT Computer Engineering Challenge 2023: time from the start of the process to the accuracy.

    python -m bench.hellaswag FILE --dtype bfloat16 --peer lm-eval
    python -m bench.hellaswag FILE --config llama-30b --tokenizer tokenizer.model --dtype bfloat16

FILE holds JSON lines of "query", "choices" and "gold". Prints what is shared and how it is packed, the time by phase, MFU against
a measured matmul rate, and the challenge's board. With `--peer`, lm-eval's `hf` model scores the same requests in the same run,
each side timed without loading and tokenising. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import jax

from bench.challenge import board
from bench.machine import describe, matmul_rate, process_seconds, report
from bench.subject import Subject, add_options
from jaxllm.encoding import PairEncoder, fit
from jaxllm.evaluate import Answer, accuracy, read_questions
from jaxllm.score import Packing, Pair, Scorer, row_length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.set_defaults(repeats=1)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="folder or SentencePiece model, with --config")
    parser.add_argument("--peer", choices=["lm-eval"])
    parser.add_argument("--peer-batch", type=int, default=16)
    args = parser.parse_args()
    if args.config and not args.tokenizer:
        parser.error("--config needs --tokenizer")
    phases = {"imports": process_seconds()}

    def lap(name: str) -> None:
        phases[name] = process_seconds() - sum(phases.values())

    questions = read_questions(args.file)
    lap("read")
    subject = Subject(args, max_model_len=1024, max_num_seqs=1)
    lap("load")
    encoder = PairEncoder.of(tokenizer_of(args, subject))
    texts = [(q.query, " " + choice) for q in questions for choice in q.choices]
    names = [f"{q.where}, choice {i}" for q in questions for i in range(len(q.choices))]
    pairs = fit(encoder.pairs(texts), names, subject.config.max_position, subject.config.vocab_size, truncate=False)
    lap("tokenise")
    steps = subject.engine.steps
    scorer = Scorer(steps, lambda: subject.engine.params, row_length(steps.layout.platform))
    packing = scorer.plan(pairs, names)
    lap("pack")
    scorer.compile(packing)
    lap("compile")
    scores = dict(scorer.run(packing))
    lap("score")
    found = iter(scores[i].logprob for i in range(len(pairs)))
    result = accuracy(questions, [Answer(i, [next(found) for _ in q.choices], 0) for i, q in enumerate(questions)])
    total = process_seconds()
    print(f"{len(pairs)} choices: {packing.unshared:,} tokens, {packing.tokens:,} after sharing, {len(packing.rows)} rows of "
          f"{packing.length}, {100 * packing.filled:.1f} % filled")  # fmt: skip
    print(f"{subject.name}, {args.dtype}, layout {args.layout}: {result}")
    print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items()), f"; {total:.1f} s from the process's start")
    repeated = [phases["score"], *(timed(scorer, packing) for _ in range(args.repeats - 1))]
    outcome = {
        **result.__dict__,
        "total_seconds": total,
        "phases": phases,
        "score_seconds": sorted(repeated)[len(repeated) // 2],
        "unshared_tokens": packing.unshared,
        "tokens": packing.tokens,
        "rows": len(packing.rows),
        "filled": packing.filled,
    }
    outcome |= utilisation(subject, packing, outcome["score_seconds"], args.dtype)
    if args.peer:
        outcome |= beside(subject, args, texts, pairs, outcome["score_seconds"])
    print(board(subject.name, len(questions), total))
    report({"bench": "hellaswag", "file": args.file.name, "model": subject.name, "dtype": args.dtype, "layout": args.layout,
            "machine": describe(), **outcome}, args.save)  # fmt: skip


def tokenizer_of(args: argparse.Namespace, subject: Subject) -> Any:
    """That of the model, or of `--tokenizer`."""
    if subject.checkpoint is not None:
        return subject.checkpoint.tokenizer()
    from transformers import AutoTokenizer, LlamaTokenizer

    if args.tokenizer.is_dir():
        return AutoTokenizer.from_pretrained(args.tokenizer, local_files_only=True)
    return LlamaTokenizer(vocab_file=str(args.tokenizer), legacy=True)


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


def beside(
    subject: Subject, args: argparse.Namespace, texts: list[tuple[str, str]], pairs: list[Pair], seconds: float
) -> dict[str, Any]:
    """lm-eval's `hf` model on the same requests."""
    from bench.peers import LMEval

    assert subject.path is not None, "the peer needs a real model"
    peer = LMEval(subject.path, args.dtype, args.peer_batch)
    peer_seconds = peer.score(texts, pairs)
    ratio = peer_seconds / seconds
    print(f"lm-eval hf, batch {args.peer_batch}: {peer_seconds:.1f} s, {len(pairs) / peer_seconds:.1f} requests/s; "
          f"ours {seconds:.1f} s, {len(pairs) / seconds:.1f} requests/s; ratio {ratio:.2f}")  # fmt: skip
    return {"peer_seconds": peer_seconds, "ratio": ratio}


if __name__ == "__main__":
    main()
