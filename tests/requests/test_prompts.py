"""What is taken for a prompt, a conversation, a request to score, and the sentence that anything else is answered with."""

from __future__ import annotations

import collections
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import RequestError, SamplingParams
from jaxllm.requests.prompts import ParsedPrompt, parse_conversations, parse_prompts, parse_score_requests

pytestmark = pytest.mark.fast

A, IDS = ParsedPrompt("a", None), ParsedPrompt(None, [1, 2])


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("a", [A]),
        ("", [ParsedPrompt("", None)]),
        (["a", "a"], [A, A]),
        (("a",), [A]),
        ([1, 2], [IDS]),
        ((1, 2), [IDS]),
        ([[1, 2], (1, 2)], [IDS, IDS]),
        (["a", [1, 2]], [A, IDS]),
        (np.array([1, 2]), [IDS]),
        (np.array([[1, 2], [1, 2]], np.int16), [IDS, IDS]),
        (jnp.array([1, 2]), [IDS]),
        ([np.int64(1), np.int32(2)], [IDS]),
        (np.array(["a", "a"]), [A, A]),
        (range(1, 3), [IDS]),
        (collections.deque(["a"]), [A]),
        ([], []),
        ([[]], [ParsedPrompt(None, [])]),
        ({"prompt": "a"}, [A]),
        ({"prompt_token_ids": [1, 2]}, [IDS]),
        ({"prompt_token_ids": np.array([1, 2]), "prompt": "a"}, [ParsedPrompt("a", [1, 2])]),
        ([{"prompt": "a"}, "a", {"prompt_token_ids": (1, 2), "prompt": None}], [A, A, IDS]),
    ],
)
def test_a_prompt_means_what_it_means_in_vllm(given: Any, meant: list[ParsedPrompt]) -> None:
    assert parse_prompts(given) == meant
    assert all(type(i) is int for prompt in parse_prompts(given) for i in prompt.ids or ())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "prompts=None is of type NoneType: give a text, a list of token ids, or a dict of `prompt` or"),
        (5, "prompts=5 is of type int: give a text"),
        (np.array(5), r"prompts=array\(5\) is of type ndarray"),
        (b"hi", "prompts=b'hi' is of type bytes: give a text"),
        ({"a", "b"}, "is of type set: give a text"),
        ((x for x in "ab"), "is of type generator: give a text"),
        ([b"hi"], r"prompts\[0\]=b'hi' is of type bytes"),
        ([1.9, 2.9], r"prompt\[0\]=1.9 is of type float: give a whole number"),
        (np.array([1.0, 2.0]), r"prompt\[0\]=.* is of type float64: give a whole number"),
        ([True, False], r"prompt\[0\]=True is of type bool: give a whole number"),
        ([1, "a"], r"prompt\[1\]='a' is of type str: give a whole number"),
        ([[1, 2.0]], r"prompts\[0\]\[1\]=2.0 is of type float: give a whole number"),
        (["a", None], r"prompts\[1\]=None is of type NoneType: give a text"),
        ([None], "=None is of type NoneType"),
        ({}, "prompt is a dict with neither `prompt` nor `prompt_token_ids`: give one of them"),
        ({"prompt": b"a"}, r"prompt\['prompt'\]=b'a' is of type bytes: give a text"),
        ({"prompt": ["a"]}, r"prompt\['prompt'\]=\['a'\] is of type list: give a text"),
        ({"prompt_token_ids": "12"}, r"prompt\['prompt_token_ids'\]='12' is of type str: give a list of token ids"),
        (["a", {"prompt_token_ids": [0.5]}], r"prompts\[1\]\['prompt_token_ids'\]\[0\]=0.5 is of type float"),
        ({"prompt": "a", "multi_modal_data": {}}, "prompt has the key 'multi_modal_data': a dict holds `prompt` or"),
        ({"text": "a"}, "prompt has the key 'text'"),
        ([{"role": "user", "content": "a"}], r"prompts\[0\] has the key 'role'"),
    ],
)
def test_what_is_no_prompt_is_refused(given: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said) as error:
        parse_prompts(given)
    assert "\n" not in str(error.value)


