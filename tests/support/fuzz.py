"""Feeds broken and hostile files to every reader of headers: `python tests/support/fuzz.py [--inputs N] [--seed N] [PARSER ...]`.

An input is a valid checkpoint, written small, of which one file is changed at random. A reader may open it, and then every tensor
can be read whole and is no larger than the file; or it refuses with a CheckpointError of one line that names the file. Anything
else is a finding: another exception, a crash, memory beyond a bound, time beyond a bound, a file that was not there before. The
work is done in a process of its own, which may die of it. Input number N of a parser is the same in every run, but for Orbax's,
whose valid files are not.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import pickletools
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tiny_checkpoint import write_tiny

from checkpoints.checkpoint import open_checkpoint
from checkpoints.config_reader import read_json
from checkpoints.errors import CheckpointError
from checkpoints.families import read_hf
from checkpoints.safetensors import SafetensorsSource, read_header
from checkpoints.source import Source

MEMORY = 512 << 20  # bytes beyond what the process has when it starts on the inputs
SECONDS = 5  # for one input
SHORTEST = 4096  # characters of a message, beyond its path
SMALL = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 2}  # fmt: skip
Random = random.Random
Mutate = Callable[[Random, bytes], bytes]


class Parser(NamedTuple):
    """A reader under test: the writer of a valid checkpoint, the changes of each of its files, the function that opens it."""

    write: Callable[[Path], None]
    files: dict[str, Mutate]  # by patterns of names in the folder
    open: Callable[[Path], Source | None]
    memory: int = MEMORY
    compressed: int = 1  # times: an array may be so much larger than its files


# Bytes


def hostile_int(rng: Random) -> int:
    """Where something overflows, or near it."""
    return rng.choice((0, 1 << rng.randrange(66), rng.randrange(1, 300))) * rng.choice((1, 1, 1, -1)) + rng.choice((-1, 0, 0, 1))


def mutate_bytes(rng: Random, data: bytes, most: int = 4) -> bytes:
    """One or several edits, most of them near the front, where headers are."""
    out = bytearray(data)
    for _ in range(rng.randint(1, most)):
        end = len(out) if rng.random() < 0.5 else min(len(out), 256)
        at, length = rng.randrange(end + 1), rng.choice((1, 1, 2, 4, 8, rng.randrange(1, 65)))
        piece = bytes(out[at : at + length])
        match rng.randrange(8):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                del out[at : at + length]
            case 2:
                out[at:at] = rng.randbytes(length)
            case 3:
                out[at:at] = piece * rng.choice((1, 2, 100))
            case 4:  # from elsewhere in the file
                start = rng.randrange(len(out) + 1)
                out[at : at + length] = out[start : start + length]
            case 5 if rng.random() < 0.3:
                del out[at:]
            case _:
                width = rng.choice((1, 2, 4, 8))
                value = hostile_int(rng) % (1 << 8 * width)
                out[at : at + width] = value.to_bytes(width, rng.choice(("little", "little", "big")))
    return bytes(out)


# JSON

RAW = {  # what json.dumps does not write: put in the place of these strings
    "@digits@": "9" * 5000,
    "@huge@": "1e999",
    "@surrogate@": '"\\ud800"',
    "@utf8@": '"\\u00ff\udcff\udcfe"',
    "@deep@": "[" * 100_000 + "]" * 100_000,
    "@deeper@": '{"a":' * 960 + "1" + "}" * 960,
    "@open@": "[" * 1000,
}
HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 1 << 31, (1 << 53) + 1, 1 << 60, 1 << 62, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30,
    10**400, -(1 << 63), 0.5, -0.0, 1.0, 1e308, 1e-320, math.nan, math.inf, -math.inf, "", "x", "a\nb", "\x1b[31m", "\0",
    "../x", "/etc/passwd", "é", "a" * 300, "x" * 100_000, [], {}, [0], [[]], [1, 2], [0, 1 << 60], [0, 1 << 63],
    [1 << 32, 1 << 32], [1] * 70, [-1, -1], [1.0], ["1"], {"": 0}, {"a": {"a": {}}}, *RAW,
)  # fmt: skip


def mutate_json(rng: Random, value: Any) -> bytes:
    """Values, keys and their number changed, and sometimes what no writer writes."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            break
        holder, key = rng.choice(places)
        match rng.randrange(8):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice([str(x) for x in HOSTILE[:48]])] = holder.pop(key)
            case 2:
                other, name = rng.choice(places)
                if name in other if isinstance(other, dict) else name < len(other):
                    holder[key] = json.loads(json.dumps(other[name]))
            case 3 if isinstance(holder[key], int):
                holder[key] = rng.choice((holder[key] + rng.choice((-1, 1)), holder[key] * 2, hostile_int(rng)))
            case _:
                holder[key] = copy.deepcopy(rng.choice(HOSTILE))
    if rng.random() < 0.02:
        value = rng.choice(HOSTILE)
    text = json.dumps(value)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    if rng.random() < 0.05 and (names := re.findall(r'"[^"]*": ', text)):  # a key that is there twice
        text = text.replace("{", "{" + rng.choice(names) + "1, ", 1)
    data = text.encode("utf-8", "surrogateescape")
    return mutate_bytes(rng, data, 2) if rng.random() < 0.15 else data


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(child, (dict, list)):
            yield from _places(child)


