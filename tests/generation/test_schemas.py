"""Whatever schema is followed is followed to the letter: walks through its masks are valid by a validator of its own."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoint import write_tiny, write_tokenizer

from jaxllm import RequestError
from jaxllm.generation.grammar import Grammar, GrammarMaker
from jaxllm.requests.structured_outputs import StructuredOutputsParams

END = 257
CLOSING = [ord(c) for c in '"]},0']
MOST = 4000  # tokens of a walk

NAMES = st.sampled_from(["a", "name", "\u00e9t\u00e9", 'a "b"', "x-y"])
LEAVES = st.one_of(
    st.builds(dict, type=st.just("string"), minLength=st.integers(0, 3), maxLength=st.integers(3, 9)),
    st.builds(dict, type=st.just("integer"), minimum=st.integers(-50, 5), maximum=st.integers(5, 2000)),
    st.builds(dict, type=st.just("number"), minimum=st.integers(-5, 0), exclusiveMaximum=st.integers(1, 99)),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "format": "date"}]),
    st.sampled_from([{"enum": [1, "two", None, [3]]}, {"const": {"k": 1.5}}, {"type": "string", "pattern": "^[a-f]{2}-\\d+$"}]),
)


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    objects = st.builds(_object, st.dictionaries(NAMES, inner, max_size=4), st.randoms(use_true_random=False), st.booleans())
    arrays: st.SearchStrategy[Any] = st.builds(
        dict, type=st.just("array"), items=inner, minItems=st.integers(0, 2), maxItems=st.integers(2, 4)
    )
    choices = st.builds(lambda of: {"anyOf": of}, st.lists(inner, min_size=1, max_size=3))
    return objects | arrays | choices


def _object(properties: dict[str, Any], random: random.Random, closed: bool) -> dict[str, Any]:
    required = [name for name in properties if random.random() < 0.6]
    found = {"type": "object", "properties": properties, "required": required}
    return found | {"additionalProperties": False} if closed else found


SCHEMAS = st.recursive(LEAVES, _nested, max_leaves=12)


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> GrammarMaker:
    from transformers import AutoTokenizer

    sizes = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": END}
    folder = write_tokenizer(write_tiny(tmp_path_factory.mktemp("schemas"), **sizes))
    return GrammarMaker(AutoTokenizer.from_pretrained(folder), sizes["vocab_size"], (END,))


def walk(grammar: Grammar, rng: random.Random) -> bytes:
    """An answer drawn from what the masks allow, in favour of what ends something."""
    found = bytearray()
    while not grammar.ended:
        assert len(found) < MOST
        allowed = np.flatnonzero(np.unpackbits(grammar.mask.view(np.uint8), bitorder="little")).tolist()
        if END in allowed and (len(allowed) == 1 or rng.random() < 0.5):
            return bytes(found)
        allowed = [token for token in allowed if token < 256]
        closing = [token for token in CLOSING if token in allowed]
        printable = [token for token in allowed if 32 <= token < 127]
        token = rng.choice(
            closing if closing and rng.random() < 0.4 else printable if printable and rng.random() < 0.9 else allowed
        )
        found.append(token)
        grammar.advance(token)
    return bytes(found)


@settings(max_examples=100, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 1000))
def test_nested_schemas_are_followed(maker: GrammarMaker, schema: dict[str, Any], seed: int) -> None:
    grammar = maker.make(StructuredOutputsParams(json=schema))
    validator = jsonschema_rs.Draft202012Validator(schema, validate_formats=True)
    for i in range(3):
        text = walk(grammar.copy(), random.Random(seed + i)).decode()
        assert validator.is_valid(json.loads(text)), text


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {"const": 1}}, "contains"),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
        ({"not": {"type": "string"}}, "not"),
        ({"if": {"type": "string"}, "then": {"minLength": 2}}, "if"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ],
)
def test_a_keyword_that_is_not_followed_is_refused_by_name(maker: GrammarMaker, schema: dict[str, Any], keyword: str) -> None:
    with pytest.raises(RequestError, match=keyword):
        maker.make(StructuredOutputsParams(json=schema))


def test_the_tests_walk_can_fail(maker: GrammarMaker) -> None:
    """A walk under one schema is no answer to another."""
    found = walk(maker.make(StructuredOutputsParams(json={"type": "integer"})), random.Random(0)).decode()
    assert not jsonschema_rs.Draft202012Validator({"type": "string"}).is_valid(json.loads(found))
