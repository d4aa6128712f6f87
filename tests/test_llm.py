"""The Python API: what goes in, what comes out, how it ends, and the sentence that a mistake is answered with."""

from __future__ import annotations

import io
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_checkpoint import write_tiny, write_tokenizer
from tqdm import tqdm

from checkpoints.errors import CheckpointError
from checkpoints.hub import resolve
from jaxllm import LLM, RequestError, RequestOutput, SamplingParams
from jaxllm import llm as llm_module
from jaxllm.generation.detokenizer import Detokenizer
from jaxllm.generation.loop import STREAM_STEPS, Submission
from jaxllm.llm import Progress
from jaxllm.planning import plan as plan_module
from jaxllm.planning.plan import MEMORY_UTILIZATION
from jaxllm.planning.remedies import DoesNotFitError
from jaxllm.requests.arguments import show_progress
from jaxllm.requests.prompts import parse_prompts
from sharding.mesh import DeviceError

GREEDY = SamplingParams(temperature=0, max_tokens=12)
EOS = 257
LETTERS = {ord(c): 12.0 for c in "abcde "}  # answers that read as text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"vocab_size": 258, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": EOS}
    return write_tokenizer(write_tiny(tmp_path_factory.mktemp("llm"), **sizes))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without a tokenizer."""
    return write_tiny(tmp_path_factory.mktemp("bare"), max_position_embeddings=64)


def make(folder: Path, **options: Any) -> LLM:
    return LLM(folder, **{"devices": 1, "max_num_seqs": 4} | options)


@pytest.fixture(scope="module")
def shared(folder: Path) -> LLM:
    return make(folder)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """The one LLM of these tests, which each leaves idle."""
    yield shared
    shared._loop.join()
    assert not shared.engine.scheduler.busy
    shared.engine.scheduler.check_integrity()


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [sample.token_ids for output in outputs for sample in output.outputs]


def text_params(**changes: Any) -> SamplingParams:
    settings: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 40, "logit_bias": LETTERS}
    return SamplingParams(**settings | changes)


# What goes in


def test_every_form_of_prompt(llm: LLM) -> None:
    [one] = llm.generate("abc", GREEDY)
    assert one.prompt == "abc" and one.prompt_token_ids == [97, 98, 99] and one.finished
    several = llm.generate(["abc", "x"], GREEDY)
    assert tokens(several) == [one.outputs[0].token_ids, several[1].outputs[0].token_ids]
    [ids] = llm.generate([97, 98, 99], GREEDY)
    assert ids.prompt is None and tokens([ids]) == tokens([one]) and ids.outputs[0].text == one.outputs[0].text
    assert tokens(llm.generate([[97, 98, 99], [120]], GREEDY)) == tokens(several)
    assert tokens(llm.generate(np.array([97, 98, 99]), GREEDY)) == tokens([one])  # type: ignore[arg-type]
    assert tokens(llm.generate(["abc", [120]], GREEDY)) == tokens(several)  # type: ignore[arg-type]
    assert llm.generate([], GREEDY) == []


def test_text_is_the_tokens_decoded(llm: LLM) -> None:
    for output in llm.generate(["abc", "xyz"], GREEDY):
        [sample] = output.outputs
        assert sample.text == llm.tokenizer.decode(sample.token_ids)
        assert len(sample.token_ids) == 12 and sample.finish_reason == "length" and sample.logprobs is None


def test_one_sampling_params_for_each_prompt(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (3, 5)]
    assert [len(ids) for ids in tokens(llm.generate(["a", "b"], params))] == [3, 5]


def test_more_prompts_than_slots(llm: LLM) -> None:
    prompts = ["abcdefghi"[i:] for i in range(9)]
    outputs = llm.generate(prompts, GREEDY)
    assert [o.prompt for o in outputs] == prompts
    ids = [o.request_id for o in outputs]
    assert ids == list(range(ids[0], ids[0] + 9))
    assert tokens(outputs) == [tokens(llm.generate(prompt, GREEDY))[0] for prompt in prompts]


def test_a_chat_is_its_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    [answer] = llm.chat(messages, GREEDY)
    assert llm.tokenizer.decode(answer.prompt_token_ids) == "user: hi\nassistant:"
    assert tokens([answer]) == tokens(llm.generate("user: hi\nassistant:", GREEDY))
    assert tokens(llm.chat([messages, messages], GREEDY)) == 2 * tokens([answer])


# Samples and seeds


def test_samples_differ_and_a_seed_repeats_them(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=11, max_tokens=12)
    [output] = llm.generate("abc", params)
    assert [sample.index for sample in output.outputs] == [0, 1, 2]
    assert len({tuple(ids) for ids in tokens([output])}) == 3
    assert tokens(llm.generate(["zz", "abc"], params)[1:]) == tokens([output])
    assert tokens(llm.generate("abc", SamplingParams(seed=11, max_tokens=12))) == tokens([output])[:1]
    assert tokens(llm.generate("abc", SamplingParams(n=3, seed=12, max_tokens=12))) != tokens([output])


def test_without_a_seed_requests_differ_and_the_llms_seed_repeats_them(folder: Path) -> None:
    params = SamplingParams(max_tokens=8)
    runs = []
    for seed in (0, 0, 1):
        llm = make(folder, seed=seed)
        runs.append(tokens(llm.generate(["abc", "abc"], params)) + tokens(llm.generate("abc", params)))
    assert runs[0] == runs[1] != runs[2]
    assert len({tuple(ids) for ids in runs[0]}) == 3


def test_no_unseeded_request_shares_the_stream_of_a_seeded_one(llm: LLM) -> None:
    seeded = {llm._request_maker.stream_seed(SamplingParams(seed=a), 0, b) for a in range(20) for b in range(20)}
    own = {llm._request_maker.stream_seed(SamplingParams(), a, b) for a in range(20) for b in range(20)}
    assert len(seeded) == len(own) == 400 and not seeded & own


# Log-probabilities


def test_logprobs_name_the_chosen_and_the_likeliest(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, seed=4, logprobs=3, max_tokens=10)
    [sample] = llm.generate("abc", params)[0].outputs
    assert sample.logprobs is not None and len(sample.logprobs) == 10
    for token, choices in zip(sample.token_ids, sample.logprobs, strict=True):
        chosen = choices[token]
        assert sorted(c.rank for c in choices.values()) == sorted({1, 2, 3, chosen.rank})
        ranked = sorted(choices.values(), key=lambda c: c.rank)
        assert all(a.logprob >= b.logprob for a, b in itertools.pairwise(ranked)) and ranked[0].logprob <= 0
        assert chosen.decoded_token == llm.tokenizer.decode([token])
    total = sum(choices[token].logprob for token, choices in zip(sample.token_ids, sample.logprobs, strict=True))
    assert sample.cumulative_logprob == total
    [plain] = llm.generate("abc", SamplingParams(temperature=1.5, seed=4, logprobs=0, max_tokens=10))[0].outputs
    assert plain.token_ids == sample.token_ids and plain.logprobs is not None
    assert all(list(choices) == [token] for token, choices in zip(plain.token_ids, plain.logprobs, strict=True))


def test_all_logprobs_name_every_token_and_sum_to_one(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, seed=4, logprobs=-1, max_tokens=7)
    [sample] = llm.generate("abc", params)[0].outputs
    [few] = llm.generate("abc", SamplingParams(temperature=1.5, seed=4, logprobs=3, max_tokens=7))[0].outputs
    assert sample.token_ids == few.token_ids and sample.logprobs is not None and few.logprobs is not None
    for choices, some in zip(sample.logprobs, few.logprobs, strict=True):
        assert sorted(choices) == list(range(258)) and some.items() <= choices.items()
        assert sum(np.exp(choice.logprob) for choice in choices.values()) == pytest.approx(1, abs=1e-5)


def test_a_mode_says_what_logprobs_are_of(folder: Path, llm: LLM) -> None:
    """After the filters the likeliest four tokens have a probability of 1 together; of the others none is drawn."""
    params = SamplingParams(temperature=0.7, top_k=4, seed=4, logprobs=-1, max_tokens=7)
    expected = tokens(llm.generate("abc", params))
    [sample] = make(folder, logprobs_mode="processed_logprobs").generate("abc", params)[0].outputs
    assert [sample.token_ids] == expected and sample.logprobs is not None
    for token, choices in zip(sample.token_ids, sample.logprobs, strict=True):
        probabilities = np.exp([choice.logprob for choice in choices.values()])
        assert sum(probabilities) == pytest.approx(1, abs=1e-5) and np.count_nonzero(probabilities) == 4
        assert choices[token].rank <= 4


# What is left out


def test_bad_words_are_not_generated(llm: LLM) -> None:
    """A token is a letter here, and a word of several forbids none of them by itself."""
    free = llm.generate("abc", text_params(max_tokens=100))[0].outputs[0].text
    words = sorted({free[i : i + n] for n in (2, 3) for i in range(20, 60, 7) if not free[i].isspace()})
    assert len(words) > 5
    text = llm.generate("abc", text_params(bad_words=["a", *words], max_tokens=100))[0].outputs[0].text
    assert "a" in free and "a" not in text and not any(word in text for word in words)
    assert len(text) == 100 and all(letter in text for letter in "bcde ")


def test_only_allowed_ids_are_generated(llm: LLM) -> None:
    params = SamplingParams(temperature=2, seed=1, allowed_token_ids=[65, 66, 67], max_tokens=40)
    assert set(tokens(llm.generate("abc", params))[0]) == {65, 66, 67}


def test_a_prompt_is_truncated_from_the_left(llm: LLM) -> None:
    def asked(prompt: Any, keep: int | None, max_tokens: int | None = 12) -> RequestOutput:
        return llm.generate(prompt, SamplingParams(temperature=0, max_tokens=max_tokens, truncate_prompt_tokens=keep))[0]

    whole = asked("cdefg", None)
    for prompt in ("abcdefg", {"prompt": "abcdefg"}, {"prompt_token_ids": list(b"abcdefg")}, list(b"abcdefg")):
        cut = asked(prompt, 5)
        assert cut.prompt_token_ids == list(b"cdefg") and tokens([cut]) == tokens([whole])
    assert asked("abcdefg", 5).prompt == "abcdefg"
    assert asked("abc", 5).prompt_token_ids == list(b"abc") == asked("abc", -1).prompt_token_ids
    long = list(range(250)) * 2
    for max_tokens, kept in ((12, 244), (1, 255), (None, 255)):
        fitting = asked(long, -1, max_tokens)
        assert fitting.prompt_token_ids == long[-kept:] and len(tokens([fitting])[0]) == 256 - kept


# How it ends


def test_an_end_of_sequence_id_ends_it(llm: LLM) -> None:
    soon = {EOS: 100.0}
    [ended] = llm.generate("abc", SamplingParams(temperature=0, logit_bias=soon))[0].outputs
    assert (ended.token_ids, ended.text, ended.finish_reason, ended.stop_reason) == ([EOS], "", "stop", EOS)
    [later] = llm.generate("abc", SamplingParams(temperature=0, logit_bias=soon, min_tokens=5))[0].outputs
    assert len(later.token_ids) == 6 and later.token_ids[-1] == EOS and EOS not in later.token_ids[:-1]
    [never] = llm.generate("abc", SamplingParams(temperature=0, logit_bias=soon, ignore_eos=True, max_tokens=4))[0].outputs
    assert never.token_ids == [EOS] * 4 and never.finish_reason == "length"


def test_a_stop_token_id_ends_it_and_is_no_text(llm: LLM) -> None:
    [free] = llm.generate("abc", text_params())[0].outputs
    stop = free.token_ids[7]
    first = free.token_ids.index(stop)
    [ended] = llm.generate("abc", text_params(stop_token_ids=[stop]))[0].outputs
    assert ended.token_ids == free.token_ids[: first + 1] and ended.stop_reason == stop
    assert ended.text == free.text[:first] and ended.finish_reason == "stop"


def test_a_stop_string_ends_text_and_tokens_where_it_is_complete(llm: LLM) -> None:
    [free] = llm.generate("abc", text_params(logprobs=0))[0].outputs
    assert len(free.text) == 40
    stop = free.text[21:24]
    at = free.text.index(stop)
    [ended] = llm.generate("abc", text_params(stop=["nowhere", stop], logprobs=0))[0].outputs
    assert (ended.text, ended.finish_reason, ended.stop_reason) == (free.text[:at], "stop", stop)
    assert ended.token_ids == free.token_ids[: at + 3]  # one token a letter
    assert free.logprobs is not None and ended.logprobs is not None and len(ended.logprobs) == at + 3
    assert "".join(llm.stream("abc", text_params(stop=stop))) == ended.text


def test_what_ends_the_text_is_part_of_it_where_that_is_asked_for(llm: LLM) -> None:
    free = llm.generate("abc", text_params())[0].outputs[0]
    stop = free.text[21:24]
    at = free.text.index(stop)
    with_stop = text_params(stop=[stop], include_stop_str_in_output=True)
    [ended] = llm.generate("abc", with_stop)[0].outputs
    assert (ended.text, ended.stop_reason, ended.token_ids) == (free.text[: at + 3], stop, free.token_ids[: at + 3])
    assert "".join(llm.stream("abc", with_stop)) == ended.text
    first = free.token_ids.index(free.token_ids[7])
    [by_id] = llm.generate("abc", text_params(stop_token_ids=[free.token_ids[7]], include_stop_str_in_output=True))[0].outputs
    assert by_id.text == free.text[: first + 1] and by_id.stop_reason == free.token_ids[7]
    soon = SamplingParams(temperature=0, logit_bias={EOS: 100.0}, include_stop_str_in_output=True)
    assert llm.generate("abc", soon)[0].outputs[0].text == ""  # a special token is no text
    soon.skip_special_tokens = False
    assert llm.generate("abc", soon)[0].outputs[0].text == "</s>"


def test_the_context_bounds_the_answer(llm: LLM) -> None:
    [full] = llm.generate([[7] * 200], SamplingParams(temperature=0, ignore_eos=True, max_tokens=None))[0].outputs
    assert len(full.token_ids) == 56 and full.finish_reason == "length"
    [last] = llm.generate([[7] * 255], SamplingParams(temperature=0, max_tokens=9))[0].outputs
    assert len(last.token_ids) == 1


@pytest.mark.parametrize("options", [{"devices": 2, "layout": "replicated", "max_num_batched_tokens": 64}])
def test_prompt_logprobs_are_those_of_scoring(folder: Path, options: dict[str, Any]) -> None:
    llm, rng = make(folder, **options), np.random.default_rng(0)
    prompts = [rng.integers(256, size=n).tolist() for n in (1, 150, 3, 200, 17)]
    params = SamplingParams(max_tokens=3, seed=1, n=2, prompt_logprobs=2, logprobs=1)
    for _ in range(2):  # the second time, the pages are there
        found = llm.generate(prompts, [params, params, GREEDY, params, params])
        assert found[2].prompt_logprobs is None and found[0].prompt_logprobs == [None]
        assert all(output.num_cached_tokens == 0 for i, output in enumerate(found) if i != 2)
        for output in (found[1], *found[3:]):
            ids, reported = output.prompt_token_ids, output.prompt_logprobs
            assert reported is not None and reported[0] is None and len(reported) == len(ids)
            [[score]] = llm.score([(ids[:1], [ids[1:]])])
            chosen = [choices[token] for token, choices in zip(ids[1:], reported[1:], strict=True) if choices is not None]
            np.testing.assert_allclose([one.logprob for one in chosen], score.token_logprobs, atol=1e-4)
            for token, choices in zip(ids[1:], reported[1:], strict=True):
                assert choices is not None and choices[token].decoded_token == llm.tokenizer.decode([token])
                assert len(choices) == (2 if choices[token].rank <= 2 else 3)
                assert sorted(choices.values(), key=lambda one: one.rank) == sorted(
                    choices.values(), key=lambda one: -one.logprob
                )
    plain = SamplingParams(max_tokens=3, seed=1, n=2, logprobs=1)
    assert tokens(llm.generate(prompts[1:2], plain)) == tokens(found[1:2])


def test_salts_keep_prompts_apart_and_priorities_change_no_text(llm: LLM) -> None:
    ids = list(range(5, 155))
    salted = {"prompt_token_ids": ids, "cache_salt": "mine"}
    first, again, other = (llm.generate(prompt, GREEDY)[0] for prompt in (salted, salted, ids))  # type: ignore[arg-type]
    assert (first.num_cached_tokens, again.num_cached_tokens, other.num_cached_tokens) == (0, 128, 0)
    assert tokens([first]) == tokens([again]) == tokens([other])
    prompts = ["abcdefghi"[i:] for i in range(9)]
    assert tokens(llm.generate(prompts, GREEDY, priority=list(range(9, 0, -1)))) == tokens(llm.generate(prompts, GREEDY))
    for wrong, said in (
        ([1], "1 of priority for 2 prompts"),
        ([1, "x"], r"priority\[1\]='x' is of type str"),
        (5, "give a list"),
    ):
        with pytest.raises(RequestError, match=said):
            llm.generate(["a", "b"], GREEDY, priority=wrong)  # type: ignore[arg-type]


# Streams


@pytest.mark.parametrize("params", [GREEDY, text_params(), SamplingParams(seed=2, max_tokens=30)])
def test_a_stream_is_the_text_in_pieces(llm: LLM, params: SamplingParams) -> None:
    pieces = list(llm.stream("abc", params))
    assert "".join(pieces) == llm.generate("abc", params)[0].outputs[0].text
    assert all(pieces)


def test_a_stream_is_told_of_its_first_token_at_once(llm: LLM) -> None:
    [request] = llm.make_requests(parse_prompts("abc"), [text_params()])
    lengths: list[int] = []
    for _ in llm.submit([request], STREAM_STEPS, lambda _: lengths.append(len(request.samples[0].shown))):
        pass
    assert lengths[0] == 1 and lengths[-1] == 40
    assert all(b - a <= STREAM_STEPS for a, b in itertools.pairwise(lengths))


def test_leaving_a_stream_cancels_it(llm: LLM) -> None:
    for _ in llm.stream("abc", text_params(max_tokens=200)):
        break
    llm._loop.join()
    assert not llm.engine.scheduler.running
    expected = tokens(llm.generate("abc", GREEDY))
    stream = llm.stream("abc", text_params(max_tokens=200))
    next(stream)
    assert tokens(llm.generate("abc", GREEDY)) == expected  # beside it
    stream.close()
    llm._loop.join()
    assert not llm.engine.scheduler.running


def test_streams_side_by_side_are_each_whole(llm: LLM) -> None:
    params = [text_params(seed=i, max_tokens=30 + 10 * i) for i in range(6)]  # more than there are slots
    expected = [llm.generate("abc", p)[0].outputs[0].text for p in params]
    streams = [llm.stream("abc", p) for p in params]
    found = [""] * 6
    for pieces in itertools.zip_longest(*streams, fillvalue=""):
        found = [text + piece for text, piece in zip(found, pieces, strict=True)]
    assert found == expected


def test_what_is_compiled_is_said_and_how_that_is_saved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    shown = io.StringIO()

    def noted(bar: Any, done: int, waits_for: str) -> None:
        said.append(waits_for)
        show_progress(bar, done, waits_for)

    monkeypatch.setattr(llm_module, "show_progress", noted)
    fresh = make(folder, max_model_len=130)  # of which nothing was compiled before
    for _ in range(2):
        fresh.generate("abc", GREEDY, use_tqdm=partial(tqdm, file=shown, mininterval=0))
    assert said[0] == "prefill of 32 tokens" and said[-1] == ""
    assert "compiling prefill of 32 tokens; `jaxllm warmup` does it ahead" in shown.getvalue()


# Interruptions


def interrupt_wait(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C comes once, while the caller waits, when so much news has come."""
    wait, count = threading.Event.wait, itertools.count()

    def interrupted(self: threading.Event, timeout: float | None = None) -> bool:
        if self in waited and next(count) == after:
            raise KeyboardInterrupt
        return wait(self, timeout)

    waited: list[threading.Event] = []
    begin = Submission.__init__

    def noted(self: Submission, *args: Any) -> None:
        begin(self, *args)
        waited.append(self._news)

    monkeypatch.setattr(Submission, "__init__", noted)
    monkeypatch.setattr(threading.Event, "wait", interrupted)


