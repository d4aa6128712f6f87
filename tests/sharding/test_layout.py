"""Layouts: names, mesh shapes, and where each logical axis goes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from sharding.layout import NAMES, Layout, make_layout, parse

pytestmark = pytest.mark.fast

HEADS, OUT, UP, DOWN, TABLE = (
    ("embed", "heads", None),
    ("heads", None, "embed"),
    ("embed", "ffn"),
    ("ffn", "embed"),
    ("vocab", "embed"),
)
SHAPES = {HEADS: (16, 12, 8), OUT: (12, 8, 16), UP: (16, 20), DOWN: (20, 16), TABLE: (40, 16)}
USED = [P(None, "model", None), P("model", None, None), P(None, "model"), P("model", None), P("model", None)]


def layout(name: str, devices: int, embed: int = 16) -> Layout:
    return make_layout(name, jax.devices()[:devices], embed)


@pytest.mark.parametrize(
    ("name", "devices", "expected"),
    [
        ("tensor", 1, (1, 1, False)),
        ("tensor", 4, (1, 4, False)),
        ("replicated", 3, (3, 1, False)),
        ("gathered", 8, (8, 1, True)),
        ("replicated-2x4", 8, (2, 4, False)),
        ("gathered-3x2", 6, (3, 2, True)),
        ("gathered-1x1", 1, (1, 1, True)),
        ("replicated-12x10", 120, (12, 10, False)),
    ],
)
def test_a_name_is_a_mesh_shape(name: str, devices: int, expected: tuple[int, int, bool]) -> None:
    assert parse(name, devices) == expected


@pytest.mark.parametrize(
    "name",
    ["", "Tensor", "auto", "tensor-2x2", "gathered-", "gathered-2", "replicated-x2", "gathered-2x2x1", "gathered-0x4"],
)
def test_an_unknown_name_is_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="unknown layout") as caught:
        parse(name, 4)
    assert repr(name) in str(caught.value) and NAMES in str(caught.value)
    for known in ("tensor", "replicated", "gathered", "replicated-AxB", "gathered-AxB"):
        assert known in NAMES.split(" (")[0].split(", ")


@pytest.mark.parametrize(("name", "devices"), [("replicated-2x2", 3), ("gathered-2x4", 4)])
def test_a_mesh_that_does_not_hold_the_devices_says_how_many_it_takes(name: str, devices: int) -> None:
    data, model = map(int, name.split("-")[1].split("x"))
    with pytest.raises(ValueError, match=rf"{name}.* takes {data * model} devices, not {devices}"):
        parse(name, devices)


def test_the_mesh_is_the_devices_in_order() -> None:
    mesh = layout("replicated-2x3", 6).mesh
    assert mesh.axis_names == ("data", "model")
    assert mesh.devices.tolist() == [jax.devices()[:3], jax.devices()[3:6]]


@pytest.mark.parametrize("name", ["tensor", "replicated-2x2", "gathered", "gathered-2x2"])
def test_weights_are_split_over_model(name: str) -> None:
    assert [layout(name, 4).spec(axes) for axes in SHAPES] == USED
    if not name.startswith("gathered"):
        assert [layout(name, 4).stored_spec(*item) for item in SHAPES.items()] == USED


def test_gathered_weights_are_stored_split_over_data_by_the_first_that_divides() -> None:
    both = ("model", "data")
    specs = [layout("gathered-2x2", 4).stored_spec(*item) for item in SHAPES.items()]
    assert specs == [P("data", "model", None), P(both, None, None), P("data", "model"), P(both, None), P(both, None)]
    where = layout("gathered", 8)  # 8 divides neither 12 heads nor 20 of the ffn
    assert where.stored_spec(OUT, SHAPES[OUT]) == P("model", None, "data")
    assert where.stored_spec(DOWN, SHAPES[DOWN]) == P("model", "data")
    assert where.stored_spec(TABLE, SHAPES[TABLE]) == P(both, None)


def test_gathered_weights_are_split_by_others_where_embed_does_not_divide() -> None:
    odd, both = layout("gathered-2x2", 4, embed=15), ("model", "data")
    specs = [odd.stored_spec(HEADS, (15, 12, 8)), odd.stored_spec(UP, (15, 20)), odd.stored_spec(DOWN, (20, 15))]
    assert specs == [P(None, both, None), P(None, both), P(both, None)]


@pytest.mark.parametrize("name", ["tensor", "replicated", "gathered", "gathered-2x2"])
def test_activations_and_vectors(name: str) -> None:
    where = layout(name, 4)
    assert where.spec(("rows", None, None)) == P("data", None, None)
    assert where.spec(("rows", "kv_heads", None, None)) == P("data", "model", None, None)
    assert where.spec((None,)) == where.stored_spec((None,), (16,)) == P(None)
    assert where.spec(()) == P()


@pytest.mark.parametrize(
    ("name", "devices", "embed", "divisor"),
    [
        ("tensor", 4, 15, 4),
        ("replicated", 4, 15, 1),
        ("replicated-2x2", 4, 15, 2),
        ("gathered", 4, 16, 1),
        ("gathered", 4, 18, 4),
        ("gathered-2x4", 8, 18, 4),
        ("gathered-2x4", 8, 15, 8),
    ],
)
def test_what_sizes_must_divide_by(name: str, devices: int, embed: int, divisor: int) -> None:
    assert layout(name, devices, embed).divisor == divisor


def test_sharding_places_an_array_and_constrain_moves_it() -> None:
    where = layout("gathered", 4)
    axes = ("ffn", "embed")
    stored = jax.device_put(jnp.arange(128.0).reshape(8, 16), where.stored(axes, (8, 16)))
    assert {shard.data.shape for shard in stored.addressable_shards} == {(2, 16)}
    whole = jax.jit(lambda x: where.constrain(x, *axes))(stored)
    assert {shard.data.shape for shard in whole.addressable_shards} == {(8, 16)}
    assert jnp.array_equal(stored, whole)
