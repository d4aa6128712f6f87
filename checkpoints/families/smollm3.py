"""SmolLM3: LLaMA with layers that know no positions, `SmolLM3ForCausalLM`."""

from __future__ import annotations

from checkpoints.config_reader import ConfigReader
from checkpoints.errors import CheckpointError
from checkpoints.families import tables
from checkpoints.families.hf_common import read_decoder, read_windows, repeated
from checkpoints.families.rope import read_rope
from jaxllm.config import ModelConfig

RULES = tables.table(*tables.NORMS_BEFORE, *tables.ATTENTION, *tables.MLP)


def read_config(reader: ConfigReader) -> ModelConfig:
    shared = read_decoder(reader, positions=32768, kv_heads=4, tied=True, bos=128000, eos=128001)
    bias = reader.take("attention_bias", False)
    reader.ignore("max_window_layers")
    roped = _read_roped(reader, shared["num_layers"])
    used = reader.take("use_sliding_window", False)
    window = reader.nullable_size("sliding_window")
    slides = used and window is not None
    return ModelConfig(
        **shared,
        rope=read_rope(reader, shared["max_position"], 2e6),
        roped=roped,
        windows=read_windows(reader, shared["num_layers"], window, lambda i: slides and not roped[i % len(roped)]),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=reader.take("mlp_bias", False),
    )


def _read_roped(reader: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """Which layers know positions: those with 1 in `no_rope_layers`, whose name says the opposite; else all but every n-th."""
    every = reader.size("no_rope_layer_interval", 4)
    listed = reader.optional("no_rope_layers", list)
    if listed is None:
        listed = [(i + 1) % every != 0 for i in range(num_layers)]
    if len(listed) < num_layers:
        raise CheckpointError(f"{reader.where}: `no_rope_layers` has {len(listed)} of {num_layers} layers; correct it")
    return repeated([bool(one) for one in listed[:num_layers]])
