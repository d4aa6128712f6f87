"""Rotary embedding parameters of a Hugging Face config, old form and new, resolved to numbers.

The meaning of every field is that of transformers' `modeling_rope_utils.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from checkpoints.config_reader import ConfigReader
from checkpoints.errors import CheckpointError
from checkpoints.families.hf_common import FULL, SLIDING
from jaxllm.config import RopeConfig


def read_rope(
    reader: ConfigReader, max_position: int, default_theta: float = 10000.0, fraction: float | None = None
) -> RopeConfig:
    """Take `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`, from a config.

    Keys that transformers does not read for that kind of rope are left unread.

    `fraction`: the rotated part of each head, where the parameters do not say; None: the family rotates whole heads.
    """
    theta = reader.take("rope_theta", default_theta)
    reader.default("partial_rotary_factor", 1.0, None)
    # transformers lets a non-empty `rope_scaling` win over `rope_parameters`.
    new = reader.optional("rope_parameters", dict)
    old = reader.optional("rope_scaling", dict)
    rope = reader.part(old or new or {}, "rope parameters")
    kind = _kind(rope)
    if kind in ("llama3", "yarn", "longrope"):
        original = rope.optional("original_max_position_embeddings", int) or max_position
        # A field of this name beside the parameters overrides the one among them.
        original = reader.optional("original_max_position_embeddings", int) or original
    else:
        original = max_position
    theta = rope.take("rope_theta", theta)
    if fraction is None:
        rope.default("partial_rotary_factor", 1.0, None)
    else:
        fraction = rope.take("partial_rotary_factor", fraction)
    fields = _KINDS[kind](rope, max_position, original)
    rope.leave_unread("rope_scaling" if old else "rope_parameters")
    return RopeConfig(theta=theta, original_max_position=original, fraction=fraction or 1.0, **fields)


def read_ropes(reader: ConfigReader, max_position: int, theta: float, local_theta: float) -> tuple[RopeConfig, RopeConfig]:
    """Ropes of the layers without a window, and of those with one. `rope_scaling`, the older form, concerns the former alone."""
    both = reader.optional("rope_parameters", dict) or {}
    scaling = reader.optional("rope_scaling", dict)
    reader.default("partial_rotary_factor", 1.0, None)
    kinds = reader.part(both, "rope parameters")
    far, near = (kinds.optional(kind, dict) or {} for kind in (FULL, SLIDING))
    kinds.finish()
    sides = ((theta, far | (scaling or {})), (local_theta, near))
    one, other = (reader.part({"rope_theta": base, "rope_parameters": side}) for base, side in sides)
    return read_rope(one, max_position), read_rope(other, max_position)


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """`rope_parameters` that `read_rope` reads as the same."""
    shared: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    own: dict[str, Any]
    match rope.kind:
        case "default":
            return shared
        case "llama3":
            own = {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
        case "yarn":
            own = {
                "beta_fast": rope.beta_fast,
                "beta_slow": rope.beta_slow,
                "attention_factor": rope.attention_factor,
                "truncate": rope.truncate,
            }
        case "longrope":
            own = {
                "attention_factor": rope.attention_factor,
                "short_factor": list(rope.short_factors),
                "long_factor": list(rope.long_factors),
            }
        case _:
            return shared | {"factor": rope.factor}
    return shared | {"factor": rope.factor, "original_max_position_embeddings": rope.original_max_position} | own


def _kind(rope: ConfigReader) -> str:
    old = rope.take("type", "default")
    kind = rope.take("rope_type", old)
    if kind not in _KINDS:
        raise CheckpointError(f"{rope.where}: rope type {kind!r} is not supported; there are {', '.join(_KINDS)}")
    return kind


def _default(rope: ConfigReader, max_position: int, original: int) -> dict[str, Any]:
    rope.ignore_at(factor=1.0)
    return {"kind": "default"}


def _linear(rope: ConfigReader, max_position: int, original: int) -> dict[str, Any]:
    return {"kind": "linear", "factor": rope.required("factor", float)}


def _dynamic(rope: ConfigReader, max_position: int, original: int) -> dict[str, Any]:
    # Whatever the config says of its original context, transformers stretches from `max_position_embeddings`.
    rope.ignore("original_max_position_embeddings")
    return {"kind": "dynamic", "factor": rope.required("factor", float)}


def _llama3(rope: ConfigReader, max_position: int, original: int) -> dict[str, Any]:
    return {
        "kind": "llama3",
        "factor": rope.required("factor", float),
        "low_freq_factor": rope.required("low_freq_factor", float),
        "high_freq_factor": rope.required("high_freq_factor", float),
    }


def _yarn(rope: ConfigReader, max_position: int, original: int) -> dict[str, Any]:
    factor = rope.optional("factor", float) or max_position / original
    mscale, mscale_all_dim = rope.optional("mscale", float), rope.optional("mscale_all_dim", float)
    if min(mscale or 0.0, mscale_all_dim or 0.0) < 0:
        raise CheckpointError(
            f"{rope.where}: `mscale` is {mscale} and `mscale_all_dim` {mscale_all_dim}; neither can be negative"
        )
    attention_factor = rope.optional("attention_factor", float)
    if attention_factor is None:
        attention_factor = _yarn_scale(factor, 1.0)
        if mscale and mscale_all_dim:
            attention_factor = _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all_dim)
    return {
        "kind": "yarn",
        "factor": factor,
        "attention_factor": attention_factor,
        "beta_fast": rope.optional("beta_fast", float) or 32.0,
        "beta_slow": rope.optional("beta_slow", float) or 1.0,
        "truncate": rope.take("truncate", True),
    }


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(rope: ConfigReader, max_position: int, original: int) -> dict[str, Any]:
    factor = rope.optional("factor", float) or max_position / original
    attention_factor = rope.optional("attention_factor", float)
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(max(original, 2)))
    return {
        "kind": "longrope",
        "factor": factor,
        "attention_factor": attention_factor,
        "short_factors": _numbers(rope, "short_factor"),
        "long_factors": _numbers(rope, "long_factor"),
    }


def _numbers(rope: ConfigReader, key: str) -> tuple[float, ...]:
    values = rope.required(key, list)
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in values):
        raise CheckpointError(f"{rope.where}: `{key}` holds what is no number; correct it")
    return tuple(float(x) for x in values)


_KINDS: dict[str, Callable[[ConfigReader, int, int], dict[str, Any]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
