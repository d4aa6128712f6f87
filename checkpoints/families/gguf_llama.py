"""LLaMA in a GGUF file: architecture `llama`, as llama.cpp's conversion writes it."""

from __future__ import annotations

import numpy as np

from checkpoints.config_reader import ConfigReader
from checkpoints.errors import CheckpointError
from checkpoints.gguf import GGUFSource
from checkpoints.names import Rule, Rules
from jaxllm.config import ModelConfig, RopeConfig
from jaxllm.decoder.rope import inverse_frequencies

_BLOCK = "blk.{i}."
_ROPE_FREQS = "rope_freqs.weight"

# llama.cpp rotates neighbouring rows, so its conversion interleaves the two halves of each query and key head:
# row 2c + p of a head there is row p * H/2 + c here.
RULES = Rules(
    table=(
        Rule.of("token_embd.weight", "v d -> v d", "embedding.weight"),
        Rule.of(_BLOCK + "attn_norm.weight", "d -> d", "blocks.{i}.attention_norm.scale"),
        Rule.of(_BLOCK + "attn_q.weight", "(n c p) d -> d (n p c)", "blocks.{i}.attention.query.weight"),
        Rule.of(_BLOCK + "attn_k.weight", "(k c p) d -> d (k p c)", "blocks.{i}.attention.key.weight"),
        Rule.of(_BLOCK + "attn_v.weight", "(k h) d -> d (k h)", "blocks.{i}.attention.value.weight"),
        Rule.of(_BLOCK + "attn_output.weight", "d (n h) -> (n h) d", "blocks.{i}.attention.out.weight"),
        Rule.of(_BLOCK + "attn_q.bias", "(n c p) -> (n p c)", "blocks.{i}.attention.query.bias"),
        Rule.of(_BLOCK + "attn_k.bias", "(k c p) -> (k p c)", "blocks.{i}.attention.key.bias"),
        Rule.of(_BLOCK + "attn_v.bias", "(k h) -> (k h)", "blocks.{i}.attention.value.bias"),
        Rule.of(_BLOCK + "attn_output.bias", "d -> d", "blocks.{i}.attention.out.bias"),
        Rule.of(_BLOCK + "ffn_norm.weight", "d -> d", "blocks.{i}.mlp_norm.scale"),
        Rule.of(_BLOCK + "ffn_gate.weight", "f d -> d f", "blocks.{i}.mlp.gate.weight"),
        Rule.of(_BLOCK + "ffn_up.weight", "f d -> d f", "blocks.{i}.mlp.up.weight"),
        Rule.of(_BLOCK + "ffn_down.weight", "d f -> f d", "blocks.{i}.mlp.down.weight"),
        Rule.of(_BLOCK + "ffn_gate.bias", "f -> f", "blocks.{i}.mlp.gate.bias"),
        Rule.of(_BLOCK + "ffn_up.bias", "f -> f", "blocks.{i}.mlp.up.bias"),
        Rule.of(_BLOCK + "ffn_down.bias", "d -> d", "blocks.{i}.mlp.down.bias"),
        Rule.of("output_norm.weight", "d -> d", "norm.scale"),
        Rule.of("output.weight", "v d -> v d", "head.weight"),
    ),
    ignored=(r"rope_freqs\.weight",),  # read with the config: it is the stretch of the rotary embedding
)

# Stretches of published models that llama.cpp stores as a tensor: Llama 3.1 and 3.3, Llama 3.2.
_STRETCHES = (
    {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8192},
    {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8192},
)
_DTYPES = {"F16": "float16", "BF16": "bfloat16"}


