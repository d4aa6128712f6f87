"""Collectives of a compiled program, the big arrays it copies, the buffers it updates in place.

A compiled jax program goes in, or its text; a `HloProgram` comes out. It is read from XLA's optimised HLO: sizes are what
one device holds, and of a fusion only the result reaches memory. Collectives and copies come as one instruction or as a
pair, `all-reduce-start` and `all-reduce-done`; a pair counts once, at its start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jax.stages import Compiled

from sharding.hlo_text import Array, Computation, Instruction, Module, parse

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# They give back the numbers they were given: elsewhere, in another order or in another type.
COPIES = ("copy", "convert", "transpose", "reverse", "slice", "dynamic-slice", "concatenate", "pad", "broadcast")
# They may stand between a copy and its source, and move nothing.
FREE = ("bitcast", "reshape", "get-tuple-element")
FAST = 1  # a TPU's memory beside its products; 5 is the host's
# What a schedule of a GPU is made of, beside collectives.
COMPUTES = ("fusion", "custom-call", "dot", "while", "call", "conditional", "copy")
# Elsewhere `to_apply` names the operator of a reduction.
CALLS = ("call", "while", "conditional", "async-start", "fusion")


@dataclass(frozen=True)
class Collective:
    """Arrays exchanged between devices: more than one where XLA has combined several collectives."""

    kind: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    computation: str
    in_loop: bool  # runs once an iteration
    source: str  # the jax operation it comes from
    groups: tuple[tuple[int, ...], ...] = ()  # devices that exchange, by their place in the mesh; none: all of them

    def crosses(self, per_host: int) -> bool:
        """Whether devices of several hosts exchange, each of which has so many."""
        return not self.groups or any(len({device // per_host for device in group}) > 1 for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of the larger side on one device: what an all-gather gives, what a reduce-scatter takes."""
        return max(_total(self.operands), _total(self.results))


@dataclass(frozen=True)
class Copy:
    """An array written to memory that holds only what another one holds."""

    opcode: str
    name: str
    result: Array
    computation: str
    in_loop: bool
    source: str

    def __str__(self) -> str:
        return f"{self.opcode} {self.name} -> {self.result}, {self.result.nbytes:,} bytes, from {self.source or 'XLA'}"


