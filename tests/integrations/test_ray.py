"""Two one-CPU workers of a local Ray cluster do what one process does, and what dies or is interrupted is done all the same.

A worker is a process that imports jax and compiles, so few are started with a model; the rest is shown with workers of no model.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import write_tiny_with_tokenizer

from jaxllm import LLM, RequestError, SamplingParams
from jaxllm.commands.cli import main

pq = pytest.importorskip("pyarrow.parquet", reason="many nodes need Ray: pip install 'jaxllm[ray]'")
ray = pytest.importorskip("ray", reason="many nodes need Ray: pip install 'jaxllm[ray]'")

from jaxllm.integrations.ray import Generate, Place, Score, datasets, generate_dataset, kept_rows, score_dataset  # noqa: E402
from jaxllm.integrations.ray.cluster import knock  # noqa: E402
from jaxllm.integrations.ray.crew import ATTEMPTS, FRUITLESS, Crew, Failed  # noqa: E402
from jaxllm.integrations.ray.scoring import pack_for  # noqa: E402
from jaxllm.integrations.ray.workers import Generator  # noqa: E402
from jaxllm.scoring.scorer import Cut, pack_pairs  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),  # of settings that it makes itself
    pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called"),  # Ray starts its processes so, where jax has threads
]

OPTIONS: dict[str, Any] = {"devices": 1, "max_num_seqs": 4, "max_num_batched_tokens": 64, "batch_invariant": True}
PARAMS = SamplingParams(max_tokens=5, temperature=1.0, logprobs=0)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_with_tokenizer(tmp_path_factory.mktemp("model"))


def read(path: Path) -> dict[int, dict[str, Any]]:
    """A file's rows, each of which is there once."""
    _, *rows = map(json.loads, path.read_text().splitlines())
    found: dict[int, dict[str, Any]] = {row["row"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def mortal(kind: Any, trace: Path) -> Any:
    """A class of workers of which the first that has a task dies over it."""

    class Mortal(kind):
        def run(self, task: Any) -> Any:
            if not trace.exists():
                trace.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return super().run(task)

    return Mortal


def test_an_interrupted_job_with_a_killed_worker_equals_one_process_to_the_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that have no seed draw by their numbers, and rows that cannot be done are told."""
    texts = [f"{'abcdef'[i % 6]} is what these begin with, {i}" for i in range(24)]
    rows, out = [{"prompt": text} for text in [*texts, "too long " * 40, ""]], tmp_path / "out.jsonl"
    add = kept_rows.Lines.add
    interrupted: list[int] = []

    def add_once(self: Any, found: Any) -> None:
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(len(found))
        add(self, found)

    monkeypatch.setattr(kept_rows.Lines, "add", add_once)
    with pytest.raises(KeyboardInterrupt):
        generate_dataset(folder, rows, out, sampling_params=PARAMS, place=Place(workers=1), **OPTIONS)
    monkeypatch.setattr(kept_rows.Lines, "add", add)
    kept = {row: one for row, one in read(out).items() if one["error"] is None}
    assert 0 < len(kept) <= interrupted[0] < 24
    with out.open("a") as file:
        file.write('{"row": 5, "te')  # killed while it wrote

    monkeypatch.setattr(datasets, "Generator", mortal(Generator, tmp_path / "died"))
    done = generate_dataset(folder, rows, out, sampling_params=PARAMS, place=Place(workers=2), **OPTIONS)
    assert (done.rows, done.before, done.failed) == (26, len(kept), 2)
    assert (tmp_path / "died").exists()
    found = read(out)
    assert found.keys() == {*range(26)} and found | kept == found
    assert "the prompt has 360 tokens" in found[24]["error"] and "the prompt is empty" in found[25]["error"]
    for row, output in enumerate(LLM(folder, **OPTIONS).generate(texts, PARAMS)):
        [sample] = output.outputs
        assert (found[row]["token_ids"], found[row]["text"]) == (sample.token_ids, sample.text)
        assert sum(found[row]["token_logprobs"]) == sample.cumulative_logprob
    with pytest.raises(RequestError, match=r"out\.jsonl holds another job \(other options\): name another"):
        generate_dataset(folder, rows, out, sampling_params=SamplingParams(max_tokens=2), **OPTIONS)


@pytest.mark.full
def test_the_command_goes_on_from_one_process_and_writes_the_same_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of several steps, whose questions begin alike; the tokens after sharing are the same, too."""
    rng = np.random.default_rng(0)
    words = rng.choice(["alpha", "beta", "gamma", "delta"], 120)
    texts = [f"{word} {rng.bytes(40).hex()}" for word in words]  # 11,000 tokens in steps of 2,048
    lines = [{"query": text, "choices": ["this", "some", "other"][: 2 + i % 2], "gold": 0}
             for i, text in enumerate(texts)]  # fmt: skip
    file, one, many = (tmp_path / name for name in ("questions.jsonl", "one.jsonl", "many.jsonl"))
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    score = ["score", str(folder), str(file), "--devices", "1"]
    assert main([*score, "--output", str(one)]) == 0
    said = capsys.readouterr().out.splitlines()
    whole = one.read_text().splitlines(keepends=True)
    many.write_text("".join(whole[:40]) + whole[40][:9])
    assert main([*score, "--output", str(many), "--ray", "auto", "--ray-workers", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == said[-1]  # the accuracy
    assert printed.out.splitlines()[1] == said[1] and "after sharing" in said[1]
    assert "39 answers are in" in printed.err
    first, *kept = many.read_text().splitlines(keepends=True)
    assert first == whole[0] and kept[:39] == whole[1:40] and sorted(kept) == sorted(whole[1:])
    assert main([*score, "--ray", "auto", "--shard", "0/2", "--output", str(many)]) == 1
    assert "leave --shard and --plot out" in capsys.readouterr().err


@pytest.mark.full
def test_a_batch_file_is_answered_as_by_one_process(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = [("/v1/completions", {"prompt": f"{'abc' * (i % 3)}{i}", "max_tokens": 5, "seed": i}) for i in range(8)]
    requests += [("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0})]
    requests += [("/v1/completions", {"prompt": "x", "temperature": -1})]
    given, one, many = (tmp_path / name for name in ("in.jsonl", "one.jsonl", "many.jsonl"))
    bodies = [{"custom_id": f"r{i}", "method": "POST", "url": url, "body": body} for i, (url, body) in enumerate(requests)]
    given.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    command = ["run-batch", str(folder), "-i", str(given), "--max-num-seqs", "4", "--devices", "1", "-o"]
    assert main([*command, str(one)]) == 0
    many.write_text("".join(one.read_text().splitlines(keepends=True)[:2]))
    capsys.readouterr()
    assert main([*command, str(many), "--ray", "auto"]) == 0
    assert capsys.readouterr().out.startswith("10 requests, 2 of them answered before, 1 refused")
    assert answers(one) == answers(many) and len(answers(one)) == 10


def answers(path: Path) -> dict[str, Any]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({one["custom_id"] for one in found}) == len(found)
    return {one["custom_id"]: (one["response"]["body"].get("choices"), one["response"]["body"].get("error")) for one in found}


@pytest.mark.full
def test_scores_of_a_dataset_in_parquet(folder: Path, tmp_path: Path) -> None:
    """A row that cannot be scored is told."""
    asked = [{"context": f"a question of {i % 4}, which", "continuations": [" is", f" was {i}"]} for i in range(20)]
    asked[7] = {"context": "x" * 300, "continuations": [" y", " z"]}
    out = tmp_path / "scores"
    done = score_dataset(folder, asked, out, place=Place(workers=1), devices=1)
    assert (done.rows, done.before, done.failed) == (20, 0, 1)
    found = {row["row"]: row for part in out.glob("*.parquet") for row in pq.read_table(part).to_pylist()}
    assert found.keys() == {*range(20)} and "the model takes 25" in found[7]["error"]
    good = [i for i in range(20) if i != 7]
    requests: list[Any] = [(asked[i]["context"], asked[i]["continuations"]) for i in good]
    scores = LLM(folder, devices=1).score(requests)
    for i, wanted in zip(good, scores, strict=True):
        assert found[i]["error"] is None and list(found[i]["logprobs"]) == [one.logprob for one in wanted]
        assert list(found[i]["is_greedy"]) == [one.is_greedy for one in wanted]
    with pytest.raises(RequestError, match="holds another job"):
        score_dataset(folder, asked[:3], out, place=Place(workers=1), devices=1)
    with pytest.raises(RequestError, match="row 0 has no column 'text': there are 'context', 'continuations'; name"):
        score_dataset(folder, asked, tmp_path / "other", context="text")


@pytest.mark.full
def test_map_batches(folder: Path) -> None:
    prompts = [f"prompt {i}" for i in range(5)] + ["too long " * 40]
    params: dict[str, Any] = {"max_tokens": 3, "temperature": 0.0}
    dataset = ray.data.from_items([{"text_in": prompt, "continuations": [" a", " b"]} for prompt in prompts])
    mapped = dataset.map_batches(
        Generate, fn_constructor_kwargs={"model": folder, "prompt": "text_in", "sampling_params": params, "devices": 1},
        batch_size=3, concurrency=1,
    )  # fmt: skip
    found = {row["text_in"]: row for row in mapped.iter_rows()}
    llm = LLM(folder, devices=1)
    for prompt, output in zip(prompts[:5], llm.generate(prompts[:5], SamplingParams(**params)), strict=True):
        assert found[prompt]["text"] == output.outputs[0].text and list(found[prompt]["continuations"]) == [" a", " b"]
    assert "the prompt has 360 tokens" in found[prompts[5]]["error"] and found[prompts[5]]["text"] is None
    # The same class in this process.
    batch = {"context": np.array(prompts), "continuations": np.array([[" a", " b"]] * 6)}
    columns = Score(folder, devices=1)(batch)
    assert columns["logprobs"][2] == pytest.approx([s.logprob for s in llm.score([(prompts[2], [" a", " b"])])[0]], abs=1e-4)
    assert "the model takes" in columns["error"][5] and columns["error"][:5].tolist() == [None] * 5


def test_rows_are_shorter_where_steps_would_be_too_few() -> None:
    """And exactly one process's where there is one for each worker, or it has to be."""
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(5, 90, 40).tolist(), [3, 4]) for _ in range(400)]
    names, cut = [str(i) for i in range(400)], Cut(2, 4096, "kernels", 97)
    one = pack_pairs(pairs, names, cut)
    assert (one.length, len(one.steps(2))) == (4096, 2)
    for workers, length, steps in ((2, 4096, 2), (3, 1024, 9), (64, 1024, 9)):
        packing = pack_for(workers, pairs, names, cut)
        assert (packing.length, len(packing.steps(2))) == (length, steps)
    assert pack_for(64, pairs, names, cut, exact=True).length == 4096


# Workers of no model


def crew_of(run: Callable[[Any], Any], size: int = 2, start: Callable[[], Any] = lambda: "facts") -> Crew:
    class Worker:
        def start(self) -> Any:
            return start()

        def run(self, task: Any) -> Any:
            return run(task)

    return Crew(lambda: ray.remote(Worker).options(num_cpus=1).remote(), size)


def test_a_task_that_kills_its_workers_is_given_up_and_the_others_are_done(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def run(task: int) -> int:
        with log.open("a") as file:
            file.write(f"{task}\n")
        if task == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return task * task

    with crew_of(run) as crew:
        found = dict(crew.run([*range(8)]))
    failed = found.pop(2)
    assert found == {i: i * i for i in range(8) if i != 2}
    assert isinstance(failed, Failed) and f"{ATTEMPTS} workers died over it" in failed.reason
    assert log.read_text().split().count("2") == ATTEMPTS


@pytest.mark.full
def test_what_a_task_raises_is_tried_by_another_worker() -> None:
    """What a worker has not caught may have broken its device."""

    def run(task: int) -> int:
        raise RuntimeError(f"INTERNAL: {os.getpid()}")

    with crew_of(run, size=1) as crew:
        [(_, failed)] = crew.run(["task"])
        assert "RuntimeError: INTERNAL" in failed.reason


@pytest.mark.full
def test_workers_that_cannot_start_end_the_job(tmp_path: Path) -> None:
    def refuse() -> None:
        raise RequestError("the model does not fit: give more devices")

    with crew_of(len, start=refuse) as crew, pytest.raises(RequestError, match=r"^the model does not fit: give more devices$"):
        print(crew.facts)

    trace = tmp_path / "starts"

    def die() -> None:
        with trace.open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)

    with (
        crew_of(len, size=1, start=die) as crew,
        pytest.raises(RequestError, match="workers died one after another and did nothing"),
    ):
        list(crew.run(["task"]))
    assert trace.read_text() == "x" * (FRUITLESS + 1)


@pytest.mark.full
def test_a_worker_that_cannot_start_where_another_could_is_replaced(tmp_path: Path) -> None:
    trace = tmp_path / "starts"

    def start() -> str:
        try:
            trace.touch(exist_ok=False)
        except FileExistsError:
            time.sleep(2)  # after the first one's news
            (tmp_path / "refused").touch()
            raise ValueError("this node has no GPU") from None
        return "facts"

    def run(task: int) -> int:
        until = time.monotonic() + 60
        while not (tmp_path / "refused").exists() and time.monotonic() < until:
            time.sleep(0.05)
        return task

    with crew_of(run, start=start) as crew:
        assert crew.facts == "facts"
        assert dict(crew.run([*range(20)])) == {i: i for i in range(20)}
    assert (tmp_path / "refused").exists()


def test_workers_that_differ_are_refused(tmp_path: Path) -> None:
    def start() -> int:
        with (tmp_path / "starts").open("a") as file:
            file.write("x")
        return len((tmp_path / "starts").read_text())

    with crew_of(time.sleep, start=start) as crew, pytest.raises(RequestError, match="workers differ"):
        list(crew.run([60]))


def test_places_are_refused_that_no_node_has() -> None:
    with pytest.raises(RequestError, match="no node of the cluster has 1 GPU for a worker: ask for fewer"):
        Place(num_gpus=1).filled()
    with pytest.raises(RequestError, match="0 workers: give 1 at least"):
        Place(workers=0).filled()
    assert Place().filled() == Place(workers=1, num_gpus=0)
    assert Place().filled().options()["runtime_env"] == {"env_vars": {"JAX_PLATFORMS": "cpu"}}
    assert "runtime_env" not in Place(workers=2, num_gpus=8).filled().options()


def test_a_node_gives_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*nodes: dict[str, float], **asked: Any) -> tuple[Any, ...]:
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
        place = Place(**asked).filled()
        return place.workers, place.num_gpus, place.resources

    assert of({"CPU": 8, "GPU": 8}, {"CPU": 8, "GPU": 4}, {"CPU": 8}) == (3, 4, {})
    assert of({"CPU": 8, "GPU": 8}, num_gpus=2) == (4, 2, {})
    assert of({"CPU": 8, "TPU": 4}, {"CPU": 8, "TPU": 4}) == (2, 0, {"TPU": 4})
    assert of({"CPU": 8}, {"CPU": 8}) == (2, 0, {})


def test_an_address_where_nobody_listens_is_told_at_once() -> None:
    with pytest.raises(OSError, match="refused"):
        knock("127.0.0.1:1")
    for address in ("auto", "local", "ray://127.0.0.1:1"):
        knock(address)


@pytest.mark.parametrize("name", ["out.jsonl", "out"])
def test_a_place_with_something_else_in_it_is_left_as_it_is(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    if out.suffix:
        out.write_text("5\n")
    else:
        out.mkdir()
        (out / "notes").write_text("5\n")
    with pytest.raises(RequestError, match=r"name another, or remove it|name an empty folder"):
        kept_rows.open_rows(out, {"job": "score"}, {})
    assert (out if out.suffix else out / "notes").read_text() == "5\n"


@pytest.mark.parametrize("name", ["out.jsonl", "out"])
def test_rows_that_failed_are_left_out_when_a_job_goes_on(tmp_path: Path, name: str) -> None:
    def opened() -> kept_rows.KeptRows:
        return kept_rows.open_rows(tmp_path / name, {"job": "score"}, datasets.SCORED)

    for new, done in (({0: None, 1: "too long"}, {0}), ({1: "too long", 2: None}, {0, 2}), ({1: None}, {0, 1, 2})):
        kept = opened()
        kept.add([{"row": row, "logprobs": [0.5], "error": error} for row, error in new.items()])
        kept.close()
        kept = opened()
        kept.close()
        assert kept.done == done
    if name.endswith(".jsonl"):
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()[1:]]
    else:
        rows = [row for part in (tmp_path / name).glob("*.parquet") for row in pq.read_table(part).to_pylist()]
    assert sorted(row["row"] for row in rows) == [0, 1, 2] and all(row["error"] is None for row in rows)
