"""Configs as models are published with them, and what becomes of each.

The keys, and the values of all that is no size, are those of the files on the hub; sizes, windows and token ids are shrunk, for a
model of random numbers to be tiny. `ACCEPTED` are run beside transformers; `REFUSED` have a pattern of the sentence they meet.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]
_SIZES: Config = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "bos_token_id": 1, "eos_token_id": 2, "use_cache": True, "initializer_range": 0.02,
}  # fmt: skip
GQA: Config = {"num_key_value_heads": 2}


def _decoder(model_type: str, architecture: str, **keys: Any) -> Config:
    shared = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    return {"architectures": [architecture], "model_type": model_type} | _SIZES | shared | keys


def _llama(**keys: Any) -> Config:
    return _decoder("llama", "LlamaForCausalLM", **({"max_position_embeddings": 4096} | keys))


def _mistral(**keys: Any) -> Config:
    shared = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "sliding_window": 16, "rope_theta": 10000.0}
    return _decoder("mistral", "MistralForCausalLM", **(GQA | shared)) | keys


def _qwen2(**keys: Any) -> Config:
    shared = {"max_position_embeddings": 32768, "attention_dropout": 0.0, "rope_theta": 1e6, "sliding_window": 32768,
              "max_window_layers": 2, "use_sliding_window": False}  # fmt: skip
    return _decoder("qwen2", "Qwen2ForCausalLM", **(GQA | shared | keys))


def _qwen3(**keys: Any) -> Config:
    shared = {"max_position_embeddings": 40960, "attention_bias": False, "attention_dropout": 0.0, "head_dim": 8,
              "rope_theta": 1e6,
              "rope_scaling": None, "sliding_window": None, "max_window_layers": 2, "use_sliding_window": False}  # fmt: skip
    return _decoder("qwen3", "Qwen3ForCausalLM", **(GQA | shared | keys))


def _moe(model_type: str, architecture: str, **keys: Any) -> Config:
    shared = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
              "output_router_logits": False, "router_aux_loss_coef": 0.001, "rope_theta": 1e6, "max_position_embeddings": 8192,
              "attention_dropout": 0.0}  # fmt: skip
    return _decoder(model_type, architecture, **(shared | keys))


def _gemma(model_type: str, architecture: str, **keys: Any) -> Config:
    shared = {"head_dim": 8, "tie_word_embeddings": True, "max_position_embeddings": 8192, "rope_theta": 10000.0,
              "pad_token_id": 0,
              "bos_token_id": 2, "eos_token_id": 1, "attention_bias": False, "attention_dropout": 0.0}  # fmt: skip
    config = _decoder(model_type, architecture, **(GQA | shared | keys))
    del config["tie_word_embeddings"]  # no Gemma's file has it
    return config


def _phi3(**keys: Any) -> Config:
    shared = {"attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "original_max_position_embeddings": 4096,
              "max_position_embeddings": 4096, "rope_theta": 10000.0, "rope_scaling": None, "pad_token_id": 3,
                  "rms_norm_eps": 1e-5,
              "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "attention_bias": False}  # fmt: skip
    return _decoder("phi3", "Phi3ForCausalLM", **(shared | keys))


def _gpt2(**keys: Any) -> Config:
    shared = {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 1,
        "embd_pdrop": 0.1, "eos_token_id": 1, "initializer_range": 0.02, "layer_norm_epsilon": 1e-5, "model_type": "gpt2",
        "n_ctx": 128, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128, "resid_pdrop": 0.1, "vocab_size": 96,
        "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
        "summary_use_proj": True,
    }  # fmt: skip
    return shared | keys


def _opt(**keys: Any) -> Config:
    shared = {
        "activation_dropout": 0.0, "activation_function": "relu", "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 2, "do_layer_norm_before": True, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 48, "hidden_size": 32,
        "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 128, "model_type": "opt", "num_attention_heads": 4,
        "num_hidden_layers": 2, "pad_token_id": 1, "torch_dtype": "float16", "use_cache": True, "vocab_size": 96,
        "word_embed_proj_dim": 32, "transformers_version": "4.21.0.dev0",
    }  # fmt: skip
    return shared | keys


def _neox(**keys: Any) -> Config:
    shared = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "rotary_emb_base": 10000,
              "rotary_pct": 0.25, "torch_dtype": "float16", "tie_word_embeddings": False, "use_parallel_residual": True,
              "bos_token_id": 0, "eos_token_id": 0, "architectures": ["GPTNeoXForCausalLM"],
              "model_type": "gpt_neox"}  # fmt: skip
    return _SIZES | shared | keys


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
          "rope_type": "llama3"}  # fmt: skip
SU = {"long_factor": [1.5, 2.0, 3.0, 4.0], "short_factor": [1.0, 1.1, 1.2, 1.3]}
OLD_WHOLE = {"torchscript": False, "pruned_heads": {}, "finetuning_task": None, "is_decoder": False, "tie_encoder_decoder": False,
             "chunk_size_feed_forward": 0, "output_attentions": False, "length_penalty": 1.0, "top_k": 50}  # fmt: skip

ACCEPTED: dict[str, Config] = {
    # LLaMA and its children
    "huggyllama/llama-7b": _llama(max_sequence_length=2048, pad_token_id=0, max_position_embeddings=2048),
    "decapoda/llama-7b-hf": _llama(max_position_embeddings=2048, pad_token_id=0, _name_or_path="llama-7b", bos_token_id=0),
    "openlm-research/open_llama_3b": _llama(max_position_embeddings=2048, pad_token_id=0, unk_token_id=0),
    "meta-llama/Llama-2-7b-hf": _llama(pretraining_tp=1, rope_scaling=None, rms_norm_eps=1e-5, num_key_value_heads=4),
    "meta-llama/Llama-2-7b-chat-hf": _llama(pretraining_tp=2, max_length=4096, pad_token_id=0, do_sample=True, temperature=0.6,
                                            top_p=0.9),
    "meta-llama/Meta-Llama-3-8B": _llama(**GQA, pretraining_tp=1, rope_theta=500000.0, rope_scaling=None, attention_bias=False,
                                         attention_dropout=0.0, max_position_embeddings=8192),
    "meta-llama/Llama-3.1-8B-Instruct": _llama(**GQA, rope_theta=500000.0, rope_scaling=LLAMA3, mlp_bias=False,
                                               attention_bias=False,
                                               eos_token_id=[2, 3, 4], max_position_embeddings=131072, pretraining_tp=1),
    "meta-llama/Llama-3.2-1B": _llama(**GQA, head_dim=8, rope_theta=500000.0, rope_scaling=LLAMA3 | {"factor": 32.0},
                                      tie_word_embeddings=True, max_position_embeddings=131072),
    "meta-llama/Llama-3.3-70B-Instruct": _llama(**GQA, head_dim=8, rope_theta=500000.0, rope_scaling=LLAMA3, mlp_bias=False,
                                                eos_token_id=[2, 3, 4], max_position_embeddings=131072, pretraining_tp=1),
    "transformers 5's own": {key: value for key, value in _llama(
        dtype="bfloat16", rope_parameters={"rope_theta": 500000.0, "rope_type": "default"}, unk_token_id=0, head_dim=8,
        transformers_version="5.0.0", attention_bias=False, mlp_bias=False, attention_dropout=0.0, pretraining_tp=1,
    ).items() if key != "torch_dtype"},
    "lmsys/vicuna-7b-v1.5": _llama(pretraining_tp=1, max_length=4096, pad_token_id=0, num_key_value_heads=4, rope_scaling=None),
    "lmsys/vicuna-7b-v1.5-16k": _llama(rope_scaling={"factor": 4.0, "type": "linear"}, max_sequence_length=16384, pad_token_id=0,
                                       num_key_value_heads=4, pretraining_tp=1, temperature=0.9, top_p=0.6),
    "togethercomputer/LLaMA-2-7B-32K": _llama(rope_scaling={"factor": 8.0, "type": "linear"}, max_position_embeddings=32768,
                                              num_key_value_heads=4, pretraining_tp=1, pad_token_id=0),
    "NousResearch/Yarn-Llama-2-7b-64k": _llama(
        rope_scaling={"factor": 16.0, "original_max_position_embeddings": 16, "type": "yarn", "finetuned": True}, use_cache=False,
        max_position_embeddings=65536, auto_map={"AutoConfig": "configuration_llama.LlamaConfig"}, num_key_value_heads=4,
        pretraining_tp=1,
    ),
    "codellama/CodeLlama-7b-hf": _llama(rope_theta=1000000, max_position_embeddings=16384, rms_norm_eps=1e-5, rope_scaling=None,
                                        num_key_value_heads=4, pretraining_tp=1),
    "TinyLlama-1.1B-Chat-v1.0": _llama(**GQA, pretraining_tp=1, rope_theta=10000.0, rms_norm_eps=1e-5, attention_bias=False,
                                       max_position_embeddings=2048, rope_scaling=None),
    "HuggingFaceTB/SmolLM2-135M": _llama(**GQA, is_llama_config=True, rope_interleaved=False, rope_theta=100000, mlp_bias=False,
                                         tie_word_embeddings=True, max_position_embeddings=8192, pretraining_tp=1,
                                         **{"transformers.js_config": {"dtype": "q4"}}),
    "deepseek-ai/deepseek-llm-7b-base": _llama(pretraining_tp=1, rope_scaling=None, rope_theta=10000.0, attention_bias=False),
    "deepseek-ai/deepseek-coder-6.7b-base": _llama(rope_scaling={"factor": 4.0, "type": "linear"}, rope_theta=100000,
                                                   max_position_embeddings=16384, pretraining_tp=1),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _llama(**GQA, rope_theta=500000.0, rope_scaling=LLAMA3, mlp_bias=False,
                                                       attention_bias=False, max_position_embeddings=131072, pretraining_tp=1),
    "01-ai/Yi-6B": _llama(**GQA, rope_theta=5000000.0, pad_token_id=0, pretraining_tp=1, attention_bias=False, rope_scaling=None),
    "01-ai/Yi-1.5-9B-Chat": _llama(**GQA, rope_theta=5000000.0, pad_token_id=0, attention_dropout=0.0, use_cache=False),
    "internlm/internlm-chat-7b as LLaMA": _llama(bias=True, rotary={"base": 10000, "type": "dynamic"}, pad_token_id=2,
                                                 attn_implementation="eager"),
    "internlm2 as LLaMA": _llama(**GQA, bias=False, rope_theta=1000000, rope_scaling={"type": "dynamic", "factor": 2.0},
                                 max_position_embeddings=32768, pad_token_id=2),
    "tiiuae/Falcon3-7B-Base": _llama(**GQA, activation="swiglu", head_dim=8, rope_theta=1000042, attention_bias=False,
                                     mlp_bias=False, rope_scaling=None, max_position_embeddings=32768),
    "WizardLM/WizardLM-13B-V1.2": _llama(custom_pipelines={}, output_past=True, pad_token_id=0, pretraining_tp=1,
                                         base_model_name_or_path="llama-2", tokenizer_model_max_length=4096),
    "NousResearch/Nous-Hermes-llama-2": _llama(pad_token="<pad>", model_max_length=4096, use_flash_attention=True,
        pad_token_id=0),
    "unsloth/llama-3-8b": _llama(**GQA, unsloth_version="2024.9", _flash_attn_2_enabled=True, rope_theta=500000.0,
                                 pretraining_tp=1, pad_token_id=5),
    "an old file, saved whole": _llama(**OLD_WHOLE, classifier_dropout=None, type_vocab_size=0, hidden_dropout_prob=0.0),
    "baichuan-inc/Baichuan2 as LLaMA": _llama(z_loss_weight=0, model_max_length=4096, _from_model_config=True, pad_token_id=0),
    # Mistral
    "mistralai/Mistral-7B-v0.1": _mistral(),
    "mistralai/Mistral-7B-Instruct-v0.2": _mistral(sliding_window=None, rope_theta=1000000.0, attention_dropout=0.0),
    "mistralai/Mistral-Nemo-Base-2407": _mistral(sliding_window=None, head_dim=16, max_position_embeddings=1024000),
    "mistralai/Mistral-Small-24B": _mistral(sliding_window=None, head_dim=16, rope_theta=100000000.0, attention_dropout=0.0),
    "HuggingFaceH4/zephyr-7b-beta": _mistral(pad_token_id=2, _name_or_path="mistralai/Mistral-7B-v0.1"),
    "openchat/openchat-3.5": _mistral(pretraining_tp=1, use_sliding_window=False, max_position_embeddings=8192),
    "NousResearch/Yarn-Mistral-7b-128k": _mistral(
        rope_scaling={"factor": 16.0, "finetuned": True, "original_max_position_embeddings": 16, "type": "yarn"},
        max_sequence_length=131072, sliding_window=131072, auto_map={"AutoConfig": "configuration_mistral.MistralConfig"},
    ),
    "mistralai/Ministral-8B": _mistral(
        model_type="ministral", architectures=["MinistralForCausalLM"], head_dim=8, rope_theta=100000000.0, attention_dropout=0.0,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "mistralai/Mixtral-8x7B-v0.1": _mistral(
        model_type="mixtral", architectures=["MixtralForCausalLM"], num_local_experts=4, num_experts_per_tok=2,
            sliding_window=None,
        output_router_logits=False, router_aux_loss_coef=0.02, rope_theta=1000000.0, router_jitter_noise=0.0,
    ),
    # Qwen
    "Qwen/Qwen1.5-0.5B-Chat": _qwen2(num_key_value_heads=4, tie_word_embeddings=True, max_window_layers=21),
    "Qwen/Qwen2-7B-Instruct": _qwen2(use_mrope=False),
    "Qwen/Qwen2.5-7B-Instruct-1M": _qwen2(
        max_position_embeddings=1010000, rope_theta=10000000.0,
        dual_chunk_attention_config={"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144},
    ),
    "Qwen/QwQ-32B": _qwen2(pad_token_id=3, rope_scaling={"factor": 4.0, "original_max_position_embeddings": 16, "type": "yarn"}),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _qwen2(max_position_embeddings=131072, use_mrope=False, rope_theta=10000),
    "Qwen/Qwen2.5-Math-7B with windows": _qwen2(use_sliding_window=True, sliding_window=16, max_window_layers=1),
    "Qwen/Qwen3-0.6B": _qwen3(tie_word_embeddings=True),
    "Qwen/Qwen3-8B": _qwen3(),
    "Qwen/Qwen1.5-MoE-A2.7B": _moe("qwen2_moe", "Qwen2MoeForCausalLM", num_key_value_heads=4, norm_topk_prob=False,
                                   shared_expert_intermediate_size=24, sliding_window=32768, max_window_layers=21,
                                   use_sliding_window=False),
    "Qwen/Qwen2-57B-A14B": _moe("qwen2_moe", "Qwen2MoeForCausalLM", **GQA, norm_topk_prob=False,
                                shared_expert_intermediate_size=24,
                                sliding_window=65536, max_window_layers=28, use_sliding_window=False, qkv_bias=True),
    "Qwen/Qwen3-30B-A3B": _moe("qwen3_moe", "Qwen3MoeForCausalLM", **GQA, norm_topk_prob=True, head_dim=8, mlp_only_layers=[],
                               rope_scaling=None, sliding_window=None, max_window_layers=48, use_sliding_window=False,
                               attention_bias=False),
    "Qwen/Qwen3-Coder-30B-A3B": _moe("qwen3_moe", "Qwen3MoeForCausalLM", **GQA, norm_topk_prob=True, head_dim=8,
                                     mlp_only_layers=[],
                                     rope_scaling=None, max_window_layers=28, use_sliding_window=False, qkv_bias=False,
                                     use_qk_norm=True, shared_expert_intermediate_size=0, attention_bias=False),
    # Gemma, Phi
    "google/gemma-2b": _gemma("gemma", "GemmaForCausalLM", hidden_act="gelu", num_key_value_heads=1, rope_scaling=None),
    "google/gemma-1.1-7b-it": _gemma("gemma", "GemmaForCausalLM", hidden_act="gelu_pytorch_tanh", num_key_value_heads=4,
                                     hidden_activation="gelu_pytorch_tanh"),
    "google/gemma-2-2b": _gemma("gemma2", "Gemma2ForCausalLM", hidden_act="gelu_pytorch_tanh", attn_logit_softcapping=50.0,
                                hidden_activation="gelu_pytorch_tanh", final_logit_softcapping=30.0, query_pre_attn_scalar=8,
                                sliding_window=16, cache_implementation="hybrid"),
    "google/gemma-3-1b-it": _gemma("gemma3_text", "Gemma3ForCausalLM", hidden_activation="gelu_pytorch_tanh", rope_theta=1000000,
                                   attn_logit_softcapping=None, final_logit_softcapping=None, query_pre_attn_scalar=8,
                                   rope_local_base_freq=10000, rope_scaling=None, sliding_window=16, sliding_window_pattern=2,
                                   cache_implementation="hybrid", eos_token_id=[1, 5]),
    "microsoft/Phi-3-mini-4k-instruct": _phi3(sliding_window=16),
    "microsoft/Phi-3.5-mini-instruct": _phi3(rope_scaling=SU | {"type": "longrope"}, max_position_embeddings=131072,
                                             sliding_window=262144),
    "microsoft/Phi-3-mini-128k-instruct": _phi3(rope_scaling=SU | {"type": "longrope"}, max_position_embeddings=131072),
    "microsoft/phi-4": _phi3(**GQA, max_position_embeddings=16384, original_max_position_embeddings=16384, rope_theta=250000,
                             sliding_window=None),
    "microsoft/Phi-4-mini-instruct": _phi3(
        **GQA, partial_rotary_factor=0.75, full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, mlp_bias=False,
        rope_scaling={"long_factor": [1.0, 2.0, 3.0], "short_factor": [1.0] * 3, "type": "longrope"}, tie_word_embeddings=True,
        max_position_embeddings=131072, sliding_window=262144,
    ),
    # The open ones
    "allenai/OLMo-2-1124-7B": _decoder("olmo2", "Olmo2ForCausalLM", attention_bias=False, attention_dropout=0.0,
                                       rope_theta=500000,
                                       max_position_embeddings=4096, pad_token_id=3, rope_scaling=None, num_key_value_heads=4),
    "allenai/Olmo-3-1025-7B": _decoder(
        "olmo3", "Olmo3ForCausalLM", attention_bias=False, attention_dropout=0.0, rope_theta=500000,
            max_position_embeddings=65536,
        pad_token_id=3, num_key_value_heads=4, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
        rope_scaling={"attention_factor": 1.2, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0, "rope_type": "yarn",
                      "original_max_position_embeddings": 8192},
    ),
    "HuggingFaceTB/SmolLM3-3B": _decoder(
        "smollm3", "SmolLM3ForCausalLM", **GQA, attention_bias=False, attention_dropout=0.0, layer_types=["full_attention"] * 2,
        max_position_embeddings=65536, max_window_layers=28, mlp_bias=False, no_rope_layer_interval=4, no_rope_layers=[1, 0],
        pretraining_tp=2, rope_scaling=None, rope_theta=5000000.0, sliding_window=None, use_sliding_window=False, pad_token_id=3,
    ),
    "ibm-granite/granite-3.1-2b-instruct": _decoder(
        "granite", "GraniteForCausalLM", **GQA, attention_bias=False, attention_dropout=0.1, attention_multiplier=0.25,
        embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22, mlp_bias=False, rope_theta=5000000.0,
        max_position_embeddings=131072, tie_word_embeddings=True, rope_scaling=None, pad_token_id=0, rms_norm_eps=1e-5,
    ),
    "bigcode/starcoder2-3b": {key: value for key, value in _decoder(
        "starcoder2", "Starcoder2ForCausalLM", **GQA, activation_function="gelu", attention_dropout=0.1, embedding_dropout=0.1,
        residual_dropout=0.1, hidden_act="gelu_pytorch_tanh", layer_norm_epsilon=1e-5, norm_epsilon=1e-5, norm_type="layer_norm",
        mlp_type="default", max_position_embeddings=16384, rope_theta=999999.4, sliding_window=16, use_bias=True,
    ).items() if key not in ("rms_norm_eps", "tie_word_embeddings")},
    # OPT, GPT-2, GPT-NeoX
    "facebook/opt-125m": _opt(_remove_final_layer_norm=False, prefix="</s>", enable_bias=True,
        layer_norm_elementwise_affine=True),
    "facebook/opt-350m": _opt(word_embed_proj_dim=16, do_layer_norm_before=False, prefix="</s>"),
    "facebook/opt-13b": _opt(output_projection=True, embed_dim=32, type_vocab_size=2),
    "facebook/galactica-125m": _opt(activation_function="gelu", enable_bias=False, learned_embeddings=True,
                                    scale_embeddings=False,
                                    layer_norm_elementwise_affine=False, bos_token_id=0),
    "openai-community/gpt2": _gpt2(task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}}),
    "distilgpt2": _gpt2(_num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0},
                        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}}),
    "microsoft/DialoGPT-small": _gpt2(output_past=True, n_inner=None,
        task_specific_params={"conversational": {"max_length": 1000}}),
    "cerebras/Cerebras-GPT-111M": _gpt2(activation_function="gelu", n_inner=48, scale_attn_weights=True,
                                        reorder_and_upcast_attn=False,
                                        scale_attn_by_inverse_layer_idx=False, use_cache=True, torch_dtype="float32"),
    "stanford-crfm/battlestar-gpt2-small": _gpt2(reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True,
                                                 scale_attn_weights=True, n_inner=None, gradient_checkpointing=False),
    "a GPT-2 of generation keys": _gpt2(do_sample=True, max_length=50, top_k=40, repetition_penalty=1.2,
        predict_special_tokens=True),
    "EleutherAI/gpt-neox-20b": _neox(attention_probs_dropout_prob=0, hidden_dropout_prob=0, initializer_range=0.02,
                                     layer_norm_eps=1e-5),
    "EleutherAI/pythia-70m": _neox(),
    "databricks/dolly-v2-3b": _neox(custom_pipelines={"text-generation": {"impl": "instruct_pipeline.InstructPipeline"}}),
    "togethercomputer/RedPajama-INCITE-Base-3B": _neox(rotary_pct=1.0, use_parallel_residual=False),
    "stabilityai/stablelm-base-alpha-3b": _neox(max_position_embeddings=4096, is_decoder=True, classifier_dropout=0.1),
    "OpenAssistant/oasst-sft-4-pythia": _neox(attention_dropout=0.1, hidden_dropout=0.1, pad_token_id=3, is_causal=True),
}  # fmt: skip

_CUSTOM = {"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "modeling.Model"}
_AWQ = {"bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm", "zero_point": True}
_GPTQ = {"bits": 4, "desc_act": True, "group_size": 128, "quant_method": "gptq", "sym": True}
_BNB = {"_load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "load_in_4bit": True, "quant_method": "bitsandbytes"}
_FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
_MLX = {"group_size": 64, "bits": 4}

REFUSED: dict[str, tuple[Config, str]] = {
    "TheBloke/Llama-2-7B-AWQ": (_llama(quantization_config=_AWQ), r"`quantization_config` \(awq\) .* quantised as AWQ"),
    "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4": (_qwen2(quantization_config=_GPTQ), "quantised as GPTQ"),
    "unsloth/llama-3-8b-bnb-4bit": (_llama(**GQA, quantization_config=_BNB), "quantised as bitsandbytes"),
    "Qwen/Qwen3-8B-FP8": (_qwen3(quantization_config=_FP8), "quantised as FP8"),
    "neuralmagic/Meta-Llama-3-8B-FP8": (_llama(compression_config={"quant_method": "compressed-tensors"}),
        "as compressed-tensors"),
    "mlx-community/Mistral-7B-4bit": (_mistral(quantization=_MLX), r"`quantization` \(MLX\) .* quantised as MLX"),
    "mlx-community/Qwen3-8B-4bit": (_qwen3(quantization=_MLX, quantization_config=_MLX), "quantised as MLX"),
    "mistralai/Mistral-Small-3.1": ({"model_type": "mistral3", "vision_config": {}, "text_config": {}}, "text and images"),
    "google/gemma-3-4b-it": ({"model_type": "gemma3", "vision_config": {}, "text_config": {}}, "text and images .* gemma3_text"),
    "llava-hf/llava-1.5-7b-hf": ({"model_type": "llava", "vision_config": {}, "text_config": {}},
        "'llava' is a model of text and"),
    "Qwen/Qwen2-VL-7B": ({"model_type": "qwen2_vl", "vision_config": {}}, "'qwen2_vl' is a model of text and images"),
    "internlm/internlm-7b": ({"model_type": "internlm", "auto_map": _CUSTOM}, "'internlm' needs code of its own"),
    "Qwen/Qwen-7B": ({"model_type": "qwen", "auto_map": _CUSTOM, "use_flash_attn": "auto"}, "'qwen' needs code of its own"),
    "THUDM/chatglm3-6b": ({"model_type": "chatglm", "auto_map": _CUSTOM, "quantization_bit": 0},
        "'chatglm' needs code of its own"),
    "google/flan-t5-base": ({"model_type": "t5", "is_encoder_decoder": True}, "'t5' has an encoder"),
    "facebook/bart-base": ({"model_type": "bart", "is_encoder_decoder": True}, "'bart' has an encoder"),
    "bert-base-uncased": ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "'bert' has an encoder"),
    "bigscience/bloom-560m": ({"model_type": "bloom", "n_layer": 24}, "architecture 'bloom' is not supported; there are: gemma"),
    "tiiuae/falcon-7b": ({"model_type": "falcon", "alibi": False}, "architecture 'falcon' is not supported"),
    "a GPT-2 that reads an encoder": (_gpt2(add_cross_attention=True), "`add_cross_attention` is True, and only False"),
    "a LLaMA that sees both ways": (_llama(is_causal=False), "`is_causal` is False, and only True is supported"),
    "a Gemma that sees both ways": (
        _gemma("gemma3_text", "Gemma3TextModel", use_bidirectional_attention=True), "`use_bidirectional_attention` is True",
    ),
    "a Mistral of Ministral's layers": (_mistral(layer_types=["full_attention"] * 2), "`layer_types` is .*, and only None"),
    "a LLaMA with a rope unheard of": (_llama(rope_scaling={"type": "ntk", "factor": 2.0}), "rope type 'ntk' is not supported"),
    "a LLaMA that turns half of each head": (_llama(partial_rotary_factor=0.5), "`partial_rotary_factor` is 0.5"),
    "a LLaMA with a slip": (
        {("num_hiden_layers" if key == "num_hidden_layers" else key): value for key, value in _llama().items()},
        "`num_hidden_layers` is missing",
    ),
}  # fmt: skip
