"""Record lm-eval's scores of SmolLM2-135M on HellaSwag questions: `python tests/support/record_hellaswag.py QUESTIONS.jsonl`.

Needs lm-eval, torch and accelerate (the `eval` and `reference` extras). Its `hf` model runs in float32. Written to
data/smollm2_hellaswag.json: for each question the log-probability of each choice. The questions themselves are not kept.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from paths import DATA

from bench.peers import LMEval
from checkpoints.checkpoint import open_checkpoint
from checkpoints.hub import resolve
from jaxllm.evaluation.multiple_choice import read_questions
from jaxllm.requests.encoding import PairEncoder

RECORD = DATA / "smollm2_hellaswag.json"


def main(file: Path) -> None:
    path = resolve("smollm2-135m")
    texts = [(q.query, " " + choice) for q in read_questions(file) for choice in q.choices]
    # transformers reads a GGUF file's tokenizer without its way of splitting digits: lm-eval is given the right one.
    tokenizer = open_checkpoint(path).tokenizer()
    peer = LMEval(path, "float32", batch_size=16, tokenizer=tokenizer)
    pairs = [peer.model._encode_pair(*text) for text in texts]
    assert pairs == PairEncoder.of(tokenizer).pairs(texts)
    peer.score(texts, pairs)
    logprobs = iter(round(logprob, 4) for logprob, _ in peer.answers)
    lines = [json.dumps([next(logprobs) for _ in q.choices]) for q in read_questions(file)]
    RECORD.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
