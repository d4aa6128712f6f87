"""The engine under test: a real model, or a published shape with random weights made on the devices."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from bench.machine import copy_bandwidth, matmul_rate
from checkpoints.checkpoint import open_checkpoint
from checkpoints.hub import compiled_dir, resolve
from checkpoints.load import load, random_leaves
from jaxllm.config import ModelConfig
from jaxllm.execution.compile_cache import use_compilation_cache
from jaxllm.execution.steps import Steps
from jaxllm.generation.engine import Engine
from jaxllm.generation.sequence import Sequence
from jaxllm.planning.plan import Plan, Run
from jaxllm.planning.presets import PRESETS
from jaxllm.planning.remedies import plan_or_refuse
from jaxllm.requests.sampling_params import SamplingParams
from sharding.layout import NAMES
from sharding.mesh import pick_devices, virtual_cpu_devices


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that choose what is measured."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help="folder, .gguf file, hub id or smollm2-135m (default)")
    what.add_argument("--config", choices=sorted(PRESETS), help="a published shape with random weights")
    parser.add_argument("--layers", type=int, help="so many layers of the --config")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--layout", default="tensor", help=NAMES)
    parser.add_argument("--devices", type=int)
    parser.add_argument("--virtual-devices", type=int, metavar="N", help="split the CPU into N devices")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", type=Path, help="keep the result in this JSON file")


def preset(name: str, layers: int | None) -> ModelConfig:
    """A published shape, or so many layers of it."""
    return PRESETS[name] if layers is None else replace(PRESETS[name], num_layers=layers)


class Subject:
    """An engine and what is known of it before it runs."""

    def __init__(self, args: argparse.Namespace, max_model_len: int, max_num_seqs: int, *, enable_prefix_caching: bool = False):
        """Without `enable_prefix_caching` prompts that are run again are computed again."""
        if args.virtual_devices:
            virtual_cpu_devices(args.virtual_devices)
        use_compilation_cache(compiled_dir())
        devices = pick_devices(args.devices)
        self.path = None if args.config else resolve(args.model or "smollm2-135m")
        self.name = args.config or args.model or "smollm2-135m"
        self.checkpoint = checkpoint = None if self.path is None else open_checkpoint(self.path)
        self.config: ModelConfig = preset(args.config, args.layers) if checkpoint is None else checkpoint.config
        run = Run(self.config, devices, args.dtype, args.layout, max_model_len, max_num_seqs)
        self.plan: Plan = plan_or_refuse(run)
        layout = self.plan.layout
        if checkpoint is None:
            params = random_leaves(self.config, layout, args.dtype, seed=0)
        else:
            params = load(checkpoint.source, checkpoint.rules, self.config, layout, args.dtype)
        self._params, self._sharing = jax.block_until_ready(params), enable_prefix_caching
        self._ids = 0
        self.engine = self.engine_with({})

    def engine_with(self, options: dict[str, Any]) -> Engine:
        """An engine of the same weights whose programs are compiled with further options of XLA."""
        return Engine(
            Steps(self.config, self.plan.layout, self.plan.dtype, options=options),
            self._params,
            pool=self.plan.pool,
            max_num_seqs=self.plan.max_num_seqs,
            enable_prefix_caching=self._sharing,
        )

    def submit(self, prompts: list[list[int]], new_tokens: int) -> list[Sequence]:
        """Greedy requests that run to their full length."""
        sequences = []
        for prompt in prompts:
            params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
            sequences.append(Sequence(self._ids, prompt, params, new_tokens, (), seed=0))
            self.engine.scheduler.add(sequences[-1])
            self._ids += 1
        return sequences

    def cost_card(self) -> dict[str, float]:
        """Bytes and FLOPs of a token, of the whole model, unpadded, and the measured ceilings of one device."""
        itemsize = {"float32": 4}.get(self.plan.dtype, 2)
        weights = self.config.num_params * itemsize
        return {
            "weight_bytes": weights,
            "weight_bytes_per_device": self.plan.weight_bytes,
            "kv_bytes_per_token": self.config.kv_bytes_per_token(itemsize),
            "flops_per_token": self.config.flops_per_token(0),
            "copy_bytes_per_second": copy_bandwidth(),
            "matmul_flops_per_second": matmul_rate(self.plan.dtype),
        }


def print_card(name: str, plan: Plan, card: dict[str, float]) -> None:
    """Print the cost card, before anything is measured."""
    devices = plan.layout.mesh.size
    shared = plan.layout.mesh.devices.flat[0].platform == "cpu"
    count = 1 if shared else devices  # virtual devices share one machine's memory and cores
    ceiling = count * card["copy_bytes_per_second"] / card["weight_bytes"]
    print(f"{name}, {plan.dtype}, layout {plan.layout.name} on {devices} device(s)")
    print(f"  weights        {card['weight_bytes'] / 1e9:8.3f} GB   ({card['weight_bytes_per_device'] / 1e9:.3f} GB a device)")
    print(f"  KV cache       {card['kv_bytes_per_token'] / 1e3:8.1f} kB a token")
    print(f"  compute        {card['flops_per_token'] / 1e9:8.3f} GFLOP a token")
    print(f"  copy           {card['copy_bytes_per_second'] / 1e9:8.1f} GB/s, measured")
    print(f"  matmul         {card['matmul_flops_per_second'] / 1e12:8.3f} TFLOP/s, measured")
    print(f"  decode ceiling {ceiling:8.1f} steps/s (copy rate over weight bytes)")
