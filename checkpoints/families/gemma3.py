"""The text models of Gemma 3: two rotary bases, five layers with a window to each without, `Gemma3ForCausalLM`."""

from __future__ import annotations

from checkpoints.config_reader import ConfigReader
from checkpoints.families import tables
from checkpoints.families.gemma import read_shared
from checkpoints.families.hf_common import FULL, SLIDING, read_windows
from checkpoints.families.rope import read_rope
from jaxllm.config import ModelConfig, RopeConfig

RULES = tables.table(*tables.NORMS_AROUND, *tables.ATTENTION, *tables.HEAD_NORMS, *tables.MLP)


def read_config(reader: ConfigReader) -> ModelConfig:
    reader.ignore("hidden_act", "attn_logit_softcapping")  # written, and read by none
    shared = read_shared(reader, 131072, 4, "hidden_activation")
    window, pattern = reader.size_if_there("sliding_window", 4096), reader.size_if_there("sliding_window_pattern", 6)
    reader.ignore("_sliding_window_pattern")
    rope, local = _read_ropes(reader, shared["max_position"])
    return ModelConfig(
        **shared,
        rope=rope,
        local_rope=local,
        norm_place="around",
        windows=read_windows(reader, shared["num_layers"], window, lambda i: (i + 1) % pattern != 0),
        qk_norm="head",
        attention_scale=reader.above_zero("query_pre_attn_scalar", 256.0) ** -0.5,
        logit_cap=reader.optional("final_logit_softcapping", float) or 0.0,
    )


def _read_ropes(reader: ConfigReader, max_position: int) -> tuple[RopeConfig, RopeConfig]:
    """Of layers without a window and of those with one. `rope_scaling`, the older form, is of the former alone."""
    theta, local_theta = reader.take("rope_theta", 1e6), reader.take("rope_local_base_freq", 1e4)
    both = reader.optional("rope_parameters", dict) or {}
    scaling = reader.optional("rope_scaling", dict)
    reader.default("partial_rotary_factor", 1.0, None)
    kinds = ConfigReader(both, f"{reader.where}: rope parameters")
    far, near = (kinds.optional(kind, dict) or {} for kind in (FULL, SLIDING))
    kinds.finish()
    sides = (("rope_theta", theta, far | (scaling or {})), ("rope_theta", local_theta, near))
    one, other = (ConfigReader({key: base, "rope_parameters": side}, reader.where) for key, base, side in sides)
    return read_rope(one, max_position), read_rope(other, max_position)
