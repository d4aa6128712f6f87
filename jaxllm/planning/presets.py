"""Published shapes, for planning and for benches with random weights."""

from __future__ import annotations

from jaxllm.config import Experts, ModelConfig, RopeConfig

PRESETS = {
    "gemma-2-27b": ModelConfig(
        256000, 4608, 36864, 46, 32, 16, 128, 8192, activation="gelu_tanh", tied_head=True, dtype="bfloat16", bos_token_id=2,
        eos_token_ids=(1,), norm="rms_float32", norm_offset=1.0, norm_place="around", windows=(4096, None),
        attention_scale=144**-0.5, attention_cap=50.0, logit_cap=30.0, embedding_scale=4608**0.5,
    ),
    "llama-7b": ModelConfig(32000, 4096, 11008, 32, 32, 32, 128, 2048, dtype="float16", bos_token_id=1, eos_token_ids=(2,)),
    "llama-30b": ModelConfig(32000, 6656, 17920, 60, 52, 52, 128, 2048, dtype="float16", bos_token_id=1, eos_token_ids=(2,)),
    "llama-3-8b": ModelConfig(
        128256, 4096, 14336, 32, 32, 8, 128, 8192, norm_eps=1e-5, dtype="bfloat16", bos_token_id=128000, eos_token_ids=(128001,),
        rope=RopeConfig(theta=500000.0),
    ),
    "llama-3-70b": ModelConfig(
        128256, 8192, 28672, 80, 64, 8, 128, 8192, norm_eps=1e-5, dtype="bfloat16", bos_token_id=128000, eos_token_ids=(128001,),
        rope=RopeConfig(theta=500000.0),
    ),
    "mixtral-8x7b": ModelConfig(
        32000, 4096, 14336, 32, 32, 8, 128, 32768, norm_eps=1e-5, dtype="bfloat16", bos_token_id=1, eos_token_ids=(2,),
        rope=RopeConfig(theta=1e6), experts=Experts(count=8, top_k=2, size=14336),
    ),
    "opt-30b": ModelConfig(
        50272, 7168, 28672, 48, 56, 56, 128, 2048, norm_eps=1e-5, activation="relu", rope=None, tied_head=True, qkv_bias=True,
        out_bias=True, mlp_bias=True, dtype="float16", bos_token_id=2, eos_token_ids=(2,), norm="layer", gated_mlp=False,
        learned_positions=2050, position_offset=2,
    ),
    "qwen3-30b-a3b": ModelConfig(
        151936, 2048, 6144, 48, 32, 4, 128, 40960, dtype="bfloat16", bos_token_id=151643, eos_token_ids=(151645,),
        rope=RopeConfig(theta=1e6), qk_norm="head", experts=Experts(count=128, top_k=8, size=768),
    ),
    "smollm2-135m": ModelConfig(
        49152, 576, 1536, 30, 9, 3, 64, 8192, norm_eps=1e-5, tied_head=True, dtype="bfloat16", bos_token_id=1, eos_token_ids=(2,),
        rope=RopeConfig(theta=100000.0),
    ),
}  # fmt: skip
