"""Patterns read in both directions, and a slice of a parameter is a slice of its tensor."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.families import FAMILIES, GGUF_FAMILIES
from checkpoints.names import Rule, Rules, axis_sizes
from checkpoints.pattern import Pattern, TensorSlice
from jaxllm.planning.presets import PRESETS

pytestmark = pytest.mark.fast


@st.composite
def patterns(draw: st.DrawFn) -> tuple[Pattern, dict[str, int]]:
    """A pattern over one to four axes, and their sizes."""
    axes = list("abcd"[: draw(st.integers(1, 4))])
    sizes = {axis: draw(st.integers(1, 4)) for axis in axes}
    sides = [_grouped(draw(st.permutations(axes)), draw(st.sets(st.integers(0, 3)))) for _ in range(2)]
    return Pattern(" -> ".join(sides)), sizes


def _grouped(axes: list[str], merged: set[int]) -> str:
    """The axes in order, those at `merged` joined to the one before."""
    groups: list[list[str]] = []
    for i, axis in enumerate(axes):
        if groups and i in merged:
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups)


def _numbered(pattern: Pattern, sizes: dict[str, int]) -> np.ndarray:
    shape = pattern.tensor_shape(sizes)
    return np.arange(math.prod(shape)).reshape(shape)


def whole(pattern: Pattern, tensor: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
    return pattern.read(tensor.__getitem__, {}, sizes)


@given(patterns())
def test_what_is_read_joins_again(case: tuple[Pattern, dict[str, int]]) -> None:
    pattern, sizes = case
    tensor = _numbered(pattern, sizes)
    param = whole(pattern, tensor, sizes)
    assert param.shape == pattern.param_shape(sizes)
    np.testing.assert_array_equal(pattern.join([pattern.split(param, sizes)]), tensor)


@given(patterns(), st.data())
def test_every_element_keeps_its_coordinates(case: tuple[Pattern, dict[str, int]], data: st.DataObject) -> None:
    pattern, sizes = case
    at = {axis: data.draw(st.integers(0, size - 1)) for axis, size in sizes.items()}

    def where(dims: tuple[tuple[str, ...], ...]) -> tuple[int, ...]:
        return tuple(int(np.ravel_multi_index([at[a] for a in g], [sizes[a] for a in g])) for g in dims)

    tensor = _numbered(pattern, sizes)
    assert whole(pattern, tensor, sizes)[where(pattern.param_dims)] == tensor[where(pattern.tensor_dims)]


@given(patterns(), st.data())
def test_a_part_of_a_parameter_is_read_as_a_box(case: tuple[Pattern, dict[str, int]], data: st.DataObject) -> None:
    """No more than the part is read where its axes lead dimensions of the tensor, what contains it elsewhere."""
    pattern, sizes = case
    alone = [group[0] for group in pattern.param_dims if len(group) == 1]
    bounds = {}
    for axis in alone:
        first = data.draw(st.integers(0, sizes[axis] - 1))
        bounds[axis] = (first, data.draw(st.integers(first + 1, sizes[axis])))
    tensor, read = _numbered(pattern, sizes), 0

    def box(slices: tuple[slice, ...]) -> np.ndarray:
        nonlocal read
        read = tensor[slices].size
        return tensor[slices]

    part = pattern.read(box, bounds, sizes)
    kept = tuple(slice(*bounds[group[0]]) if group[0] in alone else slice(None) for group in pattern.param_dims)
    np.testing.assert_array_equal(part, whole(pattern, tensor, sizes)[kept])
    assert read == part.size or not {*alone} <= {*pattern.leading()}


SIZES = {"n": 3, "k": 2, "h": 4, "d": 5, "a": 7, "t": 3, "e": 2, "f": 6}
TOGETHER = [
    [("(a h) d -> d (n h)", TensorSlice("a", (), "n")), ("(a h) d -> d (k h)", TensorSlice("a", ("n",), "k")),
     ("(a h) d -> d (k h)", TensorSlice("a", ("n", "k"), "k"))],
    [("(n t h) d -> d (n h)", TensorSlice("t", i)) for i in range(3)],
    [("d (t n h) -> d (n h)", TensorSlice("t", i)) for i in range(3)],
    [("(t n h) -> (n h)", TensorSlice("t", i)) for i in range(3)],
]  # fmt: skip


@pytest.mark.parametrize("slices", TOGETHER, ids=lambda slices: slices[0][0])
def test_parameters_of_one_tensor_are_told_apart_and_join_again(slices: list[tuple[str, TensorSlice]]) -> None:
    patterns = [Pattern(text, own) for text, own in slices]
    tensor = _numbered(patterns[0], SIZES)
    params = [whole(pattern, tensor, SIZES) for pattern in patterns]
    assert sorted(np.concatenate([param.ravel() for param in params])) == list(range(tensor.size))
    joined = patterns[0].join([pattern.split(param, SIZES) for pattern, param in zip(patterns, params, strict=True)])
    np.testing.assert_array_equal(joined, tensor)
    for pattern, param, (text, own) in zip(patterns, params, slices, strict=True):
        first = param.shape[-1] // 4 - 1  # the last head
        bounds = {own.size or "n": (first, first + 1)}
        np.testing.assert_array_equal(pattern.read(tensor.__getitem__, bounds, SIZES), param[..., -4:], err_msg=text)


@pytest.mark.parametrize("text", ["a b", "a -> b", "a b -> a", "a a -> a a", "(a b -> a b", "a ->", "a -> (a)) b", "a+b -> a"])
def test_malformed_patterns_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        Pattern(text)


def test_rules_expand_over_the_layers() -> None:
    two = [(("x.0.w",), "blocks.0.w"), (("x.1.w",), "blocks.1.w")]
    assert Rule.of("x.{i}.w", "d -> d", "blocks.{i}.w").expand(2) == two
    assert Rule.of("norm", "d -> d", "norm.scale").expand(2) == [(("norm",), "norm.scale")]
    assert Rule.of("x.{i}.{e}", "d -> e d", "blocks.{i}.w").expand(1, 2) == [(("x.0.0", "x.0.1"), "blocks.0.w")]


def test_ignored_tensors_match_whole_names() -> None:
    rules = Rules((), (r"x\.\d+\.inv_freq",))
    assert rules.is_ignored("x.11.inv_freq")
    assert not rules.is_ignored("x.1.inv_freq.y") and not rules.is_ignored("xy1.inv_freq")


@pytest.mark.parametrize(
    "rules", [*(family.rules for family in FAMILIES.values()), *(family.rules for family in GGUF_FAMILIES.values())]
)
def test_families_name_each_tensor_and_parameter_once(rules: Rules) -> None:
    tensors, params = [(r.tensor, r.pattern.tensor_slice) for r in rules.table], [r.param for r in rules.table]
    assert len(set(tensors)) == len(tensors) and len(set(params)) == len(params)
    for rule in rules.table:
        assert ("{i}" in rule.tensor) == ("{i}" in rule.param)
        assert {*itertools.chain(*rule.pattern.tensor_dims)} <= {*axis_sizes(PRESETS["smollm2-135m"])}
