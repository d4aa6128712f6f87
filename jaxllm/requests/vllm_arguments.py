"""Arguments of vLLM's `SamplingParams` and `LLM` that are none here, and what to use in their place."""

from __future__ import annotations

_NO_CODE = "code that comes with a model is never run: leave it out"
_PLANNED = "memory is planned: bound it with max_model_len and max_num_seqs"
_OWN_STEPS = "the engine chooses its steps' sizes: leave it out"
_COMPILED = "programs are always compiled, and kept on the disk: leave it out"
_TEXT_ONLY = "models of text alone are run: leave it out"
_NO_ADAPTERS = "merge the adapter into the weights first"
_FILES = "the format is seen from the files: leave it out"
_OVERRIDE = "give it in hf_overrides"

SAMPLING_ELSEWHERE = {
    "best_of": "ask for n samples with logprobs=0, and take the one of the largest cumulative_logprob",
    "detokenize": "a text is always made; token_ids are beside it",
    "early_stopping": "beam search is not offered: use n samples",
    "guided_decoding": "use structured_outputs, which has the same names",
    "length_penalty": "beam search is not offered: use n samples",
    "logits_processors": "use logit_bias",
    "min_new_tokens": "use min_tokens",
    "max_new_tokens": "use max_tokens",
    "do_sample": "use temperature, which is greedy at 0",
    "num_return_sequences": "use n",
    "output_kind": "llm.stream gives pieces, llm.generate whole texts",
    "spaces_between_special_tokens": "special tokens are decoded as the tokenizer does: leave it out",
    "use_beam_search": "beam search is not offered: use n samples",
}

LLM_ELSEWHERE = {
    "attention_backend": "what the platform has is chosen: leave it out",
    "block_size": _OWN_STEPS,
    "compilation_config": _COMPILED,
    "config_format": _FILES,
    "cpu_offload_gb": "weights stay on the devices: use more of them, or dtype='bfloat16'",
    "data_parallel_size": "use devices=N with layout='replicated', or 'gathered' where one device cannot hold the model",
    "device": "jax chooses: set JAX_PLATFORMS=cpu, cuda or tpu before the start",
    "device_map": "use devices and layout",
    "disable_custom_all_reduce": "XLA makes the collectives: leave it out",
    "disable_log_stats": "nothing is logged: leave it out",
    "distributed_executor_backend": "one process drives all devices: leave it out",
    "download_dir": "set HF_HOME",
    "enable_chunked_prefill": "long prompts are always prefilled in chunks: leave it out",
    "enable_expert_parallel": "experts are split within by the layout: leave it out",
    "enable_lora": _NO_ADAPTERS,
    "enforce_eager": _COMPILED,
    "gpu_memory_utilization": _PLANNED,
    "guided_decoding_backend": "llguidance is the only one: leave it out",
    "hf_token": "log in with `hf auth login`, or set HF_TOKEN",
    "kv_cache_dtype": "the cache has the model's dtype: leave it out",
    "kv_cache_memory_bytes": _PLANNED,
    "limit_mm_per_prompt": _TEXT_ONLY,
    "load_format": _FILES,
    "max_logprobs": "at most 20 are given, or all with logprobs=-1: leave it out",
    "max_seq_len_to_capture": _COMPILED,
    "mm_processor_kwargs": _TEXT_ONLY,
    "num_gpu_blocks_override": _PLANNED,
    "pipeline_parallel_size": "layers are not split among devices: use devices=N with layout='tensor' or 'gathered'",
    "quantization": "quantised weights are not read: use those before quantisation",
    "rope_scaling": _OVERRIDE,
    "rope_theta": _OVERRIDE,
    "runner": "any decoder generates and scores: leave it out",
    "served_model_name": "nothing is served: leave it out",
    "skip_tokenizer_init": "a tokenizer is used where there is one; give token ids to go without: leave it out",
    "speculative_config": "speculative decoding is not offered: leave it out",
    "swap_space": _PLANNED,
    "task": "any decoder generates and scores: leave it out",
    "tensor_parallel_size": "use devices=N with layout='tensor'",
    "tokenizer_mode": "the fast tokenizer is taken where there is one: leave it out",
    "tokenizer_revision": "the tokenizer has the model's revision; give another in a folder: tokenizer=FOLDER",
    "torch_dtype": "use dtype",
    "trust_remote_code": _NO_CODE,
}
