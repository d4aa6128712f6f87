"""OLMo 3: OLMo 2 with three layers with a window to each without, `Olmo3ForCausalLM`."""

from __future__ import annotations

from checkpoints.config_reader import ConfigReader
from checkpoints.families import olmo2
from checkpoints.families.hf_common import read_decoder, read_windows
from checkpoints.families.rope import read_ropes
from jaxllm.config import ModelConfig

RULES = olmo2.RULES


def read_config(reader: ConfigReader) -> ModelConfig:
    """A `rope_scaling` is of the layers without a window alone."""
    shared = read_decoder(reader, positions=2048, eps=1e-5, eos=50279)
    bias, window = reader.take("attention_bias", False), reader.size_if_there("sliding_window", 4096)
    theta = reader.take("rope_theta", 5e5)
    rope, local = read_ropes(reader, shared["max_position"], theta, theta)
    return ModelConfig(
        **shared,
        rope=rope,
        local_rope=local,
        windows=read_windows(reader, shared["num_layers"], window, lambda i: (i + 1) % 4 != 0),
        qkv_bias=bias,
        out_bias=bias,
        norm="rms_float32",
        norm_place="after",
        qk_norm="all",
    )
