"""Weights in memory become the parameters that a file of them gives, to the bit, whoever holds them and under either names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CASES, records, write
from flax import nnx
from safetensors.numpy import load_file
from tiny_checkpoint import CONFIG, write_tiny

from checkpoints.checkpoint import Checkpoint, open_checkpoint
from checkpoints.errors import CheckpointError
from checkpoints.load import load, match_tensors
from checkpoints.trees import Placement, TreeSource, of_tree
from sharding.layout import make_layout

LAYOUTS = [("tensor", 1), ("tensor", 4), ("gathered", 3), ("gathered-2x2", 4)]


def placement(checkpoint: Checkpoint, layout: str, devices: int, dtype: str = "float32") -> Placement:
    laid_out = make_layout(layout, jax.devices()[:devices], checkpoint.config.hidden_size)
    return Placement(checkpoint.family, checkpoint.config, laid_out, dtype)


def check(checkpoint: Checkpoint, place: Placement, tree: Any, **options: Any) -> list[jax.Array]:
    expected = load(checkpoint.source, checkpoint.rules, checkpoint.config, place.layout, place.dtype)
    found = place.place(place.match(TreeSource(tree)), **options)
    for a, b in zip(found, expected, strict=True):
        assert a.sharding == b.sharding and a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    return found


def nested(tensors: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in tensors.items():
        *way, last = name.split(".")
        at = tree
        for step in way:
            at = at.setdefault(step, {})
        at[last] = array
    return tree


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full if i % 3 else ()) for i, name in enumerate(CASES)])
def test_every_familys_arrays_on_devices(tmp_path: Path, name: str) -> None:
    record = records()[name]
    checkpoint = open_checkpoint(write(tmp_path, record.config, record.shapes))
    tensors = {n: checkpoint.source.read(n, tuple(map(slice, i.shape))) for n, i in checkpoint.source.tensors.items()}
    check(checkpoint, placement(checkpoint, "tensor", 3), jax.tree.map(jnp.asarray, tensors))


@pytest.mark.parametrize(("layout", "devices"), LAYOUTS)
@pytest.mark.parametrize("where", ["host", "one device", "same devices", "other devices", "mixed"])
def test_wherever_they_are(tmp_path: Path, layout: str, devices: int, where: str) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path))
    tensors: dict[str, Any] = load_file(tmp_path / "model.safetensors")
    if where == "one device":
        tensors = {name: jax.device_put(x, jax.devices()[7]) for name, x in tensors.items()}
    elif where != "host":
        picked = jax.devices()[:devices] if where == "same devices" else jax.devices()[8 - devices :]
        spread = jax.sharding.NamedSharding(jax.make_mesh((devices,), ("x",), devices=picked), jax.sharding.PartitionSpec())
        tensors = {n: x if where == "mixed" and "q_proj" in n else jax.device_put(x, spread) for n, x in tensors.items()}
    check(checkpoint, placement(checkpoint, layout, devices), nested(tensors))


def test_the_decoders_own_names_and_nnx(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path))
    place = placement(checkpoint, "tensor", 4)
    specs = match_tensors(checkpoint.source, checkpoint.rules, checkpoint.config, place.layout, "float32")
    tensors = {one.parameter.path: jnp.asarray(one.mapping.read(checkpoint.source, {}, one.sizes)) for one in specs}
    assert "blocks.1.attention.query.weight" in tensors
    check(checkpoint, place, tensors)
    check(checkpoint, place, nnx.State(jax.tree.map(nnx.Param, nested(tensors))))


def test_of_another_dtype(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path))
    tensors = {name: jnp.asarray(x) for name, x in load_file(tmp_path / "model.safetensors").items()}
    check(checkpoint, placement(checkpoint, "tensor", 2, "bfloat16"), tensors)


@pytest.mark.parametrize("donate", [False, True])
def test_a_tree_is_its_owners_unless_it_is_donated(tmp_path: Path, donate: bool) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path))
    tensors = {name: jax.device_put(x, jax.devices()[0]) for name, x in load_file(tmp_path / "model.safetensors").items()}
    found = check(checkpoint, placement(checkpoint, "tensor", 1), tensors, donate=donate)
    assert {x.is_deleted() for x in tensors.values()} == {donate}
    before = [np.array(x) for x in found]
    for x in tensors.values():
        if not x.is_deleted():
            x.delete()  # as a trainer's donating step does
    for x, y in zip(found, before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_what_was_compiled_serves_the_next_tree(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path, num_hidden_layers=4))
    tensors = {name: jnp.asarray(x) for name, x in load_file(tmp_path / "model.safetensors").items()}
    place = placement(checkpoint, "tensor", 2)
    check(checkpoint, place, tensors)
    made = len(place._makers)
    check(checkpoint, place, tensors)
    assert len(place._makers) == made < 10 and all(one._cache_size() == 1 for one in place._makers.values())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.pop("lm_head.weight"), "lacks tensors lm_head.weight; give all of them"),
        (lambda tree: tree.update(more=np.zeros(3, np.float32)), "no use for: more; leave them out"),
        (lambda tree: tree.update({"model.norm.weight": np.zeros(3, np.float32)}), r"model.norm.weight is \(3,\), not \(24,\)"),
        (lambda tree: tree.update({"model.norm.weight": np.zeros(24, np.int32)}), "model.norm.weight is int32; give arrays of"),
        (lambda tree: tree.update({"model.norm.weight": None}), "model.norm.weight is NoneType; give arrays of"),
        (lambda tree: tree.update(model={"norm": {"weight": np.zeros(24, np.float32)}}), "has model.norm.weight twice"),
    ],
)
def test_a_tree_that_is_not_the_models_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path))
    tree: dict[str, Any] = dict(load_file(tmp_path / "model.safetensors"))
    change(tree)
    with pytest.raises(CheckpointError, match=message):
        placement(checkpoint, "tensor", 1).match(TreeSource(tree))


def test_deleted_arrays_are_refused() -> None:
    array = jnp.zeros(3)
    array.delete()
    with pytest.raises(CheckpointError, match="x is deleted; give arrays that are here"):
        TreeSource({"x": array})


def test_a_config_by_its_values_or_its_folder(tmp_path: Path) -> None:
    tensors = load_file(write_tiny(tmp_path) / "model.safetensors")
    assert of_tree(CONFIG, tensors).config == of_tree(tmp_path, tensors).config == open_checkpoint(tmp_path).config
    with pytest.raises(CheckpointError, match=r"the config.json given: `hidden_size` is missing"):
        of_tree({name: value for name, value in CONFIG.items() if name != "hidden_size"}, tensors)
    with pytest.raises(CheckpointError, match=r"has no config.json; give a folder with one, or its values"):
        of_tree(tmp_path / "elsewhere", tensors)