USER = {"role": "user", "content": "hi"}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ([USER], [[USER]]),
        ([[USER], [USER, USER]], [[USER], [USER, USER]]),
        ((USER,), [[USER]]),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
         [[{"role": "user", "content": "a\nb"}]]),
        ([{"role": "user", "content": ["a", "b"]}], [[{"role": "user", "content": "a\nb"}]]),
        ([{"role": "assistant", "content": None, "tool_calls": [CALL]}],
         [[{"role": "assistant", "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}]]),
        ([{"role": "tool", "content": "7", "tool_call_id": "a"}], [[{"role": "tool", "content": "7", "tool_call_id": "a"}]]),
    ],
)  # fmt: skip
def test_a_message_becomes_what_templates_read(given: Any, meant: list[list[dict[str, Any]]]) -> None:
    assert parse_conversations(given) == meant
    assert CALL["function"]["arguments"] == '{"x": 1}'  # type: ignore[index]  # the caller's own is left as it was


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "messages=None is of type NoneType: give a list of messages"),
        ("hi", "messages='hi' is of type str: give a list of messages"),
        ({"role": "user", "content": "a"}, "is of type dict: give a list of messages"),
        ([], "messages is empty: give at least one message"),
        ([[]], r"messages\[0\] is empty"),
        (["hi"], r"messages\[0\]='hi' is of type str: give a list of messages"),
        ([{"content": "a"}], r'messages\[0\] has no "role": say who speaks, such as "user"'),
        ([{"role": 5, "content": "a"}], r"messages\[0\]\['role'\]=5 is of type int: give a text"),
        ([{"role": "user"}], r'messages\[0\] has no "content"'),
        ([USER, "a"], r"messages\[1\]='a': a message is a dict"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\['content'\]=5 is of type int: give a text, or a list of parts"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
         r"messages\[0\]\['content'\]\[0\] is 'image_url', and only text is understood"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"\[0\]\['text'\]=None is of type NoneType"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
         r"messages\[0\]\['tool_calls'\]\[0\]: its arguments are not JSON"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused(given: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said) as error:
        parse_conversations(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, r"requests=None is of type NoneType: give a list of \(context, continuations\)"),
        ([("a", " b")], r"the continuations of requests\[0\]=' b' is of type str: give a list of continuations"),
        ([("a", [" b", 5])], r"continuation 1 of requests\[0\]=5 is of type int: give a text"),
        ([("a", [" b"], 1)], r"requests\[0\] has 3 items: give a pair"),
        (["ab"], r"requests\[0\]='ab' is of type str: give a pair"),
        ([([1, 2], [[1.5]])], r"continuation 0 of requests\[0\]\[0\]=1.5 is of type float"),
        ([([1, 2], ["a"])], r"continuation 0 of requests\[0\]='a' is of type str: give a list of token ids"),
    ],
)
def test_what_cannot_be_scored_is_refused(given: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        parse_score_requests(given)


def test_what_can_be_scored_is_taken_as_it_is() -> None:
    assert parse_score_requests([("a", (" b",)), (np.array([1]), [np.array([2, 3])])]) == [("a", [" b"]), ([1], [[2, 3]])]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperature": "0"}, "temperature='0' is of type str: give a number"),
        ({"temperature": True}, "temperature=True is of type bool: give a number"),
        ({"temperature": 1j}, "temperature=1j is of type complex"),
        ({"stop": 5}, "stop=5 is of type int: give a text or a list of texts"),
        ({"stop": ["a", 5]}, r"stop\[1\]=5 is of type int: give a text"),
        ({"stop": b"a"}, "stop=b'a' is of type bytes"),
        ({"seed": 1.5}, "seed=1.5 is of type float: give a whole number"),
        ({"n": "2"}, "n='2' is of type str: give a whole number"),
        ({"max_tokens": 1.5}, "max_tokens=1.5 is of type float: give a whole number"),
        ({"max_tokens": 1 << 40}, "max_tokens=1099511627776: a number from 0 to 2147483647"),
        ({"top_k": 1.5}, "top_k=1.5 is of type float"),
        ({"top_k": 1 << 31}, "top_k=2147483648: a number from 0 to"),
        ({"logprobs": True}, "logprobs=True is of type bool: give a whole number"),
        ({"ignore_eos": 1}, "ignore_eos=1 is of type int: give True or False"),
        ({"skip_special_tokens": "no"}, "skip_special_tokens='no' is of type str: give True or False"),
        ({"stop_token_ids": 5}, "stop_token_ids=5 is of type int: give a list of token ids"),
        ({"stop_token_ids": [1.0]}, r"stop_token_ids\[0\]=1.0 is of type float"),
        ({"logit_bias": {"5": 1.0}}, "a token id of logit_bias='5' is of type str: give a whole number"),
        ({"logit_bias": {5: "1"}}, r"logit_bias\[5\]='1' is of type str: give a number"),
        ({"logit_bias": [5]}, r"logit_bias=\[5\] is of type list: give a dict"),
        ({"logit_bias": {5: 1e300}}, "logit_bias=.*: numbers of at most 1e"),
        ({"temprature": 0}, "SamplingParams has no argument 'temprature': is it temperature?"),
        ({"xyzzy": 0}, "SamplingParams has no argument 'xyzzy': there are n, temperature, top_p"),
        ({"presence_penalty": "1"}, "presence_penalty='1' is of type str: give a number"),
        ({"allowed_token_ids": 5}, "allowed_token_ids=5 is of type int: give a list of token ids"),
        ({"allowed_token_ids": [0.5]}, r"allowed_token_ids\[0\]=0.5 is of type float: give a whole number"),
        ({"bad_words": "no"}, "bad_words='no' is of type str: give a list of texts"),
        ({"bad_words": [5]}, r"bad_words\[0\]=5 is of type int: give a text"),
        ({"include_stop_str_in_output": 1}, "include_stop_str_in_output=1 is of type int: give True or False"),
        ({"truncate_prompt_tokens": 2.0}, "truncate_prompt_tokens=2.0 is of type float: give a whole number"),
        ({"best_of": 2}, "'best_of': ask for n samples"),
    ],
)
def test_a_parameter_of_another_type_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as error:
        SamplingParams(**given)
    assert "\n" not in str(error.value)


def test_parameters_are_given_by_name() -> None:
    with pytest.raises(RequestError, match=r"SamplingParams\(0.5\): give each value by its name"):
        SamplingParams(0.5)  # type: ignore[call-arg, arg-type]


def test_none_is_the_default_where_it_means_nothing() -> None:
    names = ("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "stop_token_ids", "min_tokens")
    assert SamplingParams(**dict.fromkeys(names)) == SamplingParams()  # type: ignore[arg-type]
    assert SamplingParams(max_tokens=None).max_tokens is None


def test_numpys_numbers_are_numbers() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), stop_token_ids=np.array([4, 5]))  # type: ignore[arg-type]
    assert (params.temperature, params.top_k, params.stop_token_ids) == (0.5, 3, [4, 5])
    assert type(params.temperature) is float and type(params.top_k) is int


def test_params_can_be_changed_and_copied() -> None:
    params = SamplingParams(temperature=0)
    params.max_tokens = 3
    copy = params.clone()
    params.max_tokens = -3
    assert copy == SamplingParams(temperature=0, max_tokens=3)
    with pytest.raises(RequestError, match="max_tokens=-3"):
        params.clone()
