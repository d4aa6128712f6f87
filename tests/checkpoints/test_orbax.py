"""Orbax checkpoints: exact both ways, restored by Orbax itself, read in parts, whole or absent."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layers import layered
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import CONFIG, write_tiny, write_tokenizer

from checkpoints import view
from checkpoints.checkpoint import open_checkpoint
from checkpoints.convert import convert, prepare
from checkpoints.errors import CheckpointError
from checkpoints.load import load, match_tensors, read_shard
from checkpoints.orbax import OrbaxSource
from checkpoints.orbax_writer import OrbaxArrays
from checkpoints.parameters import leaves as declared_leaves
from checkpoints.source import ORBAX
from checkpoints.target import Entry, Piece
from checkpoints.verify import compare
from checkpoints.zarr_shard import Shard
from jaxllm import LLM
from jaxllm.commands.cli import main
from sharding.layout import make_layout

LARGER = {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 512, "num_attention_heads": 16, "num_key_value_heads": 8,
          "head_dim": 32}  # fmt: skip


def leaves(folder: Path, name: str, devices: int) -> list[jax.Array]:
    checkpoint = open_checkpoint(folder)
    layout = make_layout(name, jax.devices()[:devices], checkpoint.config.hidden_size)
    return load(checkpoint.source, checkpoint.rules, checkpoint.config, layout, "float32")


def add_biases(source: Path, dtype: Any = np.float32, tied: bool = False) -> None:
    """Give a tiny checkpoint's projections their biases, all of it the dtype, and take a tied head away."""
    tensors: dict[str, Any] = load_file(source / "model.safetensors")
    rng = np.random.default_rng(1)
    for name in [name for name in tensors if "_proj.weight" in name]:
        tensors[name.replace(".weight", ".bias")] = rng.standard_normal(tensors[name].shape[0])
    if tied:
        del tensors["lm_head.weight"]
    save_file({name: x.astype(dtype) for name, x in tensors.items()}, source / "model.safetensors")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("slice_numbers", [1 << 24, 5000])
