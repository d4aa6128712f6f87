"""Tokens a second when requests of mixed lengths arrive all at once and slots are refilled as they free up.

    python -m bench.throughput --dtype bfloat16

Prints a cost card and the result; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from bench.machine import describe, report
from bench.subject import Subject, add_options, print_card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--slots", type=int, default=32, help="sequences at once")
    parser.add_argument("--prompt", type=int, nargs=2, default=[16, 128], help="shortest and longest prompt")
    parser.add_argument("--tokens", type=int, nargs=2, default=[16, 96], help="fewest and most new tokens")
    args = parser.parse_args()
    subject = Subject(args, max_model_len=args.prompt[1] + args.tokens[1], max_num_seqs=args.slots)
    card = subject.cost_card()
    print_card(subject.name, subject.plan, card)
    run(subject, args)
    results = [run(subject, args) for _ in range(args.repeats)]
    result = {key: statistics.median(r[key] for r in results) for key in results[0]}
    print(f"{result['requests_per_second']:.2f} requests/s, {result['new_tokens_per_second']:.1f} new tokens/s")
    report({"bench": "throughput", "model": subject.name, "dtype": args.dtype, "layout": args.layout, "machine": describe(),
            "repeats": args.repeats, "slots": args.slots, "card": card, **result}, args.save)  # fmt: skip


def run(subject: Subject, args: argparse.Namespace) -> dict[str, Any]:
    """All requests from first to last; the same lengths every time."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(args.prompt[0], args.prompt[1] + 1, args.requests)
    news = rng.integers(args.tokens[0], args.tokens[1] + 1, args.requests)
    for length, new in zip(lengths, news, strict=True):
        subject.submit([rng.integers(5, subject.config.vocab_size, length).tolist()], int(new))
    start = time.perf_counter()
    while subject.engine.scheduler.busy:
        subject.engine.step()
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "requests_per_second": args.requests / seconds,
        "prompt_tokens": int(lengths.sum()),
        "new_tokens": int(news.sum()),
        "new_tokens_per_second": int(news.sum()) / seconds,
    }


if __name__ == "__main__":
    main()
