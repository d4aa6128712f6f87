"""The same work done by other programs, in the same process and run."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def torch_and_transformers() -> tuple[Any, Any]:
    """The libraries, imported by now."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM  # transformers itself imports late

    assert AutoModelForCausalLM
    return torch, transformers


def from_pretrained(path: Path, dtype: str) -> Any:
    """A folder or a GGUF file, opened as transformers' own users do."""
    torch, transformers = torch_and_transformers()
    where: dict[str, Any] = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **where)


class Transformers:
    """Hugging Face transformers with torch, greedy, with a KV cache and no more around the model than the loop needs."""

    def __init__(self, path: Path, dtype: str):
        self.torch, _ = torch_and_transformers()
        self.model = from_pretrained(path, dtype).eval()

    def run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
        """Prompts of one length -> seconds until every row has its first token, seconds for a token of every row after it."""
        torch = self.torch
        with torch.inference_mode():
            start = time.perf_counter()
            cache = empty_cache(self.model)
            out = self.model(torch.tensor(prompts), logits_to_keep=1, **cache)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            first = time.perf_counter() - start
            start = time.perf_counter()
            for _ in range(new_tokens - 1):
                out = self.model(token, **cache)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
            step = (time.perf_counter() - start) / max(new_tokens - 1, 1)
        return first, step


class LMEval:
    """lm-eval's own `hf` model."""

    def __init__(self, path: Path, dtype: str, batch_size: int, tokenizer: Any = None):
        from lm_eval.models.huggingface import HFLM

        where: dict[str, Any] = {"gguf_file": path.name} if path.is_file() else {}
        folder = path.parent if path.is_file() else path
        self.model = HFLM(str(folder), tokenizer=tokenizer, dtype=dtype, device="cpu", batch_size=batch_size, **where)

    def score(self, texts: Sequence[tuple[str, str]], pairs: Sequence[Any]) -> float:
        """Seconds for the log-likelihoods of pairs of token ids."""
        requests = [(text, list(context), list(continuation)) for text, (context, continuation) in zip(texts, pairs, strict=True)]
        start = time.perf_counter()
        self.answers = self.model._loglikelihood_tokens(requests)
        return time.perf_counter() - start


def empty_cache(model: Any) -> dict[str, Any]:
    """Arguments for calls of a transformers model that go on from one another: a cache, which each call extends.

    Since 5.24 transformers calls it `cache`, before that `past_key_values`.
    """
    from transformers import DynamicCache

    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: DynamicCache(config=model.config), "use_cache": True}