def test_there_and_back_is_the_same_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, tied: bool, slice_numbers: int
) -> None:
    monkeypatch.setattr(view, "SLICE", slice_numbers)
    sizes = LARGER | {"vocab_size": 300, "num_attention_heads": 9, "num_key_value_heads": 3}
    source = write_tokenizer(
        write_tiny(tmp_path / "source", **sizes, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    )
    add_biases(source, dtype, tied)
    assert main(["convert", str(source), str(tmp_path / "orbax"), "--to", "orbax"]) == 0
    assert main(["convert", str(tmp_path / "orbax"), str(tmp_path / "back")]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert x.dtype == after[name].dtype and x.tobytes() == after[name].tobytes(), name
    assert "tokenizer.json" in os.listdir(tmp_path / "orbax") and "tokenizer.json" in os.listdir(tmp_path / "back")
    assert sorted(os.listdir(tmp_path)) == ["back", "orbax", "source"]


@pytest.mark.parametrize(("name", "devices"), [("tensor", 1), ("gathered", 2), ("tensor", 3), ("gathered-2x2", 4), ("tensor", 8)])
def test_every_mesh_and_layout_loads_the_same(tmp_path: Path, name: str, devices: int) -> None:
    source = write_tiny(tmp_path / "source", **LARGER, num_hidden_layers=1)
    convert(prepare(open_checkpoint(source), tmp_path / "orbax", to="orbax"))
    for a, b in zip(leaves(source, name, devices), leaves(tmp_path / "orbax", name, devices), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "devices"),
    layered(
        [("tensor", 3), ("tensor", 4), ("tensor", 8), ("gathered", 4), ("gathered-2x2", 4), ("replicated", 4)],
        lambda name, devices: (name, devices) in (("tensor", 3), ("gathered-2x2", 4)),
    ),
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (13, 1)])
def test_what_devices_hold_is_saved_unpadded_and_restored_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, devices: int, heads: int, kv_heads: int
) -> None:
    monkeypatch.setattr(view, "SLICE", 5000)
    sizes = LARGER | {"vocab_size": 301, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "num_hidden_layers": 1}
    source = write_tiny(tmp_path / "source", **sizes, tie_word_embeddings=kv_heads == 1)
    before = load_file(source / "model.safetensors")
    if kv_heads == 1:
        del before["lm_head.weight"]
        save_file(before, source / "model.safetensors")
    llm = LLM(source, layout=name, devices=devices)
    llm.save(tmp_path / "saved")
    for other, n in (("gathered", 1), ("tensor", 2), ("gathered", 3), ("tensor", 8)):
        for a, b in zip(leaves(source, other, n), leaves(tmp_path / "saved", other, n), strict=True):
            np.testing.assert_array_equal(a, b)
    assert main(["convert", str(tmp_path / "saved"), str(tmp_path / "back")]) == 0
    llm.save(tmp_path / "safetensors", to="safetensors")
    for folder in ("back", "safetensors"):
        after = load_file(tmp_path / folder / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(x.tobytes() == after[tensor].tobytes() for tensor, x in before.items())


def test_saving_never_goes_on_from_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(write_tokenizer(write_tiny(tmp_path / "source", vocab_size=258)), devices=2, dtype="bfloat16")
    write = OrbaxArrays.write

    def stop(self: OrbaxArrays, folder: Path, name: str, pieces: Any) -> None:
        write(self, folder, name, pieces)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(OrbaxArrays, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            llm.save(tmp_path / "saved")
    llm._params.result()[0] = -llm._params.result()[0]
    llm.save(tmp_path / "saved")
    compared = list(compare(llm.checkpoint, open_checkpoint(tmp_path / "saved"), rounded=True))
    assert len([one for one in compared if not one.equal]) == 1
    assert "tokenizer.json" in os.listdir(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="--force"):
        llm.save(tmp_path / "saved")
    llm.save(tmp_path / "saved", to="safetensors", force=True)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["tensor", "gathered"])
def test_a_quarter_of_the_devices_reads_about_a_quarter(tmp_path: Path, name: str) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "vocab_size": 2048, "head_dim": 128, "num_hidden_layers": 1}
    source = write_tiny(tmp_path / "source", **LARGER | sizes)  # pieces of 64 kB are not cut
    convert(prepare(open_checkpoint(source), tmp_path / "orbax", to="orbax"))
    checkpoint = open_checkpoint(tmp_path / "orbax")
    layout = make_layout(name, jax.devices()[:4], checkpoint.config.hidden_size)
    mine = layout.mesh.devices.flat[1]
    specs = match_tensors(checkpoint.source, checkpoint.rules, checkpoint.config, layout, "float32")
    by_path = {spec.parameter.path: spec for spec in specs}
    for leaf in declared_leaves(checkpoint.config, layout, "float32"):
        read_shard(leaf, by_path, leaf.sharding.devices_indices_map(leaf.shape)[mine], np.dtype(np.float32))
    whole = sum(info.nbytes for info in checkpoint.source.tensors.values())
    assert whole / 4 <= checkpoint.source.bytes_read < 0.3 * whole


def test_orbax_itself_restores_it_over_devices(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", **LARGER, num_hidden_layers=1)
    convert(prepare(open_checkpoint(source), tmp_path / "orbax", to="orbax"))
    tensors = load_file(source / "model.safetensors")
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "orbax" / ORBAX)
        np.testing.assert_array_equal(tree["embedding"]["weight"], tensors["model.embed_tokens.weight"])
        gate = tree["blocks"]["0"]["mlp"]["gate"]["weight"]
        np.testing.assert_array_equal(gate, tensors["model.layers.0.mlp.gate_proj.weight"].T)
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("model",))
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

        def abstract(x: np.ndarray) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows if x.shape[0] % 4 == 0 else whole)

        restored = checkpointer.restore(tmp_path / "orbax" / ORBAX, jax.tree.map(abstract, tree))
    assert restored["embedding"]["weight"].sharding == rows
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), restored, tree))


