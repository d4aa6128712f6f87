"""The memory of a run on each device, and the layout it takes, before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any, Literal

from flax import nnx
from jax.sharding import AbstractMesh

from jaxllm.buckets import PAGE, pages_of
from jaxllm.config import ModelConfig
from jaxllm.decoder.cache_spec import Pool, cache_specs
from jaxllm.decoder.model import Decoder
from jaxllm.planning.roofline import decode_step, seconds_per_token
from jaxllm.planning.working_memory import score_bytes, step_bytes
from jaxllm.platforms import choices
from sharding.hardware import hardware
from sharding.layout import AMPERE, Layout, capability, make_layout
from sharding.mesh import device_memory
from sharding.padding import round_up

MEMORY_UTILIZATION = 0.92  # of a device's free memory; the rest is the compiler's and the driver's
ROWS = (64, 32, 16, 8, 4, 2, 1)
DTYPES = ("float32", "bfloat16", "float16")
CONTEXT = 1024  # positions in the cache where steps of generating are compared


@dataclass(frozen=True)
class Run:
    """A request for a run; the planner fills in what is None.

    Attributes:
      layout: a layout's name, or "auto".
      memory: bytes of a device; None: the first one tells.
      max_model_len, max_num_seqs: limits of generating; scoring keeps no cache. Whether a run fits is decided by one sequence as
        long as that on each data shard, and by the logits of so many.

    Raises ValueError for a dtype, length or number of sequences that cannot be.
    """

    config: ModelConfig
    devices: list[Any]
    dtype: str
    layout: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    workload: Literal["generate", "score"] = "generate"
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not known; there are {', '.join(DTYPES)}, or None for the checkpoint's")
        for name in ("max_model_len", "max_num_seqs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1")
        if (most := self.config.max_position) < (self.max_model_len or 0):
            raise ValueError(f"max_model_len={self.max_model_len} exceeds the model's context of {most} positions")

    def laid_out(self) -> Layout:
        """The layout over the devices; `layout` must not be "auto"."""
        return make_layout(self.layout, self.devices, self.config.hidden_size)


@dataclass(frozen=True)
class Plan:
    """Sizes of a run, in bytes a device.

    Attributes:
      max_model_len: tokens of the longest sequence.
      max_num_seqs: most sequences at once, as far as the pages of the cache last.
      working_bytes: of a step, beside weights and cache.
      memory: None: not known.
      pool: pages of the cache.
    """

    layout: Layout
    dtype: str
    max_model_len: int
    max_num_seqs: int
    weight_bytes: int
    cache_bytes: int
    working_bytes: int
    memory: int | None
    pool: Pool

    @property
    def nbytes(self) -> int:
        """Bytes a device: weights, cache and a step's working memory."""
        return self.weight_bytes + self.cache_bytes + self.working_bytes

    @property
    def sequences(self) -> int:
        """Sequences of max_model_len tokens that the pages hold at once, all devices together."""
        return self.layout.data * self.pool.sequences

    @property
    def fits(self) -> bool:
        """Whether they take no more than MEMORY_UTILIZATION of the memory; True where that is not known."""
        return self.memory is None or self.nbytes <= MEMORY_UTILIZATION * self.memory


def default_dtype(config: ModelConfig, devices: list[Any]) -> str:
    """float32 on a CPU, else the checkpoint's; GPUs before Ampere have no bfloat16, and take float16."""
    if devices[0].platform == "cpu":
        return "float32"
    return "float16" if capability(devices[0]) < AMPERE and config.dtype == "bfloat16" else config.dtype


def find_plan(run: Run) -> Plan:
    """The plan of a run, which fills in what it leaves open: the longest context that fits, then the most sequences and pages.

    "auto" is the fastest layout that fits: for generating by the time of one sequence's next token, for scoring by that of full
    steps. On hardware that is not known here generating takes "tensor", and scoring the first that fits, which moves the least.
    Where nothing fits: the plan that needs the least.
    """
    if run.layout != "auto":
        return _sized(run)
    rates = hardware(run.devices[0])
    names = layouts(len(run.devices))
    if run.workload == "generate":
        names = names[::-1] if rates else ["tensor"]
    plans = [_sized(replace(run, layout=name)) for name in names]
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return min(plans, key=lambda plan: plan.nbytes)
    if rates is None:
        return fitting[0]

    def seconds(plan: Plan) -> float:
        if run.workload == "generate":
            return decode_step(run.config, plan.layout, run.dtype, rates, 1, min(CONTEXT, plan.max_model_len)).total
        return seconds_per_token(run.config, plan.layout, run.dtype, rates, choices(plan.layout.platform).scoring_row)

    return min(fitting, key=seconds)


