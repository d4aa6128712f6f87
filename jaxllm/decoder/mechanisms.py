"""The mechanisms of a `ModelConfig`, in words."""

from __future__ import annotations

from jaxllm.config import ModelConfig, RopeConfig

_PLACES = {"before": "", "after": "after each half", "around": "around each half", "sum": "of each sum"}
_ACTIVATIONS = {"silu": "SiLU", "gelu": "GELU", "gelu_tanh": "GELU (tanh)", "relu": "ReLU"}


def mechanisms(config: ModelConfig) -> list[str]:
    """Each in a few words, in the order of a pass through the model."""
    layers = config.layers
    windows = {layer.window for layer in layers} - {None}
    norm = "layer norm" if config.norm == "layer" else "RMS norm"
    biases = {"queries, keys and values": config.qkv_bias, "attention's output": config.out_bias, "the ffn": config.mlp_bias}
    found = {
        "embeddings multiplied": config.embedding_scale != 1,
        "embeddings projected": config.embed_size,
        "learned positions": config.learned_positions,
        _ropes(config): config.rope is not None,
        "layers without positions": config.rope is not None and any(layer.rope is None for layer in layers),
        f"{norm} {_PLACES[config.norm_place]}".strip(): True,
        "norm scales stored less one": config.norm_offset,
        "norms without scales": not config.norm_affine,
        "both halves of a block at once": config.parallel,
        "grouped heads": config.num_kv_heads < config.num_heads,
        f"norm of {'each head' if config.qk_norm == 'head' else 'all heads'}": config.qk_norm,
        f"a window of {', '.join(map(str, sorted(w for w in windows if w)))}": windows,
        "windows in some layers only": windows and any(layer.window is None for layer in layers),
        "scores scaled otherwise": config.attention_scale is not None,
        "scores divided by the layer's number": config.scale_by_depth,
        "capped scores": config.attention_cap,
        f"{'gated ' if config.gated_mlp else ''}{_ACTIVATIONS[config.activation]}": True,
        _experts(config): config.experts is not None,
        f"biases of {', '.join(name for name, there in biases.items() if there)}": any(biases.values()),
        "no norm before the head": not config.final_norm,
        "halves of a block multiplied": config.residual_scale != 1,
        "tied head": config.tied_head and config.labels is None,
        f"a classifier of {config.labels} labels": config.labels,
        "no head": config.labels == 0,
        "logits multiplied": config.logit_scale != 1,
        "capped logits": config.logit_cap,
    }
    return [name for name, there in found.items() if there]


def _ropes(config: ModelConfig) -> str:
    ropes = dict.fromkeys(layer.rope for layer in config.layers)
    return " and ".join(_rope(rope) for rope in ropes if rope is not None)


def _rope(rope: RopeConfig) -> str:
    kind = {"default": "rope", "longrope": "longrope"}.get(rope.kind, f"{rope.kind} rope")
    part = "" if rope.fraction == 1 else f" of {rope.fraction:.0%} of each head"
    return f"{kind}{part} (base {rope.theta:g})"


def _experts(config: ModelConfig) -> str:
    if config.experts is None:
        return ""
    experts, some = config.experts, "" if all(layer.routed for layer in config.layers) else " in some layers"
    shared = ", one shared" if experts.shared_size else ""
    return f"{experts.top_k} of {experts.count} experts{shared}{some}"
