"""Model arguments of lm-eval's `hf` -> those of `LLM`, so that a command keeps them when its model becomes `jaxllm`.

What has the same meaning is kept, what changes no score is dropped, and said where someone may count on it; the rest is refused
with what to say instead.
"""

from __future__ import annotations

import logging
from typing import Any

from jaxllm.requests.outputs import RequestError

SPLIT = "the model is split over all devices anyway; layout= and devices= say how"
QUANTISED = "weights are not quantised here; leave it out, and give dtype=bfloat16 to halve them"

# Dropped without a word: packing takes the place of batches, and of what is kept of a context that requests share.
SILENT = (
    "batch_size",
    "logits_cache",
    "low_cpu_mem_usage",
    "max_batch_size",
    "offload_folder",
    "truncation",
    "use_fast_tokenizer",
)
# Dropped, with the reason.
WITHOUT_EFFECT = {
    "attn_implementation": "XLA compiles attention",
    "device": "jax chooses the devices; devices= says how many, JAX_PLATFORMS=cpu asks for the CPU",
    "device_map": SPLIT,
    "parallelize": SPLIT,
    "tp_plan": SPLIT,
    "trust_remote_code": "no code that comes with a model is ever run",
}
# Refused, with the remedy.
INSTEAD = {
    "autogptq": QUANTISED,
    "delta": "add the weights to the model first, and name its folder as pretrained",
    "gguf_file": "name the file itself: pretrained=FOLDER/NAME.gguf",
    "gptqmodel": QUANTISED,
    "load_in_4bit": QUANTISED,
    "load_in_8bit": QUANTISED,
    "max_cpu_memory": "weights are not kept off the devices; leave it out, and see `jaxllm plan` for what fits",
    "max_memory_per_gpu": "`jaxllm plan` says what fits; leave it out, and give devices= or dtype=",
    "mixed_precision_dtype": "dtype= is that of weights and activations",
    "peft": "merge the adapter first (peft's merge_and_unload), and name the merged folder as pretrained",
    "quantization_config": QUANTISED,
    "softmax_dtype": "log-probabilities are always taken in float32; leave it out",
    "subfolder": "name the folder itself: pretrained=FOLDER/SUBFOLDER",
    "think_end_token": "answers are given whole; leave it out",
}


def llm_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """What `LLM` is to be given of these arguments. Raises RequestError naming one that has no counterpart."""
    asked = {name: value for name, value in arguments.items() if value not in (None, False, "")}
    for name in asked:
        if name in INSTEAD:
            raise RequestError(f"{name} is an argument of `hf` that jaxllm does not have: {INSTEAD[name]}")
        if name in WITHOUT_EFFECT:
            logging.getLogger("jaxllm").warning("%s=%s has no effect: %s", name, asked[name], WITHOUT_EFFECT[name])
    if asked.get("backend", "causal") not in ("causal", "default"):
        raise RequestError(f"backend={asked['backend']}: jaxllm runs decoders alone; leave it out")
    known = {*SILENT, *WITHOUT_EFFECT, *INSTEAD, "backend"}
    return {name: value for name, value in arguments.items() if name not in known}
