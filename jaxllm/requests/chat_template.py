"""A conversation under a chat template, as token ids."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from jaxllm.requests.outputs import RequestError


def encode_chat(tokenizer: Any, conversation: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
    """Token ids, special tokens as the template has them; `options` are those of transformers' `apply_chat_template`.

    Raises RequestError where there is no template, or it cannot set these messages.
    """
    if tokenizer is None or not (options["chat_template"] or tokenizer.chat_template):
        raise RequestError("the model has no chat template: give chat_template=, or use generate with a prompt of your own")
    if options["add_generation_prompt"] and options["continue_final_message"]:
        raise RequestError("continue_final_message=True leaves no room for a new message: set add_generation_prompt=False")
    try:
        return list(tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False, **options))
    except (TemplateError, TypeError, ValueError, KeyError) as error:  # what code of a template raises
        raise RequestError(f"the chat template refuses these messages ({error}): change them, or give chat_template=") from error
