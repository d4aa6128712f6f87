"""Published configs -> ModelConfig, and the refusal of whatever is not understood."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from checkpoints.config_reader import ConfigReader
from checkpoints.errors import CheckpointError
from checkpoints.families import read_hf
from checkpoints.families.hf_common import NO_EFFECT
from jaxllm.config import ModelConfig, RopeConfig
from jaxllm.decoder.rope import inverse_frequencies
from jaxllm.planning.presets import PRESETS

pytestmark = pytest.mark.fast

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
YARN: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 1024}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 3.0},
    {"rope_type": "llama3", **LLAMA3},
    {"rope_type": "yarn", **YARN},
    {"rope_type": "yarn", **YARN, "attention_factor": 1.5, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
    {"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    {"rope_type": "yarn", **YARN, "mscale": 0.7},
    {"rope_type": "yarn", **YARN, "factor": None},
    {"rope_type": "yarn", "factor": 4.0},
]


def read(**changes: Any) -> ModelConfig:
    return read_hf(SMALL | changes, "config.json")[1]


def test_defaults_are_those_of_transformers() -> None:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(LlamaConfig(), name) for name in names}
    assert read_hf({"model_type": "llama", **sizes}, "config.json")[1] == _translate(LlamaConfig())
    for name in sizes:
        with pytest.raises(CheckpointError, match=f"`{name}` is"):
            read_hf({"model_type": "llama", **sizes, name: None}, "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "dtype": "bfloat16"},
        {"rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": [7, 8, 7]},
    ],
)
def test_a_config_written_by_transformers_reads_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = LlamaConfig(**(SMALL | changes))
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert read_hf(values, "config.json")[1] == _translate(config)


def _translate(config: LlamaConfig) -> ModelConfig:
    """By hand, from the object transformers makes."""
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return ModelConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        rope=RopeConfig(theta=10000.0, original_max_position=config.max_position_embeddings),
        tied_head=config.tie_word_embeddings,
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        dtype=str(config.dtype or "float32").removeprefix("torch."),
        bos_token_id=config.bos_token_id,
        eos_token_ids=tuple(dict.fromkeys(eos)),
    )


@pytest.mark.parametrize("form", ["new", "old", "older"])
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: ",".join(f"{k}={v}" for k, v in rope.items()))
def test_rope_is_that_of_transformers(rope: dict[str, Any], form: str) -> None:
    """Frequencies and attention factor, from transformers' own functions."""
    pytest.importorskip("torch")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    changes: dict[str, Any] = {"rope_parameters": rope | {"rope_theta": 5e4}}
    if form != "new":
        key = "rope_type" if form == "old" else "type"
        renamed = {key if name == "rope_type" else name: value for name, value in rope.items()}
        changes = {"rope_theta": 5e4, "rope_scaling": renamed}
    ours = read(**changes)
    assert ours.rope is not None
    theirs = LlamaRotaryEmbedding(LlamaConfig(**SMALL, rope_parameters=rope | {"rope_theta": 5e4}))
    assert ours.rope.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-12)
    np.testing.assert_allclose(inverse_frequencies(ours.rope, ours.head_dim), theirs.inv_freq.numpy(), rtol=1e-6)


