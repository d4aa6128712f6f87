"""vLLM's own quick start, with `jaxllm` in place of `vllm`, and what is said to those of its arguments that are none here."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from tiny_checkpoint import write_tiny, write_tokenizer

import jaxllm
from jaxllm import LLM, RequestError, SamplingParams, TextPrompt, TokensPrompt
from jaxllm.requests.arguments import dtype_name
from jaxllm.requests.vllm_arguments import LLM_ELSEWHERE, SAMPLING_ELSEWHERE

GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 7, "eos_token_id": [257, 5]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"vocab_size": 258, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 257}
    folder = write_tokenizer(write_tiny(tmp_path_factory.mktemp("habits"), **sizes))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    llm = LLM(model=str(model), devices=1, max_num_seqs=4)
    yield llm
    assert not llm.engine.scheduler.busy


def texts(outputs: list[jaxllm.RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


# The quick start


def test_offline_batched_inference(llm: LLM) -> None:
    prompts = ["Hello, my name is", "The president of the United States is", "The capital of France is", "The future of AI is"]
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95, seed=7)
    outputs = llm.generate(prompts, sampling_params)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt == prompt and output.finished
        generated_text = output.outputs[0].text
        assert generated_text == llm.get_tokenizer().decode(output.outputs[0].token_ids)


def test_prompts_of_every_form_are_the_same_request(llm: LLM) -> None:
    greedy = SamplingParams(temperature=0)
    [expected] = texts(llm.generate("abc", greedy))
    ids = [97, 98, 99]
    forms: list[Any] = [{"prompt": "abc"}, [{"prompt": "abc"}], {"prompt_token_ids": ids}, [{"prompt_token_ids": ids}, "abc"]]
    for prompts in forms:
        assert set(texts(llm.generate(prompts, greedy))) == {expected}, prompts
    typed: list[TextPrompt | TokensPrompt] = [TextPrompt(prompt="abc"), TokensPrompt(prompt_token_ids=ids, prompt="said to be")]
    outputs = llm.generate(typed, greedy)
    assert set(texts(outputs)) == {expected}
    assert [(o.prompt, o.prompt_token_ids) for o in outputs] == [("abc", ids), ("said to be", ids)]
    assert "".join(llm.stream({"prompt": "abc"}, greedy)) == expected
    with pytest.raises(RequestError, match=r"prompt\[0\]='abc' is of type str"):
        llm.stream(["abc", "def"], greedy)  # type: ignore[list-item]


def test_chat(llm: LLM) -> None:
    conversation: list[dict[str, Any]] = [
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]
    outputs = llm.chat(conversation, sampling_params=SamplingParams(temperature=0), use_tqdm=False)
    assert llm.get_tokenizer().decode(outputs[0].prompt_token_ids) == (
        "system: You are a helpful assistant\nuser: Hello\nassistant:"
    )
    assert len(llm.chat([conversation, conversation], SamplingParams(temperature=0))) == 2


TEMPLATE = (
    "{% if tools %}[{% for t in tools %}{{ t.function.name }}{% endfor %}]{% endif %}{{ mood }}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
)


def test_what_a_chat_template_is_given(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    tool = {"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}

    def set_as(**options: Any) -> str:
        [output] = llm.chat(messages, SamplingParams(temperature=0, max_tokens=1), chat_template=TEMPLATE, **options)
        return str(llm.get_tokenizer().decode(output.prompt_token_ids))

    assert set_as() == "<user>hi<me>"
    assert set_as(add_generation_prompt=False) == "<user>hi"
    assert set_as(tools=[tool]) == "[look]<user>hi<me>"
    assert set_as(chat_template_kwargs={"mood": "sad"}) == "sad<user>hi<me>"
    messages.append({"role": "assistant", "content": "I am"})
    assert set_as(add_generation_prompt=False, continue_final_message=True).endswith("I am")
    with pytest.raises(RequestError, match=r"continue_final_message=True leaves no room .* set add_generation_prompt=False"):
        set_as(continue_final_message=True)
    with pytest.raises(RequestError, match=r"the chat template refuses these messages \(no\): change them"):
        llm.chat(messages, chat_template="{{ raise_exception('no') }}")


def test_a_bar_is_tqdms_or_ones_own(llm: LLM) -> None:
    class Bar:
        n = 0
        made: dict[str, Any] = {}  # noqa: RUF012

        def __init__(self, **options: Any):
            Bar.made = options

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, n: int) -> None:
            self.n += n
            Bar.n = self.n

    llm.generate(["a", "b", "c"], SamplingParams(temperature=0), use_tqdm=Bar)
    assert Bar.n == Bar.made["total"] == 3


# Defaults


def test_without_params_the_models_own_defaults_apply_and_it_is_said_once(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = LLM(model, devices=1, seed=3)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.6, top_p=0.9, max_tokens=7)
    with caplog.at_level(logging.WARNING, "jaxllm"):
        found = [texts(llm.generate("abc")), list(llm.stream("abc")), texts(llm.chat([{"role": "user", "content": "a"}]))]
    said = "sampling as the model's generation config says: max_tokens=7, temperature=0.6, top_p=0.9; generation_config='vllm'"
    assert [record.getMessage()[: len(said)] for record in caplog.records] == [said]
    again = LLM(model, devices=1, seed=3)
    params = SamplingParams(temperature=0.6, top_p=0.9, max_tokens=7)
    assert found[0] == texts(again.generate("abc", params)) and found[1] == list(again.stream("abc", params))


def test_generation_config_vllm_leaves_them_out(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = LLM(model, devices=1, generation_config="vllm")
    assert llm.get_default_sampling_params() == SamplingParams()
    assert 5 in llm.config.eos_token_ids  # where an answer ends is no default of sampling
    llm.generate("abc")
    assert not caplog.records


def test_defaults_that_are_none_name_their_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(model, devices=1)
    monkeypatch.setattr(llm, "generation_defaults", {"temperature": -1})
    with pytest.raises(RequestError, match=r"generation config: temperature=-1: .* generation_config='vllm'"):
        llm.generate("abc")
    llm.generate("abc", SamplingParams(max_tokens=1))


@pytest.mark.parametrize(
    ("dtype", "meant"),
    [("auto", "float32"), (None, "float32"), ("half", "float16"), ("float", "float32"), (jnp.bfloat16, "bfloat16")],
)
def test_dtypes_by_vllms_names(model: Path, dtype: Any, meant: str) -> None:
    assert LLM(model, devices=1, dtype=dtype).plan.dtype == meant


def test_a_dtype_of_torch_is_its_name() -> None:
    torch = pytest.importorskip("torch")
    assert dtype_name(torch.bfloat16) == "bfloat16"


def test_a_seed_of_none_is_the_default(model: Path) -> None:
    assert LLM(model, devices=1, seed=None).seed == LLM(model, devices=1).seed == 0


@pytest.mark.parametrize("form", ["folder", "text", "object"])
def test_a_tokenizer_of_ones_own(model: Path, tmp_path: Path, form: str) -> None:
    bare = write_tiny(tmp_path / "bare", vocab_size=258, max_position_embeddings=256)
    own = {"folder": model, "text": str(model), "object": LLM(model, devices=1).get_tokenizer()}[form]
    assert LLM(bare, devices=1, tokenizer=own).generate("abc", SamplingParams(temperature=0))[0].prompt_token_ids == [97, 98, 99]
    with pytest.raises(RequestError, match="has no tokenizer; name one: tokenizer=FOLDER"):
        LLM(bare, devices=1).get_tokenizer()


def test_hf_overrides_are_laid_over_the_config(model: Path) -> None:
    llm = LLM(model, devices=1, hf_overrides={"max_position_embeddings": 128, "rope_parameters": {"rope_theta": 50.0}})
    assert llm.plan.max_model_len == 128 and llm.config.rope is not None and llm.config.rope.theta == 50.0


# What is none here


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"tensor_parallel_size": 2}, "LLM has no argument 'tensor_parallel_size': use devices=N with layout='tensor'"),
        ({"gpu_memory_utilization": 0.9}, "'gpu_memory_utilization': memory is planned: bound it with max_model_len"),
        ({"trust_remote_code": True}, "'trust_remote_code': code that comes with a model is never run: leave it out"),
        ({"max_model_length": 5}, "'max_model_length': is it max_model_len?"),
        ({"xyzzy": 5}, "LLM has no argument 'xyzzy': there are model, tokenizer, layout"),
        ({"max_model_len": "64"}, "max_model_len='64' is of type str: give a whole number"),
        ({"max_num_seqs": 2.0}, "max_num_seqs=2.0 is of type float"),
        ({"seed": "0"}, "seed='0' is of type str"),
        ({"logprobs_mode": None}, "logprobs_mode=None is of type NoneType: give a text"),
        ({"max_logprobs": 50}, "'max_logprobs': at most 20 are given, or all with logprobs=-1: leave it out"),
        ({"generation_config": "mine"}, "generation_config='mine': there are 'auto' and 'vllm'"),
        ({"tokenizer": 5}, "tokenizer=5: give a folder, a hub id or a transformers tokenizer"),
        ({"tokenizer": "/no/such/folder"}, "/no/such/folder does not exist"),
        ({"revision": "main"}, "is not of the hub and has no revision 'main'; leave it out"),
        ({"dtype": object}, "dtype='object' is not known; there are float32"),
    ],
)
def test_arguments_of_a_start_are_answered(model: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        LLM(model, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"temperature": 0}, "sampling_params={'temperature': 0} is a dict: give SamplingParams"),
        (0.5, "sampling_params=0.5 is of type float: give SamplingParams, or a list of them"),
        ([{"temperature": 0}], "sampling_params holds {'temperature': 0}: give SamplingParams, one for each prompt"),
    ],
)
def test_what_are_no_params_is_refused(llm: LLM, params: Any, said: str) -> None:
    for call in (lambda: llm.generate("a", params), lambda: llm.stream("a", params)):
        with pytest.raises(RequestError, match=said):
            call()


def test_params_changed_after_they_were_made_are_as_they_are_when_asked_with(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3)
    stream = llm.stream("abc", params)
    params.max_tokens = 5
    assert len(llm.generate("abc", params)[0].outputs[0].token_ids) == 5
    assert len("".join(stream)) <= 3
    params.top_p = 7
    with pytest.raises(RequestError, match="top_p=7"):
        llm.generate("abc", params)


def test_nothing_that_is_here_is_said_to_be_elsewhere() -> None:
    assert not SAMPLING_ELSEWHERE.keys() & inspect.signature(SamplingParams).parameters.keys()
    assert not LLM_ELSEWHERE.keys() & inspect.signature(LLM).parameters.keys()


def test_the_package_shows_its_public_names_alone() -> None:
    assert dir(jaxllm) == sorted([*jaxllm.__all__, "__version__"])
    assert all(getattr(jaxllm, name) for name in dir(jaxllm))
