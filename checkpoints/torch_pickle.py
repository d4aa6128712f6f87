"""A check of pickles before PyTorch reads them, for its own loader of weights alone lets more through.

That loader runs no code, yet a file of a few hundred bytes can have it fill the memory (`bytearray(1 << 40)`), hash a tuple of
tuples for years or overflow the stack. A dictionary of plain tensors needs few operations, and these are read here without
being done.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

_LARGEST = 1 << 23  # bytes of a pickle: some 40,000 tensors
_MOST_IN_A_TUPLE = 1000  # values, in tuples in it too: what it takes to hash it
_ALLOWED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch (Bool|Byte|Char|Short|Int|Long|Half|BFloat16"
    r"|Float|Double|ComplexFloat|ComplexDouble|Float8_\w+)Storage"
)
_CONSTANTS = {
    "NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "BININT", "BININT1", "BININT2", "BINFLOAT",
    "BINUNICODE", "SHORT_BINSTRING", "LONG1",
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_POPS = {"APPEND": 1, "SETITEM": 2, "BUILD": 1, "REDUCE": 1}


def check_archive(path: Path) -> None:
    """Raises ValueError for an archive that PyTorch did not write, and UnpicklingError for a pickle of more than tensors."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
                raise ValueError(f"its record {record.filename} is compressed")
        pickles = [record for record in archive.infolist() if record.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _LARGEST:
            raise ValueError(f"its records are {len(pickles)} of data.pkl, not one of at most {_LARGEST} bytes")
        check_pickle(archive.read(pickles[0]))


def check_pickle(data: bytes) -> None:
    """Follow the stack, on which there is only how many values each value would be hashed by."""
    stack: list[int] = []
    marks: list[list[int]] = []
    memo: dict[int, int] = {}
    argument: Any
    for operation, argument, _ in pickletools.genops(data):
        name = operation.name
        if name in _CONSTANTS or (name == "GLOBAL" and _ALLOWED.fullmatch(argument)):
            stack.append(1)
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [_weight(stack[-_TUPLES[name] :])]
        elif name == "MARK":
            marks.append(stack)
            stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = stack, marks.pop()
            if name == "TUPLE":
                stack.append(_weight(items))
        elif name in _POPS:
            del stack[-_POPS[name] :]
            if name == "REDUCE":
                stack[-1] = 1
        elif name == "BINPERSID":
            stack[-1] = 1
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name not in ("PROTO", "STOP"):
            raise pickle.UnpicklingError(f"Unsupported {name} {argument}")


def _weight(items: list[int]) -> int:
    weight = 1 + sum(items)
    if weight > _MOST_IN_A_TUPLE:
        raise ValueError(f"a tuple of {weight} values")
    return weight