@pytest.mark.parametrize("after", [0, 2])
def test_after_ctrl_c_it_goes_on(llm: LLM, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    prompts = ["abc", "defg", "h", "ij", "k", "l"]
    expected = tokens(llm.generate(prompts, GREEDY))
    with monkeypatch.context() as patch:
        interrupt_wait(patch, after)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, SamplingParams(temperature=0, max_tokens=150, ignore_eos=True))
    llm._loop.join()
    assert not llm.engine.scheduler.busy
    assert tokens(llm.generate(prompts, GREEDY)) == expected


def test_ctrl_c_keeps_the_stream_beside_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "".join(llm.stream("abc", text_params(max_tokens=200)))
    stream = llm.stream("abc", text_params(max_tokens=200))
    first = next(stream)
    with monkeypatch.context() as patch:
        interrupt_wait(patch, 0)
        with pytest.raises(KeyboardInterrupt):
            llm.generate("xyz", GREEDY)
    assert first + "".join(stream) == expected


@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_a_step_that_fails_ends_its_own_requests_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """It fails when it has consumed the cache and not yet given it back: the others are computed again."""
    expected = "".join(llm.stream("abc", text_params(max_tokens=200)))
    stream = llm.stream("abc", text_params(max_tokens=200))
    first = next(stream)
    of = getattr(llm.engine.runner.programs, step)

    def failing(*args: Any) -> Any:
        program = of(*args)

        def run(*args: Any) -> Any:
            program(*args)
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

        monkeypatch.setattr(llm.engine.runner.programs, step, of)
        return run

    monkeypatch.setattr(llm.engine.runner.programs, step, failing)

    def both() -> None:
        llm.generate(["xyz", "abc"], GREEDY)
        list(stream)  # which may have been the one that decoded

    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        both()
    if step == "prefill":
        assert first + "".join(stream) == expected
    llm._loop.join()
    llm.engine.scheduler.check_integrity()
    assert "".join(llm.stream("abc", text_params(max_tokens=200))) == expected


