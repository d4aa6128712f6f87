"""`sharding.hlo` sees what XLA made of small programs: for virtual CPU devices, and for GPUs that are not there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled, Wrapped

from jaxllm.execution.compile_cache import use_compilation_cache
from sharding.hlo import HloProgram, analyse
from sharding.hlo_text import Array, parse
from sharding.targets import compile_for_cuda, target_devices, target_kinds

WEIGHT = 512 * 1024 * 4  # bytes of a float32 weight [512, 1024]


def compile_here(jitted: Wrapped, *args: Any) -> Compiled:
    return jitted.lower(*args).compile()


class Target:
    """Four devices along `model`, and how to compile for them."""

    def __init__(self, devices: list[jax.Device], compiler: Callable[..., Compiled]) -> None:
        self.mesh = Mesh(np.array(devices, dtype=object), ("model",))
        self.compiler = compiler

    def array(self, shape: tuple[int, ...], *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=self.sharding(*axes))

    def sharding(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def program(self, f: Callable[..., Any], *args: Any, **options: Any) -> HloProgram:
        return analyse(self.compiler(jax.jit(f, **options), *args))


@pytest.fixture(params=["cpu", "v100-32gb", "a100-80gb", "h100"])
def target(request: pytest.FixtureRequest) -> Target:
    if request.param == "cpu":
        return Target(jax.devices("cpu")[:4], compile_here)
    if not any(importlib.util.find_spec(f"jax_cuda{cuda}_plugin") for cuda in ("12", "13")):
        pytest.skip('compiling for a GPU needs pip install "jaxllm[aot]"')
    return Target(target_devices(request.param, 4), compile_for_cuda)


@pytest.mark.parametrize("kind", target_kinds())
def test_every_description_compiles(kind: str) -> None:
    if not any(importlib.util.find_spec(f"jax_cuda{cuda}_plugin") for cuda in ("12", "13")):
        pytest.skip('compiling for a GPU needs pip install "jaxllm[aot]"')
    on = Target(target_devices(kind, 2), compile_for_cuda)
    arrays = (on.array((8, 512), None, None), on.array((512, 1024), None, "model"), on.array((1024, 512), "model", None))
    assert on.program(mlp, *arrays).count("all-reduce") == 1


def mlp(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """[rows, D], [D, F], [F, D] -> [rows, D]"""
    return jax.nn.relu(x @ up) @ down


def test_a_split_mlp_needs_one_all_reduce(target: Target) -> None:
    x, up, down = target.array((8, 512)), target.array((512, 1024), None, "model"), target.array((1024, 512), "model")
    program = target.program(mlp, x, up, down, out_shardings=target.sharding())
    (collective,) = program.collectives
    assert collective.kind == "all-reduce" and not collective.in_loop
    assert collective.results == (Array("f32", (8, 512)),)
    assert collective.nbytes == 8 * 512 * 4
    assert "dot_general" in collective.source
    assert program.count("all-reduce") == 1 and program.count("all-gather") == 0


def test_a_weight_that_is_gathered_is_an_all_gather(target: Target) -> None:
    x, up = target.array((32, 512), "model"), target.array((512, 1024), "model")

    def gathered(x: jax.Array, up: jax.Array) -> jax.Array:
        return x @ jax.lax.with_sharding_constraint(up, target.sharding())

    program = target.program(gathered, x, up, out_shardings=target.sharding("model"))
    assert [(c.kind, c.nbytes, c.operands) for c in program.collectives] == [("all-gather", WEIGHT, (Array("f32", (128, 1024)),))]


def test_other_collectives_are_told_apart(target: Target) -> None:
    def everything(x: jax.Array) -> tuple[jax.Array, ...]:
        """[64, 64] on each device"""
        ring = [(i, (i + 1) % 4) for i in range(4)]
        moved = jax.lax.ppermute(x, "model", ring)
        exchanged = jax.lax.all_to_all(x, "model", split_axis=1, concat_axis=0, tiled=True)
        return moved, exchanged, jax.lax.psum_scatter(x, "model", tiled=True)

    spec = PartitionSpec("model")
    shared = jax.shard_map(everything, mesh=target.mesh, in_specs=spec, out_specs=spec)
    program = target.program(shared, target.array((256, 64), "model"))
    sizes = {collective.kind: collective.nbytes for collective in program.collectives}
    assert sizes == dict.fromkeys(("collective-permute", "all-to-all", "reduce-scatter"), 64 * 64 * 4)
    assert len(program.collectives) == 3


def test_a_collective_in_a_loop_is_marked(target: Target) -> None:
    def loop(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, x.shape[0] + 90, lambda _, y: jnp.tanh(mlp(y, up, down)), x)

    x, up, down = target.array((8, 512)), target.array((512, 1024), None, "model"), target.array((1024, 512), "model")
    program = target.program(loop, x, up, down, out_shardings=target.sharding())
    assert [(c.kind, c.in_loop) for c in program.collectives] == [("all-reduce", True)]


def write(cache: jax.Array, row: jax.Array, position: jax.Array) -> jax.Array:
    """[S, D], [1, D], [] -> [S, D]"""
    return jax.lax.dynamic_update_slice_in_dim(cache, row, position, 0)


@pytest.mark.parametrize("donated", [True, False])
def test_a_donated_cache_is_updated_in_place(target: Target, donated: bool) -> None:
    cache, row = target.array((512, 1024), None, "model"), target.array((1, 1024), None, "model")
    position = jax.ShapeDtypeStruct((), jnp.int32, sharding=target.sharding())
    options = {"donate_argnums": 0} if donated else {}
    program = target.program(write, cache, row, position, out_shardings=target.sharding(None, "model"), **options)
    expected = WEIGHT // 4 if donated else 0
    assert program.aliased_bytes == expected
    assert program.memory is not None and program.memory.alias == expected
    assert program.memory.argument >= WEIGHT // 4 + 1024
    copied = [copy.result.nbytes for copy in program.large_copies(WEIGHT // 4)]
    assert copied == ([] if donated else [WEIGHT // 4])


@pytest.mark.parametrize(
    ("f", "result"),
    [
        (lambda w: w.T, "f32[1024,512]"),
        (lambda w: w.astype(jnp.float16), "f16[512,1024]"),
        (lambda w: jnp.repeat(w[None, :, :], 4, axis=0), "f32[4,512,1024]"),
    ],
    ids=["transpose", "convert", "broadcast"],
)
def test_a_copied_weight_is_found(target: Target, f: Callable[..., jax.Array], result: str) -> None:
    program = target.program(f, target.array((512, 1024)))
    (copy,) = program.large_copies(WEIGHT // 2)
    # A layout may stand in for the order of the axes: a transposition can be a copy of the other shape.
    assert copy.result.nbytes == parse_array(result).nbytes and copy.result.dtype == parse_array(result).dtype
    assert copy.name in str(copy) and not copy.in_loop
    assert program.large_copies(copy.result.nbytes + 1) == []


def test_a_slice_of_stacked_weights_in_a_loop_is_found(target: Target) -> None:
    """A scan over stacked layers copies them where a matrix product cannot read the stack itself."""

    def scanned(x: jax.Array, stack: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda y, w: (jnp.sort(y @ jax.lax.optimization_barrier(w)), None), x, stack)[0]

    program = target.program(scanned, target.array((8, 512)), target.array((12, 512, 512)))
    copies = [copy for copy in program.large_copies(512 * 512 * 4) if copy.in_loop]
    assert copies and all(copy.result.nbytes == 512 * 512 * 4 for copy in copies)


def test_arithmetic_and_constants_are_no_copies(target: Target) -> None:
    def arithmetic(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (w * 2).astype(jnp.float16), jnp.zeros_like(w)

    assert target.program(arithmetic, target.array((512, 1024))).large_copies(1024) == []


# As XLA writes them for GPUs and TPUs: combined, asynchronous, in nested tuples, with tiled layouts; shortened.
TEXT = """HloModule jit_f, is_scheduled=true, input_output_alias={ {0}: (1, {}, may-alias) }, \
entry_computation_layout={(bf16[8,128]{1,0}, s4[3,5]{1,0})->(bf16[8,128]{1,0})}

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%x, %y)
}

