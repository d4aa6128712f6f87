"""`jaxllm families`: the families of models, and the mechanisms of each."""

from __future__ import annotations

import argparse
import sys
from typing import Any

# Sizes that no family has a default for, by each one's own keys.
_SIZES = {
    "vocab_size": 1000, "hidden_size": 256, "n_embd": 256, "intermediate_size": 128, "ffn_dim": 128, "num_hidden_layers": 12,
    "n_layer": 12, "num_attention_heads": 32, "n_head": 32, "moe_intermediate_size": 32,
}  # fmt: skip
_OWN = {"qwen2_moe": {"shared_expert_intermediate_size": 64}}


def add(commands: Any) -> None:
    """Add the command to the command line's subparsers."""
    families = commands.add_parser(
        "families",
        help="the models there are",
        description="The families of models, by the `model_type` of their config.json, and what one is made of whose config says "
        "nothing but its sizes. `jaxllm inspect` says it of a checkpoint.",
    )
    families.set_defaults(run=run_families)


def run_families(args: argparse.Namespace) -> int:
    from checkpoints.config_reader import ConfigReader
    from checkpoints.families import FAMILIES
    from jaxllm.decoder.mechanisms import mechanisms

    for name, family in FAMILIES.items():
        title = (sys.modules[family.read_config.__module__].__doc__ or "").splitlines()[0]
        config = family.read_config(ConfigReader(_SIZES | _OWN.get(name, {}), name))
        print(f"{name}: {title}\n    {', '.join(mechanisms(config))}")
    return 0
