"""A run of questions in shards, for as many jobs that know nothing of each other; and their files -> that of one run.

Shards are cut between the steps of the whole run, so that what questions share is computed once, and each answer has the bits
that the whole run gives it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.evaluation.multiple_choice import Accuracy, Question, accuracy_of, first_rows
from jaxllm.evaluation.results import Kept, read_results
from jaxllm.requests.outputs import RequestError
from jaxllm.scoring.scorer import Packing, Scorer

KEY = "shard"  # of what a file says of its run


@dataclass(frozen=True)
class Shard:
    """The shard `index` of `count`, counted from 0."""

    index: int
    count: int

    @classmethod
    def of(cls, text: str) -> Shard:
        """`i/n`. Raises RequestError."""
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if found is None or not int(found[1]) < int(found[2]):
            raise RequestError(f"--shard {text}: give i/n, with i from 0 to n - 1")
        return cls(int(found[1]), int(found[2]))

    def run(self, scorer: Scorer, questions: Sequence[Question]) -> dict[str, Any]:
        """What a file of results says of it: where it was cut follows from all of this."""
        cut = f"{scorer.layout.data} x {scorer.max_step_tokens} tokens, {scorer.steps.attention}"
        return {"index": self.index, "count": self.count, "questions": len(questions), "steps": cut}

    def questions(self, packing: Packing, questions: Sequence[Question], data: int) -> list[int]:
        """Those of this shard, by their index: the ones that begin in its share of the steps, `data` rows each."""
        steps = -(-len(packing.rows) // data)
        return [i for i, row in enumerate(first_rows(packing, questions)) if row // data * self.count // steps == self.index]


def merge(paths: Sequence[Path], output: Path) -> Accuracy:
    """Writes the results of all shards down as one run's, in the order of the questions. Raises RequestError; then nothing is.

    `jaxllm score --output` takes the file for its own.
    """
    if output.exists():
        raise RequestError(f"{output} is there already: name another file, or remove it")
    read = {path: read_results(path)[:2] for path in paths}
    run = _common(read)
    count, total = run[KEY]["count"], run[KEY]["questions"]
    shards = {one[KEY]["index"]: path for path, (one, _) in read.items()}
    if left := [i for i in range(count) if i not in shards]:
        raise RequestError(f"shard {left[0]} of {count} is missing{_and_more(left)}: give the files of all")
    found: dict[int, Kept] = {}
    for path, (_, kept) in read.items():
        for one in kept:
            if one.answer.index in found:
                raise RequestError(f"{path} has question {one.answer.index}, which another file has too: give each shard once")
            found[one.answer.index] = one
    if left := [i for i in range(total) if i not in found]:
        raise RequestError(f"question {left[0]} is in none of the files{_and_more(left)}: let every shard come to its end")
    kept = [found[i] for i in range(total)]
    scratch = output.with_name(f".{output.name}.{os.getpid()}")
    said = {key: value for key, value in run.items() if key != KEY}
    scratch.write_text(json.dumps(said) + "\n" + "".join(one.line() for one in kept), encoding="utf-8")
    scratch.replace(output)
    return accuracy_of([(one.gold, one.answer.logprobs, one.lengths) for one in kept])


def _common(read: dict[Path, tuple[dict[str, Any], list[Kept]]]) -> dict[str, Any]:
    """What all files say of their runs, but for which of the shards they are."""
    (first, (run, _)), *others = read.items()
    for path, (one, _) in read.items():
        if not isinstance(one.get(KEY), dict):
            raise RequestError(f"{path} is the file of a whole run: give those of `jaxllm score --shard`")
    for path, (one, _) in others:
        these, those = ({**said, **said[KEY], KEY: None, "index": None} for said in (run, one))
        if differing := sorted(key for key in these | those if these.get(key) != those.get(key)):
            raise RequestError(f"{first} and {path} are of different runs (other {', '.join(differing)}): merge those of one")
    return run


def _and_more(left: list[int]) -> str:
    return f", and {len(left) - 1} more" if len(left) > 1 else ""