def test_a_defect_of_the_scheduler_ends_what_waits(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise AssertionError("no such page")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.scheduler, "schedule", failing)
        with pytest.raises(AssertionError, match="no such page"):
            llm.generate("abc", GREEDY)
    assert len(tokens(llm.generate("abc", GREEDY))[0]) == 12


def test_an_error_in_one_text_leaves_the_others(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate(["abc", "xyz"], GREEDY)
    push = Detokenizer.push

    def failing(self: Detokenizer, token: int) -> bool:
        if bytes(i for i in self.ids[:4] if i < 256).startswith(b"def"):
            raise ValueError("no such token")
        return push(self, token)

    monkeypatch.setattr(Detokenizer, "push", failing)
    with ThreadPoolExecutor(3) as pool:
        bad = pool.submit(llm.generate, "def", GREEDY)
        good = [pool.submit(llm.generate, prompt, GREEDY) for prompt in ("abc", "xyz")]
        with pytest.raises(ValueError, match="no such token"):
            bad.result()
        assert [tokens(found.result()) for found in good] == [tokens([one]) for one in expected]


# Mistakes, each answered with a sentence


BAD_PARAMS: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n=0: ask for at least 1 sample"),
    ({"n": 2, "temperature": 0}, "greedy samples are all the same"),
    ({"temperature": -1}, "temperature=-1: a finite number from 0 up"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"temperature": float("inf")}, "temperature=inf"),
    ({"top_p": 0}, r"top_p=0: it lies in \(0, 1\]"),
    ({"top_p": 1.1}, "top_p=1.1"),
    ({"top_k": -2}, "top_k=-2"),
    ({"min_p": 1.5}, "min_p=1.5"),
    ({"repetition_penalty": 0}, "repetition_penalty=0"),
    ({"seed": -1}, "seed=-1"),
    ({"max_tokens": 0}, "max_tokens=0: ask for at least 1"),
    ({"min_tokens": -1}, "min_tokens=-1"),
    ({"min_tokens": 17}, "min_tokens=17 exceeds max_tokens=16: raise the one or lower the other"),
    ({"logprobs": 21}, "logprobs=21: from 0 to 20, or -1 for all of the vocabulary"),
    ({"logprobs": -2}, "logprobs=-2: from 0 to 20"),
    ({"prompt_logprobs": 21}, "prompt_logprobs=21: from 0 to 20"),
    ({"prompt_logprobs": -1}, "prompt_logprobs=-1: from 0 to 20"),
    ({"presence_penalty": 2.1}, r"presence_penalty=2.1: it lies in \[-2, 2\]; 0 is off"),
    ({"frequency_penalty": -3}, r"frequency_penalty=-3: it lies in \[-2, 2\]"),
    ({"frequency_penalty": float("nan")}, "frequency_penalty=nan"),
    ({"allowed_token_ids": []}, "allowed_token_ids is empty, and leaves nothing to generate: leave it out to allow all"),
    ({"bad_words": ["a", " "]}, "bad_words holds a text without a word in it: leave it out"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens=0: keep at least 1, or -1 for as many as the context holds"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens=-2"),
    ({"logit_bias": {3: float("nan")}}, "logit_bias"),
    ({"stop": ["a", ""]}, "an empty stop string"),
    ({"stop": ""}, "an empty stop string"),
]


