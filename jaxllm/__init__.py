"""Sharded LLM inference in JAX. `from jaxllm import LLM, SamplingParams`."""

from __future__ import annotations

import sharding  # noqa: F401  (keeps the CUDA plugin quiet: before jax is imported)

TYPE_CHECKING = False  # a type checker takes it for true; `typing` itself takes 10 ms, in which Ctrl-C would be a traceback
if TYPE_CHECKING:
    from typing import Any

    from jaxllm.llm import LLM
    from jaxllm.processes.distributed import Distributed
    from jaxllm.requests.outputs import CompletionOutput, Logprob, RequestError, RequestOutput
    from jaxllm.requests.prompts import TextPrompt, TokensPrompt
    from jaxllm.requests.sampling_params import SamplingParams
    from jaxllm.requests.structured_outputs import StructuredOutputsParams
    from sharding.mesh import virtual_cpu_devices

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "CompletionOutput",
    "Distributed",
    "Logprob",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "virtual_cpu_devices",
]

_HOMES = {
    "LLM": "jaxllm.llm",
    "Distributed": "jaxllm.processes.distributed",
    "SamplingParams": "jaxllm.requests.sampling_params",
    "StructuredOutputsParams": "jaxllm.requests.structured_outputs",
    "TextPrompt": "jaxllm.requests.prompts",
    "TokensPrompt": "jaxllm.requests.prompts",
    "virtual_cpu_devices": "sharding.mesh",
}


def __getattr__(name: str) -> Any:
    # Imported when first used: `checkpoints`, which jaxllm.llm imports, itself imports from this package.
    if name not in __all__:
        raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, "jaxllm.requests.outputs")), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