@dataclass(frozen=True)
class Overlap:
    """A collective, and the work between its start and its end: none where it is not asynchronous."""

    collective: Collective
    products: int  # instructions that are matrix products or hold some
    moved: int  # bytes of the operands and results of all


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `alias` is part of `argument` and of `output`."""

    argument: int
    output: int
    temp: int
    alias: int


@dataclass(frozen=True)
class HloProgram:
    """An optimised HLO module, and the memory it needs where that is known."""

    module: Module
    memory: Memory | None

    @property
    def collectives(self) -> list[Collective]:
        """Every collective, callers before callees; one in a computation that is called twice counts twice."""
        return [
            _collective(i, self.module.computations[where], where, in_loop)
            for i, where, in_loop, _ in self._executed(self.module.entry)
            if i.opcode.removesuffix("-start") in COLLECTIVES
        ]

    def count(self, kind: str) -> int:
        """Number of collectives of a kind; one in a loop is one. Raises ValueError for a kind that XLA does not have."""
        if kind not in COLLECTIVES:
            raise ValueError(f"unknown collective {kind!r}; there are {', '.join(COLLECTIVES)}")
        return sum(collective.kind == kind for collective in self.collectives)

    def overlaps(self, kind: str) -> list[Overlap]:
        """The work that hides each collective of a kind in the entry computation.

        The text of a compiled program is in the order of its schedule.
        """
        computation = self.module.computations[self.module.entry]
        pending: dict[str, tuple[int, int]] = {}
        found: dict[str, Overlap] = {}
        products = moved = 0
        for i in computation.values():
            if i.opcode in (kind, f"{kind}-start"):
                collective = _collective(i, computation, self.module.entry, False)
                pending[i.name], found[i.name] = (products, moved), Overlap(collective, 0, 0)
            elif i.opcode == f"{kind}-done":
                start = i.operands[0]
                before = pending[start]
                found[start] = Overlap(found[start].collective, products - before[0], moved - before[1])
            elif i.opcode in COMPUTES:
                products += self._multiplies(i)
                moved += _total(i.results) + sum(_total(computation[name].results) for name in i.operands)
        return list(found.values())

    def _multiplies(self, i: Instruction) -> bool:
        if i.opcode == "dot" or (i.opcode == "custom-call" and "dot_general" in i.source):
            return True
        callees = i.callees if i.opcode in CALLS else ()
        return any(self._multiplies(inner) for name in callees for inner in self.module.computations[name].values())

    def large_copies(self, min_bytes: int) -> list[Copy]:
        """Copies, conversions, transpositions, slices and repetitions that write at least `min_bytes` on one device.

        Not those into or out of a TPU's fast memory: that is how it reads ahead.
        """
        return [
            Copy(i.opcode, i.name, array, where, in_loop, i.source)
            for i, where, in_loop, fused in self._executed(self.module.entry)
            if not fused
            for array in self._copied(i, self.module.computations[where])
            if array.nbytes >= min_bytes
        ]

    @property
    def aliased_bytes(self) -> int:
        """Bytes on one device of the donated arguments whose memory the results take over."""
        parameters = {i.parameter: i for i in self.module.computations[self.module.entry].values()}
        return sum(_total(parameters[number].results) for number in self.module.aliased)

    def _executed(self, name: str, in_loop: bool = False, fused: bool = False) -> Iterator[tuple[Instruction, str, bool, bool]]:
        """Each instruction that runs, its computation, and whether that is part of a loop, and of a fusion."""
        for i in self.module.computations[name].values():
            yield i, name, in_loop, fused
            for callee in i.callees if i.opcode in CALLS else ():
                yield from self._executed(callee, in_loop or i.opcode == "while", fused or i.opcode == "fusion")

    def _copied(self, i: Instruction, computation: Computation) -> tuple[Array, ...]:
        """The results of an instruction that are copies."""
        if i.opcode == "copy-start":  # (the copy, its source, a context)
            copy, source, *_ = i.results
            return () if FAST in (copy.space, source.space) else (copy,)
        if i.opcode != "fusion":
            return i.results if _is_copy(i, computation) else ()
        body = self.module.computations[i.callees[0]]
        root = next(inner for inner in body.values() if inner.is_root)
        outputs = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return tuple(array for output in outputs if _only_copies(output, body) for array in output.results)


def analyse(compiled: Compiled | str) -> HloProgram:
    """Read a compiled program, or its text. Raises ValueError for text that is no HLO module."""
    if isinstance(compiled, str):
        return HloProgram(parse(compiled), memory=None)
    return HloProgram(parse(compiled.as_text() or ""), _memory(compiled))


def _memory(compiled: Compiled) -> Memory | None:
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    return Memory(
        argument=stats.argument_size_in_bytes,
        output=stats.output_size_in_bytes,
        temp=stats.temp_size_in_bytes,
        alias=stats.alias_size_in_bytes,
    )


def _total(arrays: tuple[Array, ...]) -> int:
    return sum(array.nbytes for array in arrays)


def _collective(i: Instruction, computation: Computation, where: str, in_loop: bool) -> Collective:
    operands = tuple(array for name in i.operands for array in computation[name].results)
    results = i.results
    if i.opcode.endswith("-start") and i.opcode != "all-reduce-start":  # (operands, results, contexts)
        results = results[len(operands) : 2 * len(operands)]
    return Collective(i.opcode.removesuffix("-start"), operands, results, where, in_loop, i.source, i.groups)


def _is_copy(i: Instruction, computation: Computation) -> bool:
    """Whether the instruction copies an array; a scalar that fills one is no copy."""
    return i.opcode in COPIES and any(array.shape for array in computation[i.operands[0]].results)


def _only_copies(i: Instruction, body: Computation) -> bool:
    """Whether `i`, in a fusion, is made of the fusion's parameters by copies alone, and by one at least.

    A concatenation has several sources. The other copies have one; further operands are indices, or what they pad with.
    """
    found = False
    pending = [i]
    while pending:
        i = pending.pop()
        if i.opcode == "parameter":
            continue
        if not _is_copy(i, body) and i.opcode not in FREE:
            return False
        found |= i.opcode not in FREE
        pending += [body[name] for name in (i.operands if i.opcode == "concatenate" else i.operands[:1])]
    return found
