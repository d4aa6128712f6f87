"""`jaxllm COMMAND`, from a shell: `jaxllm --help` lists the commands.

Little is imported before Ctrl-C is taken care of, and of jax nothing before a command runs.
"""

from __future__ import annotations

import sys

from jaxllm.commands.interrupt import Interrupts

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

MEMORY_REMEDY = "try a smaller --max-model-len, --dtype bfloat16 or more devices"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 1 for an error (one line on stderr).

    Without `argv` the process is this command's, as for the console script: Ctrl-C ends it with 130.
    """
    interrupts = Interrupts()
    if argv is None:
        interrupts.install()
    try:
        code = run(sys.argv[1:] if argv is None else argv, interrupts)
        interrupts.finish()
        return code
    except BaseException:
        if interrupts.stopping:
            interrupts.end()
        raise


def run(argv: list[str], interrupts: Interrupts) -> int:
    """Run a command; its errors become a sentence."""
    import os

    from jaxllm.commands.terminal import Terminal, abandon_output, show_all_characters

    args = parse(argv)
    args.interrupts, args.terminal = interrupts, Terminal(sys.stderr)
    # transformers would tell everybody that torch is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    show_all_characters()
    try:
        with args.terminal.warnings():
            code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        abandon_output()
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        if interrupts.stopping:
            raise
        said = sentence(error)
        if said is None:
            raise
        args.terminal.write_line(f"jaxllm: {said}")
        return 1


def sentence(error: Exception) -> str | None:
    """An error in a user's words; None of one that is ours to mend."""
    if isinstance(error, ValueError | OSError):  # every error of ours is a ValueError with a sentence for the user
        return str(error)
    if "RESOURCE_EXHAUSTED" in str(error):
        return f"a device ran out of memory ({str(error).splitlines()[0]}): {MEMORY_REMEDY}"
    return None


def parse(argv: list[str]) -> argparse.Namespace:
    root = parser()
    args, rest = root.parse_known_args(argv)
    # Where an option stands between the model and the prompts, argparse has taken none for those.
    if vars(args).get("prompts") == [] and all(text == "-" or not text.startswith("-") for text in rest):
        args.prompts, rest = rest, []
    if rest:
        root.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def parser() -> argparse.ArgumentParser:
    import argparse

    from jaxllm import __version__
    from jaxllm.commands import cache as cache_command
    from jaxllm.commands import chat as chat_command
    from jaxllm.commands import checkpoints as checkpoint_commands
    from jaxllm.commands import demo as demo_command
    from jaxllm.commands import families as families_command
    from jaxllm.commands import generate as generate_command
    from jaxllm.commands import plan as plan_command
    from jaxllm.commands import run_batch as run_batch_command
    from jaxllm.commands import score as score_command
    from jaxllm.commands import serve as serve_command
    from jaxllm.commands import warmup as warmup_command

    root = argparse.ArgumentParser(prog="jaxllm", description="Sharded LLM inference in JAX.")
    root.add_argument("--version", action="version", version=f"jaxllm {__version__}")
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    for command in (
        generate_command,
        chat_command,
        demo_command,
        score_command,
        serve_command,
        run_batch_command,
        checkpoint_commands,
        plan_command,
        cache_command,
        warmup_command,
        families_command,
    ):
        command.add(commands)
    return root
