"""What XLA's options do to a step, each beside none in turns."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.gpu.model import PROMPT
from bench.gpu.results import Reporter, options_of_a_part
from bench.latency import run
from bench.subject import Subject, add_options

COMMANDS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,DYNAMIC_SLICE_FUSION"
OPTIONS: dict[str, dict[str, Any]] = {
    "ours": {},
    "the loop as one graph": {"xla_gpu_enable_command_buffer": f"{COMMANDS},WHILE", "xla_gpu_graph_min_graph_size": 1},
    "no graphs": {"xla_gpu_enable_command_buffer": ""},
    "no Triton products": {"xla_gpu_enable_triton_gemm": False},
    "no autotuning": {"xla_gpu_autotune_level": 0},
    "exhaustive tiling": {"xla_gpu_exhaustive_tiling_search": True},
    "merged products": {"xla_gpu_dot_merger_threshold_mb": 1000},
}
TOKENS = 65


def main() -> None:
    parser = options_of_a_part(__doc__)
    add_options(parser)
    parser.set_defaults(dtype="bfloat16", repeats=3)
    parser.add_argument("--rows", type=int, nargs="+", required=True)
    parser.add_argument("--only", nargs="+", choices=sorted(OPTIONS), default=list(OPTIONS))
    args = parser.parse_args()
    report = Reporter(args)
    subject = Subject(args, max_model_len=PROMPT + TOKENS, max_num_seqs=max(args.rows))
    prompts = np.random.default_rng(0).integers(5, subject.config.vocab_size, (max(args.rows), PROMPT)).tolist()
    for name in args.only:
        with report.guarded(name):
            subject.engine.runner.forget()  # one cache at a time
            subject.engine = subject.engine_with(OPTIONS[name])
            for rows in args.rows:
                run(subject, prompts[:rows], TOKENS)
                times = [run(subject, prompts[:rows], TOKENS) for _ in range(args.repeats)]
                first, step = np.median(np.array(times), axis=0).tolist()
                report(options=name, rows=rows, first_seconds=first, step_seconds=step)


if __name__ == "__main__":
    main()
