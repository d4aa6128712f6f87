"""Answers have the form that they are held to, in any crowd, and change nobody else's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import write_tiny, write_tokenizer

from jaxllm import LLM, RequestError, SamplingParams, StructuredOutputsParams
from jaxllm.generation.grammar import Grammar, GrammarError
from jaxllm.serving.protocol import CompletionRequest

SIZES = {"vocab_size": 261, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 257}
REGEX = {"regex": r"[a-c]{3}-\d{2,4}"}
CHOICE = {"choice": ["red", "green apple", 'a "quoted" one']}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More rows of the vocabulary than the tokenizer has tokens, and no whole number of words of a mask."""
    return write_tokenizer(write_tiny(tmp_path_factory.mktemp("structured"), **SIZES))


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, devices=2, max_num_seqs=4)


def params(form: Any, seed: int, **others: Any) -> SamplingParams:
    return SamplingParams(**{"seed": seed, "max_tokens": 120, "structured_outputs": form} | others)


def texts(llm: LLM, asked: list[SamplingParams]) -> list[str]:
    return [output.outputs[0].text for output in llm.generate(["abc"] * len(asked), asked, use_tqdm=False)]


def test_answers_have_the_form(llm: LLM) -> None:
    found = texts(
        llm, [params(form, seed) for seed in range(3) for form in (REGEX, CHOICE, {"grammar": 'start: "x" /[0-9]{2}/'})]
    )
    assert all(re.fullmatch(REGEX["regex"], text) for text in found[0::3])
    assert all(text in CHOICE["choice"] for text in found[1::3])
    assert all(re.fullmatch("x[0-9]{2}", text) for text in found[2::3])
    assert len(set(found[0::3])) == 3  # drawn, not dictated


def test_json_follows_its_schema(llm: LLM) -> None:
    asked = [params(form, seed) for seed in range(4) for form in ({"json": SCHEMA}, {"json": json.dumps(SCHEMA)})]
    for text in texts(llm, asked):
        value = json.loads(text)
        assert set(value) == {"name", "age"} and len(value["name"]) <= 6 and 0 <= value["age"] <= 150


def test_an_object_is_any_and_its_blanks_are_bounded(llm: LLM) -> None:
    blanks = {ord(" "): 40.0, ord("\n"): 40.0}
    for output in llm.generate(["abc"] * 2, [params({"json_object": True}, seed, logit_bias=blanks) for seed in range(2)]):
        text = output.outputs[0].text
        assert text.startswith("{") and max(map(len, re.findall(r"\s+", text))) <= 20


def test_greedy_takes_the_likeliest_of_what_may_follow(llm: LLM) -> None:
    [output] = llm.generate("abc", params({"regex": "[de]{9}"}, 0, temperature=0, logprobs=20, max_tokens=20))
    sample = output.outputs[0]
    assert sample.finish_reason == "stop" and sample.stop_reason is None and len(sample.token_ids) == 9
    assert sample.logprobs is not None
    raw = [choices[token].rank for token, choices in zip(sample.token_ids, sample.logprobs, strict=True)]
    assert max(raw) > 1  # as the model gives them, before the form


def test_who_is_beside_one_gets_what_it_gets_alone(folder: Path) -> None:
    """With pages for few, so that some are computed again."""
    llm = LLM(folder, layout="replicated", devices=2, max_num_seqs=3, batch_invariant=False)
    asked = [params(REGEX, 1), SamplingParams(seed=2, max_tokens=40), params({"json": SCHEMA}, 3, n=2), params(CHOICE, 4)]
    asked += [SamplingParams(seed=5, max_tokens=60, logit_bias={99: 2.0}), params(REGEX, 6, stop="-")]
    alone = [[sample.text for sample in llm.generate("abc", one)[0].outputs] for one in asked]
    together = llm.generate(["abc"] * len(asked), asked)
    assert [[sample.text for sample in output.outputs] for output in together] == alone
    assert alone[-1][0].isalpha()  # up to the stop string
    llm._loop.join()
    llm.engine.scheduler.check_integrity()