@pytest.mark.parametrize(("params", "message"), BAD_PARAMS)
def test_contradictory_params(params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**params)


BAD_REQUESTS: list[tuple[Any, SamplingParams | list[SamplingParams], str]] = [
    ("", GREEDY, "the prompt is empty"),
    ([[]], GREEDY, "the prompt is empty"),
    ("a" * 256, GREEDY, "the prompt has 256 tokens and the context holds 256 with the answer: shorten it"),
    ([[5, 258]], GREEDY, "prompt holds token id 258, outside the vocabulary of 258"),
    ([[-1]], GREEDY, "prompt holds token id -1"),
    ("a", SamplingParams(logit_bias={300: 1.0}), "logit_bias holds token id 300"),
    ("a", SamplingParams(stop_token_ids=[999]), "stop_token_ids holds token id 999"),
    ("a", SamplingParams(allowed_token_ids=[5, 258]), "allowed_token_ids holds token id 258"),
    (
        "a",
        SamplingParams(
            allowed_token_ids=[97, 5, 6], bad_words=["a"], logit_bias={5: float("-inf")}, min_tokens=1, stop_token_ids=[6]
        ),
        "all of allowed_token_ids are forbidden by logit_bias, bad_words or min_tokens",
    ),
    ("a", SamplingParams(truncate_prompt_tokens=256), "truncate_prompt_tokens=256 and the context holds 256 with the answer"),
    (
        "a",
        SamplingParams(truncate_prompt_tokens=-1, max_tokens=256),
        "keeps nothing, for max_tokens=256 fills the context of 256",
    ),
    (["a", "b", "c"], [GREEDY, GREEDY], "2 sampling_params for 3 prompts"),
]