def layouts(devices: int) -> list[str]:
    """Names of the layouts over so many devices, those that exchange less first; over one device all are the same."""
    if devices == 1:
        return ["tensor"]
    mixed = [(data, devices // data) for data in range(devices - 1, 1, -1) if devices % data == 0]
    kinds = [f"{kind}-{data}x{model}" for kind in ("replicated", "gathered") for data, model in mixed]
    return ["replicated", "gathered", *kinds, "tensor"]


def _sized(run: Run) -> Plan:
    """The plan of a given layout: the longest context of which a sequence fits on each data shard, then the most sequences, then
    the most pages."""
    lengths = [run.max_model_len] if run.max_model_len else _halves(run.config.max_position)
    row_choices = [run.max_num_seqs] if run.max_num_seqs else ROWS
    layout = run.laid_out()
    for length, rows in product(lengths, row_choices):
        plan = _least(run, layout, length, rows)
        if plan.fits:
            return plan if run.workload == "score" else _with_most_pages(run, plan)
    return plan


def _least(run: Run, layout: Layout, length: int, rows: int) -> Plan:
    """The plan with pages for one sequence of `length` on each data shard."""
    config, dtype = run.config, run.dtype
    memory = device_memory(layout.mesh.devices.flat[0]) if run.memory is None else run.memory
    pool = Pool.of(config, length, length, -(-rows // layout.data))
    cache, working = 0, score_bytes(config, layout, dtype)
    if run.workload == "generate":
        cache, working = _pool_bytes(run, layout, pool), step_bytes(config, layout, dtype, rows, length)
    return Plan(layout, dtype, length, rows, weight_bytes(config, layout, dtype), cache, working, memory, pool)


def _with_most_pages(run: Run, plan: Plan) -> Plan:
    """The plan with as many pages as fit and its sequences may need."""
    layout, length, rows = plan.layout, plan.max_model_len, -(-plan.max_num_seqs // plan.layout.data)

    def of(pages: int) -> Plan:
        pool = Pool.of(run.config, length, pages * PAGE, rows)
        return replace(plan, pool=pool, cache_bytes=_pool_bytes(run, layout, pool))

    typical = choices(layout.platform).typical_length
    tokens = rows * length if typical is None else min(rows * length, max(length, rows * typical))
    # With so many pages the pool holds all sequences at their longest, each of whose last page may not be full.
    most = rows * pages_of(length) if tokens == rows * length else pages_of(tokens)
    return of(largest(lambda pages: of(pages).fits, most))


def _pool_bytes(run: Run, layout: Layout, pool: Pool) -> int:
    return pool.nbytes(layout, cache_specs(run.config, layout, run.dtype))


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n up to `most` that fits, 0 if none does; what is larger needs more."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def weight_bytes(config: ModelConfig, layout: Layout, dtype: str) -> int:
    """Bytes of parameters on each device, padding included."""
    return _weight_bytes(config, layout.data, layout.model, layout.gathered, layout.embed_divides, dtype)


@lru_cache(maxsize=256)
def _weight_bytes(config: ModelConfig, data: int, model: int, gathered: bool, embed_divides: bool, dtype: str) -> int:
    """`weight_bytes`, cached: a plan asks for the same ones again and again, on devices of one kind or another."""
    layout = Layout("", AbstractMesh((data, model), ("data", "model")), gathered, embed_divides)  # type: ignore[arg-type]

    def of(layers: int, routed: bool) -> int:
        decoder = Decoder(replace(config, num_layers=layers, routed=(routed,)), layout, dtype)
        state = nnx.to_flat_state(nnx.state(decoder, nnx.Param))
        leaves = [(v.get_value(), v.get_metadata()["axes"]) for _, v in state]
        return sum(math.prod(layout.stored(axes, x.shape).shard_shape(x.shape)) * x.dtype.itemsize for x, axes in leaves)

    # All layers take a tenth of a second to declare. Those that have experts are alike, and those that have none.
    count = sum(layer.routed for layer in config.layers)
    counts = {routed: n for routed, n in ((False, config.num_layers - count), (True, count)) if n}
    each = {routed: of(2, routed) - of(1, routed) for routed in counts}
    any_kind = next(iter(counts))
    return of(1, any_kind) - each[any_kind] + sum(n * each[routed] for routed, n in counts.items())


def cache_bytes(config: ModelConfig, layout: Layout, dtype: str, rows: int, length: int) -> int:
    """Bytes of keys and values on each device for `rows` sequences of `length` tokens."""
    rows = -(-rows // layout.data)
    return Pool.of(config, length, rows * round_up(length, PAGE), rows).nbytes(layout, cache_specs(config, layout, dtype))


def _halves(length: int) -> list[int]:
    """`length`, half of it and so on, down to 512."""
    lengths = [length]
    while lengths[-1] > 1024:
        lengths.append(lengths[-1] // 2)
    return lengths
