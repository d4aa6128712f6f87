"""The options that commands share, and what becomes of them. Nothing of jax is imported before a command runs."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from jaxllm.requests.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxllm.config import ModelConfig
    from jaxllm.llm import LLM
    from jaxllm.processes.distributed import Distributed

MODEL_HELP = "folder, .gguf file, hub id, or smollm2-135m"
LAYOUTS = "tensor, replicated, gathered, replicated-AxB, gathered-AxB (A over data, B over model)"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a model and how its config is read."""
    parser.add_argument("model", help=MODEL_HELP)
    add_config(parser)


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    parser.add_argument("--hf-overrides", type=_json_object, metavar="JSON", help="keys that replace those of config.json")


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", help="a model whose tokenizer is taken in place of its own")


def add_place(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where it runs")
    where.add_argument("--layout", default="auto", help=f"auto, {LAYOUTS}")
    where.add_argument("--devices", type=int, help="how many devices (default: all)")
    where.add_argument("--virtual-devices", type=int, metavar="N", help="split the CPU into N devices")
    where.add_argument(
        "--coordinator", metavar="HOST:PORT", help="one of several processes: where process 0 waits for the others, or auto"
    )
    where.add_argument("--processes", type=int, metavar="N", help="how many there are (default: as srun, mpirun, torchrun say)")
    where.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0 (default: likewise)")
    where.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32 on a CPU, else the checkpoint's)")
    where.add_argument("--max-model-len", type=int, help="longest prompt and answer together, in tokens")


def add_sampling(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    how = parser.add_argument_group("how tokens are chosen")
    how.add_argument("--max-tokens", type=int, default=max_tokens, help=f"most of an answer (default {max_tokens})")
    how.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    how.add_argument("--top-p", type=float, default=1.0, help="of the likeliest tokens with so much probability together")
    how.add_argument("--top-k", type=int, default=0, help="of so many likeliest tokens")
    how.add_argument("--min-p", type=float, default=0.0, help="of those at least so likely beside the likeliest")
    how.add_argument("--repetition-penalty", type=float, default=1.0, help="divides logits of tokens seen before")
    how.add_argument("--seed", type=int)
    how.add_argument("--stop", action="append", default=[], help="a string that ends the answer; may be given again")


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object, such as '{{\"rope_theta\": 10000}}'")
    return found


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options of these names that the command has and the user gave, with their values."""
    return {name: value for name in names if (value := vars(args).get(name)) is not None}


def sampling_params(args: argparse.Namespace, n: int = 1) -> SamplingParams:
    return SamplingParams(
        n=n,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=tuple(args.stop),
    )


def load(args: argparse.Namespace, **options: Any) -> LLM:
    """The LLM of a command's options, with progress for whoever watches.

    One of several processes that is not the first takes part in what that does, and goes no further.
    """
    from jaxllm.llm import LLM, Progress
    from sharding.mesh import virtual_cpu_devices

    if args.virtual_devices is not None:
        virtual_cpu_devices(args.virtual_devices)
    with args.terminal.watching():
        shown = Progress(args.terminal.say, args.terminal.loaded)
        llm = LLM(args.model, progress=shown, distributed=place_among(args), **options_of(args), **options)
    if llm.group is not None and not llm.group.leads:
        llm.follow()
        sys.exit(0)
    return llm


def place_among(args: argparse.Namespace) -> Distributed | None:
    """Which of several processes this is; None: there is one."""
    from jaxllm.processes.distributed import Distributed

    return Distributed.given(args.coordinator, args.processes, args.process_id)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Those of `LLM` that a command's options are."""
    place = {name: getattr(args, name) for name in ("layout", "devices", "dtype", "max_model_len")}
    return place | given(args, "revision", "hf_overrides", "tokenizer", "max_num_seqs")


def let_the_first_go_on(args: argparse.Namespace) -> None:
    """Any other of several processes takes part in what the first one does, and goes no further."""
    if (place := place_among(args)) is not None and place.process_id > 0:
        load(args)


def read_config_of(args: argparse.Namespace) -> ModelConfig:
    """The config of the model alone; no weight is read, and none fetched where the hub has a config.json."""
    from checkpoints.checkpoint import read_config
    from checkpoints.hub import resolve_config

    return read_config(resolve_config(args.model, **given(args, "revision")), **given(args, "hf_overrides"))