@pytest.mark.parametrize(("prompt", "params", "message"), BAD_REQUESTS)
def test_requests_that_cannot_be_served(llm: LLM, prompt: Any, params: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt, params)
    if not isinstance(params, list) and not (isinstance(prompt, list) and not prompt[0]):
        with pytest.raises(RequestError, match=message):  # where it is called, before the first piece is asked for
            llm.stream(prompt if isinstance(prompt, str) else prompt[0], params)
    assert not llm.engine.scheduler.busy


def test_one_bad_prompt_of_several_starts_nothing(llm: LLM) -> None:
    with pytest.raises(RequestError, match="empty"):
        llm.generate(["good", ""], GREEDY)
    assert not llm.engine.scheduler.busy


def test_a_stream_is_one_sample(llm: LLM) -> None:
    with pytest.raises(RequestError, match="n=2: a stream is one sample; use generate"):
        llm.stream("a", SamplingParams(n=2))


def test_a_folder_without_a_tokenizer_takes_ids_alone(bare: Path) -> None:
    llm = make(bare)
    [output] = llm.generate([3, 4, 5], SamplingParams(temperature=0, logprobs=1))
    assert len(output.outputs[0].token_ids) == 16 and output.outputs[0].text == ""
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("has no tokenizer; give token ids instead of text", lambda: llm.generate("text")),
        ("has no tokenizer to stream text with; use generate", lambda: llm.stream([3, 4])),
        ("no tokenizer to encode bad_words with; use logit_bias", lambda: llm.generate([3], SamplingParams(bad_words=["a"]))),
        ("no tokenizer to find stop strings with; use stop_token_ids", lambda: llm.generate([3], SamplingParams(stop="a"))),
        ("has no chat template", lambda: llm.chat([{"role": "user", "content": "a"}])),
    ]
    for message, call in calls:
        with pytest.raises(RequestError, match=message):
            call()