%fused (p: bf16[8,128], q: s4[3,5]) -> (f32[8,128], bf16[8,128]) {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %q = s4[3,5]{1,0} parameter(1)
  %wide = f32[8,128]{1,0} convert(%p)
  %twice = bf16[8,128]{1,0} add(%p, %p)
  ROOT %both = (f32[8,128]{1,0}, bf16[8,128]{1,0}) tuple(%wide, %twice)
}

%wrapped (w: bf16[8,128]) -> bf16[8,128] {
  %w = bf16[8,128]{1,0} parameter(0)
  ROOT %inner = bf16[8,128]{1,0} all-to-all(%w), channel_id=3, dimensions={0}
}

ENTRY %main (a: bf16[8,128], b: s4[3,5]) -> (f32[8,128], bf16[8,128]) {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="a"}
  %b = s4[3,5]{1,0} parameter(1)
  %ar = (bf16[8,128]{1,0}, bf16[8,128]{1,0}) all-reduce-start(%a, %a), channel_id=1, to_apply=%add
  %ard = (bf16[8,128]{1,0}, bf16[8,128]{1,0}) all-reduce-done(%ar)
  %ag = ((bf16[8,128]{1,0}, bf16[8,128]{1,0}), (bf16[32,128]{1,0}, /*index=1*/bf16[32,128]{1,0})) \
