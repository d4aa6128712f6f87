"""`jaxllm serve MODEL`: the OpenAI API over one model."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from jaxllm.commands.model_options import add_model, add_place, add_tokenizer, let_the_first_go_on, load

if TYPE_CHECKING:
    from jaxllm.serving.server import Settings

INSTALL = 'pip install "jaxllm[serve]"'
KEY_VARIABLE = "JAXLLM_API_KEY"
LOCAL = ("127.0.0.1", "::1", "localhost")


def add(commands: Any) -> None:
    """Add the command to the command line's subparsers."""
    serve = commands.add_parser(
        "serve",
        help="answer OpenAI's clients over HTTP",
        description="Answer OpenAI's clients over HTTP. It listens at once, and answers 503 until the model is loaded.",
    )
    add_model(serve)
    add_tokenizer(serve)
    add_place(serve)
    serve.add_argument("--max-num-seqs", type=int, help="most sequences at once")
    web = serve.add_argument_group("the server")
    web.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    web.add_argument("--port", type=int, default=8000, help="default 8000; 0: one that is free")
    web.add_argument("--uds", metavar="PATH", help="listen on a Unix socket instead")
    web.add_argument(
        "--api-key", action="append", default=[], help=f"a key that requests must bring; may be given again, or as {KEY_VARIABLE}"
    )
    web.add_argument(
        "--served-model-name", action="append", help="what requests call the model (default: MODEL); may be given again"
    )
    web.add_argument("--max-waiting", type=int, default=1024, help="answers that may wait for their turn (default 1024)")
    web.add_argument("--shutdown-timeout", type=int, default=60, metavar="SECONDS", help="for answers under way at SIGTERM (60)")
    web.add_argument("--trust-request-chat-template", action="store_true", help="requests may bring chat templates of their own")
    web.add_argument("--profile-dir", metavar="DIR", help="POST /start_profile and /stop_profile write profiles there")
    serve.set_defaults(run=run_serve)


def needs_serving(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """A command that says what to install where a package is missing."""

    @wraps(run)
    def checked(args: argparse.Namespace) -> int:
        try:
            import jaxllm.serving.app  # noqa: F401
        except ImportError as error:
            raise ValueError(f"this command needs {error.name}: {INSTALL}") from error
        return run(args)

    return checked


@needs_serving
def run_serve(args: argparse.Namespace) -> int:
    from jaxllm.serving.run import listen, serve

    let_the_first_go_on(args)
    settings = settings_of(args)
    with listen(args.host, args.port, args.uds) as socket:
        where = f"unix:{args.uds}" if args.uds else "http://{}:{}".format(*socket.getsockname()[:2])
        print(f"listening on {where}, loading {settings.names[0]}", flush=True)
        if not settings.api_keys and not args.uds and args.host not in LOCAL:
            print(f"anyone who reaches {args.host} can use it: --api-key asks for a key", file=sys.stderr, flush=True)
        return serve(socket, settings, lambda: load(args), args.shutdown_timeout)


def settings_of(args: argparse.Namespace) -> Settings:
    from jaxllm.serving.server import Settings

    keys = [*args.api_key, *filter(None, [os.environ.get(KEY_VARIABLE)])]
    names = args.served_model_name or [args.model]
    return Settings(
        names,
        keys,
        max_waiting=args.max_waiting,
        trust_request_templates=args.trust_request_chat_template,
        profile_dir=args.profile_dir,
    )
