"""`jaxllm chat MODEL`: a conversation."""

from __future__ import annotations

import argparse
import contextlib
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

from jaxllm.commands.model_options import add_model, add_place, add_sampling, add_tokenizer, load, sampling_params

if TYPE_CHECKING:
    from jaxllm.llm import LLM
    from jaxllm.requests.sampling_params import SamplingParams


def add(commands: Any) -> None:
    """Add the command to the command line's subparsers."""
    chat = commands.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model. Ctrl-C stops an answer; an empty line, Ctrl-D, or Ctrl-C at the prompt ends.",
    )
    add_model(chat)
    chat.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    add_tokenizer(chat)
    add_place(chat)
    add_sampling(chat, max_tokens=512)
    chat.set_defaults(run=run_chat)


def run_chat(args: argparse.Namespace) -> int:
    params = sampling_params(args)
    llm = load(args)
    messages: list[dict[str, Any]] = []
    if args.system is not None:
        messages.append({"role": "system", "content": args.system})
    while line := next_line():
        messages.append({"role": "user", "content": line})
        said = answer(args, llm, messages, params)
        if said:
            messages.append({"role": "assistant", "content": said})
        else:
            messages.pop()
    return 0


def next_line() -> str:
    """The user's next line; empty at the end of the input."""
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # `input` has its history and keys then
    try:
        return input("> " if typed else "").strip()
    except EOFError:
        if typed:
            print()  # the shell's own prompt begins a line
        return ""


def answer(args: argparse.Namespace, llm: LLM, messages: list[dict[str, Any]], params: SamplingParams) -> str:
    """The model's answer, printed as it comes: cut short by Ctrl-C, empty where the context has no room."""
    ids, room = llm.chat_prompt(messages), llm.plan.max_model_len
    if len(ids) >= room:
        args.terminal.write_line(
            f"jaxllm: with this message the conversation has {len(ids)} tokens, and the context holds {room} with the answer: "
            "it was left out; say less, or begin anew"
        )
        return ""
    said = ""
    with args.interrupts.deferred() as pressed, closing(llm.stream(ids, params)) as pieces:
        for piece in args.terminal.until_first(pieces):
            if pressed():
                break
            print(piece, end="", flush=True)
            said += piece
    print()
    return said
