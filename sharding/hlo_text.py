"""XLA's HLO text, read into computations: what `sharding.hlo` draws its conclusions from.

The text of an optimised module goes in; its instructions come out, grouped by computation. Layouts, shardings and
backend configurations are read over, but for the memory that an array is in. The operations: https://openxla.org/xla/operation_semantics.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
ASSIGNMENT = re.compile(r"\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = ")
OPCODE = re.compile(r" ([a-z][\w\-]*)(?=\()")
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{[^{}]*?(?:S\((\d+)\))?\})?")
BITS = re.compile(r"(?:bf|[fsuc])(\d+)")
REFERENCE = re.compile(r"%([\w.\-]+)")
CALLEES = ("calls", "to_apply", "body", "condition", "true_computation", "false_computation", "branch_computations")
CALLEE = re.compile(rf"\b(?:{'|'.join(CALLEES)})=(\{{[^}}]*\}}|%\S+)")
SOURCE = re.compile(r'\bop_name="([^"]*)"')
# Devices that exchange, by their place in the mesh: {{0,2},{1,3}}; or [2,2]<=[2,2]T(1,0) or mesh['a'=2,'b'=2] {'a'} for the same.
LISTED = re.compile(r"\breplica_groups=\{([\d,{} ]*)\}")
COUNTED = re.compile(r"\breplica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
NAMED = re.compile(r"\breplica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
ALIAS = re.compile(r"\{[\d, ]*\}: \((\d+), \{[\d, ]*\}")  # {output}: (parameter, {index in it}, may-alias)


@dataclass(frozen=True)
class Array:
    """Type and shape as XLA writes them: `bf16[6656,4480]` has dtype "bf16" and shape (6656, 4480).

    `space` is the memory it is in: 0 is the device's own.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes without the layout's padding; 0 for a token."""
        bits = 8 if self.dtype == "pred" else int(m[1]) if (m := BITS.match(self.dtype)) else 0
        return math.ceil(math.prod(self.shape) * bits / 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Instruction:
    """A line of HLO, `name = results opcode(operands), ...`; `results` holds a tuple's arrays one after the other."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    parameter: int | None
    callees: tuple[str, ...]
    source: str  # the jax operation it comes from
    is_root: bool
    groups: tuple[tuple[int, ...], ...] = ()  # devices that exchange, by their place in the mesh


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Module:
    """Computations by name, the one that starts the program, and the parameters of it whose memory the results take."""

    computations: dict[str, Computation]
    entry: str
    aliased: tuple[int, ...]


def parse(text: str) -> Module:
    """Read an HLO module. Raises ValueError for text that is none."""
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        if header := HEADER.match(line):
            current = computations.setdefault(header["name"], {})
            entry = header["name"] if header["entry"] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (assignment := ASSIGNMENT.match(line)):
            current[assignment["name"]] = _instruction(assignment, line[assignment.end() :])
    if entry is None:
        raise ValueError(f"no HLO module with an ENTRY computation in the text that starts with {text[:40]!r}")
    # The aliases precede the layout in a module's first line; further on, braces mean other things.
    aliased = tuple(int(m[1]) for m in ALIAS.finditer(text.partition("entry_computation_layout")[0]))
    return Module(computations, entry, aliased)


def _instruction(assignment: re.Match[str], line: str) -> Instruction:
    """`line` is what stands after `name = `."""
    end = _closing(line) if line.startswith("(") else line.index(" ")
    opcode = OPCODE.match(line, end)
    if opcode is None:
        raise ValueError(f"no opcode in the HLO instruction {assignment['name']} = {line[:80]}")
    after = _closing(line, opcode.end())
    inputs, attributes = line[opcode.end() + 1 : after - 1], line[after:]
    source = SOURCE.search(attributes)
    return Instruction(
        name=assignment["name"],
        opcode=opcode[1],
        results=_arrays(line[:end]),
        operands=tuple(REFERENCE.findall(inputs)),
        parameter=int(inputs) if opcode[1] == "parameter" else None,
        callees=tuple(name for m in CALLEE.finditer(attributes) for name in REFERENCE.findall(m[1])),
        source=source[1].replace("\\'", "'") if source else "",
        is_root=assignment["root"] is not None,
        groups=_groups(attributes),
    )


def _groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    if found := LISTED.search(attributes):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", found[1]))
    if found := COUNTED.search(attributes):
        shape, dims, order = (tuple(map(int, part.split(","))) if part else () for part in found.groups())
        places = np.arange(math.prod(dims)).reshape(dims).transpose(order or range(len(dims))).reshape(shape)
    elif found := NAMED.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"('[^']*')=(\d+)", found[1])}
        along = re.findall(r"'[^']*'", found[2])
        places = np.arange(math.prod(sizes.values())).reshape([*sizes.values()])
        others = [i for i, name in enumerate(sizes) if name not in along]
        places = places.transpose(*others, *([*sizes].index(name) for name in along)).reshape(
            -1, math.prod(sizes[name] for name in along)
        )
    else:
        return ()
    return tuple(map(tuple, places.tolist()))


def _closing(text: str, start: int = 0) -> int:
    """The index after the bracket that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] in "([{") - (text[position] in ")]}")
        if depth == 0:
            return position + 1
    raise ValueError(f"unbalanced brackets in the HLO text {text[start : start + 80]}")


def _arrays(result: str) -> tuple[Array, ...]:
    """`(f32[2,3]{1,0:T(8,128)}, s32[])` -> its two arrays. A dynamic size, `<=5`, counts as its bound."""
    found = ((dtype, dims.replace("<=", "").split(",") if dims else [], space) for dtype, dims, space in ARRAY.findall(result))
    return tuple(Array(dtype, tuple(map(int, dims)), int(space or 0)) for dtype, dims, space in found)
