"""Accuracy from a file of questions, kept as it comes, and what is said of files that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import write_tiny_with_tokenizer

from jaxllm import LLM, RequestError
from jaxllm.commands.cli import main
from jaxllm.evaluation.multiple_choice import Question, accuracy, hellaswag, read_questions
from jaxllm.evaluation.results import Answer, Results

LINES: list[dict[str, Any]] = [
    {"query": f"{'a long ' * (i % 3)}question {i % 5}:", "choices": ["yes", "no", f"perhaps {i}"][: 2 + i % 2], "gold": i % 2}
    for i in range(12)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_with_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def score(folder: Path, *arguments: Any) -> int:
    return main(["score", str(folder), "--devices", "1", *map(str, arguments)])


def test_accuracy_is_lm_evals() -> None:
    questions = [Question("q", choices, gold, "") for choices, gold in ((("a", "bbbb"), 0), (("a", "bbbb"), 1), (("a", "b"), 1))]
    answers = [Answer(0, [-2.0, -4.0], 3), Answer(1, [-2.0, -4.0], 3), Answer(2, [-1.0, -2.0], 3)]
    found = accuracy(questions, answers)
    assert (found.acc, found.acc_norm) == (1 / 3, 1 / 3)  # per character the second's right choice is the better, the first's not
    assert found.acc_stderr == pytest.approx((2 / 9 / 2) ** 0.5)


def test_the_command_scores_as_the_library_does(
    folder: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    assert score(folder, file, "--output", output) == 0
    printed = capsys.readouterr().out
    llm = LLM(folder, devices=1)
    scores = llm.score([(line["query"], [" " + choice for choice in line["choices"]]) for line in LINES])
    _, *kept = map(json.loads, output.read_text().splitlines())
    assert sorted(line["index"] for line in kept) == list(range(12))
    for line in kept:
        assert line["logprobs"] == pytest.approx([s.logprob for s in scores[line["index"]]], abs=1e-4)
    answers = [Answer(line["index"], line["logprobs"], line["tokens"]) for line in kept]
    assert f"{accuracy(read_questions(file), answers)}" in printed
    assert "after sharing" in printed and "filled" in printed


@pytest.mark.parametrize(
    ("options", "joints", "said"),
    [
        ([], [["", " "], ["", ""], ["", ""]], "a space before 1 of 6 choices; none before 1 (the choice begins"),
        (["--delimiter", ""], [["", ""]] * 3, "'' before each of 6 choices"),
        (["--delimiter", "\n- "], [["\n- ", "\n- "]] * 3, r"'\n- ' before each of 6 choices"),
    ],
)
def test_choices_in_lm_evals_own_form_get_no_second_space(
    folder: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], joints: Any, said: str
) -> None:
    lines: list[dict[str, Any]] = [
        {"query": "Is it so? Answer:", "choices": [" A", "B"], "gold": 0},
        {"query": "", "choices": ["A", " B"], "gold": 0},
        {"query": "Answer:\n", "choices": ["A", "北京"], "gold": 0},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "answers.jsonl"
    assert score(folder, file, "--output", output, *options) == 0
    assert f"delimiter: {said}" in capsys.readouterr().out
    first, *kept = map(json.loads, output.read_text().splitlines())
    assert first["delimiter"] == (options[1] if options else None)
    asked = [
        (line["query"], [joint + choice for joint, choice in zip(of_line, line["choices"], strict=True)])
        for line, of_line in zip(lines, joints, strict=True)
    ]
    for line, found in zip(sorted(kept, key=lambda line: line["index"]), LLM(folder, devices=1).score(asked), strict=True):
        assert line["logprobs"] == pytest.approx([s.logprob for s in found], abs=1e-4)


def test_hellaswag_has_the_delimiter_of_lm_evals_task(
    folder: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(json.dumps({"query": "Roof:", "choices": [" How", "x"], "gold": 0}) + "\n")
    monkeypatch.setattr("jaxllm.commands.score_run.hellaswag", lambda folder: file)
    assert score(folder, "hellaswag") == 0
    assert "delimiter: ' ' before each of 2 choices" in capsys.readouterr().out


def test_truncated_runs_of_other_lengths_do_not_mix(
    folder: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for length, code in ((32, 0), (32, 0), (24, 1)):
        options = ("--truncate", "--max-model-len", length, "--output", tmp_path / "answers.jsonl")
        assert score(folder, file, *options) == code
    assert "holds another run (other truncate)" in capsys.readouterr().err


def test_runs_of_other_delimiters_do_not_mix(
    folder: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    assert score(folder, file, "--output", output) == 0
    assert score(folder, file, "--output", output, "--delimiter", " ") == 1
    assert "holds another run (other delimiter)" in capsys.readouterr().err
    first, *kept = output.read_text().splitlines(keepends=True)
    run = json.loads(first)
    del run["delimiter"]  # as written before there was one
    output.write_text("".join([json.dumps(run) + "\n", *kept]))
    assert score(folder, file, "--output", output) == 1
    assert "holds another run (other delimiter)" in capsys.readouterr().err


def test_an_interrupted_run_goes_on(folder: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    assert score(folder, file, "--output", whole) == 0
    expected = capsys.readouterr().out.splitlines()[-1]
    lines = whole.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:5]) + lines[5][:20])  # stopped in the middle of a line
    assert score(folder, file, "--output", part) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == expected
    assert "4 answers are in" in captured.err
    assert part.read_text().splitlines()[:5] == [line.rstrip() for line in lines[:5]]
    assert len(part.read_text().splitlines()) == 13
    assert score(folder, file, "--output", part) == 0  # nothing is left to do
    assert capsys.readouterr().out.splitlines()[-1] == expected


@pytest.mark.parametrize(("layout", "devices"), [("tensor", 1), ("replicated", 2)])
def test_an_interrupted_run_gives_the_bits_of_one_go(
    folder: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str, devices: int
) -> None:
    rng = np.random.default_rng(0)
    texts = [[f"{word} " * 5 for word in rng.choice(["alpha", "beta", "gamma", "delta"], 4)] for _ in range(80)]
    lines = [{"query": "".join(text), "choices": [text[0], "some", text[1] + "more"], "gold": 0} for text in texts]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    place = ("--layout", layout, "--devices", devices)
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    assert score(folder, file, "--output", whole, *place) == 0
    first, *kept = whole.read_text().splitlines()
    for cut in (1, 30, 75):
        part.write_text("\n".join([first, *kept[:cut]]) + "\n")
        assert score(folder, file, "--output", part, *place) == 0
        assert part.read_text().splitlines()[: cut + 1] == [first, *kept[:cut]]
        assert sorted(part.read_text().splitlines()[1:]) == sorted(kept)  # each question once, its numbers equal to the bit
    assert "of them left;" in capsys.readouterr().out  # steps that hold nothing new are left out


def test_another_runs_results_are_not_continued(
    folder: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    output.write_text(json.dumps({"model": "another"}) + "\n")
    assert score(folder, file, "--output", output) == 1
    assert "holds another run" in capsys.readouterr().err
    output.write_text("no results\n")
    assert score(folder, file, "--output", output) == 1
    assert "does not hold results" in capsys.readouterr().err
    assert output.read_text() == "no results\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is no question"),
        ('{"query": "a", "choices": ["b"]}', "line 2 is no question"),
        ('{"query": 1, "choices": ["b"], "gold": 0}', 'line 2: "query" must be a text'),
        ('{"query": "a", "choices": [], "gold": 0}', 'line 2: "choices" is empty'),
        ('{"query": "a", "choices": ["b"], "gold": 1}', 'line 2: "gold" is 1'),
        ('{"query": "a", "choices": ["b"], "gold": true}', 'line 2: "gold" is True'),
    ],
)
def test_a_malformed_line_is_named(file: Path, line: str, said: str) -> None:
    file.write_text(json.dumps(LINES[0]) + "\n" + line + "\n")
    with pytest.raises(RequestError, match="line 2") as error:
        read_questions(file)
    assert said in str(error.value)


def test_a_file_with_byte_order_marks_is_read(file: Path) -> None:
    line = json.dumps(LINES[0], ensure_ascii=False).encode()
    file.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\xef\xbb\xbf" + line + b"\n")  # two files, put together
    assert [q.query for q in read_questions(file)] == [LINES[0]["query"]] * 2


def test_what_is_no_text_is_named(folder: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = json.dumps(LINES[0]).encode()
    for content, said in [
        (good + b"\n" + good.replace(b"yes", b"caf\xe9"), f"{file}, line 2 is not UTF-8 (invalid continuation byte, byte "),
        (good.decode().encode("utf-16"), f"{file}, line 1 is not UTF-8 (invalid start byte, byte 1, 0xff): save it as UTF-8"),
        (good.replace(b"yes", rb"\ud83d"), f"{file}, line 1: a text holds half of a surrogate pair"),
        (b"\n\n", f"{file} holds no questions"),
    ]:
        file.write_bytes(content)
        assert score(folder, file) == 1
        assert capsys.readouterr().err.startswith(f"jaxllm: {said}")
    for path, said in [(tmp_path, "Is a directory"), (tmp_path / "absent", "No such file or directory")]:
        assert score(folder, path) == 1
        assert capsys.readouterr().err == (
            f"jaxllm: {path} cannot be read ({said}): name a file with a line of JSON for each question\n"
        )


def test_a_question_too_long_is_refused_or_truncated(folder: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(json.dumps({"query": "word " * 100, "choices": ["a", "b"], "gold": 0}) + "\n")
    assert score(folder, file) == 1
    said = capsys.readouterr().err
    assert f"{file}, line 1, continuation 0 and its context have" in said and "the model takes 257" in said
    assert score(folder, file, "--truncate") == 0


def test_a_full_disk_keeps_what_was_scored(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full to stand for a full disk")
    with pytest.raises(RequestError, match=r"cannot be written.*free space"):
        Results(full, {"model": "m"})


def test_a_plot_is_drawn(folder: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e '.[plot]'")
    assert score(folder, file, "--plot", tmp_path / "plot.png") == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "tokenise and pack" in capsys.readouterr().out


def test_a_plot_without_matplotlib_is_refused_first(
    folder: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert score(folder, file, "--plot", tmp_path / "plot.png") == 1
    assert "pip install 'jaxllm[plot]'" in capsys.readouterr().err


ROWS = [
    {
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man is sitting on a roof. [substeps] He looks up.",
        "ctx_b": "he",
        "endings": [
            "is using wrap  to wrap a pair of skis.",
            " [header] How [title] It works",
            "is ripping level tiles off.",
            "x",
        ],
        "label": "2",
    },
    {
        "activity_label": "Health",
        "ctx_a": "[header] How to rest [title] Lie down.",
        "ctx_b": "",
        "endings": ["a", "b"],
        "label": "0",
    },
]


def test_hellaswag_by_name_is_worded_as_lm_evals_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install -e '.[eval]'")
    task = pytest.importorskip("lm_eval.tasks.hellaswag.utils")
    rows = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    path = hellaswag(tmp_path)
    expected = [(doc["query"], tuple(doc["choices"]), doc["gold"]) for doc in task.process_docs(rows)]
    assert [(q.query, q.choices, q.gold) for q in read_questions(path)] == expected

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert hellaswag(tmp_path) == path  # fetched once
    path.unlink()
    with pytest.raises(RequestError, match=r"the hub cannot be reached \(no network\): name a file"):
        hellaswag(tmp_path)
