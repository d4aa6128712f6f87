"""The tokenizer inside a GGUF file, built from the metadata that is already in memory.

transformers can do this from the file, but it parses the vocabulary with slow readers, twice, and imports torch to do
so; its conversion of the parsed vocabulary needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.errors import CheckpointError

_FIELDS = {
    "model": "tokenizer_type",
    "pre": "pre_tokenizer_type",
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
}
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_GPT2_SPLITS = ("default", "gpt-2")  # byte-level BPE with GPT-2's own split, which the conversion starts from
_DIGIT_SPLITS = ("smollm",)  # the same, after cutting every digit off


def build_tokenizer(metadata: Mapping[str, Any], where: str) -> Any:
    """GGUF metadata -> a transformers tokenizer, chat template included; None when the file has no vocabulary.

    Raises CheckpointError when text would be split in a way that is not known: token ids would be subtly wrong.
    """
    if "tokenizer.ggml.tokens" not in metadata:
        return None
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer

    found = {name: metadata.get(f"tokenizer.ggml.{key}") for key, name in _FIELDS.items()}
    values = {name: value for name, value in found.items() if value is not None}
    _check_split(values, where)
    try:
        backend, _ = convert_gguf_tokenizer(metadata["general.architecture"], values)
    except (ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{where}: its vocabulary cannot be converted ({error}); use its Hugging Face folder") from error
    if values.get("pre_tokenizer_type") in _DIGIT_SPLITS:
        backend.pre_tokenizer = _digits_then_bytes()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **_settings(metadata, values))


def _check_split(values: Mapping[str, Any], where: str) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if values.get("tokenizer_type") != "gpt2":
        return  # sentencepiece vocabularies have one split
    known = {*_GPT2_SPLITS, *_DIGIT_SPLITS, *GGUF_PRE_TOKENIZER_SPLITS}
    pre = values.get("pre_tokenizer_type")
    if pre not in known:
        raise CheckpointError(
            f"{where}: `tokenizer.ggml.pre` {pre!r} is not supported; there are {', '.join(sorted(known))}; "
            "use the model's Hugging Face folder"
        )


def _digits_then_bytes() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


def _settings(metadata: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens, the chat template, and whether BOS and EOS are added."""
    settings: dict[str, Any] = {
        # llama.cpp adds BOS to a sentencepiece vocabulary that does not say otherwise.
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", values.get("tokenizer_type") == "llama"),
        "add_eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
        "chat_template": metadata.get("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
    }
    for name, key in _SPECIAL.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        settings[name] = None if token_id is None else values["tokens"][token_id]
    return settings