def read_config(source: GGUFSource) -> ModelConfig:
    """Metadata, and the tensors that say what it does not -> ModelConfig. Raises CheckpointError naming the key."""
    reader = ConfigReader(source.metadata, source.where)
    embedding = source.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{source.where} lacks tensor token_embd.weight; fetch it again if it is incomplete")
    hidden, heads = reader.size("llama.embedding_length"), reader.size("llama.attention.head_count")
    head_dim = reader.size("llama.attention.key_length", hidden // heads)
    max_position = reader.size("llama.context_length")
    reader.default("llama.attention.value_length", head_dim)
    reader.default("llama.rope.dimension_count", head_dim)
    reader.default("llama.vocab_size", embedding.shape[0])
    reader.default("llama.expert_count", 0)
    reader.default("llama.expert_used_count", 0)
    reader.default("split.count", 1)
    config = ModelConfig(
        vocab_size=embedding.shape[0],
        hidden_size=hidden,
        intermediate_size=reader.size("llama.feed_forward_length"),
        num_layers=reader.size("llama.block_count"),
        num_heads=heads,
        num_kv_heads=reader.size("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position=max_position,
        norm_eps=_float32(reader.required("llama.attention.layer_norm_rms_epsilon", float)),
        rope=_read_rope(reader, source, head_dim, max_position),
        tied_head="output.weight" not in source.tensors,
        qkv_bias="blk.0.attn_q.bias" in source.tensors,
        out_bias="blk.0.attn_output.bias" in source.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in source.tensors,
        dtype=_dtype(source),
        bos_token_id=reader.optional("tokenizer.ggml.bos_token_id", int),
        eos_token_ids=_stop_ids(reader),
    )
    reader.ignore_prefix("general.")
    reader.ignore_prefix("tokenizer.")
    reader.ignore_prefix("quantize.")
    reader.ignore_prefix("split.")
    reader.finish()
    return config


def _dtype(source: GGUFSource) -> str:
    """The dtype that holds the matrices exactly: 16 bits if all are stored so, else float32, to which the rest expands."""
    kinds = {info.dtype for info in source.tensors.values() if len(info.shape) > 1}
    return _DTYPES.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def _float32(value: float) -> float:
    """The shortest decimal that is this number in the file's 32 bits: 1e-05, not 9.999999747378752e-06."""
    with np.errstate(over="ignore"):  # an infinity is refused with its name
        return float(str(np.float32(value)))


def _stop_ids(reader: ConfigReader) -> tuple[int, ...]:
    """Ids of the ends of sequence, turn and message: llama.cpp stops at each of them."""
    ids = [reader.optional(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _read_rope(reader: ConfigReader, source: GGUFSource, head_dim: int, max_position: int) -> RopeConfig:
    theta = _float32(reader.take("llama.rope.freq_base", 10000.0))
    kind = reader.take("llama.rope.scaling.type", "none")
    factor = reader.optional("llama.rope.scaling.factor", float) or reader.optional("llama.rope.scale_linear", float)
    reader.default("llama.rope.scaling.attn_factor", 1.0)
    reader.default("llama.rope.scaling.finetuned", False)
    if kind not in ("none", "linear"):
        raise CheckpointError(f"{source.where}: rope scaling {kind!r} is not supported in GGUF; use the model's safetensors")
    plain = RopeConfig(theta=theta, original_max_position=max_position)
    if _ROPE_FREQS in source.tensors:
        return _match_stretch(source, plain, head_dim)
    if kind == "linear":
        return RopeConfig(kind="linear", theta=theta, factor=factor or 1.0, original_max_position=max_position)
    return plain


def _match_stretch(source: GGUFSource, plain: RopeConfig, head_dim: int) -> RopeConfig:
    """`rope_freqs.weight` divides the frequencies: find the llama3 parameters that give exactly those divisors."""
    pairs, shape = head_dim // 2, source.tensors[_ROPE_FREQS].shape
    if shape != (pairs,):
        raise CheckpointError(f"{source.where}: {_ROPE_FREQS} is {shape}, not {(pairs,)}; use the model's safetensors")
    divisors = source.read(_ROPE_FREQS, (slice(0, pairs),)).astype(np.float32)
    for stretch in _STRETCHES:
        rope = RopeConfig(kind="llama3", theta=plain.theta, **stretch)  # type: ignore[arg-type]
        expected = inverse_frequencies(plain, head_dim) / inverse_frequencies(rope, head_dim)
        if np.allclose(divisors, expected, rtol=1e-5, atol=0):
            return rope
    raise CheckpointError(f"{source.where}: {_ROPE_FREQS} is none of the known Llama 3 stretches; use the model's safetensors")
