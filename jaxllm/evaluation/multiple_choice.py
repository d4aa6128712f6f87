"""Multiple-choice questions, from a file of JSON lines -> accuracy.

A question is `{"query": ..., "choices": [...], "gold": index}`. Each choice is scored with a delimiter between it and the query.
`acc` takes the choice with the largest log-probability, `acc_norm` with the largest per character of the choice, the delimiter
left out: lm-eval's definitions.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxllm.evaluation.delimiter import delimiter_for
from jaxllm.evaluation.results import Answer
from jaxllm.llm import LLM
from jaxllm.requests.encoding import Pair
from jaxllm.requests.outputs import RequestError
from jaxllm.requests.text_lines import lines_of
from jaxllm.scoring.scorer import Packing, Score


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; `gold` is the index of the right choice, `where` the file and line that it comes from."""

    query: str
    choices: tuple[str, ...]
    gold: int
    where: str


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers and their standard errors (of a mean, as lm-eval has it)."""

    questions: int
    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float

    def __str__(self) -> str:
        return (
            f"acc {self.acc:.4f} ± {self.acc_stderr:.4f}, acc_norm {self.acc_norm:.4f} ± {self.acc_norm_stderr:.4f} "
            f"({self.questions} questions)"
        )


def read_questions(path: Path) -> list[Question]:
    """Questions of a JSON-lines file in UTF-8. Raises RequestError naming the file, or the line that is no question."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(
            f"{path} cannot be read ({error.strerror}): name a file with a line of JSON for each question"
        ) from error
    questions = [_question(line, where) for where, line in lines_of(data, str(path))]
    if not questions:
        raise RequestError(f"{path} holds no questions: give a line of JSON for each")
    return questions


def _question(line: str, where: str) -> Question:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{where} is not JSON ({error}): correct it") from error
    if not isinstance(value, dict) or not {"query", "choices", "gold"} <= value.keys():
        raise RequestError(f'{where} is no question: it needs "query", "choices" and "gold"')
    query, choices, gold = value["query"], value["choices"], value["gold"]
    if not isinstance(query, str) or not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise RequestError(f'{where}: "query" must be a text and "choices" a list of texts')
    if not all(map(_is_unicode, [query, *choices])):
        raise RequestError(
            f"{where}: a text holds half of a surrogate pair, which is no character: write both halves, or the letter"
        )
    if not choices or not all(choices):
        raise RequestError(f'{where}: "choices" is empty, or one of them is: give at least one token to score in each')
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise RequestError(f'{where}: "gold" is {gold!r}, which is not the index of one of {len(choices)} choices')
    return Question(query, tuple(choices), gold, where)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def accuracy(questions: Sequence[Question], answers: Sequence[Answer]) -> Accuracy:
    """Accuracy over the questions that have been answered."""
    asked = [questions[answer.index] for answer in answers]
    return accuracy_of([(q.gold, a.logprobs, list(map(len, q.choices))) for q, a in zip(asked, answers, strict=True)])


def accuracy_of(answers: Sequence[tuple[int, list[float], list[int]]]) -> Accuracy:
    """Accuracy of (the right choice, log-probabilities of the choices, their characters)."""
    right, right_norm = np.zeros((2, len(answers)))
    for i, (gold, logprobs, lengths) in enumerate(answers):
        right[i] = np.argmax(logprobs) == gold
        right_norm[i] = np.argmax(np.array(logprobs) / np.array(lengths, float)) == gold
    mean, mean_norm = (x.mean() if len(answers) else 0.0 for x in (right, right_norm))
    return Accuracy(len(answers), mean, _stderr(right), mean_norm, _stderr(right_norm))


def _stderr(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def pack(llm: LLM, questions: Sequence[Question], *, delimiter: str | None, truncate: bool) -> Packing:
    """All questions, packed."""
    return llm.pack(requests(questions, delimiter), truncate=truncate, names=[q.where for q in questions])


def requests(questions: Sequence[Question], delimiter: str | None) -> list[tuple[str, list[str]]]:
    """(query, choices with their delimiter) of each, as `LLM.score` takes them."""
    return [(q.query, [delimiter_for(q.query, choice, delimiter) + choice for choice in q.choices]) for q in questions]


def only(packing: Packing, questions: Sequence[Question], left: Sequence[int]) -> Packing:
    """The steps that score those `left` (indices): they give the same bits as in a whole run."""
    starts = _starts(questions)
    return packing.only(pair for i in left for pair in range(starts[i], starts[i + 1]))


def first_rows(packing: Packing, questions: Sequence[Question]) -> list[int]:
    """The first row that holds a choice of each question."""
    first = np.full(len(packing.pairs), len(packing.rows))
    for row, one in reversed([*enumerate(packing.rows)]):
        first[one.row.members] = row
    return np.minimum.reduceat(first, _starts(questions)[:-1]).tolist()


def _starts(questions: Sequence[Question]) -> np.ndarray:
    """The index of each question's first choice among all choices, and how many there are."""
    return np.cumsum([0, *(len(q.choices) for q in questions)])


def answers(llm: LLM, packing: Packing, questions: Sequence[Question]) -> Iterator[Answer]:
    """Answers to the questions that are left, as they come."""
    return gathered(llm.run_packing(packing), packing.pairs, questions)


def gathered(scores: Iterable[tuple[int, Score]], pairs: Sequence[Pair], questions: Sequence[Question]) -> Iterator[Answer]:
    """Answers to the questions whose choices have all been scored, as they come; `scores` name a choice among all `pairs`."""
    starts = _starts(questions)
    logprobs: dict[int, dict[int, float]] = {}
    for pair, score in scores:
        index = int(np.searchsorted(starts, pair, side="right")) - 1
        found = logprobs.setdefault(index, {})
        found[pair - int(starts[index])] = score.logprob
        if len(found) == len(questions[index].choices):
            own = pairs[starts[index] : starts[index + 1]]
            longest = max(len(context) + len(continuation) for context, continuation in own)
            yield Answer(index, [found[i] for i in range(len(found))], longest)
            del logprobs[index]


def hellaswag(folder: Path) -> Path:
    """HellaSwag's validation set (Zellers et al. 2019), from the Hugging Face hub into `folder`, worded as lm-eval's task is."""
    target = folder / "hellaswag_validation.jsonl"
    if target.exists():
        return target
    try:
        from datasets import load_dataset

        rows = load_dataset("Rowan/hellaswag", split="validation")
    except ImportError as error:
        raise RequestError("HellaSwag by name needs the package datasets: pip install datasets, or name a file") from error
    except (OSError, ValueError) as error:
        raise RequestError(f"HellaSwag is not on this machine and the hub cannot be reached ({error}): name a file") from error
    lines = [
        {
            "query": _cleaned(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
            "choices": [_cleaned(ending) for ending in row["endings"]],
            "gold": int(row["label"]),
        }
        for row in rows
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(f".{os.getpid()}")
    scratch.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    scratch.replace(target)
    return target


def _cleaned(text: str) -> str:
    """The text without the marks that WikiHow articles left."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def digest(questions: Sequence[Question]) -> str:
    """sha256 of the questions, which tells runs apart."""
    return hashlib.sha256(json.dumps([(q.query, q.choices, q.gold) for q in questions]).encode()).hexdigest()