def json_file(rng: Random, data: bytes) -> bytes:
    return mutate_json(rng, json.loads(data)) if rng.random() < 0.8 else mutate_bytes(rng, data)


# Safetensors


def safetensors_bytes(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def safetensors_file(rng: Random, data: bytes) -> bytes:
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    end = 8 + int.from_bytes(data[:8], "little")
    return safetensors_bytes(mutate_json(rng, json.loads(data[8:end])), data[end:])


def _write_index(folder: Path) -> None:
    _write_folder(folder)
    (folder / "model.safetensors").rename(folder / "model-0.safetensors")
    names = list(read_header(folder / "model-0.safetensors"))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model-0.safetensors")})
    )


# GGUF

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9


class GGUFTensor(NamedTuple):
    """A line of the table: `shape` with rows first, `offset` into the data."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def gguf_string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def gguf_value(kind: int, value: Any) -> bytes:
    """`value` of an array is (kind of its items, items)."""
    if kind == STRING:
        return gguf_string(value)
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(gguf_value(inner, item) for item in items)
    return struct.pack(SCALARS[kind], value)


def gguf_bytes(metadata: list[tuple[str, int, bytes]], tensors: list[GGUFTensor], data: bytes, align: int = 32) -> bytes:
    """A file of values that are packed already, its data aligned."""
    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    out += [gguf_string(key) + struct.pack("<I", kind) + packed for key, kind, packed in metadata]
    for name, shape, kind, offset in tensors:
        out += [gguf_string(name), struct.pack("<I", len(shape)), *(struct.pack("<Q", size % 2**64) for size in reversed(shape))]
        out.append(struct.pack("<IQ", kind % 2**32, offset % 2**64))
    head = b"".join(out)
    return head + bytes(-len(head) % align) + data


_GGUF_METADATA: list[tuple[str, int, Any]] = [
    ("general.architecture", STRING, "llama"), ("general.alignment", 4, 32), ("llama.block_count", 4, 1),
    ("llama.context_length", 4, 128), ("llama.embedding_length", 4, 4), ("llama.feed_forward_length", 4, 4),
    ("llama.attention.head_count", 4, 2), ("llama.attention.key_length", 4, 2), ("llama.rope.freq_base", 6, 10000.0),
    ("llama.rope.scaling.type", STRING, "linear"), ("llama.rope.scaling.factor", 6, 2.0), ("llama.vocab_size", 4, 8),
    ("llama.attention.layer_norm_rms_epsilon", 6, 1e-5), ("tokenizer.ggml.tokens", ARRAY, (STRING, ["a", "b"])),
    ("tokenizer.ggml.scores", ARRAY, (6, [0.5, 1.0])), ("tokenizer.ggml.eos_token_id", 4, 1),
]  # fmt: skip
_GGUF_TENSORS = [
    GGUFTensor("token_embd.weight", (8, 4), 0, 0), GGUFTensor("output_norm.weight", (4,), 0, 128),
    GGUFTensor("blk.0.attn_q.weight", (4, 32), 8, 160), GGUFTensor("blk.0.attn_k.weight", (2, 4), 1, 320),
    GGUFTensor("rope_freqs.weight", (1,), 0, 352),
]  # fmt: skip


def gguf_file(rng: Random, data: bytes) -> bytes:
    """The bytes of a file changed, or the values and the table that it is written from."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, data)
    metadata = [(key, kind, gguf_value(kind, value)) for key, kind, value in _GGUF_METADATA]
    tensors = list(_GGUF_TENSORS)
    if rng.random() < 0.7:
        del tensors[-1]
    for _ in range(rng.choice((1, 1, 2, 3))):
        i, j = rng.randrange(len(metadata)), rng.randrange(len(tensors))
        match rng.randrange(7):
            case 0 | 1:
                metadata[i] = (metadata[i][0], *_hostile_value(rng))
            case 2:
                metadata.insert(i, (rng.choice((metadata[i][0], "", "a\nb", "llama.x", "\ud800")), *_hostile_value(rng)))
            case 3 if len(tensors) > 1:
                del tensors[j]
            case 4:
                tensors.insert(j, tensors[j]._replace(name=rng.choice(("a\nb", "", "x", tensors[j].name, "output.weight"))))
            case _:
                tensors[j] = _hostile_tensor(rng, tensors[j])
    out = gguf_bytes(metadata, tensors, data[-512:])
    if rng.random() < 0.1:  # a count that the file does not hold
        at = rng.choice((8, 16))
        out = out[:at] + struct.pack("<Q", hostile_int(rng) % 2**64) + out[at + 8 :]
    return out