def test_what_is_computed_again_begins_its_form_anew(folder: Path) -> None:
    llm = LLM(folder, devices=1, max_num_seqs=2, batch_invariant=True)
    scheduler, preempt = llm.engine.scheduler, llm.engine.scheduler.preempt
    once: list[int] = []

    def append(sequence: Any, token: int, choices: Any, inner: Any = scheduler.append) -> None:
        inner(sequence, token, choices)
        if len(sequence.tokens) == 3 and not once:
            once.append(sequence.id)
            preempt(sequence)

    alone = texts(llm, [params(REGEX, 7)])
    scheduler.append = append  # type: ignore[method-assign]
    assert texts(llm, [params(REGEX, 7)]) == alone and once


def test_a_form_that_fails_ends_its_own_request(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Grammar.advance

    def fail(grammar: Grammar, token: int) -> None:
        if grammar.mask is broken:
            raise GrammarError("too complex")
        advance(grammar, token)

    [request] = llm.make_requests([_parsed()], [params(REGEX, 1)])
    grammar = request.samples[0].sequence.grammar
    assert grammar is not None
    broken = grammar.mask
    monkeypatch.setattr(Grammar, "advance", fail)
    other = llm.submit(llm.make_requests([_parsed()], [params(CHOICE, 2)]))
    with pytest.raises(GrammarError, match="too complex"):
        for _ in llm.submit([request]):
            pass
    for _ in other:
        pass
    assert other.samples[0].text is not None and other.samples[0].text.text in CHOICE["choice"]


def _parsed() -> Any:
    from jaxllm.requests.prompts import ParsedPrompt

    return ParsedPrompt("abc", None)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({}, r"^structured_outputs is empty: give one of json, json_object, regex, choice, grammar$"),
        ({"json": {}, "regex": "a"}, r"^structured_outputs has json and regex: give one of"),
        ({"jsn": {}}, r"^structured_outputs has no argument 'jsn': is it json\?$"),
        ({"json": 5}, r"json=5: give a JSON schema"),
        ({"json": "{"}, r"^structured_outputs: json is no JSON"),
        ({"json": "[]"}, r"^structured_outputs: json is no object"),
        ({"json": {"type": "objekt"}}, r"cannot be followed: Invalid type: objekt$"),
        ({"json": {"type": "object", "unevaluatedProperties": False}}, r"Unimplemented keys: .*unevaluatedProperties"),
        ({"regex": "("}, r"cannot be followed: .*unclosed group"),
        ({"regex": 5}, r"structured_outputs.regex=5"),
        ({"choice": []}, r"choice is empty"),
        ({"grammar": "foo"}, r"cannot be followed"),
        (5, r"^structured_outputs=5: give StructuredOutputsParams, or a dict"),
    ],
)
def test_what_is_no_form_is_told(llm: LLM, form: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        llm.generate("abc", params(form, 1))
    assert "\n" not in str(error.value)


def test_a_model_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no tokenizer to follow structured_outputs with"):
        LLM(write_tiny(tmp_path)).generate([[3]], params(REGEX, 1))


def test_the_api_says_it_as_openai_does() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    body = CompletionRequest.model_validate({"prompt": "a", "response_format": form})
    assert body.params({}, 5, None).structured_outputs == StructuredOutputsParams(json=SCHEMA)
    body = CompletionRequest.model_validate({"prompt": "a", "structured_outputs": {"regex": "a"}})
    assert body.params({}, 5, None).structured_outputs == StructuredOutputsParams(regex="a")


def test_a_mask_has_a_bit_for_each_token() -> None:
    import jax.numpy as jnp

    from jaxllm.execution.sampling import _allowed

    rng = np.random.default_rng(0)
    wanted = rng.random((3, 261)) < 0.5
    packed = np.packbits(wanted, axis=1, bitorder="little")
    bits = np.zeros((3, 36), np.uint8)
    bits[:, : packed.shape[1]] = packed
    found = _allowed(jnp.zeros((3, 261)), jnp.asarray(bits.view(np.int32)))
    assert np.array_equal(np.asarray(found) == 0, wanted)
