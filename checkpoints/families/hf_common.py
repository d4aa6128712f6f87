"""Keys that any Hugging Face config.json may carry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from checkpoints.config_reader import ConfigReader
from checkpoints.errors import CheckpointError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Windows = tuple[int | None, ...]
T = TypeVar("T")

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_LABELS = 2  # of a classifier that does not say, in transformers
DTYPES = ("float32", "float16", "bfloat16", "float64")

# What no forward pass of a decoder reads: who wrote the file, how the model was trained, what else a pass returns. Keys of
# published files that no config class defines are among them for their files to open without a word.
NO_EFFECT = (
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_experts_implementation",
    "_name_or_path",
    "_num_labels",
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "attn_pdrop",
    "auto_map",  # code of its own, which is not run
    "classifier_dropout",
    "dropout",
    "embd_pdrop",
    "embedding_dropout",
    "gradient_checkpointing",
    "hidden_dropout",
    "id2label",
    "init_std",
    "initializer_range",
    "is_decoder",
    "label2id",
    "layerdrop",
    "max_sequence_length",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "prefix",  # of a pipeline's prompts, as are task_specific_params
    "pretraining_tp",  # splits the products of training differently; the sums are the same
    "problem_type",
    "reorder_and_upcast_attn",
    "resid_pdrop",
    "residual_dropout",
    "return_dict",
    "router_aux_loss_coef",
    "task_specific_params",
    "tokenizer_class",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",  # as transformers itself writes a model that it read from a GGUF file
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
)


def read_decoder(
    reader: ConfigReader,
    *,
    positions: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    activation_key: str = "hidden_act",
    activation: str = "silu",
    eps_key: str = "rms_norm_eps",
    eps: float = 1e-6,
    tied: bool = False,
    bos: int | None = None,
    eos: int | None = None,
) -> dict[str, Any]:
    """The fields of `ModelConfig` that nearly all configs have, with a family's own defaults.

    Sizes that transformers always writes have none: without them a plan would be of the family's first model. Without their key
    there are `kv_heads`, or as many as heads; with null always the latter.
    """
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    return decoder_keys(reader, tied=tied, bos=bos, eos=eos) | {
        "hidden_size": hidden,
        "intermediate_size": reader.size("intermediate_size"),
        "num_layers": reader.size("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": reader.size(
            "num_key_value_heads", heads if kv_heads is None or reader.has("num_key_value_heads") else kv_heads
        ),
        "head_dim": reader.size("head_dim", head_dim or hidden // heads),
        "max_position": reader.size("max_position_embeddings", positions),
        "norm_eps": reader.take(eps_key, eps),
        "activation": read_activation(reader, activation_key, activation),
    }


def decoder_keys(reader: ConfigReader, *, tied: bool = False, bos: int | None = None, eos: int | None = None) -> dict[str, Any]:
    """The part of it whose keys have the same names in all families; and those that have nothing to do with the architecture."""
    labels = read_labels(reader)
    reader.ignore(*NO_EFFECT)
    begin, stop = (
        token_ids(reader.raw(key) if reader.has(key) else default, reader.where, key)
        for key, default in (("bos_token_id", bos), ("eos_token_id", eos))
    )
    return {
        "vocab_size": reader.size("vocab_size"),
        **_head(reader.take("tie_word_embeddings", tied), labels),
        "dtype": read_dtype(reader),
        "bos_token_id": begin[0] if begin else None,
        "eos_token_ids": stop,
    }


def read_labels(reader: ConfigReader) -> int | None:
    """The labels of a classifier, 0 of a model without a head, as `architectures` says; None of any other."""
    names = reader.raw("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if name.endswith("ForSequenceClassification"):
        labels = reader.optional("id2label", dict)
        given = [reader.optional(key, int) for key in ("num_labels", "_num_labels")]
        count = len(labels) if labels is not None else next((n for n in given if n is not None), _LABELS)
        if count < 1:
            raise CheckpointError(f"{reader.where}: a classifier of {count} labels; name them in `id2label`")
        return count
    return 0 if name.endswith("Model") and not name.endswith("LMHeadModel") else None


def _head(tied: bool, labels: int | None) -> dict[str, Any]:
    """A model of the decoder alone is a language model where its embedding is the head. No other has a table for it."""
    if labels == 0 and tied:
        labels = None
    return {"tied_head": tied or labels is not None, "labels": labels}


SLIDING, FULL = "sliding_attention", "full_attention"


def read_windows(reader: ConfigReader, num_layers: int, window: int | None, slides: Callable[[int], bool]) -> Windows:
    """The window of each layer, a pattern that repeats: of those that `layer_types` says slide, or else the function."""
    kinds = reader.optional("layer_types", list)
    if kinds is None:
        kinds = [SLIDING if slides(i) else FULL for i in range(num_layers)]
    if len(kinds) != num_layers or not all(kind in (SLIDING, FULL) for kind in kinds):
        raise CheckpointError(
            f"{reader.where}: `layer_types` must name {num_layers} layers, each {SLIDING!r} or {FULL!r}; correct it"
        )
    if window is None and SLIDING in kinds:
        raise CheckpointError(f"{reader.where}: `layer_types` has layers that slide, and there is no `sliding_window`; add it")
    return repeated([window if kind == SLIDING else None for kind in kinds])


def repeated(pattern: Sequence[T]) -> tuple[T, ...]:
    """The shortest beginning of a pattern that gives all of it when it is repeated."""
    return next(tuple(pattern[:n]) for n in range(1, len(pattern) + 1) if all(x == pattern[i % n] for i, x in enumerate(pattern)))


def read_dtype(reader: ConfigReader) -> str:
    """`dtype` (transformers 5) or `torch_dtype`; float32 when neither is there, as in transformers."""
    old = reader.optional("torch_dtype", str)
    name = (reader.optional("dtype", str) or old or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(f"{reader.where}: `dtype` {name!r} is not supported; there are {', '.join(DTYPES)}")
    return "float32" if name == "float64" else name


def read_activation(reader: ConfigReader, key: str, default: str) -> Activation:
    """The name of an activation in `jaxllm.decoder.layers`."""
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
