"""LLaMA as Meta gave it out: `params.json` and the names and order of its tensors."""

from __future__ import annotations

from checkpoints.config_reader import ConfigReader
from checkpoints.errors import CheckpointError
from checkpoints.meta import MetaSource
from checkpoints.names import Rule, Rules
from jaxllm.config import ModelConfig, RopeConfig

_LAYER = "layers.{i}."
_ATTENTION = _LAYER + "attention."
_MLP = _LAYER + "feed_forward."

# Meta rotates neighbouring rows of a query or key head, as llama.cpp does: see gguf_llama.
RULES = Rules(
    table=(
        Rule.of("tok_embeddings.weight", "v d -> v d", "embedding.weight"),
        Rule.of(_LAYER + "attention_norm.weight", "d -> d", "blocks.{i}.attention_norm.scale"),
        Rule.of(_ATTENTION + "wq.weight", "(n c p) d -> d (n p c)", "blocks.{i}.attention.query.weight"),
        Rule.of(_ATTENTION + "wk.weight", "(k c p) d -> d (k p c)", "blocks.{i}.attention.key.weight"),
        Rule.of(_ATTENTION + "wv.weight", "(k h) d -> d (k h)", "blocks.{i}.attention.value.weight"),
        Rule.of(_ATTENTION + "wo.weight", "d (n h) -> (n h) d", "blocks.{i}.attention.out.weight"),
        Rule.of(_LAYER + "ffn_norm.weight", "d -> d", "blocks.{i}.mlp_norm.scale"),
        Rule.of(_MLP + "w1.weight", "f d -> d f", "blocks.{i}.mlp.gate.weight"),
        Rule.of(_MLP + "w3.weight", "f d -> d f", "blocks.{i}.mlp.up.weight"),
        Rule.of(_MLP + "w2.weight", "d f -> f d", "blocks.{i}.mlp.down.weight"),
        Rule.of("norm.weight", "d -> d", "norm.scale"),
        Rule.of("output.weight", "v d -> v d", "head.weight"),
    ),
    ignored=(r"rope\.freqs", r"layers\.\d+\.attention\.inner_attention\.rope\.freqs"),  # they follow from the config
)

# What params.json does not say. Positions go by what each generation is known by: LLaMA 1 was given out in float16 and Llama 2 in
# bfloat16; Code Llama and Llama 3 have other rotary bases, 3.1 to 3.3 a stretched one; 3.2's small ones are stretched further.
_TOKENS = {32000: (1, (2,)), 32016: (1, (2,)), 128256: (128000, (128001, 128008, 128009))}
_POSITIONS = {500000.0: 8192, 1000000.0: 16384}
_SMALL = ((2048, 16), (3072, 28))  # hidden size and layers of Llama 3.2 1B and 3B
_DTYPES = {"F16": "float16", "BF16": "bfloat16"}


def read_config(source: MetaSource) -> ModelConfig:
    """params.json, and the shapes that say what it does not -> ModelConfig. Raises CheckpointError naming the key."""
    reader = ConfigReader(source.params, f"{source.where}/params.json")
    hidden, heads = reader.size("dim"), reader.size("n_heads")
    theta = reader.take("rope_theta", 10000.0)
    stretched = reader.take("use_scaled_rope", False)
    shapes = {}
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in source.tensors:
            raise CheckpointError(f"{source.where} lacks tensor {name}; fetch it again if it is incomplete")
        shapes[name] = source.tensors[name]
        if len(shapes[name].shape) != 2:
            raise CheckpointError(f"{source.where}: tensor {name} is {shapes[name].shape}, not a matrix; fetch it again")
    embedding, layers = shapes["tok_embeddings.weight"], reader.size("n_layers")
    vocab = embedding.shape[0]
    positions = _POSITIONS.get(theta, 2048 if embedding.dtype == "F16" else 4096)
    rope = RopeConfig(theta=theta, original_max_position=positions)
    if stretched:
        factor = 32.0 if (hidden, layers) in _SMALL else 8.0
        rope = RopeConfig("llama3", theta, factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    bos, eos = _TOKENS.get(vocab, (None, ()))
    config = ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=shapes["layers.0.feed_forward.w1.weight"].shape[0],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=reader.size("n_kv_heads", heads),
        head_dim=hidden // heads,
        max_position=131072 if stretched else positions,
        norm_eps=reader.required("norm_eps", float),
        rope=rope,
        tied_head="output.weight" not in source.tensors,
        dtype=_DTYPES.get(embedding.dtype, "float32"),
        bos_token_id=bos,
        eos_token_ids=eos,
    )
    # The ffn's size follows from its tensors; the vocabulary's is -1 in LLaMA 1.
    reader.ignore("multiple_of", "ffn_dim_multiplier", "vocab_size", "max_batch_size", "max_seq_len")
    reader.finish()
    return config
