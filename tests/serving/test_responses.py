"""`/v1/responses` with OpenAI's own client: whole, in events, with forms, thoughts and calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel, Field
from servers import serving
from test_tools import MESSAGES, SIZES, TEMPLATE, TOOLS
from tiny_checkpoint import write_tiny, write_tokenizer

from jaxllm import LLM, SamplingParams
from jaxllm.serving.messages import Part
from jaxllm.serving.responses import Items
from jaxllm.serving.server import Server, Settings

LETTERS = {ord(c): 12.0 for c in "abcde "}
BIASES = {"logit_bias": {str(token): bias for token, bias in LETTERS.items()}}
FUNCTIONS: Any = [{"type": "function", "strict": True, **tool["function"]} for tool in TOOLS]
CALLED: Any = [
    {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
    {"type": "function_call", "call_id": "c1", "name": "now", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "noon"},
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    llm = LLM(write_tokenizer(write_tiny(tmp_path_factory.mktemp("responses"), **SIZES)), devices=1, max_num_seqs=2)
    llm.tokenizer.chat_template = TEMPLATE
    return llm


@pytest.fixture(scope="module")
def http(llm: LLM) -> Iterator[httpx.Client]:
    server = Server(Settings(["tiny"]), lambda: llm)
    server.load()
    with serving(server) as client:
        yield client
    assert server.admitted == 0


def test_a_response_is_what_the_engine_says(llm: LLM, client: openai.OpenAI) -> None:
    said = [{"role": "system", "content": "be short"}, *MESSAGES]
    [wanted] = llm.chat(said, SamplingParams(seed=5, max_tokens=12, logit_bias=LETTERS))
    found = client.responses.create(
        model="tiny", instructions="be short", input="hi", max_output_tokens=12, top_logprobs=2, extra_body={"seed": 5} | BIASES
    )
    assert found.output_text == wanted.outputs[0].text
    assert found.status == "incomplete" and found.incomplete_details and found.incomplete_details.reason == "max_output_tokens"
    assert found.usage and (found.usage.input_tokens, found.usage.output_tokens) == (len(wanted.prompt_token_ids), 12)
    [item] = found.output
    assert item.type == "message" and item.content[0].type == "output_text"
    assert "".join(one.token for one in item.content[0].logprobs or []) == found.output_text
    assert found.instructions == "be short" and found.max_output_tokens == 12 and found.id.startswith("resp_")


@pytest.mark.parametrize("input", ["hi", CALLED])
def test_events_build_up_the_whole(client: openai.OpenAI, input: Any) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": input, "max_output_tokens": 40, "extra_body": {"seed": 1} | BIASES}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    last = events[-1]
    assert last.type == "response.incomplete" and last.response.output_text == whole.output_text
    assert last.response.usage == whole.usage
    asked["extra_body"]["stop"] = whole.output_text[5:8]
    with client.responses.stream(**asked) as stream:  # the client puts the events together itself
        final = stream.get_final_response()
    assert final.status == "completed" and final.output_text == whole.output_text.partition(whole.output_text[5:8])[0]


class City(BaseModel):
    """What is asked for."""

    name: str = Field(max_length=8)
    days: int = Field(ge=1, le=9)


def test_an_answer_may_have_a_form(client: openai.OpenAI) -> None:
    found = client.responses.parse(model="tiny", input="hi", text_format=City, extra_body={"seed": 2})
    assert isinstance(found.output_parsed, City) and found.status == "completed"
    assert found.text and found.text.format and found.text.format.type == "json_schema"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_call_that_is_wanted_is_made(client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": "hi", "tools": FUNCTIONS, "tool_choice": choice, "extra_body": {"seed": 1}}
    asked["parallel_tool_calls"] = False
    whole = client.responses.create(**asked)
    [call] = whole.output
    assert call.type == "function_call" and call.call_id.startswith("call_") and call.status == "completed"
    arguments = json.loads(call.arguments)
    assert call.name == "now" or arguments["city"] in ("Seoul", "Paris")
    events = list(client.responses.create(**asked, stream=True))
    [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert done.arguments == call.arguments and events[-1].type == "response.completed"


def test_thoughts_texts_and_calls_are_items() -> None:
    items = Items()
    parts = [Part("thought", "h"), Part("thought", "m"), Part("content", "\n"), Part("content", "We"), Part("content", "ll")]
    parts += [Part("call", "{}", "now"), Part("content", "\n"), Part("call", "{}", "now"), Part("content", " \n")]
    events = [event["type"] for part in parts for event in items.add(part, [])] + [event["type"] for event in items.close()]
    kinds = [item["type"] for item in items.items]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    assert [item["content"][0]["text"] for item in items.items[:2]] == ["hm", "\nWell"]
    assert all(item["status"] == "completed" for item in items.items)
    assert events.count("response.output_item.added") == events.count("response.output_item.done") == 4
    assert events.count("response.content_part.added") == events.count("response.content_part.done") == 2


def test_what_an_assistant_did_is_one_message(http: httpx.Client, llm: LLM) -> None:
    """As a chat has it: the templates know no other form."""
    call = {"type": "function", "id": "c1", "function": {"name": "now", "arguments": "{}"}}
    assistant: dict[str, Any] = {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]}
    chat: list[Any] = [*MESSAGES, assistant, {"role": "tool", "tool_call_id": "c1", "content": "noon"}]
    body = {"input": CALLED, "max_output_tokens": 1}
    assert http.post("/v1/responses", json=body).json()["usage"]["input_tokens"] == len(llm.chat_prompt(chat))


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"previous_response_id": "resp_1"}, 400, "previous_response_id", "send the whole conversation as input"),
        ({"background": True}, 400, "background", "leave it out"),
        ({"input": []}, 422, "input", "at least 1 item"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "input", r"input[0] is of the type 'item_reference'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "input", "input[0]: its content is a text"),
        ({"input": [{"type": "function_call", "name": "x"}]}, 400, "input", "input[0] has no arguments"),
        ({"n": 2}, 400, "n", "a response is one answer"),
        ({"truncation": "auto"}, 422, "truncation", "disabled"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, 400, "text", "its schema is missing"),
        ({"max_output_tokens": 10_000}, 400, "max_tokens", "the context holds"),
        ({"tool_choice": "required"}, 400, "tool_choice", "there are no tools"),
        ({"tools": [{"type": "web_search"}]}, 422, "tools", "function"),
    ],
)
def test_a_mistake_is_told(http: httpx.Client, body: dict[str, Any], status: int, param: str, message: str) -> None:
    answer = http.post("/v1/responses", json={"input": "hi"} | body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], message in error["message"]) == (status, param, True), answer.text


def test_fields_without_consequence_are_taken(http: httpx.Client) -> None:
    body = {"input": "hi", "max_output_tokens": 1, "store": False, "include": ["reasoning.encrypted_content"], "x": 1}
    answer = http.post("/v1/responses", json=body | {"previous_response_id": None, "background": False})
    assert answer.status_code == 200 and answer.headers["x-ignored-fields"] == "x"