all-gather-start(%a, %a), channel_id=2, dimensions={0}
  %agd = (bf16[32,128]{1,0}, bf16[32,128]{1,0}) all-gather-done(%ag)
  %aa = ((bf16[8,128]{1,0}), bf16[8,128]{1,0}, u32[]) async-start(%a), calls=%wrapped
  %aad = bf16[8,128]{1,0} async-done(%aa)
  %cs = (bf16[8,128]{1,0}, bf16[8,128]{1,0:S(5)}, u32[]) copy-start(%a), metadata={op_name="moved[\\'w\\']"}
  %cd = bf16[8,128]{1,0} copy-done(%cs)
  ROOT %out = (f32[8,128]{1,0}, bf16[8,128]{1,0}) fusion(%a, %b), kind=kLoop, calls=%fused
}
"""


def parse_array(text: str) -> Array:
    """`f32[2,3]` -> its Array"""
    module = parse(f"ENTRY %main (x: {text}) -> {text} {{\n  ROOT %x = {text} parameter(0)\n}}\n")
    return module.computations["main"]["x"].results[0]


def test_pairs_and_combined_collectives_count_once() -> None:
    program = analyse(TEXT)
    assert [(c.kind, len(c.operands), c.nbytes, c.computation) for c in program.collectives] == [
        ("all-reduce", 2, 2 * 2048, "main"),
        ("all-gather", 2, 2 * 8192, "main"),
        ("all-to-all", 1, 2048, "wrapped"),
    ]
    assert program.memory is None


def test_one_of_two_outputs_of_a_fusion_may_be_a_copy() -> None:
    assert [str(copy) for copy in analyse(TEXT).large_copies(0)] == [
        "copy-start cs -> bf16[8,128], 2,048 bytes, from moved['w']",
        "fusion out -> f32[8,128], 4,096 bytes, from XLA",
    ]


def test_what_a_tpu_reads_ahead_is_no_copy() -> None:
    ahead = TEXT.replace(
        "(bf16[8,128]{1,0}, bf16[8,128]{1,0:S(5)}", "(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[8,128]{1,0:T(8,128)}"
    )
    assert ahead != TEXT
    assert [copy.opcode for copy in analyse(ahead).large_copies(0)] == ["fusion"]


def test_bytes_of_narrow_types_are_rounded_up() -> None:
    assert analyse(TEXT).aliased_bytes == 8  # 15 numbers of 4 bits
    sizes = {"pred[3]": 3, "f8e4m3fn[2,2]": 4, "bf16[<=5]": 10, "c64[]": 8, "token[]": 0}
    assert {text: parse_array(text).nbytes for text in sizes} == sizes


def test_what_is_no_hlo_is_refused() -> None:
    with pytest.raises(ValueError, match="no HLO module"):
        analyse("module @jit_f {}")
    with pytest.raises(ValueError, match="unknown collective 'allreduce'; there are all-reduce"):
        analyse(TEXT).count("allreduce")


def test_an_unknown_gpu_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="unknown hardware 'b9000'; there are V100-32GB"):
        target_devices("b9000", 4)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        target_devices("h100", 0)


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"jaxlib": "9.9.9"}, r'needs jax\'s CUDA plugin: pip install "jaxllm\[aot\]"'),
        (
            {"jaxlib": "9.9.9", "jax-cuda12-plugin": "9.9.8", "jax-cuda12-pjrt": "9.9.8"},
            r"jax-cuda12-plugin 9.9.8 does not fit jaxlib 9.9.9: pip install",
        ),
    ],
)
def test_a_missing_or_foreign_plugin_is_named(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], message: str) -> None:
    def version(package: str) -> str:
        if package not in versions:
            raise metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr("sharding.targets.metadata.version", version)
    with pytest.raises(RuntimeError, match=message):
        target_devices("h100", 4)


def test_programs_for_absent_gpus_stay_out_of_the_compilation_cache(tmp_path: Path) -> None:
    # jax writes such a program to its cache and then cannot read it: every later compilation would warn.
    use_compilation_cache(tmp_path)  # where conftest.py has not named a folder
    target = Target(target_devices("h100", 4), compile_for_cuda)
    x = target.array((8, 8))
    folder = Path(jax.config.values["jax_compilation_cache_dir"])

    def seldom_named(x: jax.Array) -> jax.Array:  # other processes write to the folder too
        return x @ x + 41

    def written() -> list[Path]:
        return list(folder.glob(f"*{seldom_named.__name__}*"))

    for path in written():
        path.unlink()  # of an earlier run
    for _ in range(2):
        target.program(seldom_named, x)
        assert not written()
    jax.jit(seldom_named)(jnp.zeros((8, 8)))  # the cache works as before for devices that are there
    assert written()


SCHEDULED = """HloModule scheduled, is_scheduled=true, entry_computation_layout={(f32[2,8]{1,0})->f32[8,8]{1,0}}

