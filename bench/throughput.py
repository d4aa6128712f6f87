"""Tokens a second, time to first token and time per token of a workload like a server's.

    python -m bench.throughput --dtype bfloat16 --peer transformers vllm --vllm-python vllm/bin/python
    python -m bench.throughput --rate 2 --shared-prefix 256

Prompts and answers have ShareGPT-like lengths and come all at once, or as a Poisson process with `--rate`; slots are refilled as
they free up. Prints a cost card, the workload, then a table; the last line of stdout is one JSON document. With `--peer` the same
requests go to each peer in turn, in the same run; vLLM runs in an environment of its own, and its start is not counted. The first
run, in which everything is compiled, is left out; what is printed are medians of the others.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from bench.machine import describe, report
from bench.peers import MAKE_VLLM, VLLM, TransformersBatching, safetensors_folder
from bench.subject import Subject, add_options, print_card
from bench.workload import FEWEST, PERCENTILES, Request, Served, Times, Workload, summary
from jaxllm.generation.sequence import Sequence

OURS = "jaxllm"
LATENCIES = [f"{name}_p{p}" for name in ("ttft", "tpot") for p in PERCENTILES]


class Server(Protocol):
    """Whatever answers requests."""

    def serve(self, requests: list[Request]) -> Served: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    add_workload(parser)
    parser.add_argument("--peer", nargs="+", choices=["transformers", "vllm"], default=[])
    parser.add_argument("--vllm-python", type=Path, metavar="PATH", help="the Python of vLLM's own environment")
    args = parser.parse_args()
    if wrong := refusal(args):
        parser.error(wrong)
    max_model_len = args.shared_prefix + args.prompt[1] + args.tokens[1]
    subject = Subject(args, max_model_len=max_model_len, max_num_seqs=args.max_num_seqs, enable_prefix_caching=True)
    card = subject.cost_card()
    print_card(subject.name, subject.plan, card)
    workload = Workload.of(args, subject.config.vocab_size)
    print_workload(workload)
    with servers(subject, args, max_model_len) as those:
        runs = measure(those, workload, args.repeats)
        versions = {name: server.version for name, server in those.items() if isinstance(server, VLLM)}
    rows = medians(runs)
    ratios = {name: compared(rows[OURS], row) for name, row in rows.items() if name != OURS}
    print_table(rows, ratios)
    report({"bench": "throughput", "model": subject.name, "dtype": args.dtype, "layout": args.layout, "machine": describe(),
            "peers": versions, "repeats": args.repeats, "max_num_seqs": args.max_num_seqs, "max_model_len": max_model_len,
            "workload": workload.describe(), "card": card, "rows": rows, "ratios": ratios, "runs": runs}, args.save)  # fmt: skip


def add_workload(parser: argparse.ArgumentParser) -> None:
    """The options that say what is asked for, and how much of it at once."""
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--max-num-seqs", type=int, default=64, help="sequences at once")
    parser.add_argument("--prompt", type=int, nargs=2, default=[83, 400], metavar=("MEAN", "MOST"), help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, nargs=2, default=[61, 200], metavar=("MEAN", "MOST"), help="new tokens")
    parser.add_argument("--rate", type=float, metavar="R", help="requests a second, as Poisson arrivals (default: all at once)")
    parser.add_argument("--shared-prefix", type=int, default=0, metavar="N", help="tokens that all prompts begin with")
    parser.add_argument("--seed", type=int, default=0, help="of the workload")


def refusal(args: argparse.Namespace) -> str | None:
    """What is wrong with the options, in a sentence."""
    for name, (mean, most) in (("--prompt", args.prompt), ("--tokens", args.tokens)):
        if not FEWEST <= mean <= most:
            return f"{name} {mean} {most}: the mean must be at least {FEWEST} and at most the maximum"
    if args.rate is not None and args.rate <= 0:
        return f"--rate {args.rate:g}: must be above 0; leave it out for all at once"
    if args.peer and args.config:
        return "--peer needs a real model: leave out --config"
    if "vllm" in args.peer and (args.vllm_python is None or not args.vllm_python.exists()):
        return f"--peer vllm needs --vllm-python, the Python of an environment made by: {MAKE_VLLM}"
    return None


@contextmanager
def servers(subject: Subject, args: argparse.Namespace, max_model_len: int) -> Iterator[dict[str, Server]]:
    """Ours and the peers asked for, up until the end."""
    found: dict[str, Server] = {OURS: Ours(subject)}
    with ExitStack() as stack:
        if "transformers" in args.peer and subject.path:
            peer = TransformersBatching(subject.path, args.dtype, max_model_len, args.max_num_seqs)
            found["transformers"] = stack.enter_context(closing(peer))
        if "vllm" in args.peer and subject.path:
            folder = stack.enter_context(safetensors_folder(subject.path))
            kv_bytes = subject.config.kv_bytes_per_token(4 if args.dtype == "float32" else 2)
            vllm = VLLM(args.vllm_python, folder, args.dtype, max_model_len, args.max_num_seqs, kv_bytes)
            found["vllm"] = stack.enter_context(closing(vllm))
        yield found


def measure(servers: dict[str, Server], workload: Workload, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Summaries of `repeats` runs of each server, in turns, after a run that is left out."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for run in range(repeats + 1):
        requests = workload.requests(run)
        for name, server in servers.items():
            runs[name].append(summary(requests, server.serve(requests)))
    return {name: of[1:] for name, of in runs.items()}


def medians(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each server's runs, number by number."""
    return {name: {key: statistics.median(run[key] for run in of) for key in of[0]} for name, of in runs.items()}


