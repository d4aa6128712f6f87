"""What lm-eval's `hf` model is told, told to jaxllm."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import write_tokenizer
from transformers import AutoTokenizer

from jaxllm import RequestError
from jaxllm.integrations.hf_arguments import llm_options
from jaxllm.requests.encoding import PairEncoder

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ({"dtype": "auto", "revision": "main", "tokenizer": "other"}, None, ""),
        ({"batch_size": "auto:4", "max_batch_size": 64, "use_fast_tokenizer": False}, {}, ""),
        ({"trust_remote_code": False, "parallelize": False, "load_in_4bit": False, "peft": None, "subfolder": ""}, {}, ""),
        ({"trust_remote_code": True}, {}, "trust_remote_code=True has no effect: no code that comes with a model is ever run"),
        ({"parallelize": True}, {}, "parallelize=True has no effect: the model is split over all devices anyway"),
        ({"device_map": "auto", "layout": "tensor"}, {"layout": "tensor"}, "device_map=auto has no effect"),
        ({"device": "cuda:0"}, {}, "device=cuda:0 has no effect: jax chooses the devices"),
        ({"backend": "causal"}, {}, ""),
    ],
)
def test_arguments_are_kept_translated_or_dropped(
    arguments: dict[str, Any], options: dict[str, Any] | None, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "jaxllm"):
        assert llm_options(arguments) == (arguments if options is None else options)
    assert len(caplog.messages) == bool(said)
    assert said in "".join(caplog.messages)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"load_in_4bit": True}, "load_in_4bit is an argument of `hf` that jaxllm does not have: weights are not quantised here"),
        ({"peft": "adapter"}, "peft .* merge the adapter first"),
        ({"gguf_file": "m.gguf"}, "gguf_file .* pretrained=FOLDER/NAME.gguf"),
        ({"backend": "seq2seq"}, "backend=seq2seq: jaxllm runs decoders alone"),
    ],
)
def test_what_has_no_counterpart_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        llm_options(arguments)


@pytest.mark.parametrize("flag", [True, False])
def test_add_bos_token_is_what_transformers_makes_of_it(tmp_path: Path, flag: bool) -> None:
    folder = write_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(folder, add_bos_token=flag)
    encoder = PairEncoder(AutoTokenizer.from_pretrained(folder), 256, flag)
    texts = ["ab", "", "<s>begun"]
    expected = [theirs(text, add_special_tokens=flag and not text.startswith("<s>"))["input_ids"] for text in texts]
    assert encoder.encode(texts) == expected
    [(context, continuation), (empty, _)] = encoder.pairs([("ab ", "c"), ("", "c")])
    assert (context, continuation, empty) == ([256] * flag + [97, 98], [32, 99], [256])


def test_a_tokenizer_without_bos_cannot_add_it(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path))
    tokenizer.bos_token = None
    with pytest.raises(RequestError, match="add_bos_token=True, and the tokenizer has no such token: leave it out"):
        PairEncoder(tokenizer, 257, True)
