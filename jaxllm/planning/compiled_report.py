"""Bytes, collectives, copies and overlaps of a layout's compiled steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.decoder.cache_spec import Pool
from jaxllm.execution import programs
from jaxllm.execution.steps import Steps
from jaxllm.planning.plan import CONTEXT
from jaxllm.platforms import PASSES, choices
from sharding.hlo import COLLECTIVES, HloProgram, analyse
from sharding.layout import Layout

WIDTH = 8  # tiles that a tile of a scoring step sees, as most do
BATCHES = (1, 8)  # on each data shard
PROMPT = 512  # tokens
PROGRAMS = 2 + len(BATCHES)  # a layout
SMALL = 1 << 20  # bytes; copies below are none of a weight


@dataclass(frozen=True)
class Collectives:
    """The collectives of one kind in a program; one in a loop counts once.

    Attributes:
      nbytes: bytes of their larger sides on one device, summed.
      hidden: number with work between their start and their end.
    """

    kind: str
    count: int
    nbytes: int
    hidden: int


@dataclass(frozen=True)
class CompiledStep:
    """A step as compiled. Bytes are those of one device; `alias_bytes` of the arguments are updated in place."""

    name: str
    argument_bytes: int
    temp_bytes: int
    alias_bytes: int
    collectives: list[Collectives]
    copies: list[str]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compiled_steps(config: ModelConfig, layout: Layout, dtype: str, say: Callable[[str], None]) -> list[CompiledStep]:
    """Compile a prefill, decoding and a scoring step for the layout's devices. `say` is called before each, with its name.

    Raises RuntimeError where the devices' compiler is missing.
    """
    steps = Steps(config, layout, dtype)
    context = min(CONTEXT, config.max_position)
    pool = Pool.of(config, context, max(BATCHES) * context, max(BATCHES))
    wanted = [programs.prefill(steps, PROMPT, pool)]
    wanted += [programs.decode(steps, batch * layout.data, pool) for batch in BATCHES]
    wanted += [programs.score(steps, choices(layout.platform).scoring_row, WIDTH if steps.attention == PASSES else 0)]
    found = []
    for program in wanted:
        say(f"compiling {program.name}, {layout.name}")
        start = time.perf_counter()
        found.append(_read(program.name, analyse(program.compile()), time.perf_counter() - start))
    return found


def _read(name: str, program: HloProgram, seconds: float) -> CompiledStep:
    memory = program.memory
    assert memory is not None, "every compiler here tells"
    collectives = []
    for kind in COLLECTIVES:
        of = [c for c in program.collectives if c.kind == kind]
        if of:
            hidden = sum(overlap.moved > 0 for overlap in program.overlaps(kind))
            collectives.append(Collectives(kind, len(of), sum(c.nbytes for c in of), hidden))
    copies = [str(copy) for copy in program.large_copies(SMALL)]
    return CompiledStep(name, memory.argument, memory.temp, memory.alias, collectives, copies, seconds)
