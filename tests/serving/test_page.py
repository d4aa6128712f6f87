"""The chat page in a headless Chromium, where there are one and playwright."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from servers import serving
from tiny_checkpoint import write_tiny, write_tokenizer

from jaxllm import LLM
from jaxllm.serving.server import Server, Settings

api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

SIZES = {"vocab_size": 258, "max_position_embeddings": 2048, "bos_token_id": 256, "eos_token_id": 257}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    llm = LLM(write_tokenizer(write_tiny(tmp_path_factory.mktemp("page"), **SIZES)), devices=1, max_num_seqs=2)
    server = Server(Settings(["tiny"], api_keys=["secret"]), lambda: llm)
    server.load()
    with serving(server) as client:
        yield client


@pytest.fixture
def page(http: httpx.Client) -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        said: list[str] = []
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("requestfailed", lambda request: said.append(f"{request.url}: {request.failure}"))
        page.goto(str(http.base_url))
        yield page
        browser.close()
        assert not [one for one in said if "ERR_ABORTED" not in one], said  # what Stop aborts


def say(page: Any, text: str) -> Any:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    return page.locator("article[data-role=assistant]").last


def test_a_conversation(page: Any) -> None:
    page.locator("summary").click()
    page.fill("#key", "secret")
    page.fill("#max_completion_tokens", "40")
    page.fill("#seed", "1")
    api.expect(page.locator("#model")).to_have_text("tiny", timeout=20_000)
    answer = say(page, "hi <b>there</b>")
    api.expect(page.locator("#send")).to_have_text("Send", timeout=60_000)
    api.expect(page.locator("#speed")).to_have_text(re.compile(r"40 tokens, [\d.]+ tokens/s"))
    assert page.locator("article[data-role=user]").text_content() == "hi <b>there</b>"
    tokens = answer.locator(".token")
    assert tokens.count() > 5 and re.match(r'".*": [\d.]+ %', tokens.first.get_attribute("title"))
    api.expect(page.locator("#engine")).to_have_text(
        re.compile(r"0 rows run, 0 wait, .* of prompts found in the cache"), timeout=5000
    )
    first = answer.text_content()
    assert say(page, "more").text_content() != first  # the conversation has grown
    page.click("#clear")
    assert page.locator("article").count() == 0


def test_an_answer_is_stopped_and_a_mistake_is_told(page: Any) -> None:
    answer = say(page, "hi")
    api.expect(answer.locator(".error")).to_contain_text("the key is missing or wrong")
    page.locator("summary").click()
    page.fill("#key", "secret")
    page.fill("#max_completion_tokens", "2000")
    answer = say(page, "hi")
    api.expect(answer.locator(".token").first).to_be_visible(timeout=60_000)
    page.click("#send")
    api.expect(page.locator("#send")).to_have_text("Send")
    api.expect(page.locator("#engine")).to_have_text(re.compile("0 rows run"), timeout=10_000)
