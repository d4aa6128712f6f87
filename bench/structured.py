"""What a form costs: the same 64 answers free, and held to a JSON schema, a regular expression or a grammar, in turns.

    python -m bench.structured

All answers have the same number of tokens: the forms leave room for more. The first run, in which everything is compiled, is left
out; what is printed are medians of the others. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import describe, report
from bench.workload import FIRST_ID
from jaxllm import LLM, SamplingParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 400},
        "email": {"type": "string", "pattern": r"[a-z]+@[a-z]+\.com"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
    },
    "required": ["name", "email", "tags"],
    "additionalProperties": False,
}
NUMBERS = {
    "type": "object",
    "properties": {"rows": {"type": "array", "minItems": 200, "items": {"type": "object", "properties": {
        "id": {"type": "integer", "minimum": 0}, "x": {"type": "number"}}, "required": ["id", "x"]}}},
    "required": ["rows"],
}  # fmt: skip
FORMS: dict[str, Any] = {
    "free": None,
    "schema, text": {"json": PERSON},
    "schema, numbers": {"json": NUMBERS},
    "regex": {"regex": r"([A-Z][a-z]{2,9}, ){200,}"},
    "grammar": {"grammar": 'start: sum+\nsum: term ("+" term)+ ";"\nterm: /[0-9]{1,4}/ | "(" term "*" term ")"'},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    llm = LLM(args.model, dtype=args.dtype, devices=1, max_num_seqs=args.rows, max_model_len=512)
    rng = np.random.default_rng(0)
    runs: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(args.repeats + 1):
        prompts = rng.integers(FIRST_ID, llm.config.vocab_size, (args.rows, args.prompt)).tolist()
        for name, form in FORMS.items():
            runs[name].append(rate(llm, prompts, form, args.tokens))
    rates = {name: statistics.median(of[1:]) for name, of in runs.items()}
    for name, found in rates.items():
        print(f"  {name:<16}{found:9.1f} tok/s{found / rates['free']:8.2f} of free")
    how = {"rows": args.rows, "prompt": args.prompt, "tokens": args.tokens, "repeats": args.repeats}
    result = {"bench": "structured", "model": args.model, "dtype": args.dtype, "machine": describe()}
    report(result | how | {"tokens_per_second": rates}, args.save)


def rate(llm: LLM, prompts: list[list[int]], form: Any, tokens: int) -> float:
    """New tokens a second."""
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=tokens, ignore_eos=True, structured_outputs=form)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    short = [len(output.outputs[0].token_ids) for output in outputs if len(output.outputs[0].token_ids) != tokens]
    assert not short, f"answers have ended early: {short}"
    return len(outputs) * tokens / seconds


if __name__ == "__main__":
    main()
