"""Scoring a file of questions over many nodes, predicted: of this only the packing is done, and nothing measured.

    python -m bench.nodes FILE --config llama-30b --tokenizer tokenizer.model --on 8xH100

Each node has one worker over all its devices. It reads the checkpoint at `--node-rate`, or at its share of `--store-rate`, which
storage gives to all nodes together. A step takes what the roofline says. Work is divided as `jaxllm score --ray` does it, in
whole steps of one packing. Beside it stand the tokens, over those of one trie of everything, of groups that begin alike, as
`generate_dataset` makes them, and of questions and of choices that are dealt out one by one. The last line of stdout is one JSON
document. It needs jaxllm[ray].
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from bench.hellaswag import encode, tokenizer_of
from bench.machine import describe, report
from jaxllm.config import ModelConfig
from jaxllm.evaluation.multiple_choice import read_questions
from jaxllm.integrations.ray.scoring import pack_for, task_steps
from jaxllm.planning.plan import Plan, Run, find_plan
from jaxllm.planning.presets import PRESETS
from jaxllm.planning.roofline import seconds_per_token
from jaxllm.platforms import attention_form, choices
from jaxllm.requests.encoding import Pair
from jaxllm.scoring.partition import partition, repeated
from jaxllm.scoring.scorer import Cut
from jaxllm.scoring.trie import Trie
from sharding.hardware import absent_devices
from sharding.layout import NAMES

NODES = (1, 2, 4, 8, 16, 32, 64)


def main() -> None:
    args = arguments()
    devices = absent_devices(args.on)
    config = PRESETS[args.config]
    plan = find_plan(Run(config, devices, args.dtype, args.layout, workload="score"))
    questions = read_questions(args.file)
    _, pairs, names = encode(questions, tokenizer_of(args, None), config)
    asked = Asked(pairs, names, cut_of(config, plan), [len(q.choices) for q in questions])
    print(f"{args.config}, {args.dtype}, {plan.layout.name} on the {args.on} of a node, {len(questions)} questions")
    rows = []
    for nodes in NODES:
        rows.append(loading(nodes, args) | scoring(nodes, asked, config, plan) | asked.divided(nodes))
        rows[-1]["seconds"] = rows[-1]["load_seconds"] + rows[-1]["score_seconds"]
    show(rows)
    report({"bench": "nodes", "predicted": True, "file": args.file.name, "questions": len(questions), "model": args.config,
            "dtype": args.dtype, "layout": plan.layout.name, "node": args.on, "node_rate": args.node_rate,
            "store_rate": args.store_rate, "weight_bytes": weights(args), "unshared_tokens": sum(map(len, asked.sequences)),
            "trie_tokens": asked.trie.tokens, "machine": describe(), "rows": rows}, args.save)  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help='JSON lines of "query", "choices" and "gold"')
    parser.add_argument("--config", choices=sorted(PRESETS), default="llama-30b")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with a tokenizer, or LLaMA's tokenizer.model")
    parser.add_argument("--on", default="8xH100", help="the devices of a node")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--layout", default="auto", help=NAMES)
    parser.add_argument("--node-rate", type=float, default=5e9, help="bytes a second that a node reads (default 5e9)")
    parser.add_argument("--store-rate", type=float, default=100e9, help="that all read together (default 100e9)")
    parser.add_argument("--save", type=Path, help="keep the result in this JSON file")
    return parser.parse_args()


class Asked:
    """All choices as token ids, and how they may be divided."""

    def __init__(self, pairs: list[Pair], names: list[str], cut: Cut, counts: list[int]):
        self.pairs, self.names, self.cut = pairs, names, cut
        self.sequences = [[*context, *continuation[:-1]] for context, continuation in pairs]
        self.trie = Trie(self.sequences)
        self._of_question = np.repeat(np.arange(len(counts)), counts)

    def divided(self, nodes: int) -> dict[str, float]:
        """Tokens of so many nodes over those of one trie: in groups, of questions that are dealt out, and of choices."""
        dealt = {"questions": self._of_question % nodes, "choices": np.arange(len(self.pairs)) % nodes}
        tokens = {name: sum(self._tokens(np.flatnonzero(node == i)) for i in range(nodes)) for name, node in dealt.items()}
        return {
            "groups_tokens": 1 + repeated(partition(self.trie, nodes), self.trie),
            **{f"dealt_{name}_tokens": found / self.trie.tokens for name, found in tokens.items()},
        }

    def _tokens(self, members: np.ndarray) -> int:
        return Trie([self.sequences[i] for i in members]).tokens


def cut_of(config: ModelConfig, plan: Plan) -> Cut:
    """How such a worker packs."""
    platform = plan.layout.platform
    form = attention_form(platform, plan.layout.capability, plan.dtype, config.head_dim)
    return Cut(plan.layout.data, choices(platform).scoring_row, form, config.vocab_size)


def weights(args: argparse.Namespace) -> int:
    """Bytes of the checkpoint."""
    return PRESETS[args.config].num_params * (4 if args.dtype == "float32" else 2)


def loading(nodes: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds until every node has read the weights."""
    return {"nodes": nodes, "load_seconds": weights(args) / min(args.node_rate, args.store_rate / nodes)}


def scoring(nodes: int, asked: Asked, config: ModelConfig, plan: Plan) -> dict[str, Any]:
    """Seconds of the node that has the most to do, and the part of all nodes' time in which they score."""
    rates = plan.layout.mesh.devices.flat[0].hardware
    packing = pack_for(nodes, asked.pairs, asked.names, asked.cut)
    steps = len(packing.steps(plan.layout.data))
    each = task_steps(steps, nodes)
    most = min(-(-steps // each // nodes) * each, steps)
    step = seconds_per_token(config, plan.layout, plan.dtype, rates, packing.length) * packing.length * plan.layout.data
    return {"row": packing.length, "steps": steps, "tokens": packing.tokens, "filled": packing.filled, "step_seconds": step,
            "score_seconds": most * step, "busy": steps / (most * nodes)}  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'nodes':>6}{'load':>9}{'score':>9}{'row':>7}{'steps':>7}{'busy':>6}{'tokens':>11}"
          f"{'groups':>9}{'questions':>11}{'choices':>9}")  # fmt: skip
    for row in rows:
        print(f"{row['nodes']:>6}{row['load_seconds']:>8.1f}s{row['score_seconds']:>8.1f}s{row['row']:>7}{row['steps']:>7}"
              f"{row['busy']:>6.2f}{row['tokens']:>11,}{row['groups_tokens']:>9.4f}{row['dealt_questions_tokens']:>11.4f}"
              f"{row['dealt_choices_tokens']:>9.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