def _hostile_value(rng: Random) -> tuple[int, bytes]:
    match rng.randrange(10):
        case 0:
            return ARRAY, struct.pack("<IQ", rng.randrange(14), hostile_int(rng) % 2**64)
        case 1:  # arrays in arrays
            depth = rng.choice((2, 500, 990, 3000, 1_000_000 if rng.random() < 0.02 else 5))
            return ARRAY, struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", 0, 0)
        case 2 if rng.random() < 0.02:  # many small things
            count = 6_000_000
            kind, item = rng.choice(((STRING, bytes(8)), (ARRAY, bytes(12)), (0, b"\1"), (6, b"\0\0\0\1")))
            return ARRAY, struct.pack("<IQ", kind, count) + item * count
        case 3:
            return STRING, gguf_string(rng.choice(("", "none", "linear", "yarn", "a\nb", "\ud800", "x" * 100_000, "\0")))
        case 4:
            return STRING, struct.pack("<Q", hostile_int(rng) % 2**64) + b"text"
        case 5:
            bits = rng.choice((0, 1, 0x7F800000, 0x7FC00000, 0xFF7FFFFF))  # the infinity, no number, the lowest
            return rng.choice(((6, struct.pack("<I", bits)), (12, rng.randbytes(8))))
        case _:
            kind = rng.choice((0, 1, 2, 3, 4, 5, 7, 10, 11, 10, rng.randrange(20)))
            width = struct.calcsize(SCALARS.get(kind, "<I"))
            return kind, (hostile_int(rng) % 2 ** (8 * width)).to_bytes(width, "little")


def _hostile_tensor(rng: Random, tensor: GGUFTensor) -> GGUFTensor:
    size = hostile_int(rng)
    shapes = ((), (0,), (size,), (0, size), (size, 0), (size, size), (4, 0, 32), (1,) * 70, (*tensor.shape, 1), tensor.shape[:-1])
    match rng.randrange(4):
        case 0:
            return tensor._replace(kind=rng.choice((0, 1, 2, 8, 10, 12, 14, 30, rng.randrange(60), size)))
        case 1:
            return tensor._replace(offset=size)
        case _:
            return tensor._replace(shape=rng.choice(shapes), kind=rng.choice((tensor.kind, 0, 8, 12)))


