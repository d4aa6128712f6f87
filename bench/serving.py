"""What a server adds: the same requests by the engine in this process, by `jaxllm serve`, and by vLLM's server, in turns.

    python -m bench.serving --peer vllm --vllm-python vllm/bin/python
    python -m bench.serving --minutes 10

The workload is that of `bench.throughput`, as completions that are streamed; the client is the same for every server, and runs on
the same machine. With `--minutes` so many clients ask one after another for so long, and the server's memory is looked at. The
last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from bench import http_servers
from bench.http_servers import HttpServer
from bench.machine import describe, report
from bench.peers import safetensors_folder
from bench.subject import Subject, add_options
from bench.throughput import OURS, Ours, Server, add_workload, compared, measure, medians, print_table, print_workload, refusal
from bench.workload import Workload
from checkpoints.checkpoint import open_checkpoint
from checkpoints.hub import resolve

SERVED, VLLM_SERVED = "jaxllm serve", "vllm serve"
DEFAULT = "smollm2-135m"
WARM = 2  # runs in which the last of the programs are compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    add_workload(parser)
    parser.add_argument("--minutes", type=float, help="no comparison: clients that ask for so long")
    parser.add_argument("--clients", type=int, default=64, help="of --minutes")
    parser.add_argument("--peer", nargs="+", choices=["vllm"], default=[])
    parser.add_argument("--vllm-python", type=Path, metavar="PATH", help="the Python of vLLM's own environment")
    args = parser.parse_args()
    if wrong := refusal(args):
        parser.error(wrong)
    max_model_len = args.shared_prefix + args.prompt[1] + args.tokens[1]
    result = {"bench": "serving", "model": args.model or DEFAULT, "dtype": args.dtype, "layout": args.layout}
    result |= {"machine": describe(), "max_num_seqs": args.max_num_seqs, "max_model_len": max_model_len}
    report(result | (soak(args, max_model_len) if args.minutes else compare(args, max_model_len)), args.save)


def our_server(args: argparse.Namespace, max_model_len: int, clients: int | None = None) -> HttpServer:
    names = ("dtype", "layout", "devices", "virtual_devices", "max_num_seqs")
    options = {name.replace("_", "-"): getattr(args, name) for name in names}
    return http_servers.ours(args.model or DEFAULT, options | {"max-model-len": max_model_len}, clients)


def compare(args: argparse.Namespace, max_model_len: int) -> dict[str, Any]:
    """The same requests in turns by each."""
    subject = Subject(args, max_model_len=max_model_len, max_num_seqs=args.max_num_seqs, enable_prefix_caching=True)
    workload = Workload.of(args, subject.config.vocab_size)
    print_workload(workload)
    with servers(subject, args, max_model_len) as those:
        runs = measure(those, workload, args.repeats)
        versions = {name: server.version for name, server in those.items() if isinstance(server, HttpServer)}
    rows = medians(runs)
    of_server = rows[SERVED]
    steps = sum(workload.new_lengths) / args.max_num_seqs
    of_server["server_ms_per_step"] = 1e3 * of_server["main_thread_seconds"] / steps
    ratios = {name: compared(of_server, row) for name, row in rows.items() if name != SERVED}
    print_table(rows, ratios)
    print(
        f"  the server's own thread: {of_server['server_ms_per_step']:.2f} ms for a token of each of {args.max_num_seqs} streams"
    )
    return {
        "peers": versions,
        "repeats": args.repeats,
        "workload": workload.describe(),
        "rows": rows,
        "ratios": ratios,
        "runs": runs,
    }


@contextmanager
def servers(subject: Subject, args: argparse.Namespace, max_model_len: int) -> Iterator[dict[str, Server]]:
    """The engine, and the servers, up until the end."""
    with ExitStack() as stack:
        found: dict[str, Server] = {OURS: Ours(subject), SERVED: stack.enter_context(closing(our_server(args, max_model_len)))}
        if "vllm" in args.peer and subject.path:
            folder = stack.enter_context(safetensors_folder(subject.path))
            kv_bytes = subject.config.kv_bytes_per_token(4 if args.dtype == "float32" else 2)
            peer = http_servers.vllm(args.vllm_python, folder, args.dtype, max_model_len, args.max_num_seqs, kv_bytes)
            found[VLLM_SERVED] = stack.enter_context(closing(peer))
        yield found


def soak(args: argparse.Namespace, max_model_len: int) -> dict[str, Any]:
    """So many clients for so long, and what is left then."""
    workload = Workload.of(args, open_checkpoint(resolve(args.model or DEFAULT)).config.vocab_size)
    with closing(our_server(args, max_model_len, args.clients)) as server:
        for run in range(WARM):
            server.serve(workload.requests(run))
        rss, start, count = [server.rss_bytes()], time.monotonic(), 0
        while time.monotonic() < start + 60 * args.minutes:
            server.serve(workload.requests(WARM + len(rss)))
            count += workload.count
            rss.append(server.rss_bytes())
            print(f"  {time.monotonic() - start:6.0f} s, {count} requests, {rss[-1] / 1e6:.0f} MB", flush=True)
        seconds = time.monotonic() - start
        left = {
            name: server.metric(f"jaxllm:{name}")
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        }
    tokens = (len(rss) - 1) * sum(workload.new_lengths)
    print(f"{count} requests of {args.clients} clients in {seconds:.0f} s: {tokens / seconds:.1f} tok/s, memory "
          f"{rss[-1] / rss[0] - 1:+.1%}, left: {left}")  # fmt: skip
    return {"clients": args.clients, "seconds": seconds, "requests": count, "rss_bytes": rss, "left": left,
            "new_tokens_per_second": tokens / seconds, "workload": workload.describe()}  # fmt: skip


if __name__ == "__main__":
    main()
