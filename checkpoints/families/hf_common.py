"""Keys that any Hugging Face config.json may carry."""

from __future__ import annotations

from typing import Any, Literal

from checkpoints.config_reader import ConfigReader
from checkpoints.errors import CheckpointError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
DTYPES = ("float32", "float16", "bfloat16", "float64")

# Written by older versions of transformers into every config: fine at these values, a different computation at others.
PRETRAINED_DEFAULTS: dict[str, Any] = {
    "add_cross_attention": False,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "top_k": 50,
    "top_p": 1.0,
    "torchscript": False,
    "typical_p": 1.0,
    "use_bfloat16": False,
}
# Who wrote the file, how the model was trained, how a Python object prints: nothing a forward pass reads.
NO_EFFECT = (
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "id2label",
    "initializer_range",
    "label2id",
    "max_sequence_length",
    "model_type",
    "name_or_path",
    "num_labels",
    "pad_token_id",
    "tokenizer_class",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
)


def read_common(reader: ConfigReader) -> None:
    """Account for the keys that have nothing to do with the architecture; refuse quantised checkpoints."""
    quantization = reader.raw("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            f"{reader.where}: `quantization_config` ({method}) is not supported; use the weights before quantisation"
        )
    for key, value in PRETRAINED_DEFAULTS.items():
        reader.default(key, value)
    reader.ignore(*NO_EFFECT)


def read_dtype(reader: ConfigReader) -> str:
    """`dtype` (transformers 5) or `torch_dtype`; float32 when neither is there, as in transformers."""
    old = reader.optional("torch_dtype", str)
    name = (reader.optional("dtype", str) or old or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(f"{reader.where}: `dtype` {name!r} is not supported; there are {', '.join(DTYPES)}")
    return "float32" if name == "float64" else name


def read_activation(reader: ConfigReader, key: str, default: str) -> Activation:
    """The name of an activation in `jaxllm.layers`."""
    name = reader.take(key, default)
    if name not in ACTIVATIONS:
        raise CheckpointError(f"{reader.where}: `{key}` {name!r} is not supported; there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def token_ids(value: Any, where: str, key: str) -> tuple[int, ...]:
    """An id, a list of ids or null -> ids."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise CheckpointError(f"{where}: `{key}` is {value!r}, which is neither a token id nor a list of them")
    return tuple(dict.fromkeys(ids))
