"""A run in shards is the whole run, to the bit and the byte; and what cannot be joined is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import write_tiny_with_tokenizer

from jaxllm import RequestError
from jaxllm.commands.cli import main
from jaxllm.evaluation.shards import Shard, merge


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_with_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of several steps; their queries begin alike."""
    rng = np.random.default_rng(0)
    texts = [[f"{word} " * 5 for word in rng.choice(["alpha", "beta", "gamma", "delta"], 4)] for _ in range(80)]
    lines = [{"query": "".join(text), "choices": [text[0], "some", text[1] + "more"][: 2 + i % 2], "gold": 0}
             for i, text in enumerate(texts)]  # fmt: skip
    file = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize(("layout", "devices", "count"), [("tensor", 1, 3), ("replicated", 2, 2), ("tensor", 1, 40)])
def test_shards_are_the_whole_run(
    folder: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str, devices: int, count: int
) -> None:
    whole, merged = tmp_path / "whole.jsonl", tmp_path / "merged.jsonl"
    score = ["score", str(folder), str(questions), "--layout", layout, "--devices", str(devices), "--output"]
    assert main([*score, str(whole)]) == 0
    expected = capsys.readouterr().out.splitlines()[-1]
    shards = [tmp_path / f"shard-{i}.jsonl" for i in range(count)]
    for i, shard in enumerate(shards):
        assert main([*score, str(shard), "--shard", f"{i}/{count}"]) == 0
    assert main(["merge", *map(str, reversed(shards)), "--output", str(merged)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == expected
    first, *kept = whole.read_text().splitlines()
    assert merged.read_text().splitlines() == [first, *sorted(kept, key=lambda line: json.loads(line)["index"])]
    assert main([*score, str(merged)]) == 0  # a whole run's file, with nothing left to do
    assert capsys.readouterr().out.splitlines()[-1] == expected


def written(path: Path, run: dict[str, Any] | None, indices: list[int]) -> Path:
    lines = [{"index": i, "logprobs": [-1.0, -2.0], "tokens": 3, "gold": 0, "lengths": [1, 2]} for i in indices]
    path.write_text("".join(json.dumps(line) + "\n" for line in [run, *lines]))
    return path


def test_what_cannot_be_joined_is_refused_and_nothing_written(tmp_path: Path) -> None:
    def shard(i: int, **changes: Any) -> dict[str, Any]:
        return {"model": "m", "shard": {"index": i, "count": 2, "questions": 4, "steps": "s"} | changes}

    a, b = written(tmp_path / "a", shard(0), [0, 2]), written(tmp_path / "b", shard(1), [3, 1])
    make: list[tuple[str, Callable[[], list[Path]]]] = [
        ("shard 1 of 2 is missing: give the files of all", lambda: [a]),
        ("c has question 0, which another file has too: give", lambda: [a, b, written(tmp_path / "c", shard(0), [0])]),
        ("question 1 is in none of the files: let every shard", lambda: [a, written(tmp_path / "c", shard(1), [3])]),
        ("of different runs (other steps): merge those", lambda: [a, written(tmp_path / "c", shard(1, steps="t"), [1, 3])]),
        ("of different runs (other model): merge", lambda: [a, written(tmp_path / "c", shard(1) | {"model": "n"}, [1, 3])]),
        ("c is the file of a whole run", lambda: [a, written(tmp_path / "c", {"model": "m"}, [1, 3])]),
        ("c does not hold results", lambda: [a, written(tmp_path / "c", None, [])]),
    ]  # fmt: skip
    for said, files in make:
        with pytest.raises(RequestError) as caught:
            merge(files(), tmp_path / "out")
        assert said in str(caught.value)
        assert not (tmp_path / "out").exists()
    assert merge([a, b], tmp_path / "out").acc == 1
    with pytest.raises(RequestError, match="out is there already: name another file, or remove it"):
        merge([a, b], tmp_path / "out")
    for wrong in ("2/2", "1", "-1/2", "a/2", "0/0", "1/2/3"):
        with pytest.raises(RequestError, match="give i/n, with i from 0 to n - 1"):
            Shard.of(wrong)