@pytest.mark.parametrize(("ocdbt", "zarr3"), [(True, True), (True, False), (False, True), (False, False)])
def test_what_orbax_itself_saved_is_read(tmp_path: Path, ocdbt: bool, zarr3: bool) -> None:
    """Its own chunks and compression, in each of its formats."""
    source = write_tiny(tmp_path / "source")
    convert(prepare(open_checkpoint(source), tmp_path / "orbax", to="orbax"))
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "orbax" / ORBAX)
    shutil.rmtree(tmp_path / "orbax" / ORBAX)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)) as saver:
        saver.save(tmp_path / "orbax" / ORBAX, tree)
    assert all(one.equal for one in compare(open_checkpoint(source), open_checkpoint(tmp_path / "orbax")))


def test_paths_of_earlier_versions_are_known(tmp_path: Path) -> None:
    """A matrix and its bias were `query` and `query_bias`."""
    source = write_tiny(tmp_path / "source", attention_bias=True, mlp_bias=True)
    add_biases(source)
    convert(prepare(open_checkpoint(source), tmp_path / "orbax", to="orbax"))
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "orbax" / ORBAX)
    shutil.rmtree(tmp_path / "orbax" / ORBAX)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax" / ORBAX, _flattened(tree))
    assert all(one.equal for one in compare(open_checkpoint(source), open_checkpoint(tmp_path / "orbax")))


def _flattened(tree: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if not isinstance(value, dict):
            found[name] = value
        elif "weight" in value:
            found |= {name: value["weight"]} | ({f"{name}_bias": value["bias"]} if "bias" in value else {})
        else:
            found[name] = _flattened(value)
    return found


def test_an_interrupted_run_goes_on_and_writes_each_array_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(write_tiny(tmp_path / "source"))
    job = prepare(source, tmp_path / "target", to="orbax")
    written: list[str] = []
    write, stopping = OrbaxArrays.write, True

    def counted(self: OrbaxArrays, folder: Path, name: str, pieces: Any) -> None:
        if stopping and len(written) == 7:
            raise KeyboardInterrupt
        write(self, folder, name, pieces)
        written.append(name)

    monkeypatch.setattr(OrbaxArrays, "write", counted)
    with pytest.raises(KeyboardInterrupt):
        convert(job)
    assert not job.target.exists()
    stopping = False
    convert(job)
    assert sorted(written) == sorted(job.groups)
    assert all(one.equal for one in compare(source, open_checkpoint(job.target)))
    assert main(["convert", str(tmp_path / "source"), str(job.target), "--force"]) == 0  # in the place of what was Orbax's
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    convert(prepare(open_checkpoint(write_tiny(tmp_path / "source", **LARGER)), tmp_path / "orbax", to="orbax"))
    params = tmp_path / "orbax" / ORBAX
    shutil.copytree(tmp_path / "orbax", tmp_path / "copy")
    checkpoint = open_checkpoint(tmp_path / "orbax")
    shard = params / "head.weight" / "c" / "0" / "0"
    whole = shard.read_bytes()
    for broken in (None, b"", whole[:-20], whole[:-8] + b"\xff" * 8, whole[: len(whole) // 2]):
        shard.unlink() if broken is None else shard.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"head\.weight cannot be read"):
            list(compare(checkpoint, checkpoint))
    for file, content in (("head.weight/zarr.json", b"x"), ("_METADATA", b"{}"), ("_METADATA", b"[")):
        shutil.rmtree(tmp_path / "orbax")
        shutil.copytree(tmp_path / "copy", tmp_path / "orbax")
        (params / file).write_bytes(content)
        with pytest.raises(CheckpointError, match="params"):
            open_checkpoint(tmp_path / "orbax")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", r"\.zarray is not valid JSON"),
        ({"shape": [1 << 50]}, r"x has the shape \(1125899906842624,\), which no array can have"),
        ({"shape": [1 << 40]}, r"its arrays would have 4398046511104 bytes, and its files have \d+; convert"),
        ({"chunks": [1 << 40]}, r"x is \(4,\), and its chunks are larger; convert"),
    ],
)
def test_arrays_that_are_not_what_their_files_hold(tmp_path: Path, changes: Any, message: str) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)) as saver:
        saver.save(tmp_path / ORBAX, {"x": np.zeros(4, np.float32)})
    file = tmp_path / ORBAX / "x" / ".zarray"
    file.write_text(changes if isinstance(changes, str) else json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        OrbaxSource(tmp_path)


def test_an_array_without_axes_is_read(tmp_path: Path) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)) as saver:
        saver.save(tmp_path / ORBAX, {"x": np.full((), 3, np.float32)})
    assert OrbaxSource(tmp_path).read("x", ()) == 3


