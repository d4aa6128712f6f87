"""One device's share of a model over several: the program for all of them, its collectives left out, on the one that is here.

jax is told of devices that are not there (`jax_mock_gpu_topology`). What is timed is compute alone.
"""

from __future__ import annotations

import jax

from bench.gpu.model import PROMPT
from bench.gpu.results import Reporter, options_of_a_part
from bench.latency import measure
from bench.subject import Subject, add_options


def main() -> None:
    parser = options_of_a_part(__doc__)
    add_options(parser)
    parser.set_defaults(dtype="bfloat16", repeats=3)
    parser.add_argument("--shards", type=int, required=True)
    parser.add_argument("--rows", type=int, nargs="+", required=True)
    args = parser.parse_args()
    report = Reporter(args)
    if args.shards > 1:
        jax.config.update("jax_mock_gpu_topology", f"1x1x{args.shards}")
    report(devices=len(jax.devices()))
    subject = Subject(args, max_model_len=256, max_num_seqs=max(args.rows))
    for rows in args.rows:
        with report.guarded(f"{rows} rows"):
            report(**measure(subject, None, rows, PROMPT, 33, args.repeats))


if __name__ == "__main__":
    main()
