"""The report of `jaxllm plan`: a model's costs on some devices, as tables, JSON or a drawing."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from tqdm import tqdm

from checkpoints.hub import rates_dir
from jaxllm.commands.model_options import given, read_config_of
from jaxllm.config import ModelConfig
from jaxllm.planning.compiled_report import PROGRAMS, CompiledStep, compiled_steps
from jaxllm.planning.estimate import BATCHES, PROMPT, Estimate, estimates
from jaxllm.planning.measure import measured
from jaxllm.planning.plan import CONTEXT, MEMORY_UTILIZATION, Plan, Run, default_dtype, find_plan
from jaxllm.planning.presets import PRESETS
from jaxllm.planning.remedies import remedies
from jaxllm.requests.outputs import RequestError
from sharding.hardware import Hardware, absent_devices
from sharding.layout import hosts_of, make_layout
from sharding.mesh import pick_devices, virtual_cpu_devices
from sharding.targets import target_devices

GIB = 1 << 30
HERE = "here"
MOST_COPIES = 3  # printed of a program
WORKLOADS: tuple[Literal["generate", "score"], ...] = ("generate", "score")


def run(args: argparse.Namespace) -> int:
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise RequestError("--plot needs matplotlib: pip install 'jaxllm[plot]', or leave it out")
    config = config_of(args)
    devices = _devices(args)
    dtype = args.dtype or default_dtype(config, devices)
    rates = measured(devices, dtype, rates_dir()) if args.on == HERE else devices[0].hardware
    found = estimates(config, devices, dtype, rates)
    advice = [advise(Run(config, devices, dtype, workload=workload)) for workload in WORKLOADS]
    compiled = compile_steps(args, config, dtype, devices, advice) if args.compile else {}
    title = head(args.model, config, dtype, devices, rates)
    if args.json:
        document = {"model": args.model, "on": args.on, "devices": len(devices), "hardware": asdict(rates), "dtype": dtype}
        document |= {"layouts": [one.as_json() for one in found], "auto": {one.workload: one.as_json() for one in advice}}
        document |= {"compiled": {name: [step.as_json() for step in steps] for name, steps in compiled.items()}}
        print(json.dumps(document))
    else:
        print("\n".join([title, "", *table(found, config, args.on == HERE), "", *map(str, advice)]))
        for name, steps in compiled.items():
            print("\n".join(["", *compiled_table(next(one for one in found if one.layout == name), steps)]))
    if args.plot:
        plot(args.plot, title, found, rates.memory)
    return 0 if all(one.plan.fits for one in advice) else 1


def compile_steps(
    args: argparse.Namespace, config: ModelConfig, dtype: str, devices: list[Any], advice: list[Advice]
) -> dict[str, list[CompiledStep]]:
    """The steps of each layout that is asked for, compiled for the devices."""
    names = args.layout or dict.fromkeys(one.plan.layout.name for one in advice)
    if args.on != HERE:
        try:
            hosts = hosts_of(devices)
            devices = target_devices(devices[0].hardware.name, len(devices) // hosts, hosts)
        except RuntimeError as error:  # there is no compiler for them, and how to get it
            raise RequestError(str(error)) from error
    found = {}
    with tqdm(total=PROGRAMS * len(names), unit="program", disable=not sys.stderr.isatty(), leave=False) as bar:

        def say(line: str) -> None:
            bar.set_description(line)
            bar.update()

        for name in names:
            found[name] = compiled_steps(config, make_layout(name, devices, config.hidden_size), dtype, say)
    return found


def config_of(args: argparse.Namespace) -> ModelConfig:
    """The config of a checkpoint or a published shape."""
    if args.model not in PRESETS or Path(args.model).expanduser().exists():
        return read_config_of(args)
    if given(args, "revision", "hf_overrides"):
        raise RequestError(f"{args.model} is a published shape without a config.json: leave out --revision and --hf-overrides")
    return PRESETS[args.model]


def _devices(args: argparse.Namespace) -> list[Any]:
    """The devices that are here, or stand-ins for those that `--on` names."""
    if args.on != HERE:
        if args.virtual_devices is not None:
            raise RequestError("--virtual-devices are those of --on here: leave out one of the two")
        return absent_devices(args.on)
    if args.virtual_devices is not None:
        virtual_cpu_devices(args.virtual_devices)
    return pick_devices(None)


@dataclass(frozen=True)
class Advice:
    """One workload's plan with layout `auto`, and the remedies where it does not fit."""

    workload: str
    plan: Plan
    remedies: list[str]

    def __str__(self) -> str:
        plan = self.plan
        if not self.remedies and plan.fits:
            sizes = ""
            if self.workload == "generate":
                sizes = f", {plan.max_num_seqs} sequences of up to {plan.max_model_len} tokens, {plan.sequences} of that length"
            return f"to {self.workload}, auto takes {plan.layout.name}{sizes}"
        remedies = "; ".join(self.remedies) or "a smaller model"
        return f"to {self.workload} does not fit: {plan.nbytes / GIB:.1f} GiB a device at least; what would: {remedies}"

    def as_json(self) -> dict[str, Any]:
        plan = self.plan
        return {"layout": plan.layout.name, "fits": plan.fits, "max_model_len": plan.max_model_len,
                "max_num_seqs": plan.max_num_seqs, "sequences": plan.sequences, "nbytes": plan.nbytes,
                "remedies": self.remedies}  # fmt: skip


