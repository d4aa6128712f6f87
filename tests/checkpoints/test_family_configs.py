"""Configs of every family are read to their last key; what cannot be run is refused in one sentence that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from families import CASES, records, write
from safetensors.numpy import load_file, save_file

from checkpoints.checkpoint import open_checkpoint
from checkpoints.convert import prepare
from checkpoints.errors import CheckpointError
from checkpoints.families import FAMILIES, read_hf
from checkpoints.load import load
from checkpoints.verify import compare
from jaxllm.commands.cli import main
from jaxllm.config import ModelConfig, RopeConfig
from jaxllm.decoder.mechanisms import mechanisms
from sharding.layout import make_layout

pytestmark = pytest.mark.fast


def read(name: str, **changes: Any) -> ModelConfig:
    return read_hf(records()[name].config | changes, "config.json")[1]


# What transformers 4 wrote into every config that it saved whole.
OLD_DEFAULTS: dict[str, Any] = {
    "add_cross_attention": False, "bad_words_ids": None, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None,
    "do_sample": False, "finetuning_task": None, "is_decoder": False, "is_encoder_decoder": False, "length_penalty": 1.0,
    "max_length": 20, "num_beams": 1, "output_attentions": False, "pruned_heads": {}, "return_dict": True, "sep_token_id": None,
    "tie_encoder_decoder": False, "torchscript": False, "use_bfloat16": False,
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_key_unknown_to_transformers_is_accepted_with_a_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert read(name, zzz=1) == read(name)
    assert [record.getMessage() for record in caplog.records] == [
        f"config.json: ignored, for transformers' {name} reads no such keys: zzz"
    ]
    assert read(name, **OLD_DEFAULTS) == read(name)


@pytest.mark.parametrize("name", CASES)
def test_what_transformers_writes_is_read_to_its_last_key(name: str, caplog: pytest.LogCaptureFixture) -> None:
    read(name)
    assert not caplog.records


@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_of_transformers_own_class_is_known(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Keys that the class has and does not write change nothing, and are accepted without a word."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = {key: value for key, value in CONFIG_MAPPING[name]().to_dict().items() if key not in records()[name].config}
    assert read(name, **values) == read(name)
    assert not [record for record in caplog.records if record.name == "jaxllm"]


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mistral", {"sliding_window": 0}, "`sliding_window` is 0; it must be at least 1, or null"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, r"`layer_types` is \[.*, and only None is supported"),
        ("qwen2", {"layer_types": ["full_attention"]}, "`layer_types` must name 3 layers"),
        ("qwen2", {"use_sliding_window": False}, "`layer_types` has layers that slide, and there is no `sliding_window`"),
        ("gemma", {"use_bidirectional_attention": True}, "`use_bidirectional_attention` is True, and only None or False is"),
        ("gemma2", {"sliding_window": None}, "`sliding_window` is missing"),
        ("gemma2", {"query_pre_attn_scalar": -1}, "`query_pre_attn_scalar` is -1.0; it must be above 0"),
        ("granite", {"logits_scaling": 0.0}, "`logits_scaling` is 0.0; it must be above 0"),
        ("granite", {"attention_multiplier": 0.0}, "config.json: attention_scale is 0.0; it must be"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "rope parameters: unknown keys rope_theta"),
        ("mixtral", {"num_experts_per_tok": 6}, "config.json: of 5 experts a token cannot choose 6"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "`moe_intermediate_size` is missing"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "`no_rope_layers` has 2 of 5 layers"),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope type 'linear' is not supported; there are"),
        ("phi3", {"rope_parameters": LONGROPE | {"short_factor": ["x"]}}, "`short_factor` holds what is no number"),
        ("phi3", {"rope_parameters": LONGROPE}, "longrope needs a short and a long factor for each of 2 pairs"),
        ("gpt2", {"add_cross_attention": True}, "`add_cross_attention` is True, and only False is supported"),
        ("gpt_neox", {"head_dim": 4}, "`head_dim` is 4, and only 8 or None is supported"),
        ("olmo3", {"sliding_window": None}, "`sliding_window` is missing"),
        ("olmo3", {"rope_parameters": {"rope_theta": 5.0}}, "rope parameters: unknown keys rope_theta"),
        ("ministral", {"layer_types": ["chunked_attention"] * 3}, "`layer_types` must name 3 layers, each 'sliding_attention'"),
        ("gpt_neox", {"is_causal": False}, "`is_causal` is False, and only True is supported"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "turns 1.5 of a head; it must be at most 1"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, r"\(awq\) is not supported: the weights are quantised"),
        ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "quantised as FP8; use those before quantisation"),
        ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised as bitsandbytes"),
        ("gemma3_text", {"model_type": "gemma3", "vision_config": {}}, "'gemma3' is a model of text and images.*gemma3_text"),
        ("llama", {"model_type": "t5", "is_encoder_decoder": True}, "'t5' has an encoder, and only decoders are supported"),
        ("llama", {"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "'bert' has an encoder"),
        ("llama", {"model_type": "own", "auto_map": {"AutoModel": "x.Y"}}, "'own' needs code of its own.*, which is never run"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(name, **changes)


PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    # Keys beside the architecture that published files of each family carry.
    ("opt", {"prefix": "</s>", "_remove_final_layer_norm": False, "activation_dropout": 0.0, "dropout": 0.1, "layerdrop": 0.0}),
    ("gpt2", {"task_specific_params": {"text-generation": {"max_length": 50}}, "n_ctx": 256, "summary_type": "cls_index",
              "_num_labels": 1}),
    ("gemma2", {"sliding_window_size": 7, "_attn_implementation": "eager", "hidden_act": "gelu_pytorch_tanh",
                "cache_implementation": "hybrid"}),
    ("gemma", {"hidden_activation": None}),
    ("phi3", {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "embd_pdrop": 0.0}),
    ("gpt_neox", {"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0, "rotary_pct": 0.5, "rotary_emb_base": 10000}),
    ("qwen3_moe", {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True, "max_window_layers": 3}),
    ("qwen2", {"use_mrope": False}),
    ("smollm3", {"max_window_layers": 28, "pretraining_tp": 2}),
    ("starcoder2", {"mlp_type": "default", "norm_type": "layer_norm", "residual_dropout": 0.1, "embedding_dropout": 0.1}),
    ("mixtral", {"router_jitter_noise": 0.0, "output_router_logits": False}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "more"), PUBLISHED)
def test_keys_of_published_files_are_known(name: str, more: dict[str, Any]) -> None:
    assert read(name, **more) == read(name)


def test_an_absent_number_of_kv_heads_is_the_familys() -> None:
    """And null is as many as heads."""
    values = {key: value for key, value in records()["mistral tied"].config.items() if key != "num_key_value_heads"}
    values |= {"num_attention_heads": 16}
    assert read_hf(values, "")[1].num_kv_heads == 8
    assert read_hf(values | {"num_key_value_heads": None}, "")[1].num_kv_heads == 16


@pytest.mark.parametrize(
    ("name", "buffers"),
    [
        ("gpt_neox", ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")),
        ("gpt2", ("attn.bias", "attn.masked_bias")),
        ("llama", ("self_attn.rotary_emb.inv_freq",)),
    ],
)
def test_buffers_of_old_files_are_passed_over(tmp_path: Path, name: str, buffers: tuple[str, ...]) -> None:
    """Causal masks are a byte a number: no dtype of weights."""
    folder = write(tmp_path / name, records()[name].config, records()[name].shapes)
    plain = write(tmp_path / "plain", records()[name].config, records()[name].shapes)
    layer = {"gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h", "llama": "model.layers"}[name]
    masks = {f"{layer}.0.{buffer}": np.ones((1, 1, 4, 4), bool) for buffer in buffers}
    save_file(load_file(folder / "model.safetensors") | masks, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert all(one.equal for one in compare(checkpoint, open_checkpoint(plain)))
    layout = make_layout("tensor", jax.devices()[:2], checkpoint.config.hidden_size)
    assert load(checkpoint.source, checkpoint.rules, checkpoint.config, layout, "float32")


def test_an_incomplete_stack_of_experts_names_what_is_missing(tmp_path: Path) -> None:
    folder = write(tmp_path / "mixtral", records()["mixtral"].config, records()["mixtral"].shapes)
    tensors = load_file(folder / "model.safetensors")
    missing = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    del tensors[missing]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"lacks tensors {missing}; fetch it again"):
        prepare(open_checkpoint(folder), tmp_path / "target")


def test_code_in_the_repository_of_a_known_family_is_not_run() -> None:
    assert read("phi3", auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}) == read("phi3")


def test_older_names_of_keys() -> None:
    phi = records()["phi3 longrope"].config
    rope = {key: value for key, value in phi["rope_parameters"].items() if key.endswith("_factor")}
    old = {"rope_parameters": None, "rope_scaling": rope | {"type": "su"}, "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    assert read_hf(phi | old, "")[1] == read("phi3 longrope")
    neox = {"rope_parameters": None, "rotary_emb_base": 10000, "rotary_pct": 0.5}
    assert read("gpt_neox", **neox) == read("gpt_neox")
    gemma = {"rope_parameters": None, "rope_theta": 5e3, "rope_local_base_freq": 50.0}
    scaled = read("gemma3_text untied", **gemma, rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert scaled == read("gemma3_text untied")
    olmo = {"rope_parameters": None, "rope_theta": 5e3}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    olmo3 = read("olmo3 tied", **olmo, rope_scaling=yarn)
    assert olmo3.rope == read("olmo3 tied").rope and olmo3.local_rope == RopeConfig(theta=5e3, original_max_position=256)
    assert read("gpt2", hidden_size=24, n_embd=24) == read("gpt2")


def test_tensors_without_a_prefix_and_with_the_heads_other_name(tmp_path: Path) -> None:
    """As of a checkpoint of the model without its head, and as some files of GPT-2 and GPT-NeoX have them."""
    for name, prefix in (("gpt2", "transformer."), ("opt", "model."), ("qwen3 tied", "model."), ("gpt_neox", "gpt_neox.")):
        folder = write(tmp_path / name, records()[name].config, records()[name].shapes)
        other = write(tmp_path / f"{name} other", records()[name].config, {})
        tensors = load_file(folder / "model.safetensors")
        tensors = {key.removeprefix(prefix).replace("embed_out", "lm_head"): value for key, value in tensors.items()}
        save_file(tensors, other / "model.safetensors")
        assert all(one.equal for one in compare(open_checkpoint(folder), open_checkpoint(other)))


def test_families_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families"]) == 0
    out = capsys.readouterr().out
    assert [line.split(":")[0] for line in out.splitlines()[::2]] == list(FAMILIES)
    assert "2 of 8 experts" in out and "rope of 25% of each head" in out and "capped logits" in out


def test_mechanisms_are_told_apart() -> None:
    told = {name: tuple(mechanisms(read(name))) for name in CASES}
    assert "longrope of 50% of each head (base 500)" in told["phi3 longrope"][0]
    assert "windows in some layers only" in told["qwen2"] and "windows in some layers only" not in told["mistral"]
    assert len(set(told.values())) > len(FAMILIES)