def test_what_begins_alike_is_computed_once(bare: Path) -> None:
    """Samples of one prompt too; and the answers are those without sharing."""
    options: dict[str, Any] = {"hf_overrides": {"max_position_embeddings": 512}, "max_num_batched_tokens": 32}
    llm, plain = make(bare, **options), make(bare, **options, enable_prefix_caching=False)
    beginning, params = [3, 4, 5, 6] * 32, SamplingParams(temperature=0, max_tokens=4)
    prompts = [[*beginning, 7, 8], [*beginning, 9], beginning[:65]]
    first, *others = llm.generate(prompts, params)
    assert [o.num_cached_tokens for o in (first, *others)] == [0, 128, 64]
    assert [o.outputs[0].token_ids for o in (first, *others)] == [o.outputs[0].token_ids for o in plain.generate(prompts, params)]
    assert llm.statistics.hit_rate == (128 + 64) / (130 + 129 + 65) and plain.statistics.hit_rate == 0
    llm.generate([2] * 100, SamplingParams(n=2, seed=1, max_tokens=4))
    assert llm.statistics.shared_tokens == 128 + 64 + 64


BAD_STARTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"devices": 99}, DeviceError, r"99 devices asked for, 8 there \(cpu\): ask for 1 to 8, or call jaxllm.virtual_cpu_devices"),
    ({"devices": 0}, DeviceError, "0 devices asked for"),
    ({"devices": []}, DeviceError, "an empty list of devices"),
    ({"layout": "diagonal"}, ValueError, "unknown layout 'diagonal'; there are tensor, replicated"),
    ({"layout": "replicated-2x2", "devices": 3}, ValueError, "takes 4 devices, not 3"),
    ({"dtype": "int3"}, ValueError, "dtype='int3' is not known; there are float32, bfloat16, float16"),
    ({"max_model_len": 10_000}, ValueError, "max_model_len=10000 exceeds the model's context of 64"),
    ({"max_model_len": 0}, ValueError, "max_model_len=0: it must be at least 1"),
    ({"max_num_seqs": 0}, ValueError, "max_num_seqs=0"),
    ({"max_num_batched_tokens": 5}, ValueError, "max_num_batched_tokens=5: a number from 16 to 1024"),
    ({"seed": -3}, ValueError, "seed=-3"),
    ({"logprobs_mode": "raw"}, RequestError, "logprobs_mode='raw': there are raw_logprobs, processed_logprobs, raw_logits"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_STARTS)