def advise(run: Run) -> Advice:
    plan = find_plan(run)
    return Advice(run.workload, plan, [] if plan.fits else [text for text, _ in remedies(run, plan)])


def head(name: str, config: ModelConfig, dtype: str, devices: list[Any], rates: Hardware) -> str:
    """The model and the devices, in a line."""
    size, hosts = jnp.dtype(dtype).itemsize, hosts_of(devices)
    count = f"{hosts} hosts of {len(devices) // hosts}" if hosts > 1 else str(len(devices))
    return (
        f"{name}: {config.num_params / 1e9:.2f} B parameters in {dtype}, {config.kv_bytes_per_token(size) / 1024:.0f} KiB of "
        f"cache a token; {count} x {rates.name} of {rates.memory / GIB:.1f} GiB"
    )


def table(found: list[Estimate], config: ModelConfig, here: bool) -> list[str]:
    """A line for each layout."""
    source = "what these devices were measured to do" if here else "the devices' data sheets, not measured"
    batches = " ".join(f"{f'batch {batch}':>9}" for batch in BATCHES)
    lines = [
        f"{'':16}{'GiB a device':^34}{'at most':^20}{'tokens/s':^30}{'seconds':^22}",
        f"{'layout':16}{'weights':>8}{'sequence':>9}{'step':>8}{'scoring':>9}{'sequences':>11}{'tokens':>9} {batches}"
        f"{'prompt':>10}{'HellaSwag':>11}",
    ]
    for one in found:
        gib = (one.weight_bytes, one.cache_bytes, one.generate_bytes, one.score_bytes)
        line = f"{one.layout:16}" + "".join(f"{n / GIB:{w}.2f}" for n, w in zip(gib, (8, 9, 8, 9), strict=True))
        line += f"{one.sequences or '-':>11}{one.longest or '-':>9} "
        line += " ".join(f"{step.tokens_per_second:9.0f}" if step.fits else f"{'-':>9}" for step in one.steps)
        line += f"{one.first_token:10.2g}" if one.fits and one.first_token else f"{'-':>10}"
        line += f"{one.hellaswag:11.3g}" if one.scores and one.hellaswag else f"{'-':>11}"
        lines.append(line)
    return [
        *lines,
        f"A sequence is as long as the model allows, {config.max_position} tokens, and of shorter ones more fit; tokens/s have "
        f"{min(CONTEXT, config.max_position)} in the cache, a prompt {min(PROMPT, config.max_position)}.",
        f"Bytes of weights and cache are exact, those of a step about right; times are by {source}.",
    ]


def compiled_table(estimate: Estimate, steps: list[CompiledStep]) -> list[str]:
    """A line for each program, and what it exchanges; the estimate beside its temporaries."""
    mib = 1 << 20
    lines = [
        f"{estimate.layout}, compiled: MiB a device",
        f"{'':34}{'arguments':>11}{'in place':>10}{'temporaries':>13}{'estimated':>11}",
    ]
    for step in steps:
        estimated = estimate.score_bytes if step.name.startswith("score") else estimate.generate_bytes
        lines.append(
            f"  {step.name:<32}{step.argument_bytes / mib:>11,.0f}{step.alias_bytes / mib:>10,.0f}{step.temp_bytes / mib:>13,.1f}"
            f"{estimated / mib:>11,.1f}"
        )
        for c in step.collectives:
            hidden = f", {c.hidden} of them begun before other work" if c.hidden else ""
            lines.append(f"    {c.count} {c.kind} of {c.nbytes / mib:,.2f} MiB{hidden}")
        lines += [f"    copies: {copy}" for copy in step.copies[:MOST_COPIES]]
        if len(step.copies) > MOST_COPIES:
            lines.append(f"    and {len(step.copies) - MOST_COPIES} more copies: --json has all")
    return lines


def plot(path: Path, title: str, found: list[Estimate], memory: int) -> None:
    """Bytes of a device, and seconds of a step of decoding, by layout, as a PNG. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [one.layout for one in found]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.5 + 0.5 * len(found)), layout="constrained", sharey=True)
    parts = {
        "weights": [one.weight_bytes for one in found],
        "cache of one sequence": [one.cache_bytes for one in found],
        "a step, generating or scoring": [max(one.generate_bytes, one.score_bytes) for one in found],
    }
    begin = [0.0] * len(found)
    for label, nbytes in parts.items():
        gib = [n / GIB for n in nbytes]
        left.barh(names, gib, left=begin, label=label)
        begin = [a + b for a, b in zip(begin, gib, strict=True)]
    left.axvline(MEMORY_UTILIZATION * memory / GIB, color="black", linestyle="--", label="what a device has")
    left.set(xlabel="GiB a device")
    left.invert_yaxis()
    height = 0.8 / len(BATCHES)
    for i, batch in enumerate(BATCHES):
        at = [row + (i - (len(BATCHES) - 1) / 2) * height for row in range(len(found))]
        milliseconds = [1e3 * one.steps[i].seconds if one.steps[i].fits else 0.0 for one in found]
        bars = right.barh(at, milliseconds, height, label=f"batch {batch}")
        right.bar_label(bars, [f"{ms:.3g}" if ms else "" for ms in milliseconds], padding=3, fontsize="small")
    right.set(xlabel="ms a step of decoding, where it fits")
    right.margins(x=0.1)
    for axes in (left, right):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
