"""Time to first token and time per token, by batch size.

    python -m bench.latency --dtype bfloat16 --peer transformers
    python -m bench.latency --config llama-30b --dtype bfloat16

Prints a cost card, then a table; the last line of stdout is one JSON document. With `--peer`, the same work is done by the peer
alternating with ours, in the same run, so that the ratio survives a noisy machine. Times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from bench.machine import describe, report
from bench.peers import Transformers
from bench.subject import Subject, add_options, print_card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt of a batch")
    parser.add_argument("--long-prompt", type=int, default=512, help="tokens of the single prompt whose prefill is timed")
    parser.add_argument("--tokens", type=int, default=33, help="new tokens, the first one included")
    parser.add_argument("--peer", choices=["transformers"])
    args = parser.parse_args()
    longest = max(args.prompt, args.long_prompt) + args.tokens
    subject = Subject(args, max_model_len=longest, max_num_seqs=max(args.batch))
    if args.peer and subject.path is None:
        parser.error("--peer needs a real model: leave out --config")
    card = subject.cost_card()
    print_card(subject.name, subject.plan, card)
    peer = Transformers(subject.path, args.dtype) if args.peer and subject.path else None
    rows = [measure(subject, peer, 1, args.long_prompt, 2, args.repeats)]
    rows += [measure(subject, peer, batch, args.prompt, args.tokens, args.repeats) for batch in args.batch]
    for row in rows:
        add_utilisation(row, subject, card)
    print_table(rows)
    report({"bench": "latency", "model": subject.name, "dtype": args.dtype, "layout": args.layout, "machine": describe(),
            "repeats": args.repeats, "card": card, "rows": rows}, args.save)  # fmt: skip


def measure(subject: Subject, peer: Transformers | None, batch: int, prompt: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Times of `batch` prompts of `prompt` tokens, `tokens` new ones each; ours and the peer's alternate."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(5, subject.config.vocab_size, (batch, prompt)).tolist()
    run(subject, prompts, tokens)
    if peer:
        peer.run(prompts, min(tokens, 3))
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(run(subject, prompts, tokens))
        if peer:
            theirs.append(peer.run(prompts, tokens))
    row: dict[str, Any] = {"batch": batch, "prompt": prompt, "new_tokens": tokens}
    row["first_seconds"], row["step_seconds"] = (statistics.median(column) for column in zip(*ours, strict=True))
    if theirs:
        row["peer_first_seconds"], row["peer_step_seconds"] = (statistics.median(c) for c in zip(*theirs, strict=True))
        row["first_ratio"] = row["peer_first_seconds"] / row["first_seconds"]
        row["step_ratio"] = row["peer_step_seconds"] / row["step_seconds"]
    return row


def run(subject: Subject, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
    """Seconds until every row has its first token, seconds for a token of every row after it."""
    sequences = subject.submit(prompts, tokens)
    start = time.perf_counter()
    while not all(s.tokens for s in sequences):
        subject.engine.step(0)
    first = time.perf_counter() - start
    start = time.perf_counter()
    while subject.engine.busy:
        subject.engine.step()
    return first, (time.perf_counter() - start) / max(tokens - 1, 1)


def add_utilisation(row: dict[str, Any], subject: Subject, card: dict[str, float]) -> None:
    """MBU: bytes a step must read over what a copy would move; MFU: FLOPs of the prefill over the measured matmul rate."""
    platform = subject.plan.layout.mesh.devices.flat[0].platform
    devices = 1 if platform == "cpu" else subject.plan.layout.mesh.size
    context = row["prompt"] + row["new_tokens"] / 2
    moved = card["weight_bytes"] + row["batch"] * context * card["kv_bytes_per_token"]
    row["tokens_per_second"] = row["batch"] / row["step_seconds"]
    row["decode_mbu"] = moved / row["step_seconds"] / (devices * card["copy_bytes_per_second"])
    flops = row["batch"] * row["prompt"] * subject.config.flops_per_token(row["prompt"] // 2)
    row["prefill_mfu"] = flops / row["first_seconds"] / (devices * card["matmul_flops_per_second"])


def print_table(rows: list[dict[str, Any]]) -> None:
    print("  batch  prompt   first token   ms/step    tok/s   MBU   MFU   peer: first   ms/step   ratio: first    step")
    for r in rows:
        line = f"{r['batch']:7d} {r['prompt']:7d} {1e3 * r['first_seconds']:10.0f} ms {1e3 * r['step_seconds']:9.1f}"
        line += f" {r['tokens_per_second']:8.1f} {r['decode_mbu']:5.2f} {r['prefill_mfu']:5.2f}"
        if "first_ratio" in r:
            line += f" {1e3 * r['peer_first_seconds']:10.0f} ms {1e3 * r['peer_step_seconds']:9.1f}"
            line += f" {r['first_ratio']:14.2f} {r['step_ratio']:7.2f}"
        print(line)


if __name__ == "__main__":
    main()