def _write_gguf(folder: Path) -> None:
    metadata = [(key, kind, gguf_value(kind, value)) for key, kind, value in _GGUF_METADATA]
    (folder / "x.gguf").write_bytes(gguf_bytes(metadata, _GGUF_TENSORS[:-1], np.arange(128, dtype=np.float32).tobytes()))


# PyTorch

PICKLED = "archive/data.pkl"


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _call(name: str, *args: bytes) -> bytes:
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n(".encode() + b"".join(args) + b"tR"


def _grown(times: int) -> bytes:
    """A string that is twice as long with each call."""
    value = b"U\4aaaa"
    for _ in range(times):
        value = _call("_codecs.encode", value, _text("hex"))
    return value


_TENSOR = b"ctorch\nTensor\n"
PICKLES = {  # values that an unpickler of weights alone may be talked into
    "runs": _call("os.system", _text("touch run")),
    "opens": _call("builtins.open", _text("written"), _text("w")),
    "bytes": _call("builtins.bytearray", _number(1 << 33)),
    "tensor": _call("torch.FloatTensor", _number(1 << 32)),
    "storage": _call("torch.storage.UntypedStorage", _number(1 << 33)),
    "meta": _call("torch._utils._rebuild_meta_tensor_no_storage", b"ctorch\nfloat32\n", b"(K\4t", b"(K\1t", b"\x89"),
    "deep key": b"}" + b")" + b"\x85" * 400_000 + b"K\1s",
    "wide key": b"}" + b")" + b"q\xf0h\xf0\x86" * 60 + b"K\1s",
    "grown": _grown(30),
    "state": _call("torch._tensor._rebuild_from_type_v2", _TENSOR, _TENSOR, b")", b"}" + _text("detach") + b"K\1s"),
    "new": b"ctorch\nTensor\n)\x81",
    "named": b"ccollections\nOrderedDict\n)R}" + _text("items") + b"K\1sb",
    "size": b"ctorch\nSize\n(" + _number(1 << 62) + b"tR",
}  # fmt: skip


def torch_file(rng: Random, data: bytes) -> bytes:
    """The archive's bytes changed, or what is pickled in it."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    with zipfile.ZipFile(BytesIO(data)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    out = BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if rng.random() < 0.02 else zipfile.ZIP_STORED) as archive:
        for name, record in records:
            if name.endswith("/data.pkl"):
                record = mutate_pickle(rng, record)
            elif rng.random() < 0.03:
                record = mutate_bytes(rng, record) if rng.random() < 0.7 else b""
            if rng.random() > 0.01:
                archive.writestr(zipfile.ZipInfo(name), record)
                if rng.random() < 0.005:
                    archive.writestr(zipfile.ZipInfo(rng.choice((name + "x", ".data/version", "archive/constants.pkl"))), record)
    return out.getvalue()


def mutate_pickle(rng: Random, data: bytes) -> bytes:
    starts = [position for _, _, position in pickletools.genops(data)] + [len(data)]
    steps = [data[a:b] for a, b in itertools.pairwise(starts)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        i, j = rng.randrange(len(steps)), rng.randrange(len(steps))
        match rng.randrange(8):
            case 0:
                del steps[i]
            case 1:
                steps[i] = steps[j]
            case 2:
                steps.insert(i, steps[j])
            case 3:
                return mutate_bytes(rng, b"".join(steps))
            case 4:
                value = rng.choice(list(PICKLES.values()))
                steps[-2:-2] = [_text("x"), value]  # an item of the dictionary, which ends in SETITEMS and STOP
            case 5:
                steps.insert(i, rng.choice(list(PICKLES.values())))
            case _:
                numbers = [k for k, step in enumerate(steps) if step[:1] in (b"K", b"M", b"J", b"\x8a", b"\x89", b"\x88")]
                steps[rng.choice(numbers or [i])] = rng.choice((_number(hostile_int(rng)), b"\x89", b"N", b")", b"}"))
        if len(steps) < 3:
            break
    return b"".join(steps)


def _torch_tensors(folder: Path) -> dict[str, Any]:
    import torch

    tensors = {"a": torch.arange(8.0).reshape(2, 4), "b": torch.zeros(3, dtype=torch.bfloat16), "c": torch.ones(()).half()}
    return tensors | {"d": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).T)}


def _write_torch(folder: Path) -> None:
    import torch

    torch.save(_torch_tensors(folder), folder / "pytorch_model.bin")


def _write_meta(folder: Path) -> None:
    import torch

    shapes = {"tok_embeddings.weight": (8, 2), "norm.weight": (4,), "layers.0.attention.wq.weight": (2, 4)}
    shapes |= {"layers.0.feed_forward.w1.weight": (2, 4), "layers.0.feed_forward.w2.weight": (4, 2), "output.weight": (4, 4)}
    for i in range(2):
        torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / f"consolidated.0{i}.pth")
    params = {"dim": 4, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "norm_eps": 1e-6, "rope_theta": 500000.0, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params | {"multiple_of": 2, "use_scaled_rope": True}))


# Configs


def _write_folder(folder: Path) -> None:
    write_tiny(folder, **SMALL)


def _write_config(folder: Path) -> None:
    from checkpoints.families.hf_common import NO_EFFECT

    write_tiny(folder, **SMALL)
    (folder / "model.safetensors").unlink()
    values = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16, "mscale": 1.0,
            "mscale_all_dim": 0.5, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None, "truncate": True}  # fmt: skip
    more = {"rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "rope_parameters": rope, "rope_theta": 1e4}
    values |= more | {"eos_token_id": [1, 2], "attention_bias": False, "mlp_bias": False, "torch_dtype": "float16"}
    values |= {"chunk_size_feed_forward": 0, "is_causal": True, "temperature": 0.6, "unk_token_id": 0, "sliding_window": None}
    values |= {NO_EFFECT[0]: 1, "quantization_config": None}
    (folder / "config.json").write_text(json.dumps(values))


def _write_generation(folder: Path) -> None:
    write_tiny(folder, **SMALL)
    values = {"eos_token_id": [1, 2], "temperature": 0.6, "top_k": 20, "top_p": 0.9, "do_sample": True, "max_new_tokens": 5}
    (folder / "generation_config.json").write_text(json.dumps(values | {"repetition_penalty": 1.1, "min_p": 0.1}))


def _write_families(folder: Path) -> None:
    from families import records

    for name, one in records().items():
        (folder / f"{name}.json").write_text(json.dumps(one.config))


def _open_configs(folder: Path) -> None:
    for file in sorted(folder.glob("*.json")):
        _open_config(file)


def _open_config(file: Path) -> None:
    from jaxllm.decoder.rope import inverse_frequencies

    _, config, _ = read_hf(read_json(file), str(file))
    for rope in {config.rope, config.local_rope} - {None}:
        if rope is not None and config.head_dim < 1 << 20:
            inverse_frequencies(rope, rope.rotary_dim(config.head_dim))


# Orbax


def _write_orbax(folder: Path, ocdbt: bool = True, zarr3: bool = True) -> None:
    import orbax.checkpoint as ocp

    tree = {"blocks": {"0": {"gate": np.arange(8, dtype=np.float32).reshape(2, 4)}}, "norm": np.ones(4, np.float16)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)) as saver:
        saver.save(folder.resolve() / "params", tree)


def _write_shards(folder: Path) -> None:
    from checkpoints.convert import convert, prepare

    write_tiny(folder / "source", **SMALL)
    convert(prepare(open_checkpoint(folder / "source"), folder / "target", to="orbax"))
    shutil.rmtree(folder / "source")
    (folder / "target" / "params").rename(folder / "params")


def _write_arrays(folder: Path) -> None:
    _write_orbax(folder, ocdbt=False, zarr3=bool(folder.name.endswith("3")))


def _open_orbax(folder: Path) -> Source:
    from checkpoints.orbax import OrbaxSource

    return OrbaxSource(folder)


def _open_torch(folder: Path) -> Source:
    from checkpoints.torch_files import TorchSource

    return TorchSource(folder)


PARSERS = {
    "safetensors": Parser(_write_folder, {"model.safetensors": safetensors_file}, SafetensorsSource),
    "index": Parser(_write_index, {"*.index.json": json_file}, SafetensorsSource),
    "gguf": Parser(_write_gguf, {"x.gguf": gguf_file}, lambda folder: open_checkpoint(folder / "x.gguf").source),
    "torch": Parser(_write_torch, {"pytorch_model.bin": torch_file}, _open_torch),
    "meta": Parser(_write_meta, {"params.json": json_file, "*.pth": torch_file}, lambda folder: open_checkpoint(folder).source),
    "config": Parser(_write_config, {"config.json": json_file}, _open_configs),
    "families": Parser(_write_families, {"*.json": json_file}, _open_configs),
    "generation": Parser(_write_generation, {"generation_config.json": json_file}, lambda folder: open_checkpoint(folder).source),
    "orbax": Parser(_write_orbax, {"params/_METADATA": json_file}, _open_orbax, 4 * MEMORY, 1000),
    "ocdbt": Parser(_write_orbax, {"params/**/*": mutate_bytes}, _open_orbax, 4 * MEMORY, 1000),
    "shard": Parser(
        _write_shards, {"params/**/zarr.json": json_file, "params/**/0": mutate_bytes}, _open_orbax, 4 * MEMORY, 1000
    ),
    "zarr": Parser(_write_arrays, {"params/**/.zarray": json_file, "params/**/0*": mutate_bytes}, _open_orbax, 4 * MEMORY, 1000),
}


# The contract


def check(parser: Parser, folder: Path) -> str:
    """`accepted`, `refused`, or what is wrong."""
    try:
        source = parser.open(folder)
        held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for name, info in source.tensors.items() if source is not None else ():
            if (wrong := _check_tensor(source, name, info.shape, info.nbytes, held * parser.compressed)) is not None:
                return f"tensor {name!r} {wrong}"
    except CheckpointError as error:
        return _check_message(str(error), folder)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = next((frame for frame in reversed(where) if "/checkpoints/" in frame.filename), where[-1])
        return f"{type(error).__name__} at {Path(ours.filename).name}:{ours.lineno}: {str(error)[:200]}"
    return "accepted"


def _check_tensor(source: Any, name: str, shape: tuple[int, ...], nbytes: int, held: int) -> str | None:
    if nbytes > held:
        return f"has {nbytes} bytes in files of {held}"
    box = source.read(name, tuple(slice(0, size) for size in shape))
    if box.shape != tuple(shape):
        return f"is {shape} and reads as {box.shape}"
    return None if len(box.tobytes()) == box.nbytes else "cannot be copied"


def _check_message(message: str, folder: Path) -> str:
    if not message.isprintable():
        return f"the message is not one printable line: {message[:200]!r}"
    if str(folder) not in message:
        return f"the message does not name the file: {message[:200]!r}"
    if len(message) > SHORTEST:
        return f"the message has {len(message)} characters: {message[:200]!r}"
    return "finding: " + message if re.search(r"bad_alloc|allocate|MemoryError|out of memory", message) else "refused"


class Files:
    """A valid checkpoint in memory, of which an input changes one file."""

    def __init__(self, parser: Parser, folder: Path):
        self.folder, self.parser = folder, parser
        folder.mkdir(parents=True)
        parser.write(folder)
        self.whole = {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
        self.choices = [(file, change) for pattern, change in parser.files.items() for file in sorted(folder.glob(pattern))]
        self.choices = [(file, change) for file, change in self.choices if file in self.whole]
        assert self.choices, f"no file of {folder} is like {list(parser.files)}"

    def try_input(self, rng: Random) -> str:
        file, change = rng.choice(self.choices)
        return self.try_bytes(file, change(rng, self.whole[file]))

    def try_bytes(self, file: Path, data: bytes) -> str:
        self._put(file, data)
        try:
            result = check(self.parser, self.folder)
            if new := {file for file in self.folder.rglob("*") if file.is_file()} - set(self.whole):
                result = f"wrote {sorted(map(str, new))}"
                for each in new:
                    each.unlink()
        finally:
            self._put(file, self.whole[file])
        return result

    def _put(self, file: Path, data: bytes) -> None:
        file.unlink(missing_ok=True)  # its mapping may live on
        file.write_bytes(data)


def try_inputs(name: str, folder: Path, first: int, last: int, seed: int) -> Iterator[str]:
    """The outcome of each input, in order."""
    files = Files(PARSERS[name], folder / name)
    assert check(files.parser, files.folder) == "accepted", f"{name}: {check(files.parser, files.folder)}"
    for number in range(first, last):
        yield files.try_input(Random(f"{name} {seed} {number}"))


# The program


def _child(name: str, first: int, last: int, seed: int, root: Path) -> None:
    """A line of JSON for each input; dies of the signals of its bounds."""
    warnings.simplefilter("ignore")
    os.chdir(root)
    inputs = try_inputs(name, root, first, last, seed)
    _bound(PARSERS[name].memory, root / "warm", name)
    for _ in range(first, last):
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        result = next(inputs)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(result), flush=True)


def _bound(memory: int, folder: Path, name: str) -> None:
    """The memory of this process, once everything is imported."""
    for _ in try_inputs(name, folder, -3, 0, -1):
        pass
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run(name: str, inputs: int, seed: int) -> tuple[dict[str, int], dict[int, str]]:
    """(counts of inputs accepted and refused, findings by the input's number)."""
    counts, findings, number = {"accepted": 0, "refused": 0}, dict[int, str](), 0
    while number < inputs:
        shm = Path("/dev/shm")
        root = Path(tempfile.mkdtemp(prefix="jaxllm-fuzz-", dir=shm if shm.is_dir() else None))
        numbers = ["--child", str(number), str(root), "--inputs", str(inputs), "--seed", str(seed)]
        command = [sys.executable, __file__, *numbers, name]
        said = root / "said"
        with said.open("w") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                result = json.loads(line)
                if result in counts:
                    counts[result] += 1
                else:
                    findings[number] = result
                number += 1
        last = said.read_text().splitlines()[-1:]
        shutil.rmtree(root, ignore_errors=True)
        if child.returncode and number < inputs:
            findings[number] = f"died: {child.returncode} ({_signal(child.returncode)}) {last}"
            number += 1
        if sum(text.startswith("died") for text in findings.values()) >= 30:
            break
    return counts, findings


def _signal(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else "an exception out of the parser's reach"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("parsers", nargs="*", metavar="PARSER", help=f"of {', '.join(PARSERS)}; all when none is named")
    options.add_argument("--inputs", type=int, default=100_000, help="of each parser")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.child:
        _child(given.parsers[0], int(given.child[0]), given.inputs, given.seed, Path(given.child[1]))
        return 0
    found = 0
    for name in given.parsers or PARSERS:
        start = time.monotonic()
        counts, findings = run(name, given.inputs, given.seed)
        total, seconds = sum(counts.values()) + len(findings), time.monotonic() - start
        print(f"{name}: {total} inputs, {counts['accepted']} accepted, {counts['refused']} refused, "
              f"{len(findings)} findings, {seconds:.0f} s", flush=True)  # fmt: skip
        kinds: dict[str, list[int]] = {}
        for number, text in findings.items():
            kinds.setdefault(re.sub(r"\d{3,}|'[^']*'", "_", text)[:120], []).append(number)
        for numbers in kinds.values():
            print(f"  {len(numbers)}x, first is number {numbers[0]}: {findings[numbers[0]][:300]}", flush=True)
        found += len(findings)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
