"""Calls of tools and thoughts: read out of a text however it is cut, and forced where a request wants one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from servers import serving
from tiny_checkpoint import write_tiny, write_tokenizer

from jaxllm import LLM
from jaxllm.serving.messages import MessageReader, Part, response_template
from jaxllm.serving.server import Server, Settings

SIZES = {"vocab_size": 258, "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": 257}
TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}{# <think></think> <tool_call></tool_call> #}"
)
MESSAGES = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Seoul", "Paris"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]


class Templated:
    def __init__(self, chat_template: Any):
        self.chat_template = chat_template


def reader(prompt: str = "user: hi\nassistant:") -> MessageReader:
    template = response_template(Templated(TEMPLATE))
    assert template is not None
    return MessageReader(template, prompt, TOOLS)


def read(pieces: list[str], prompt: str = "user: hi\nassistant:") -> list[Part]:
    """All parts, what follows each other of one kind joined."""
    one = reader(prompt)
    joined: list[Part] = []
    for i, piece in enumerate(pieces):
        for part in one.read(piece, i == len(pieces) - 1):
            if joined and part.kind == joined[-1].kind != "call":
                joined[-1] = Part(part.kind, joined[-1].text + part.text)
            else:
                joined.append(part)
    return joined


TEXT = (
    'so<think>hm <b></think>Well. <tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
    '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call> \u00e9'
)


@given(st.lists(st.integers(0, len(TEXT)), max_size=8))
def test_it_is_the_same_however_the_text_is_cut(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(TEXT)]
    assert read([TEXT[a:b] for a, b in pairwise(places)]) == [
        Part("content", "so"),
        Part("thought", "hm <b>"),
        Part("content", "Well. "),
        Part("call", "{}", "now"),
        Part("content", "\n"),
        Part("call", '{"city": "Paris"}', "weather"),
        Part("content", " \u00e9"),
    ]


def test_a_thought_may_have_been_begun_by_the_prompt() -> None:
    assert read(["hm</think>Yes"], "user: assistant?\nassistant:<think>") == [Part("thought", "hm"), Part("content", "Yes")]


def test_a_call_that_is_none_is_text() -> None:
    for text in ("<tool_call>{bad</tool_call>", '<tool_call>{"nam": 1}</tool_call>'):
        assert {part.kind for part in read([text])} == {"content"}
    assert read(["<tool_call>{bad</tool_call> x"]) == [Part("content", "<tool_call>{bad</tool_call> x")]


def test_text_alone_needs_no_template() -> None:
    assert response_template(Templated("{{ messages }}")) is None and response_template(Templated(None)) is None
    assert response_template(Templated({"default": "a", "tool_use": "</tool_call>"})) is not None


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = write_tokenizer(write_tiny(tmp_path_factory.mktemp("tools"), **SIZES))
    llm = LLM(folder, devices=1, max_num_seqs=2)
    llm.tokenizer.chat_template = TEMPLATE
    server = Server(Settings(["tiny"]), lambda: llm)
    server.load()
    with serving(server) as client:
        yield client


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_is_wanted_is_made(client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "seed": 1}
    asked["parallel_tool_calls"] = False
    [whole] = client.chat.completions.create(**asked).choices
    assert whole.finish_reason == "tool_calls" and not whole.message.content
    [call] = whole.message.tool_calls or []
    assert call.type == "function" and call.id.startswith("call_")
    assert (call.function.name in ("weather", "now") and isinstance(choice, str)) or call.function.name == "weather"
    arguments = json.loads(call.function.arguments)
    if call.function.name == "weather":
        assert arguments["city"] in ("Seoul", "Paris") and 1 <= arguments["days"] <= 9
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    [streamed] = [made for chunk in chunks for made in chunk.delta.tool_calls or []]
    assert streamed.index == 0 and streamed.function is not None
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    assert chunks[-1].finish_reason == "tool_calls"


def test_tools_that_may_be_called_change_no_text(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 20, "seed": 2}
    asked["logit_bias"] = {str(ord(c)): 12.0 for c in "abcde "}
    [choice] = client.chat.completions.create(**asked).choices
    assert choice.message.tool_calls is None and choice.finish_reason == "length" and choice.message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(pieces) == choice.message.content


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"tool_choice": "required"}, 400, "there are no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, 400, "names 'x', which is none of"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 422, "tools: it String should match"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, 400, "leave one out"),
        ({"tools": TOOLS, "tool_choice": "x"}, 422, "tool_choice: it"),
    ],
)
def test_a_mistake_is_told(http: httpx.Client, body: dict[str, Any], status: int, message: str) -> None:
    answer = http.post("/v1/chat/completions", json={"messages": MESSAGES} | body)
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), answer.text