def test_an_llm_that_cannot_start(bare: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(bare, **options)


def test_a_model_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; give a folder"):
        LLM(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("options", "remedies"),
    [
        ({}, ["max_model_len=256", "dtype='bfloat16'"]),
        ({"layout": "replicated", "devices": 2}, ["max_model_len=256", "dtype='bfloat16'"]),
        ({"dtype": "bfloat16"}, ["max_model_len=256"]),
    ],
)
def test_a_run_that_does_not_fit(
    bare: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], remedies: list[str]
) -> None:
    """Not even the pages of one sequence on each data shard."""
    options = {"hf_overrides": {"max_position_embeddings": 512}, "max_model_len": 512, "max_num_seqs": 1} | options
    needed = make(bare, **options).plan.nbytes
    monkeypatch.setattr(plan_module, "device_memory", lambda device: int((needed - 1) / MEMORY_UTILIZATION))
    live = jax.live_arrays()  # held, so that none of them goes meanwhile
    with pytest.raises(DoesNotFitError, match=r"does not fit: layout .* GiB of weights and .* GiB of cache") as found:
        make(bare, **options)
    assert "a sequence of 512 tokens" in str(found.value)
    assert all(remedy in str(found.value) for remedy in remedies), found.value
    assert len(jax.live_arrays()) == len(live)  # it said so before it took anything