@pytest.mark.parametrize("name", ["../x", "..", "", "\ud800"])
def test_names_of_no_array_are_refused(tmp_path: Path, name: str) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)) as saver:
        saver.save(tmp_path / ORBAX, {"x": np.zeros(4, np.float32)})
    shutil.copytree(tmp_path / ORBAX / "x", tmp_path / "x")
    file = tmp_path / ORBAX / "_METADATA"
    values = json.loads(file.read_text())
    (leaf,) = values["tree_metadata"].values()
    leaf["key_metadata"][0]["key"] = name
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="is no name of an array"):
        OrbaxSource(tmp_path)


def test_chunks_divide_what_layouts_split() -> None:
    def chunks(*shape: int) -> tuple[int, ...]:
        return Shard(Entry("x", shape, np.dtype(ml_dtypes.bfloat16))).chunk

    assert chunks(4096, 11008) == (512, 1376)
    assert chunks(8, 6144, 16384) == (1, 768, 2048) and chunks(128, 2048, 768) == (1, 256, 192)  # an expert's, read alone
    assert chunks(8192, 28672) == (512, 1792) and chunks(256000, 4608) == (2000, 288)  # no more than is read at a time
    assert chunks(32000, 4096) == (4000, 512)
    assert chunks(24, 40) == (24, 40) and chunks(4096) == (4096,)


@given(shape=st.lists(st.integers(1, 40), min_size=1, max_size=3), rows=st.integers(1, 3), data=st.integers(0, 3))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tensorstore_reads_any_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: list[int], rows: int, data: int
) -> None:
    """Also where chunks do not divide, and pieces are of several, in any order."""
    monkeypatch.setattr("checkpoints.zarr_shard._SMALL", 1 << data)
    x = np.random.default_rng(0).standard_normal(shape).astype(ml_dtypes.bfloat16)
    shard = Shard(Entry("x", x.shape, x.dtype))
    folder = tmp_path / "-".join(map(str, (*shape, rows, data)))
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}, "metadata": shard.metadata()}
    array = ts.open(spec, create=True, delete_existing=True).result()
    (folder / shard.name).parent.mkdir(parents=True, exist_ok=True)
    boxes = [chunk * rows for chunk in shard.chunk]
    corners = itertools.product(*(range(0, size, box) for size, box in zip(shape, boxes, strict=True)))
    parts = [(at, tuple(slice(first, first + box) for first, box in zip(at, boxes, strict=True))) for at in corners]
    shard.write(folder / shard.name, (Piece(at, x[part]) for at, part in reversed(parts)))
    assert (folder / shard.name).stat().st_size == shard.nbytes
    np.testing.assert_array_equal(array.read().result(), x)


def test_the_configs_travel(tmp_path: Path) -> None:
    convert(prepare(open_checkpoint(write_tiny(tmp_path / "source")), tmp_path / "orbax", to="orbax", dtype="bfloat16"))
    assert json.loads((tmp_path / "orbax" / "config.json").read_text()) == CONFIG | {"dtype": "bfloat16"}


def test_the_command_line_leaves_accelerators_alone(tmp_path: Path) -> None:
    """A GPU that serves a model has no memory left; here there is none at all, and jax is told to start with it."""
    write_tiny(tmp_path / "tiny")
    command = [sys.executable, "-m", "jaxllm", "convert", tmp_path / "tiny", tmp_path / "orbax", "--to", "orbax"]
    done = subprocess.run(list(map(str, command)), env=os.environ | {"JAX_PLATFORMS": "cuda"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "orbax" / ORBAX).is_dir()
