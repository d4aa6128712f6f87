"""Tiny models of every family: configs as transformers' classes take them, checkpoints of random numbers, and their records.

`record_families.py` asks transformers once how it writes each config, what tensors a checkpoint has, and what the model answers.
With that the tests need no torch.
"""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from paths import DATA
from safetensors.numpy import save_file
from tiny import random_row

VOCAB = 61
ROWS = [random_row(0, [16, 11], 4, VOCAB), random_row(1, [13], 4, VOCAB)]
RECORDED = ([0, 5, 6, 7, 8, 15, 16, 26, 27, 30], [12, 13, 16])  # tokens of each row; windows are of 7
LONG = random_row(2, [100], 0, VOCAB).prompt
NEW = 48  # greedy tokens after it, over the edge of a block of the cache
CONTEXT = random_row(3, [19], 0, VOCAB).prompt
CONTINUATIONS = [random_row(4 + i, [n], 0, VOCAB).prompt for i, n in enumerate((1, 3, 9))]

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def _model(kind: str, layers: int, heads: int, kv_heads: int, hidden: int, **others: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": hidden}
    return {"model_type": kind, "intermediate_size": 33} | _COMMON | sizes | others


def _gpt2(layers: int, heads: int, hidden: int, **others: Any) -> dict[str, Any]:
    common = {name: value for name, value in _COMMON.items() if name != "max_position_embeddings"}
    sizes = {"n_layer": layers, "n_head": heads, "n_embd": hidden, "n_positions": 256}
    return {"model_type": "gpt2"} | common | sizes | others


def _opt(layers: int, heads: int, hidden: int, embed: int, **others: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": hidden, "ffn_dim": 30}
    return {"model_type": "opt", "word_embed_proj_dim": embed} | _COMMON | sizes | others


def _neox(layers: int, heads: int, hidden: int, **others: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": hidden}
    return {"model_type": "gpt_neox", "intermediate_size": 33} | _COMMON | sizes | others


def _longrope(pairs: int) -> dict[str, Any]:
    short, long = ([1 + step * i for i in range(pairs)] for step in (0.25, 3.0))
    return {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": short, "long_factor": long}


WINDOW = {"sliding_window": 7}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
QUERY = {"query_pre_attn_scalar": 5}
CASES: dict[str, dict[str, Any]] = {
    "llama": _model("llama", 2, 9, 3, 45, head_dim=6,
                    rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}),
    "mistral": _model("mistral", 2, 3, 1, 24, head_dim=8, **WINDOW),
    "mistral tied": _model("mistral", 2, 4, 4, 24, sliding_window=None, **TIED),
    "qwen2": _model("qwen2", 3, 6, 2, 24, use_sliding_window=True, max_window_layers=1, **WINDOW),
    "qwen2 tied": _model("qwen2", 2, 5, 1, 20, **TIED),
    "qwen3": _model("qwen3", 2, 6, 3, 25, head_dim=8),
    "qwen3 tied": _model("qwen3", 3, 3, 3, 24, head_dim=6, attention_bias=True, use_sliding_window=True, max_window_layers=2,
                         **WINDOW, **TIED),
    "qwen3_moe": _model("qwen3_moe", 3, 4, 2, 24, head_dim=8, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=13,
                        mlp_only_layers=[1], norm_topk_prob=True),
    "qwen3_moe tied": _model("qwen3_moe", 2, 3, 1, 21, num_experts=40, num_experts_per_tok=3, moe_intermediate_size=12,
                             head_dim=6, decoder_sparse_step=1, **TIED),
    "qwen2_moe": _model("qwen2_moe", 2, 3, 3, 24, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=13,
                        shared_expert_intermediate_size=17),
    "qwen2_moe tied": _model("qwen2_moe", 4, 4, 1, 24, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=16,
                             shared_expert_intermediate_size=9, decoder_sparse_step=2, use_sliding_window=True,
                             max_window_layers=3, **WINDOW, **TIED),
    "mixtral": _model("mixtral", 2, 6, 2, 24, num_local_experts=5, num_experts_per_tok=2, **WINDOW),
    "mixtral tied": _model("mixtral", 2, 3, 1, 24, num_local_experts=8, num_experts_per_tok=2, **TIED),
    "gemma": _model("gemma", 2, 4, 1, 24, head_dim=8),
    "gemma untied": _model("gemma", 2, 3, 3, 24, head_dim=6, attention_bias=True, **UNTIED),
    "gemma2": _model("gemma2", 3, 4, 2, 24, head_dim=8, attn_logit_softcapping=3.0, final_logit_softcapping=4.0, **QUERY,
                     **WINDOW),
    "gemma2 untied": _model("gemma2", 2, 6, 2, 24, head_dim=4, attn_logit_softcapping=None, final_logit_softcapping=None, **QUERY,
                            **WINDOW, **UNTIED),
    "gemma3_text": _model("gemma3_text", 7, 3, 1, 24, head_dim=8, **QUERY, **WINDOW),
    "gemma3_text untied": _model(
        "gemma3_text", 3, 4, 4, 24, head_dim=6, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e3},
                         "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}},
        final_logit_softcapping=5.0, **QUERY, **WINDOW, **UNTIED,
    ),
    "phi3": _model("phi3", 2, 6, 2, 24, **WINDOW),
    "phi3 longrope": _model("phi3", 2, 3, 1, 24, original_max_position_embeddings=120, max_position_embeddings=1024,
                            partial_rotary_factor=0.5, rope_parameters=_longrope(2), **TIED),
    "olmo2": _model("olmo2", 2, 6, 3, 24),
    "olmo2 tied": _model("olmo2", 2, 5, 1, 20, attention_bias=True, **TIED),
    "smollm3": _model("smollm3", 5, 3, 1, 24),
    "smollm3 untied": _model("smollm3", 4, 4, 2, 24, no_rope_layers=[0, 1, 1, 0], use_sliding_window=True, mlp_bias=True,
                             attention_bias=True, **WINDOW, **UNTIED),
    "granite": _model("granite", 2, 6, 2, 24, embedding_multiplier=3.0, attention_multiplier=0.5, residual_multiplier=0.4,
                      logits_scaling=0.5),
    "granite tied": _model("granite", 2, 3, 3, 24, attention_multiplier=0.3, attention_bias=True, mlp_bias=True, **TIED),
    "opt": _opt(3, 3, 24, 24),
    "opt untied": _opt(2, 4, 20, 20, enable_bias=False, activation_function="gelu", **UNTIED),
    "opt sums": _opt(3, 3, 24, 10, do_layer_norm_before=False),
    "opt plain norms": _opt(3, 3, 24, 24, layer_norm_elementwise_affine=False),
    "gpt2": _gpt2(3, 3, 24, n_inner=33),
    "gpt2 untied": _gpt2(2, 5, 20, scale_attn_weights=False, activation_function="gelu", **UNTIED),
    "gpt2 by depth": _gpt2(3, 5, 30, scale_attn_by_inverse_layer_idx=True),
    "gpt_neox": _neox(3, 3, 24, rotary_pct=0.5),
    "gpt_neox tied": _neox(2, 4, 32, use_parallel_residual=False, attention_bias=False, **TIED),
    "starcoder2": _model("starcoder2", 2, 6, 2, 24, **WINDOW),
    "starcoder2 untied": _model("starcoder2", 3, 5, 1, 30, use_bias=False, hidden_act="gelu", **UNTIED),
    "olmo3": _model("olmo3", 5, 6, 3, 24, **WINDOW),
    "olmo3 tied": _model(
        "olmo3", 2, 4, 1, 24, attention_bias=True, layer_types=["full_attention", "sliding_attention"],
        rope_parameters={"full_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e3,
                                            "original_max_position_embeddings": 64},
                         "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}, **WINDOW, **TIED,
    ),
    "ministral": _model("ministral", 3, 3, 1, 24, head_dim=6,
                        layer_types=["full_attention", "sliding_attention", "sliding_attention"], **WINDOW),
    "ministral tied": _model("ministral", 2, 4, 2, 24, head_dim=8, **WINDOW, **TIED),
}  # fmt: skip


class Record(NamedTuple):
    """Outputs of transformers for a case.

    Attributes:
      config: as it wrote it.
      shapes: shapes of the checkpoint's tensors, by name.
      logits: after the tokens `RECORDED` of each of `ROWS`, [_, V].
      greedy: tokens after `LONG`.
      scores: log-probabilities of `CONTINUATIONS` after `CONTEXT`.
    """

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    logits: list[np.ndarray]
    greedy: list[int]
    scores: list[float]


@cache
def records() -> dict[str, Record]:
    texts = json.loads((DATA / "families.json").read_text(encoding="utf-8"))
    with np.load(DATA / "families.npz") as arrays:
        return {
            name: Record(
                text["config"],
                {tensor: tuple(shape) for tensor, shape in text["shapes"].items()},
                [arrays[f"{name} {i}"] for i in range(len(ROWS))],
                text["greedy"],
                text["scores"],
            )
            for name, text in texts.items()
        }


def write(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Path:
    """`folder` with a checkpoint of random numbers.

    Nothing is left at a value that could hide its absence: norms are not 1, biases not 0, and the matrices are large enough for
    attention to be sharp and for logits to be a few units apart.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    centre = 0.0 if config["model_type"].startswith("gemma") else 1.0  # of the scales of norms
    save_file({name: _numbers(name, shape, centre) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


def _numbers(name: str, shape: tuple[int, ...], centre: float) -> np.ndarray:
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    if "norm" in name or ".ln_" in name:
        return (0.0 if name.endswith("bias") else centre) + 0.3 * noise
    if len(shape) == 1 or any(table in name for table in ("embed_tokens", "embed_in", "positions", "wte", "wpe")):
        return noise / 5
    fan_in = shape[0] if ".c_" in name else shape[-1]  # GPT-2's are stored [in, out]
    return noise * (1.5 if any(part in name for part in ("q_proj", "k_proj", "qkv", "c_attn", "query_key")) else 1) / fan_in**0.5