class Ours:
    """The engine under test, stepped from here."""

    def __init__(self, subject: Subject):
        self.subject = subject

    def serve(self, requests: list[Request]) -> Served:
        """Every request when it arrives, or after the step that was running then; looked at after each step."""
        engine = self.subject.engine
        sequences: list[Sequence] = []
        first, last = [0.0] * len(requests), [0.0] * len(requests)
        running: set[int] = set()
        before = replace(engine.scheduler.statistics)
        start = time.perf_counter()
        while len(sequences) < len(requests) or engine.busy:
            while len(sequences) < len(requests) and requests[len(sequences)].arrival <= time.perf_counter() - start:
                running.add(len(sequences))
                request = requests[len(sequences)]
                sequences += self.subject.submit([request.prompt], request.new_tokens)
            if not engine.busy:
                time.sleep(max(requests[len(sequences)].arrival - (time.perf_counter() - start), 0))
                continue
            engine.step()
            now = time.perf_counter() - start
            for i in sorted(running):
                if sequences[i].tokens and not first[i]:
                    first[i] = now
                if sequences[i].finish_reason is not None:
                    last[i] = now
                    running.remove(i)
        assert [len(s.tokens) for s in sequences] == [r.new_tokens for r in requests], "a request has ended early"
        after, cached_tokens = engine.scheduler.statistics, sum(s.num_shared for s in sequences)
        host_ms = 1e3 * (after.host_seconds - before.host_seconds) / max(after.steps - before.steps, 1)
        counts = {"cached_tokens": cached_tokens, "steps": after.steps - before.steps, "host_ms_per_step": host_ms}
        return Served([Times(*times) for times in zip(first, last, strict=True)], counts)


def compared(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    """Ratios of rates and of times; above 1, ours is faster."""
    rate = "new_tokens_per_second"
    return {rate: ours[rate] / theirs[rate], **{key: theirs[key] / ours[key] for key in LATENCIES}}


def print_workload(workload: Workload) -> None:
    said: dict[str, Any] = workload.describe()
    prefix = f", after {workload.shared_prefix} that are shared" if workload.shared_prefix else ""
    print(f"{workload.count} requests, {said['arrivals']}, seed {workload.seed}; lognormal tokens:")
    for title, key, more in (("in", "prompt_tokens", prefix), ("out", "new_tokens", "")):
        of = said[key]
        spread = ", ".join(f"{name} {of[name]:.0f}" for name in ("least", "p50", "p90", "p99", "most"))
        print(f"  {title:<4} mean {of['mean']:6.1f}, {spread}{more}")


def print_table(rows: dict[str, dict[str, float]], ratios: dict[str, dict[str, float]]) -> None:
    """Rates and latencies, and of each peer the ratio to ours; cached tokens of those who count them."""
    titles = "".join(f"{'TTFT ' * (key == 'ttft_p50') + 'TPOT ' * (key == 'tpot_p50') + key[5:]:>10}" for key in LATENCIES)
    print(f"  {'':<14}{'requests/s':>10}{'tok/s':>9}{titles}{'cached':>9}   (ms)")
    for name, row in rows.items():
        line = f"  {name:<14}{row['requests_per_second']:10.2f}{row['new_tokens_per_second']:9.1f}"
        line += "".join(f"{1e3 * row[key]:10.1f}" for key in LATENCIES)
        line += f"{row['cached_tokens']:9.0f}" if "cached_tokens" in row else ""
        print(line + (f"   host {row['host_ms_per_step']:.1f} a step" if "host_ms_per_step" in row else ""))
        if name in ratios:
            of = ratios[name]
            print(f"  {'  ratio':<24}{of['new_tokens_per_second']:9.2f}" + "".join(f"{of[key]:10.2f}" for key in LATENCIES))


if __name__ == "__main__":
    main()