def test_what_is_left_open_is_filled_in_as_memory_allows(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [LLM(bare, devices=1).plan]
    few = int((plans[0].nbytes - plans[0].cache_bytes // 2) / MEMORY_UTILIZATION)
    for memory in (None, 1 << 40, few):
        monkeypatch.setattr(plan_module, "device_memory", lambda device, memory=memory: memory)
        plans.append(LLM(bare, devices=1).plan)
    assert {plan.max_num_seqs for plan in plans} == {64}
    *enough, scarce = [plan.pool.pages[None] for plan in plans]
    assert set(enough) == {65} and 2 <= scarce < 40


# A real model


@pytest.fixture(scope="module")
def smollm2() -> LLM:
    try:
        path = resolve("smollm2-135m")
    except CheckpointError as error:
        pytest.skip(f"the SmolLM2 checkpoint cannot be fetched: {error}")
    lines: list[str] = []
    llm = LLM(path, devices=1, max_model_len=256, max_num_seqs=1, progress=Progress(say=lines.append))
    llm.chat([{"role": "user", "content": "What is the capital of France?"}], SamplingParams(temperature=0, max_tokens=2))
    assert lines == ["prefill of 64 tokens", "decode of 1 rows"]
    return llm


@pytest.mark.slow
def test_a_real_model_answers_ends_and_streams(smollm2: LLM) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    params = SamplingParams(temperature=0, max_tokens=24)
    [answer] = smollm2.chat(messages, params)
    assert "Paris" in answer.outputs[0].text
    assert answer.outputs[0].finish_reason == "stop" and answer.outputs[0].stop_reason in smollm2.config.eos_token_ids
    assert "".join(smollm2.stream(smollm2.chat_prompt(messages), params)) == answer.outputs[0].text
    [stopped] = smollm2.chat(messages, SamplingParams(temperature=0, max_tokens=24, stop="Par"))
    assert stopped.outputs[0].text == answer.outputs[0].text.split("Par")[0]