%product (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %d = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (w: f32[2,8]) -> f32[8,8] {
  %w = f32[2,8]{1,0} parameter(0)
  %all-gather = f32[8,8]{1,0} all-gather(%w), dimensions={0}
  %all-gather-start = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%w), dimensions={0}
  %fused = f32[8,8]{1,0} fusion(%all-gather), kind=kCustom, calls=%product
  %library = (f32[8,8]{1,0}, s8[64]{0}) custom-call(%fused, %fused), metadata={op_name="jit(f)/dot_general"}
  %all-gather-done = f32[8,8]{1,0} all-gather-done(%all-gather-start)
  %all-gather-start.1 = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%w), dimensions={0}
  %all-gather-done.1 = f32[8,8]{1,0} all-gather-done(%all-gather-start.1)
  ROOT %out = f32[8,8]{1,0} dot(%all-gather-done, %all-gather-done.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_what_hides_a_collective_is_between_its_start_and_its_end() -> None:
    overlaps = analyse(SCHEDULED).overlaps("all-gather")
    assert [o.products for o in overlaps] == [0, 2, 0]
    assert [o.moved for o in overlaps] == [0, 5 * 256 + 64, 0]
    assert {o.collective.nbytes for o in overlaps} == {256}
    assert analyse(SCHEDULED).overlaps("all-reduce") == []


@pytest.mark.parametrize(
    ("said", "groups"),
    [
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
        ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("{}", ()),
    ],
)
def test_who_exchanges_is_read_in_every_form(said: str, groups: tuple[tuple[int, ...], ...]) -> None:
    text = f"""HloModule m

ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  ROOT %sum = f32[4]{{0}} all-reduce(%x), channel_id=1, replica_groups={said}, use_global_device_ids=true, to_apply=%add
}}
"""
    [found] = analyse(text).collectives
    assert found.groups == groups
    assert found.crosses(2) == (groups not in (((0, 1), (2, 3)),))