def test_dynamic_stretches_from_max_position() -> None:
    rope = read(rope_scaling={"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 7}).rope
    assert rope == RopeConfig(kind="dynamic", factor=2.0, original_max_position=4096)


def test_original_context_beside_the_rope_parameters_wins() -> None:
    assert read(rope_parameters={"rope_type": "llama3", **LLAMA3}, original_max_position_embeddings=512).rope == RopeConfig(
        kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=512
    )


def test_smollm2s_published_config_is_the_preset() -> None:
    published = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
        "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "transformers_version": "4.42.3",
        "use_cache": True, "vocab_size": 49152,
    }  # fmt: skip
    ours, preset = read_hf(published, "config.json")[1], PRESETS["smollm2-135m"]
    assert ours == _with_context(preset, 8192)


def test_llama_30bs_published_config_is_the_preset() -> None:
    published = {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 6656, "initializer_range": 0.02, "intermediate_size": 17920, "max_position_embeddings": 2048,
        "max_sequence_length": 2048, "model_type": "llama", "num_attention_heads": 52, "num_hidden_layers": 60,
        "pad_token_id": 0, "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.28.0.dev0", "use_cache": True, "vocab_size": 32000,
    }  # fmt: skip
    assert read_hf(published, "config.json")[1] == PRESETS["llama-30b"]


def _with_context(config: ModelConfig, length: int) -> ModelConfig:
    """A reader states the trained context, which presets leave out for the default rope: it is not read there."""
    assert config.rope is not None
    return replace(config, rope=replace(config.rope, original_max_position=length))


def test_keys_without_effect_are_accepted_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert read(**{key: "anything" for key in NO_EFFECT if key != "model_type"}, quantization_config=None) == read()
    assert not caplog.records


def test_a_plain_config_needs_no_transformers() -> None:
    """Its config classes take seconds to import where torch is installed."""
    program = f"""
import sys
from checkpoints.families import read_hf
read_hf({SMALL}, "")
assert not any(name.split(".")[0] in ("torch", "transformers") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_keys_of_generation_are_accepted_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    generation = {"max_length": 4096, "temperature": 0.6, "do_sample": True, "top_k": 7, "repetition_penalty": 1.1,
                  "num_beams": 4, "suppress_tokens": [1], "decoder_start_token_id": 1}  # fmt: skip
    assert read(**generation) == read()
    assert not caplog.records


@pytest.mark.parametrize(
    ("key", "default", "other"),
    [
        ("chunk_size_feed_forward", 0, 17),
        ("is_encoder_decoder", False, True),
        # What transformers asks of configs whose class does not define it.
        ("is_causal", True, False),
        ("layer_types", None, ["sliding_attention"] * 2),
        ("text_config", None, {"hidden_size": 8}),
        # What would change the class itself.
        ("per_layer_config", None, {"0": {"num_attention_heads": 3}}),
        ("attribute_map", None, {"num_hidden_layers": "n"}),
        ("to_dict", None, 1),
    ],
)
def test_what_transformers_reads_is_accepted_at_its_default_alone(
    key: str, default: Any, other: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert read(**{key: default}) == read()
    assert not caplog.records
    with pytest.raises(CheckpointError, match=re.escape(f"config.json: `{key}` is {other!r}, and only {default} is supported")):
        read(**{key: other})


def test_what_transformers_writes_itself_is_accepted_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert read(unk_token_id=0) == read()
    assert not caplog.records


def test_what_transformers_does_not_read_is_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    rope = {"type": "linear", "factor": 2, "finetuned": True, "attn_factor": 1.0}
    extra = {"zzz": 1, "output_past": True, "bias": True, "rotary": True, "\x1b[31m": "\n"}
    assert read(**extra, rope_scaling=rope) == read(rope_scaling={"type": "linear", "factor": 2})
    assert [record.getMessage() for record in caplog.records] == [
        r"config.json: ignored, for transformers' llama reads no such keys: \x1b[31m, bias, output_past, rotary, zzz, "
        "rope_scaling.attn_factor, rope_scaling.finetuned"
    ]


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({"sliding_window": 128}, 128),  # of a class without one, whose cache obeys it all the same
        ({"attention_chunk_size": 512, "sliding_window": 700}, 512),
        ({"dual_chunk_attention_config": {"chunk_size": 2048, "local_size": 128}}, 1920),
        ({"dual_chunk_attention_config": {"chunk_size": 2048, "original_max_position_embeddings": 1000}}, 1000),
    ],
)
def test_what_matters_beyond_a_length_cuts_the_context(
    changes: dict[str, Any], length: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert read(**changes) == replace(read(), max_position=length)
    assert f"matter beyond {length} tokens, and is not supported: the model opens for {length} in place of" in caplog.text
    caplog.clear()
    assert read(**changes, max_position_embeddings=length) == read(max_position_embeddings=length)
    assert not caplog.records


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("quantization_config", {"quant_method": "gptq"}, "gptq) is not supported: the weights are quantised as GPTQ"),
        ("quantization", {"group_size": 64, "bits": 4}, "MLX) is not supported: the weights are quantised as MLX"),
        ("quant_method", "bitsandbytes", "bitsandbytes) is not supported: the weights are quantised as bitsandbytes"),
        ("compression_config", {"quant_method": "compressed-tensors"}, "compressed-tensors) is not supported"),
    ],
)
def test_whatever_speaks_of_quantisation_is_refused_as_that(key: str, value: Any, name: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"config.json: `{key}` ({name}")):
        read(**{key: value})
    assert read(**{key: None}) == read()


PLAIN_YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0}
PLAIN_LLAMA3: dict[str, Any] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 0}, "`sliding_window` is 0; it must be at least 1, or null"),
        ({"dual_chunk_attention_config": {"chunk_size": 9, "local_size": 9}}, "its chunks leave 0 tokens; correct it"),
        ({"dual_chunk_attention_config": [1]}, r"`dual_chunk_attention_config` is \[1\], which is not of type dict"),
        ({"vocab_size": "many"}, "`vocab_size` is 'many', which is not of type int"),
        ({"hidden_size": True}, "`hidden_size` is True, which is not of type int"),
        ({"rms_norm_eps": None}, "`rms_norm_eps` is missing"),
        ({"num_attention_heads": 0}, "`num_attention_heads` is 0, which is not a size"),
        ({"num_hidden_layers": -2}, "`num_hidden_layers` is -2, which is not a size"),
        ({"num_key_value_heads": 4}, "config.json: 6 query heads cannot share 4 KV heads"),
        ({"head_dim": 7}, "config.json: head size 7: rotary embeddings turn pairs"),
        ({"hidden_act": "relu2"}, "`hidden_act` 'relu2' is not supported; there are silu"),
        ({"dtype": "int8"}, "`dtype` 'int8' is not supported"),
        ({"eos_token_id": "</s>"}, "`eos_token_id` is '</s>', which is neither a token id nor a list"),
        ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor` is 0.5"),
        (
            {"rope_scaling": {"rope_type": "proportional"}},
            "rope type 'proportional' is not supported; there are default, linear",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope parameters: `factor` is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "`low_freq_factor` is missing"),
        ({"rms_norm_eps": math.nan}, "`rms_norm_eps` is nan, which is not a number to compute with"),
        ({"rms_norm_eps": 10**400}, "`rms_norm_eps` is 10+, which is not a number to compute with"),
        ({"rms_norm_eps": -1.0}, "config.json: norm_eps is -1.0; it must be at least 0"),
        ({"vocab_size": 1 << 40}, "`vocab_size` is 1099511627776, which is not a size; it must be 1 to 2147483647"),
        ({"num_hidden_layers": 100_000}, "100000 layers are more than 4096"),
        ({"rope_theta": 0.0}, "the rotary embedding's theta is 0.0; it must be 1e-12 to"),
        ({"rope_theta": 1}, "theta is 1, which turns all pairs alike"),
        ({"rope_scaling": PLAIN_YARN | {"factor": -4.0}}, "the rotary embedding's factor is -4.0"),
        ({"rope_scaling": PLAIN_YARN | {"beta_slow": -1.0}}, "the rotary embedding's beta_slow is -1.0"),
        ({"rope_scaling": PLAIN_YARN | {"mscale": 1.0, "mscale_all_dim": -10 / math.log(4)}}, "neither can be negative"),
        ({"rope_scaling": PLAIN_LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor 4.0 is not below high_freq_factor 4.0"),
        ({"rope_scaling": PLAIN_LLAMA3 | {"original_max_position_embeddings": -1}}, "original_max_position is -1"),
        ({"rope_scaling": [1]}, r"`rope_scaling` is \[1\], which is not of type dict"),
        ({"model_type": "gpt9"}, "architecture 'gpt9' is not supported; there are: gemma, .*llama"),
        ({"model_type": None}, "architecture None is not supported"),
    ],
)
def test_bad_configs_are_refused_in_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(**changes)
    assert str(caught.value).startswith("config.json") and "\n" not in str(caught.value)


def test_a_bool_does_not_pass_for_a_number_that_equals_it() -> None:
    reader = ConfigReader({"chunk": False}, "here")
    with pytest.raises(CheckpointError, match="`chunk` is False, and only 0"):
        reader.default("chunk", 0)


def test_reading_a_config_leaves_it_as_it_was() -> None:
    values = SMALL | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    before = json.dumps(values)
    read_hf(values, "config.json")
    assert json.dumps(values) == before
